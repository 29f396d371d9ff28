import math

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from talk3d.errors import ShapeError
from talk3d.metrics.face import LIP_POINTS, NUM_FACE_POINTS, RIGID_POINTS, correlation, face_box, face_distance, jitter, landmark_distance


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
