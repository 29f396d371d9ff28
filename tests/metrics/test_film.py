import math

import numpy as np
import pytest

from talk3d.metrics.face import LIP_POINTS
from talk3d.metrics.film import Film, distance_measure, face_measures, mouth_measure
from talk3d.perception.landmarks import FaceBox, FaceObservation

UPPER, LOWER = (82, 13, 312), (87, 14, 317)


class ScriptedModel:
    """A face model whose points are written in the picture: the first pixel's red is the mouth opening in px, green 0 means no face."""

    source = "script"

    def __init__(self) -> None:
        self.face = np.random.default_rng(0).uniform(50, 150, (468, 2)).astype(np.float32)
        self.face[33], self.face[263] = (50, 80), (150, 80)
        for upper, lower in zip(UPPER, LOWER, strict=True):
            self.face[lower] = self.face[upper]

    def detect(self, frame: np.ndarray) -> list[FaceBox]:
        return [FaceBox(centre_px=(100.0, 100.0), side_px=100.0, angle_rad=0.0, score=1.0)] if frame[0, 0, 1] else []

    def observe(self, frame: np.ndarray, box: FaceBox) -> FaceObservation | None:
        if not frame[0, 0, 1]:
            return None
        points = self.face.copy()
        points[list(LOWER), 1] += frame[0, 0, 0]
        return FaceObservation(landmarks=points, score=1.0, eyes_shut=(0.0, 0.0))


def film(*openings: int | None) -> Film:
    pictures = np.zeros((len(openings), 4, 4, 3), np.uint8)
    for picture, opening in zip(pictures, openings, strict=True):
        picture[..., 0], picture[..., 1] = opening or 0, opening is not None
    made = Film(ScriptedModel())
    made.watch(pictures[:2])
    made.watch(pictures[2:])
    return made


def test_a_film_knows_openings_and_misses() -> None:
    watched = film(0, 10, None, 30)
    np.testing.assert_array_equal(watched.seen, [True, True, False, True])
    np.testing.assert_allclose(watched.opening, [0, 0.1, math.nan, 0.3], atol=1e-6)
    assert watched.landmarks.shape == (4, 468, 2) and watched.landmarks[2].isnan().all()


def test_two_films_compared() -> None:
    found = {entry.name: entry for entry in face_measures(film(0, 10, 20, None, 40), film(0, 20, 40, 30, 80), "")}
    assert found["mouth_correlation"].value == pytest.approx(1)
    assert (found["mouth_correlation"].num_frames, found["mouth_correlation"].num_missed) == (4, 1)
    expected = np.mean([0, 10, 20, 40]) / 100 * len(set(LOWER) & set(LIP_POINTS)) / 40
    assert found["lmd_lips"].value == pytest.approx(expected, rel=1e-4)
    assert (found["lmd_lips"].num_frames, found["lmd_lips"].num_missed) == (4, 1)
    face = found["lmd_face"].value
    assert face is not None and 0 < face < expected
    assert found["jitter"].value == pytest.approx(0) and found["jitter_real"].value == pytest.approx(0)


def test_a_mouth_that_does_not_move_has_no_correlation() -> None:
    still = mouth_measure("r", film(5, 5, 5), np.array([0.0, 1.0, 2.0]), "r")
    assert still.value is None and "moves" in still.needs


def test_without_a_model_nothing_is_invented() -> None:
    blind = Film(None)
    blind.watch(np.zeros((3, 4, 4, 3), np.uint8))
    for entry in face_measures(blind, blind, "a face model: none is there"):
        assert entry.value is None and str(entry) == "not measured (needs a face model: none is there)" and entry.num_missed == 0


def test_films_without_a_common_frame() -> None:
    entry = distance_measure("lmd", film(None, 1, None), film(1, None, 1), "d")
    assert entry.value is None and entry.num_missed == 3
