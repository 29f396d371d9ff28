"""Pictures with mattes, over black or back in the frame they came from: colours at the seam, resampling. Pixel centres are at half-integers."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

FEATHER = 0.07
"""Width of the soft edge of a pasted square, in its sides."""
INSET = 1 / 128
"""A rendered head's matte fades over four times this inside its outline, in the picture's sides."""
MOST_SHIFT = 0.15
"""How far colours are moved to match at the seam, of the whole range."""


def premultiply(image: Float[Tensor, "b 3 h w"], alpha: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Lay a picture in [-1, 1] over black with its matte in [0, 1]."""
    return (image + 1) * alpha - 1


def over(image: Float[Tensor, "b 3 h w"], alpha: Float[Tensor, "b 1 h w"], behind: Float[Tensor, "#b 3 #h #w"]) -> Float[Tensor, "b 3 h w"]:
    """Lay a premultiplied picture over what is behind it; both in [-1, 1]."""
    return image + (1 - alpha) * (behind + 1)


HAIR_PX = 6
"""Hair that a matte leaves out is looked for this near to the person."""
SAME = 0.04
"""What differs less from what is behind, of the whole range, is that."""


def unmix(
    image: Float[Tensor, "b 3 h w"], alpha: Float[Tensor, "b 1 h w"], behind: Float[Tensor, "3 h w"], steady: Float[Tensor, "1 h w"]
) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 1 h w"]]:
    """Lay a person over black, without what shines through from behind, and find more opacity where the picture needs it.

    Near the person a pixel is at least so opaque that some colour could make what is seen out of what is behind; a matte alone leaves hair out.
    Laid over what is behind again, the result is the picture, wherever that is steady.

    Args:
        image: in [-1, 1].
        alpha: its matte, 0 … 1.
        behind: the person, [-1, 1].
        steady: 1 where that is known, 0 elsewhere, where this is `premultiply`.

    Reference: Smith and Blinn, Blue screen matting, SIGGRAPH 1996.
    """
    seen, back = (image + 1) / 2, (behind + 1) / 2
    brighter = (seen - back - SAME).clamp(min=0) / (1 - back).clamp(min=SAME)
    darker = (back - seen - SAME).clamp(min=0) / back.clamp(min=SAME)
    near = _grow((alpha > 0.5).float(), HAIR_PX)
    found = torch.maximum(alpha, steady * near * torch.maximum(brighter, darker).amax(1, keepdim=True).clamp(max=1))
    own = (seen - (1 - found) * back).clamp(min=0).minimum(found)
    return 2 * torch.where(steady > 0, own, seen * alpha) - 1, found


def _grow(mask: Float[Tensor, "b 1 h w"], pixels: int) -> Float[Tensor, "b 1 h w"]:
    """Largest value within so many pixels, rows and columns one after the other."""
    rows = F.max_pool2d(mask, (2 * pixels + 1, 1), 1, (pixels, 0))
    return F.max_pool2d(rows, (1, 2 * pixels + 1), 1, (0, pixels))


def resample(picture: Float[Tensor, "c h w"], target_to_source: Float64[np.ndarray, "2 3"], size: tuple[int, int]) -> Float[Tensor, "c H W"]:
    """A picture of another size (height, width) whose pixels come from where an affine map says; bilinear, the edges repeated.

    Args:
        picture: what is looked at.
        target_to_source: from pixels of the result to pixels of `picture`.
        size: of the result.
    """
    height, width = picture.shape[1:]
    rows, columns = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5, indexing="ij")
    places = np.stack([columns, rows, np.ones_like(rows)], -1) @ target_to_source.T
    grid = torch.from_numpy(2 * places / np.array([width, height]) - 1).to(picture.device, picture.dtype)
    return F.grid_sample(picture[None], grid[None], padding_mode="border", align_corners=False)[0]


def inverse(affine: Float64[np.ndarray, "2 3"]) -> Float64[np.ndarray, "2 3"]:
    """The map back."""
    return np.linalg.inv(np.vstack([affine, [0, 0, 1]]))[:2]


