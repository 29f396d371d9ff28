"""Lip points moved by what networks get wrong of everybody's mouth."""

import math

import pytest
import torch
from torch import Tensor

from talk3d.perception.facetemplate import ModelKind
from talk3d.perception.landmarks import mouth_opening
from talk3d.perception.liplines import LIP_BIASES, LIP_RINGS, correct_lips

KINDS: tuple[ModelKind, ...] = ("registry", "task")
EYES_PX = 100.0


def face(opening: float) -> Tensor:
    """A level face with eyes 100 px apart and lips of 60 px round (0, 80); the inner edges are parabolas `opening` apart in the middle; 1 478 2."""
    points = torch.zeros(1, 478, 2, dtype=torch.float64)
    points[:, 33, 0], points[:, 263, 0] = -EYES_PX / 2, EYES_PX / 2
    for ring, thick_px in zip(LIP_RINGS, (16.0, 12.0, 6.0, 0.0), strict=True):
        for number, point in enumerate(ring):
            across = (number - 5) / 5 if number <= 10 else (15 - number) / 5
            side = -1 if number <= 10 else 1  # upper lips lie above
            height = side * (thick_px + opening * EYES_PX / 2) * (1 - across**2)
            points[0, point] = torch.tensor([30 * across, 80 + height])
    return points


def shifts(opening: float, kind: ModelKind) -> Tensor:
    before = face(opening)
    return ((correct_lips(before, kind) - before) / EYES_PX)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_corners_and_middles_move_by_what_the_table_says(kind: ModelKind):
    moved, bias = shifts(0.3, kind), LIP_BIASES[kind]
    expected = {
        **dict.fromkeys((61, 291), bias.outer_corner),
        **dict.fromkeys((78, 308), bias.inner_corner),
        0: 0.0,
        17: bias.outer_lower,
        13: bias.inner_middle,
        14: bias.inner_middle,
        11: bias.inner_middle / 3,
        12: 2 * bias.inner_middle / 3,
        15: bias.outer_lower / 3 + 2 * bias.inner_middle / 3,
        76: (2 * bias.outer_corner + bias.inner_corner) / 3,
        40: 0.36 * bias.outer_corner,
        91: 0.36 * bias.outer_corner + 0.64 * bias.outer_lower,
        321: 0.36 * bias.outer_corner + 0.64 * bias.outer_lower,
    }
    for point, down in expected.items():
        torch.testing.assert_close(moved[point], torch.tensor([0.0, down], dtype=torch.float64), msg=str(point))


@pytest.mark.parametrize("kind", KINDS)
def test_only_lips_move(kind: ModelKind):
    lips = {point for ring in LIP_RINGS for point in ring}
    assert len(lips) == 80
    moved = shifts(0.2, kind)
    assert moved[[point for point in range(478) if point not in lips]].eq(0).all()
    assert (moved[sorted(lips), 1] >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mouth_stays_as_shut_or_open_as_it_was_and_lips_never_cross(kind: ModelKind):
    outer, inner = LIP_RINGS[0], LIP_RINGS[-1]
    upper, lower = list(inner[1:10]), list(inner[:10:-1])
    shut = correct_lips(face(0.0), kind)[0]
    torch.testing.assert_close(shut[upper], shut[lower])
    for opening in (0.0, 0.01, 0.1, 0.5):
        lips = correct_lips(face(opening), kind)[0, :, 1]
        torch.testing.assert_close(lips[lower] - lips[upper], face(opening)[0, lower, 1] - face(opening)[0, upper, 1])
        torch.testing.assert_close(mouth_opening(correct_lips(face(opening), kind)), mouth_opening(face(opening)))
        assert (lips[upper] > lips[list(outer[1:10])]).all()
        assert (lips[list(outer[:10:-1])] > lips[lower]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_turning_scaling_moving_and_mirroring_the_picture_moves_the_lips_with_it(kind: ModelKind):
    points = face(0.25)
    angle = math.radians(35)
    turn = 2.5 * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    shift = torch.tensor([300.0, -40.0], dtype=torch.float64)
    torch.testing.assert_close(correct_lips(points @ turn.mT + shift, kind), correct_lips(points, kind) @ turn.mT + shift)
    lips = correct_lips(points, kind)[0]
    for ring in LIP_RINGS:
        mirrored = [ring[(10 - number) % 20] for number in range(20)]
        torch.testing.assert_close(lips[list(ring)], lips[mirrored] * torch.tensor([-1.0, 1.0], dtype=torch.float64))


def test_faces_without_irises_are_corrected_too_and_given_points_are_left_alone():
    points = face(0.1).float()
    kept = points.clone()
    torch.testing.assert_close(correct_lips(points[:, :468], "registry"), correct_lips(points, "registry")[:, :468])
    assert torch.equal(points, kept)
