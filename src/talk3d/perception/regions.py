"""What each pixel of a crop shows (face, hair, eyes, mouth, neck, torso), from the matte, the face points and the colours of skin, hair and clothes.

Needs no network beyond those of tracking. Outlines come from the points; where the matte goes on beyond the face, colour tells skin from hair.
"""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, uniform_filter

from talk3d.perception.landmarks import LEFT_EYE, RIGHT_EYE
from talk3d.types.face import REGIONS

FACE_OVAL = (
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377),
    *(152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
)
"""Outline of the face from the top of the forehead, over the subject's left, to the chin and back."""
OUTER_LIPS = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146)
"""Outline of the mouth."""
EYE_CONTOURS = ((*RIGHT_EYE[:9], *RIGHT_EYE[:8:-1]), (*LEFT_EYE[:9], *LEFT_EYE[:8:-1]))
"""Outlines of the lids: lower lid from the outer corner, back along the upper one."""
TOP, CHIN = 10, 152


class RegionLabeller:
    """Labels the crops of one clip in order; the colours of skin, hair and clothes are remembered, so that labels are steady."""

    def __init__(self, memory: float = 0.9) -> None:
        """Start without colours; `memory` is the share of the remembered ones kept at each frame."""
        self.source = "face points and colours"
        self._memory = memory
        self._skin: np.ndarray | None = None
        self._hair: np.ndarray | None = None
        self._cloth: np.ndarray | None = None

    def __call__(
        self, picture: UInt8[np.ndarray, "h w 3"], matte: UInt8[np.ndarray, "h w"], landmarks: Float32[np.ndarray, "n 2"]
    ) -> UInt8[np.ndarray, "h w"]:
        """Number in `REGIONS` for each pixel.

        Args:
            picture: the crop.
            matte: of the person in it.
            landmarks: in px of the crop.
        """
        shape = matte.shape
        oval, mouth = _polygon(landmarks, FACE_OVAL, shape), _polygon(landmarks, OUTER_LIPS, shape)
        eyes = _polygon(landmarks, EYE_CONTOURS[0], shape) | _polygon(landmarks, EYE_CONTOURS[1], shape)
        height = _height(landmarks, shape)
        person = matte > 127
        colour = np.stack([uniform_filter(picture[..., channel].astype(np.float32), 3, mode="nearest") for channel in range(3)], -1)
        self._skin = self._learn(self._skin, colour[oval & ~mouth & ~eyes & (height > 0.25) & (height < 0.8)])
        self._hair = self._learn(self._hair, colour[person & ~oval & (height > 1.12)])
        lowest = np.arange(shape[0])[:, None] >= 0.94 * shape[0]
        self._cloth = self._learn(self._cloth, colour[person & lowest & (height < -0.15)])
        skin_like = self._like_skin(colour, self._hair)
        bare = self._like_skin(colour, self._cloth) & (height > -0.6)
        labels = np.where(height > 0.02, np.where(skin_like, 1, 2), np.where(bare, 5, 6)).astype(np.uint8)
        labels[oval] = 1
        labels[oval & (height > 0.85) & ~skin_like] = REGIONS.index("hair")
        labels[eyes] = REGIONS.index("eyes")
        labels[mouth] = REGIONS.index("mouth")
        labels[~person] = 0
        return labels

    def _like_skin(self, colour: np.ndarray, other: np.ndarray | None) -> np.ndarray:
        """Pixels that look more like skin than like something else; all where a colour is unknown."""
        if self._skin is None or other is None:
            return np.ones(colour.shape[:2], bool)
        return uniform_filter(_surprise(colour, other) - _surprise(colour, self._skin), 5, mode="nearest") > 0

    def _learn(self, known: np.ndarray | None, pixels: np.ndarray) -> np.ndarray | None:
        """Median and spread of a colour, mixed with what was known; few pixels teach nothing."""
        if len(pixels) < 50:
            return known
        middle = np.median(pixels, 0)
        seen = np.stack([middle, 1.48 * np.median(np.abs(pixels - middle), 0) + 8])
        return seen if known is None else self._memory * known + (1 - self._memory) * seen


def soft_region(
    labels: UInt8[np.ndarray, "h w"], matte: UInt8[np.ndarray, "h w"], *names: str, softness_px: float = 1.5
) -> Float32[np.ndarray, "h w"]:
    """Opacity of some regions together, 0 … 1; its edge is the matte's where the person ends, and blurred where another region begins.

    Args:
        labels: of one frame.
        matte: of the person in it.
        names: out of `REGIONS`.
        softness_px: of the blur.
    """
    chosen = np.isin(labels, [REGIONS.index(name) for name in names]).astype(np.float32)
    person = (labels > 0).astype(np.float32)
    inside = gaussian_filter(chosen, softness_px) / np.maximum(gaussian_filter(person, softness_px), 1e-3)
    return (np.clip(inside, 0, 1) * matte.astype(np.float32) / 255).astype(np.float32)


def _polygon(landmarks: np.ndarray, outline: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Pixels inside an outline of face points."""
    canvas = Image.new("1", (shape[1], shape[0]))
    ImageDraw.Draw(canvas).polygon([(float(x) - 0.5, float(y) - 0.5) for x, y in landmarks[list(outline)]], fill=1)
    return np.asarray(canvas)


def _height(landmarks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Height of each pixel along the face: 0 at the chin, 1 at the top of the forehead."""
    up = landmarks[TOP] - landmarks[CHIN]
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    return ((columns - landmarks[CHIN, 0]) * up[0] + (rows - landmarks[CHIN, 1]) * up[1]) / max(float(up @ up), 1e-6)


def _surprise(colour: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Squared distance from a colour in units of its spread, with the spread's own cost."""
    return (((colour - known[0]) / known[1]) ** 2).sum(-1) + 2 * float(np.log(known[1]).sum())
