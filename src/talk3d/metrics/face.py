"""Measures of faces and their motion: pure functions on landmarks, and films of a face as a detector sees them, compared with each other."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from talk3d.errors import ShapeError
from talk3d.metrics.report import Measure, measure
from talk3d.ops.geometry import fit_similarity
from talk3d.perception.landmarks import FaceModel, FaceTracker, mouth_opening

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
ALIGNED = "after a similarity fitted on rigid points, over the real inter-ocular distance; same detector on both"
LIPS = f"mean distance of 40 lip points {ALIGNED}"
FACE = f"mean distance of all 468 face points {ALIGNED}"


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


class Film:
    """Landmarks of one film, frame after frame, by one detector; nan where it saw no face."""

    def __init__(self, model: FaceModel | None) -> None:
        """Start at the first frame; without a model no face is ever seen."""
        self._tracker = FaceTracker(model) if model else None
        self._points: list[Float[np.ndarray, "n 2"] | None] = []

    def watch(self, pictures: UInt8[np.ndarray, "b h w 3"]) -> None:
        """Find the face in the next frames."""
        for picture in pictures:
            seen = self._tracker.follow(np.ascontiguousarray(picture)) if self._tracker else None
            self._points.append(seen.landmarks if seen else None)

    @property
    def landmarks(self) -> Float[Tensor, "t n 2"]:
        """All frames' landmarks in pixels."""
        number = next((len(points) for points in self._points if points is not None), 478)
        blank = np.full((number, 2), np.nan, np.float32)
        return torch.from_numpy(np.stack([blank if points is None else points for points in self._points]))

    @property
    def seen(self) -> Bool[np.ndarray, " t"]:
        """Where a face was found."""
        return np.array([points is not None for points in self._points])

    @property
    def opening(self) -> Float[np.ndarray, " t"]:
        """Mouth opening, nan where no face was found."""
        return mouth_opening(self.landmarks).double().numpy()


def face_measures(rendered: Film, real: Film, missing: str) -> list[Measure]:
    """Compare a rendered film with the real one: landmark distances, mouth opening, jitter.

    Args:
        rendered: as long as the real one.
        real: of the same moments.
        missing: what is missing where there is no detector, else empty.
    """
    return [
        distance_measure("lmd_lips", rendered, real, LIPS, needs=missing),
        distance_measure("lmd_face", rendered, real, FACE, distance=face_distance, needs=missing),
        mouth_measure("mouth_correlation", rendered, real.opening, "Pearson's r of mouth opening, rendered against real, same detector", missing),
        _jitter_measure("jitter", rendered, "rendered", missing),
        _jitter_measure("jitter_real", real, "real", missing),
    ]


def distance_measure(
    name: str,
    rendered: Film,
    real: Film,
    definition: str,
    *,
    distance: Callable[[Tensor, Tensor], Tensor] = landmark_distance,
    needs: str = "",
) -> Measure:
    """Mean landmark distance over the frames in which both films show a face."""
    both = rendered.seen & real.seen
    index = torch.from_numpy(np.flatnonzero(both))
    values = distance(rendered.landmarks[index], real.landmarks[index]).numpy() if len(index) else np.zeros(0)
    return measure(name, values, "", definition, num_missed=_missed(both, needs), needs=needs or "frames in which the face is found in both films")


def mouth_measure(name: str, film: Film, reference: Float[np.ndarray, " t"], definition: str, needs: str = "") -> Measure:
    """Correlation of a film's mouth opening with a reference (nan: unknown), over the frames where both are known."""
    both = film.seen & np.isfinite(reference)
    found = measure(name, correlation(film.opening, reference), "", definition, num_missed=_missed(both, needs), needs=needs or "a mouth that moves")
    return _counted(found, int(both.sum()))


def _jitter_measure(name: str, film: Film, which: str, needs: str) -> Measure:
    definition = f"RMS second difference of rigid face points in the {which} crops"
    found = measure(name, jitter(film.landmarks, film.seen), "px", definition, num_missed=_missed(film.seen, needs), needs=needs)
    return _counted(found, int(film.seen.sum()))


def _missed(seen: Bool[np.ndarray, " t"], needs: str) -> int:
    """How many frames show no face; none count where nobody looked."""
    return 0 if needs else int((~seen).sum())


def _counted(found: Measure, num_frames: int) -> Measure:
    return found if found.value is None else replace(found, num_frames=num_frames)
