import math

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from talk3d.errors import ShapeError
from talk3d.metrics.face import (
    LIP_POINTS,
    LOWER_BLENDSHAPES,
    NUM_FACE_POINTS,
    RIGID_POINTS,
    UPPER_BLENDSHAPES,
    correlation,
    face_box,
    face_distance,
    head_rotations,
    jitter,
    landmark_distance,
    lip_motion,
    lse,
    mouth_lag,
    rigid_distance,
    silent_spans,
    sync_distances,
    turn_between,
)
from talk3d.ops.geometry import rotation_from_vector
from talk3d.types import Waveform


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


def test_the_lag_of_a_mouth_that_comes_three_frames_late() -> None:
    t = np.arange(100.0)
    mouth = np.sin(0.4 * t) + 0.5 * np.sin(0.93 * t)
    late = np.concatenate([np.zeros(3), mouth[:-3]])
    assert mouth_lag(late, mouth, 25.0) == pytest.approx(3, abs=0.25)
    assert mouth_lag(mouth, late, 25.0) == pytest.approx(-3, abs=0.25)
    assert mouth_lag(mouth, mouth, 25.0) == pytest.approx(0, abs=1e-9)
    assert mouth_lag(mouth + 0.3 * t, mouth - 0.2 * t, 25.0) == pytest.approx(0, abs=0.1)  # slow drift says nothing of lips
    assert mouth_lag(np.sin(0.4 * (t - 0.5)), np.sin(0.4 * t), 25.0) == pytest.approx(0.5, abs=0.1)
    gap = np.where((t > 20) & (t < 24), np.nan, late)
    assert mouth_lag(gap, mouth, 25.0) == pytest.approx(3, abs=0.3)
    assert math.isnan(mouth_lag(np.ones(100), mouth, 25.0)) and math.isnan(mouth_lag(mouth[:8], mouth[:8], 25.0))
    assert math.isnan(mouth_lag(np.random.default_rng(1).standard_normal(900), np.random.default_rng(2).standard_normal(900), 25.0))
    assert math.isnan(mouth_lag(np.full(100, np.nan), mouth, 25.0))


def test_a_head_that_turns_by_five_degrees_is_off_by_five() -> None:
    shape = torch.rand(478, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    angles = torch.deg2rad(torch.tensor([[0.0, 5.0, 0.0], [20.0, 5.0, 0.0], [0.0, 0.0, 10.0]]))
    points = [(shape @ rotation_from_vector(angle).mT)[:, :2] * torch.tensor([100.0, -100.0]) for angle in angles]
    turns = head_rotations(torch.stack(points), shape)
    still = head_rotations((shape[:, :2] * torch.tensor([70.0, -70.0]) + 30)[None].expand(3, -1, -1), shape)
    found = turn_between(turns, still)
    torch.testing.assert_close(found, angles.norm(dim=1).rad2deg(), atol=0.01, rtol=0)
    torch.testing.assert_close(turn_between(turns, turns), torch.zeros(3), atol=0.03, rtol=0)


def test_rigid_points_moved_by_a_pixel_are_a_pixel_away(face: Float[Tensor, "3 478 2"]) -> None:
    torch.testing.assert_close(rigid_distance(face + torch.tensor([0.6, 0.8]), face), torch.ones(3), atol=1e-4, rtol=0)


def test_silence_is_found_where_there_is_none_to_hear() -> None:
    samples = torch.sin(torch.arange(50 * 640) * 0.3)
    samples[10 * 640 : 25 * 640] *= 0.01  # 40 dB below, 15 frames
    samples[30 * 640 : 38 * 640] *= 0.1  # 20 dB below is no silence
    samples[40 * 640 : 45 * 640] = 0  # too short
    assert silent_spans(Waveform(samples=samples, sample_rate_hz=16000), 50, 25.0) == [(13, 22)]
    assert silent_spans(Waveform(samples=torch.zeros(640 * 20), sample_rate_hz=16000), 20, 25.0) == [(3, 17)]
    assert silent_spans(Waveform(samples=torch.zeros(0), sample_rate_hz=16000), 20, 25.0) == []


def test_lips_that_swing_by_two_pixels_move_by_two(face: Float[Tensor, "3 478 2"]) -> None:
    points = face[:1].repeat(8, 1, 1)
    points[::2, list(LIP_POINTS)] += torch.tensor([0.0, 2.0])
    points[1::2, list(LIP_POINTS)] -= torch.tensor([0.0, 2.0])
    assert lip_motion(points) == pytest.approx(2, abs=1e-4)
    drift = torch.arange(8.0)[:, None, None] * torch.tensor([1.0, -3.0])  # the head moves away with its lips
    assert lip_motion(face[:1] + drift) == pytest.approx(0, abs=1e-4)


def test_sound_that_comes_four_frames_late_is_found_by_its_embeddings() -> None:
    vectors = torch.randn(80, 16, generator=torch.Generator().manual_seed(0))
    lips, sound = vectors[10:60], vectors[6:56]  # what is said at lips i is heard at i + 4
    least, confidence, offset = lse(sync_distances(lips, sound))
    assert offset == 4 and least == pytest.approx(0, abs=1e-6)
    assert confidence == pytest.approx(math.sqrt(32), rel=0.1)  # the distance of two independent normal vectors of 16 numbers
    assert lse(sync_distances(sound, lips))[2] == -4
    assert math.isnan(lse(sync_distances(lips[:1], sound[:1]))[0])


def test_blendshapes_of_both_halves_are_all_but_the_neutral_one() -> None:
    assert sorted(UPPER_BLENDSHAPES + LOWER_BLENDSHAPES) == list(range(1, 52))
