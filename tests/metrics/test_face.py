import math

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from talk3d.errors import ShapeError
from talk3d.metrics.face import (
    LIP_POINTS,
    NUM_FACE_POINTS,
    RIGID_POINTS,
    Film,
    correlation,
    distance_measure,
    face_box,
    face_distance,
    face_measures,
    jitter,
    landmark_distance,
    mouth_measure,
)
from talk3d.perception.landmarks import FaceBox, FaceObservation


@pytest.fixture
def face() -> Float[Tensor, "3 478 2"]:
    points = 200 * torch.rand(478, 2)
    points[33], points[263] = torch.tensor([50.0, 80.0]), torch.tensor([150.0, 80.0])
    return points.expand(3, -1, -1).clone()


def test_point_lists_are_disjoint_and_whole() -> None:
    assert len(set(LIP_POINTS)) == 40
    assert not set(LIP_POINTS) & set(RIGID_POINTS)
    assert max(LIP_POINTS + RIGID_POINTS) < NUM_FACE_POINTS


def test_moved_turned_and_scaled_faces_are_equal(face: Float[Tensor, "3 478 2"]) -> None:
    turn = torch.tensor([[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]])
    moved = 1.7 * face @ turn.mT + torch.tensor([20.0, -8.0])
    torch.testing.assert_close(landmark_distance(moved, face), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(face_distance(moved, face), torch.zeros(3), atol=1e-5, rtol=0)


def test_lips_moved_by_five_of_a_hundred_pixels_score_five_percent(face: Float[Tensor, "3 478 2"]) -> None:
    spoken = face.clone()
    spoken[1, list(LIP_POINTS)] += torch.tensor([3.0, 4.0])
    torch.testing.assert_close(landmark_distance(spoken, face), torch.tensor([0.0, 0.05, 0.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(face_distance(spoken, face), torch.tensor([0.0, 0.05 * 40 / 468, 0.0]), atol=1e-5, rtol=0)


def test_distance_is_in_units_of_the_truth(face: Float[Tensor, "3 478 2"]) -> None:
    spoken = face.clone()
    spoken[:, list(LIP_POINTS)] += torch.tensor([0.0, 10.0])
    torch.testing.assert_close(landmark_distance(3 * spoken, face), torch.full((3,), 0.1), atol=1e-5, rtol=0)


def test_other_landmarks_are_refused() -> None:
    with pytest.raises(ShapeError, match="468"):
        landmark_distance(torch.rand(2, 68, 2), torch.rand(2, 68, 2))


def test_correlation_of_lines_and_waves() -> None:
    t = np.linspace(0, 2 * np.pi, 101)[:-1]
    assert correlation(3 * t + 1, t) == pytest.approx(1)
    assert correlation(-t, t) == pytest.approx(-1)
    assert correlation(np.sin(t), np.cos(t)) == pytest.approx(0, abs=1e-12)
    assert correlation(np.sin(t + 0.5), np.sin(t)) == pytest.approx(math.cos(0.5))


def test_correlation_skips_missed_frames_and_knows_stillness() -> None:
    assert correlation(np.array([0.0, np.nan, 1.0, 2.0]), np.array([1.0, 9.0, 2.0, 3.0])) == pytest.approx(1)
    assert math.isnan(correlation(np.ones(5), np.arange(5.0)))
    assert math.isnan(correlation(np.array([np.nan, 1.0]), np.array([1.0, 1.0])))


def test_jitter_of_straight_motion_parabolas_and_noise(face: Float[Tensor, "3 478 2"]) -> None:
    time = torch.arange(9.0)[:, None, None]
    assert jitter(face[:1] + 2 * time) == pytest.approx(0, abs=1e-4)
    assert jitter(face[:1] + 0.5 * time**2 * torch.tensor([3.0, 4.0])) == pytest.approx(5, rel=1e-4)
    assert jitter(torch.randn(4000, 478, 2)) == pytest.approx(math.sqrt(12), rel=0.02)


def test_jitter_looks_only_where_the_face_was_seen(face: Float[Tensor, "3 478 2"]) -> None:
    points = face[:1].repeat(7, 1, 1)
    points[3] += 50
    seen = np.array([True, True, True, False, True, True, True])
    assert jitter(points, seen) == pytest.approx(0)
    assert math.isnan(jitter(points[:4], np.array([True, False, True, True])))


def test_face_box_widens_by_the_larger_side() -> None:
    points = torch.zeros(1, 478, 2)
    points[0, 1] = torch.tensor([100.0, 40.0])
    points[0, 470] = 500
    torch.testing.assert_close(face_box(points, 0.1), torch.tensor([[-10.0, -10.0, 110.0, 50.0]]))


UPPER, LOWER = (82, 13, 312), (87, 14, 317)


class ScriptedModel:
    """A face model whose points are written in the picture: the first pixel's red is the mouth opening in px, green 0 means no face."""

    source = "script"
    kind = "task"

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
        return FaceObservation(landmarks=points, score=1.0, eyes_shut=(0.0, 0.0), expression=np.zeros(0, np.float32))


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
