"""Where the person is in a picture: a soft matte for every crop, steady in time. Knows nothing of heads in space."""

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from scipy.ndimage import uniform_filter

from talk3d.io.face_models import registry_model
from talk3d.perception.detection import Network


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
        guide = picture.astype(np.float32).mean(-1) / 255
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
