"""Where the person is in a picture: a soft matte for every crop, steady in time, and the parts of the face where BiSeNet is there.

Knows nothing of heads in space.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, UInt8
from PIL import Image
from scipy.ndimage import label, uniform_filter

from talk3d.io.face_models import registry_model
from talk3d.perception.bisenet import load_bisenet
from talk3d.perception.detection import Network

Region = Literal["face", "hair", "mouth", "eyes", "torso", "person"]
REGIONS: Mapping[Region, tuple[int, ...]] = {
    "face": (*range(1, 14),),
    "hair": (17,),
    "mouth": (11, 12, 13),
    "eyes": (4, 5),
    "torso": (14, 15, 16),
    "person": (*range(1, 19),),
}
"""Which parts make up a region. BiSeNet's parts: 0 background, 1 skin, 2 3 brows, 4 5 eyes, 6 glasses, 7 8 ears, 9 earring, 10 nose, 11 inside of the
mouth, 12 13 upper and lower lip, 14 neck, 15 necklace, 16 cloth, 17 hair, 18 hat."""
PARSED_PX = 512
"""Side of the pictures that BiSeNet learnt from."""


@runtime_checkable
class FaceParser(Protocol):
    """Tells the parts of a face in single pictures."""

    source: str
    """What tells them, to be recorded with them."""

    def __call__(self, picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
        """Return the number of the part that each pixel shows, see `REGIONS`."""
        ...


class BiSeNetParser:
    """BiSeNet on a picture brought to the size that it learnt from; where the picture is smaller, a pixel goes to the part with most of it."""

    def __init__(self, path: Path | None = None, device: str = "cpu") -> None:
        """Load it; `path` in place of the file in the cache folder.

        Raises:
            WeightsError: the weights are not there, or do not fit.
        """
        self.network, self.device = load_bisenet(path, device), device
        self.source = self.network.source

    @torch.no_grad()
    def __call__(self, picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
        """Return the number of the part that each pixel shows."""
        whole = torch.from_numpy(np.ascontiguousarray(picture)).to(self.device).permute(2, 0, 1)[None].float() / 255  # 1 3 h w
        large = F.interpolate(whole, (PARSED_PX, PARSED_PX), mode="bilinear", align_corners=False, antialias=True)
        shares = F.interpolate(self.network(large).softmax(1), picture.shape[:2], mode="bilinear", align_corners=False, antialias=True)
        return shares[0].argmax(0).to(torch.uint8).cpu().numpy()


def region_matte(parts: UInt8[np.ndarray, "h w"], region: Region, radius_px: int = 1) -> Float32[np.ndarray, "h w"]:
    """How much each pixel belongs to a region, 0 … 1, with edges of twice the radius; specks of less than 1 % of the region are left out."""
    inside = np.isin(parts, REGIONS[region])
    pieces, count = label(inside)  # pyright: ignore[reportGeneralTypeIssues]
    if count > 1:
        sizes = np.bincount(pieces.ravel(), minlength=count + 1)
        inside &= (sizes >= 0.01 * inside.sum())[pieces]
    return uniform_filter(inside.astype(np.float32), 2 * radius_px + 1, mode="nearest")


@runtime_checkable
class Matting(Protocol):
    """Cuts a person out of single pictures."""

    source: str
    """What makes the mattes, to be recorded with them."""

    def __call__(self, picture: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w"]:
        """Opacity of the person, 0 background … 1 person."""
        ...


class SelfieMatting:
    """MediaPipe's selfie segmentation, its edges drawn to those of the picture by a guided filter."""

    def __init__(self, folder: Path | None = None, radius_px: int = 4, smoothness: float = 1e-3) -> None:
        """Read the network from the cache folder; fetch it from the package registry if it is not there.

        Args:
            folder: to look in instead of the user's cache folder.
            radius_px: of the windows of the guided filter.
            smoothness: variance of brightness below which a window counts as flat.

        Raises:
            WeightsError: the network cannot be had.
        """
        self.source = "selfie segmentation of mediapipe 0.10.21"
        self._network = Network(registry_model("selfie_segmentation.tflite", folder))
        self._radius_px, self._smoothness = radius_px, smoothness

    def __call__(self, picture: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w"]:
        """Opacity of the person, 0 background … 1 person."""
        height, width = picture.shape[:2]
        side = self._network.side_px
        small = picture if (height, width) == (side, side) else np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BOX))
        matte = self._network(np.ascontiguousarray(small, dtype=np.float32) / 255)[0][..., 0]
        if (height, width) != (side, side):
            matte = np.asarray(Image.fromarray(matte).resize((width, height), Image.Resampling.BILINEAR))
        guide = picture.astype(np.float32) @ np.full(3, 1 / 765, np.float32)
        refined = guided_filter(guide, matte, self._radius_px, self._smoothness)
        return np.clip((refined - 0.05) / 0.9, 0, 1).astype(np.float32)


def guided_filter(
    guide: Float32[np.ndarray, "h w"], values: Float32[np.ndarray, "h w"], radius_px: int, smoothness: float
) -> Float32[np.ndarray, "h w"]:
    """`values` smoothed so that what is left of their edges lies on the edges of `guide`.

    Args:
        guide: brightness in [0, 1].
        values: what to smooth.
        radius_px: half the windows' width.
        smoothness: variance of the guide below which a window counts as flat.

    Reference: He, Sun and Tang, Guided image filtering, PAMI 2013, equations 5 and 6.
    """

    def mean(array: np.ndarray) -> np.ndarray:
        return uniform_filter(array, 2 * radius_px + 1, mode="nearest")

    guide_mean, values_mean = mean(guide), mean(values)
    variance = mean(guide * guide) - guide_mean**2
    slope = (mean(guide * values) - guide_mean * values_mean) / (variance + smoothness)
    offset = values_mean - slope * guide_mean
    return (mean(slope) * guide + mean(offset)).astype(np.float32)


def steady_mattes(mattes: Iterable[Float32[np.ndarray, "h w"]]) -> Iterator[UInt8[np.ndarray, "h w"]]:
    """Median of each matte with its two neighbours in time, as 0..255; the ends stand in for what lies beyond them."""
    window: deque[np.ndarray] = deque(maxlen=3)
    for matte in mattes:
        if not window:
            window.append(matte)
        window.append(matte)
        if len(window) == 3:
            yield _median(window)
    if window:
        window.append(window[-1])
        yield _median(window)


def _median(window: deque[np.ndarray]) -> np.ndarray:
    """Median of three arrays as 0..255."""
    first, second, third = window
    middle = np.maximum(np.minimum(first, second), np.minimum(np.maximum(first, second), third))
    return np.round(middle * 255).astype(np.uint8)
