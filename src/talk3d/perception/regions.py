"""What each pixel of a crop shows (face, hair, eyes, mouth, neck, torso), from the matte, the face points and the colours of skin, hair and clothes.

Needs no network beyond those of tracking. Outlines come from the points; where the matte goes on beyond the face, colour tells skin from hair.
"""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw
from scipy.ndimage import uniform_filter

from talk3d.perception.landmarks import LEFT_EYE, RIGHT_EYE

FACE_OVAL = (
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377),
    *(152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
)
"""Outline of the face from the top of the forehead, over the subject's left, to the chin and back."""
OUTER_LIPS = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146)
"""Outline of the mouth."""
EYE_CONTOURS = ((*RIGHT_EYE[:9], *RIGHT_EYE[:8:-1]), (*LEFT_EYE[:9], *LEFT_EYE[:8:-1]))
"""Outlines of the lids: lower lid from the outer corner, back along the upper one."""
INNER_OUTLINE = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 324, 318, 402, 317, 14, 87, 178, 88, 95)
"""Outline of what is seen between the lips."""
TOP, CHIN = 10, 152
SKIN, LEFT, RIGHT, INSIDE, UPPER_LIP, LOWER_LIP, NECK, CLOTH, HAIR = 1, 4, 5, 11, 12, 13, 14, 16, 17
"""Numbers of `parsing.REGIONS` for skin (ears, brows and nose with it), the subject's eyes, mouth, lips, neck, clothes and hair."""


class OutlineParser:
    """Tells the parts in the crops of one clip in order; the colours of skin, hair and clothes are remembered, so that parts are steady."""

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
        """Return the number of the part that each pixel shows, as `parsing.REGIONS` has them.

        Args:
            picture: the crop.
            matte: of the person in it.
            landmarks: in px of the crop.
        """
        shape = matte.shape
        oval, mouth = _polygon(landmarks, FACE_OVAL, shape), _polygon(landmarks, OUTER_LIPS, shape)
        right, left = (_polygon(landmarks, contour, shape) for contour in EYE_CONTOURS)
        eyes = right | left
        height = _height(np.moveaxis(np.mgrid[: shape[0], : shape[1]][::-1] + 0.5, 0, -1), landmarks)
        person = matte > 127
        colour = np.stack([uniform_filter(picture[..., channel].astype(np.float32), 3, mode="nearest") for channel in range(3)])
        self._skin = self._learn(self._skin, colour[:, oval & ~mouth & ~eyes & (height > 0.25) & (height < 0.8)])
        self._hair = self._learn(self._hair, colour[:, person & ~oval & (height > 1.12)])
        shoulders = np.abs(np.arange(shape[1]) + 0.5 - landmarks[CHIN, 0]) > 0.55 * np.ptp(landmarks[:468, 0])  # beside the neck
        self._cloth = self._learn(self._cloth, colour[:, person & shoulders & (height < -0.05)])
        skin_like = self._like_skin(colour, self._hair)
        bare = self._like_skin(colour, self._cloth) & (height > -0.6)
        parts = np.where(height > 0.02, np.where(skin_like, SKIN, HAIR), np.where(bare, NECK, CLOTH)).astype(np.uint8)
        parts[oval] = SKIN
        parts[oval & (height > 0.85) & ~skin_like] = HAIR
        parts[right], parts[left] = RIGHT, LEFT
        inside = _polygon(landmarks, INNER_OUTLINE, shape)
        above = height > _height(landmarks[[13, 14]], landmarks).mean()
        parts[mouth & above], parts[mouth & ~above], parts[inside & mouth] = UPPER_LIP, LOWER_LIP, INSIDE
        parts[~person] = 0
        return parts

    def _like_skin(self, colour: np.ndarray, other: np.ndarray | None) -> np.ndarray:
        """Pixels that look more like skin than like something else; all where a colour is unknown."""
        if self._skin is None or other is None:
            return np.ones(colour.shape[1:], bool)
        return uniform_filter(_surprise(colour, other) - _surprise(colour, self._skin), 5, mode="nearest") > 0

    def _learn(self, known: np.ndarray | None, pixels: np.ndarray) -> np.ndarray | None:
        """Median and spread of a colour, mixed with what was known; few pixels teach nothing."""
        if pixels.shape[1] < 50:
            return known
        middle = np.median(pixels, 1)
        seen = np.stack([middle, 1.48 * np.median(np.abs(pixels - middle[:, None]), 1) + 8])
        return seen if known is None else self._memory * known + (1 - self._memory) * seen


def _polygon(landmarks: np.ndarray, outline: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Pixels inside an outline of face points."""
    canvas = Image.new("1", (shape[1], shape[0]))
    ImageDraw.Draw(canvas).polygon([(float(x) - 0.5, float(y) - 0.5) for x, y in landmarks[list(outline)]], fill=1)
    return np.asarray(canvas)


def _height(places: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Height of places along the face: 0 at the chin, 1 at the top of the forehead."""
    up = landmarks[TOP] - landmarks[CHIN]
    return (places - landmarks[CHIN]) @ up / max(float(up @ up), 1e-6)


def _surprise(colour: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Squared distance from a colour in units of its spread, with the spread's own cost."""
    middle, spread = known[..., None, None]
    return (((colour - middle) / spread) ** 2).sum(0) + 2 * float(np.log(spread).sum())
