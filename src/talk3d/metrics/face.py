"""Measures of faces and their motion, from landmarks. Pure functions on arrays: who found the landmarks does not matter here."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from talk3d.errors import ShapeError
from talk3d.ops.geometry import fit_similarity

OUTER_EYE_CORNERS = (33, 263)
"""MediaPipe's numbers; their distance is the inter-ocular distance everywhere in talk3d."""
RIGID_POINTS = (33, 133, 362, 263, 168, 6, 197, 195, 5, 4, 8, 9, 151, 10)
"""Eye corners, nose bridge, nose tip and the middle of the forehead: what speech and blinks hardly move."""
LIP_POINTS = (
    *(61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185),
    *(78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191),
)
"""The outer and the inner contour of the lips, 20 points each."""
NUM_FACE_POINTS = 468
"""MediaPipe's face mesh; ten more belong to the irises and are left out of whole-face measures."""


def landmark_distance(landmarks: Float[Tensor, "t n 2"], truth: Float[Tensor, "t n 2"], points: tuple[int, ...] = LIP_POINTS) -> Float[Tensor, " t"]:
    """LMD of each frame: the mean distance of `points` from the truth in inter-ocular distances of the truth, head motion taken out.

    |S(p) - g| / |g₃₃ - g₂₆₃|, S being the similarity that brings `RIGID_POINTS` of the first onto those of the second, frame by frame.

    Args:
        landmarks: of the rendered face, MediaPipe's order, pixels.
        truth: of the real face.
        points: which to average over.

    Raises:
        ShapeError: fewer points than MediaPipe's 468.
    """
    if landmarks.shape[1] < NUM_FACE_POINTS:
        raise ShapeError(f"landmark distance needs MediaPipe's {NUM_FACE_POINTS} face points, got {landmarks.shape[1]}: use the face mesh detector")
    landmarks, truth = landmarks.double(), truth.double()
    rigid = list(RIGID_POINTS)
    scale, rotation, shift = fit_similarity(landmarks[:, rigid], truth[:, rigid])
    moved = scale[:, None, None] * landmarks[:, list(points)] @ rotation.mT + shift[:, None]
    left, right = OUTER_EYE_CORNERS
    interocular = (truth[:, left] - truth[:, right]).norm(dim=-1)
    return ((moved - truth[:, list(points)]).norm(dim=-1).mean(-1) / interocular).float()


def face_distance(landmarks: Float[Tensor, "t n 2"], truth: Float[Tensor, "t n 2"]) -> Float[Tensor, " t"]:
    """LMD over all 468 points of the face, see `landmark_distance`."""
    return landmark_distance(landmarks, truth, tuple(range(NUM_FACE_POINTS)))


def correlation(values: Float[np.ndarray, " t"], truth: Float[np.ndarray, " t"]) -> float:
    """Pearson's correlation of two series over the frames where both are finite; nan where one of them does not move."""
    both = np.isfinite(values) & np.isfinite(truth)
    if both.sum() < 2:
        return float("nan")
    a = values[both].astype(np.float64) - values[both].mean(dtype=np.float64)
    b = truth[both].astype(np.float64) - truth[both].mean(dtype=np.float64)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms > 1e-12 else float("nan")


def jitter(landmarks: Float[Tensor, "t n 2"], seen: Bool[np.ndarray, " t"] | None = None) -> float:
    """Root mean square second difference of `RIGID_POINTS` in pixels, over every three frames in a row that were all seen.

    Straight motion scores 0; white noise of σ pixels on both axes scores σ √12. nan where no three frames in a row were seen.

    Args:
        landmarks: MediaPipe's order, pixels.
        seen: False where the detector missed the face; everything if left out.
    """
    points = landmarks[:, list(RIGID_POINTS)].double()
    bend = points[2:] - 2 * points[1:-1] + points[:-2]
    if seen is not None:
        bend = bend[torch.from_numpy(seen[2:] & seen[1:-1] & seen[:-2])]
    return float(bend.square().sum(-1).mean().sqrt()) if len(bend) else float("nan")


def face_box(landmarks: Float[Tensor, "t n 2"], margin: float = 0.1) -> Float[Tensor, "t 4"]:
    """Left, top, right, bottom of the face points' bounding box, widened on each side by `margin` of its larger side."""
    points = landmarks[:, :NUM_FACE_POINTS]
    low, high = points.amin(1), points.amax(1)
    border = margin * (high - low).amax(1, keepdim=True)
    return torch.cat([low - border, high + border], 1)
