"""Films of a face as a detector sees them, and what the comparison of two of them says."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from talk3d.metrics.face import correlation, face_distance, jitter, landmark_distance
from talk3d.metrics.report import Measure, measure
from talk3d.perception.landmarks import FaceModel, FaceTracker, mouth_opening

ALIGNED = "after a similarity fitted on rigid points, over the real inter-ocular distance; same detector on both"
LIPS = f"mean distance of 40 lip points {ALIGNED}"
FACE = f"mean distance of all 468 face points {ALIGNED}"


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