def soft_window(side: int) -> Float[Tensor, "1 s s"]:
    """1 inside a square and 0 at its edge, smooth between."""
    place = (torch.arange(side) + 0.5) / side
    ramp = (torch.minimum(place, 1 - place) / FEATHER - 0.15).clamp(0, 1)
    smooth = ramp * ramp * (3 - 2 * ramp)
    return (smooth[:, None] * smooth[None, :])[None]


def inner_matte(alpha: Float[Tensor, "1 s s"]) -> Float[Tensor, "1 s s"]:
    """A matte that fades inside the rendered head, not at its outline: there the frame keeps the edge that it has, and gets none beside it.

    Args:
        alpha: rendered opacity, 0 … 1.
    """
    size = max(1, round(INSET * alpha.shape[-1]))
    matte = -F.max_pool2d(-((alpha - 0.5) / 0.4).clamp(0, 1), 4 * size + 1, 1, 2 * size)
    for _ in range(2):
        matte = F.avg_pool2d(F.pad(matte, (size,) * 4, mode="replicate"), 2 * size + 1, 1)
    return matte


def match_colours(
    colour: Float[Tensor, "3 s s"], source: Float[Tensor, "3 s s"], shared: Float[Tensor, "1 s s"], window: Float[Tensor, "1 s s"]
) -> Float[Tensor, "3 s s"]:
    """Move colours so that at the seam they are the source's, and ever less so away from it: the difference there, continued as a membrane.

    Args:
        colour: rendered, [0, 1].
        source: what is there in the frame, [0, 1].
        shared: how much both show the person, 0 … 1; colours are compared only where they do.
        window: of the paste; the seam is where it is neither 0 nor 1.
    """
    seam = shared * (window < 0.999).float()
    if float(seam.sum()) < 1:
        return colour
    difference = F.avg_pool2d(F.pad((source - colour) * seam, (2, 2, 2, 2)), 5, 1)
    weight = F.avg_pool2d(F.pad(seam, (2, 2, 2, 2)), 5, 1)
    shift = membrane(difference[None], weight[None])[0]
    return colour + shift.clamp(-MOST_SHIFT, MOST_SHIFT)


def membrane(total: Float[Tensor, "b c h w"], weight: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b c h w"]:
    """Continue weighted values smoothly to where there is no weight: what is unknown comes from the same picture at half the size, and so on."""
    known = weight.clamp(0, 1)
    here = total / weight.clamp_min(1e-6)
    if min(total.shape[-2:]) <= 1:
        return here * (weight > 0)
    coarse = membrane(F.avg_pool2d(total, 2, ceil_mode=True), F.avg_pool2d(weight, 2, ceil_mode=True))
    spread = F.interpolate(coarse, size=total.shape[-2:], mode="bilinear", align_corners=False)
    return known * here + (1 - known) * spread


def paste(
    frame: UInt8[np.ndarray, "h w 3"], picture: Float[Tensor, "3 s s"], matte: Float[Tensor, "1 s s"], crop: Float64[np.ndarray, "2 3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Lay a square picture into a frame; where the matte says nothing, no bit of the frame changes.

    Args:
        frame: RGB.
        picture: [0, 1], not multiplied by the matte.
        matte: 0 … 1, 0 at its edge.
        crop: from pixels of the frame to pixels of the picture.
    """
    height, width = frame.shape[:2]
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * picture.shape[-1]
    places = np.concatenate([corners, np.ones((4, 1))], 1) @ inverse(crop).T
    low = np.clip(np.floor(places.min(0)), 0, (width, height)).astype(int)
    high = np.clip(np.ceil(places.max(0)), 0, (width, height)).astype(int)
    if (high <= low).any():
        return frame.copy()
    part = np.s_[low[1] : high[1], low[0] : high[0]]
    shifted = crop.copy()
    shifted[:, 2] += crop[:, :2] @ low
    layers = resample(torch.cat([picture, matte]), shifted, (int(high[1] - low[1]), int(high[0] - low[0]))).cpu()
    opacity = layers[3].clamp(0, 1).numpy()[..., None]
    colour = 255 * layers[:3].clamp(0, 1).permute(1, 2, 0).numpy()  # h w 3
    result = frame.copy()
    mixed = np.rint(frame[part] + opacity * (colour - frame[part])).astype(np.uint8)
    result[part] = np.where(opacity > 0.5 / 255, mixed, frame[part])
    return result
