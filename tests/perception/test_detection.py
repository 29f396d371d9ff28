"""Squares, overlaps and the detector on a rendered face at known places."""

import math

import numpy as np
import pytest

from talk3d.perception import detection as d


def gradient(height: int = 120, width: int = 160) -> np.ndarray:
    rows, columns = np.indices((height, width))
    return np.stack([columns, rows, (rows + columns) // 2], -1).astype(np.uint8)


def square(x: float, y: float, side: float, angle: float = 0.0) -> d.FaceBox:
    return d.FaceBox(centre_px=(x, y), side_px=side, angle_rad=angle, score=1.0)


@pytest.mark.parametrize("angle", [0.0, 0.3, -1.2])
@pytest.mark.parametrize("side", [40.0, 64.0, 100.0])
def test_samples_of_a_square_lie_where_its_points_map_to(angle: float, side: float):
    picture, box = gradient(), square(80, 60, side, angle)
    patch = d.sample_square(picture, box, 32).astype(float)
    rows, columns = np.array([12, 16, 20, 16]), np.array([16, 11, 19, 22])
    places = d.from_square(np.stack([(columns + 0.5) / 32, (rows + 0.5) / 32], -1), box)
    seen = patch[rows, columns, :2] + 0.5  # the picture holds its own pixel numbers
    assert np.abs(seen - places).max() < 1.0


def test_outside_the_picture_is_black_and_far_away_is_all_black():
    patch = d.sample_square(np.full((50, 50, 3), 200, np.uint8), square(0, 0, 40), 20)
    assert patch[:9, :9].max() == 0
    assert patch[12:, 12:].min() == 200
    assert d.sample_square(gradient(), square(-500, -500, 40), 20).max() == 0


def test_square_round_points():
    box = d.square_round(np.array([[10.0, 20.0], [30.0, 60.0]]), angle_rad=0.1, scale=1.5)
    assert box.centre_px == (20.0, 40.0)
    assert box.side_px == pytest.approx(60.0)


def test_tiles_cover_the_picture():
    for tiles in d._tilings(640, 360):
        assert min(left for left, _, _ in tiles) <= 0
        assert max(left + side for left, _, side in tiles) >= 640
        assert max(top + side for _, top, side in tiles) >= 360


def test_detector_finds_a_face_where_it_was_put(registry_model, portrait: np.ndarray):
    found = registry_model.detect(portrait)
    assert len(found) == 1
    canvas = np.full((900, 1200, 3), 90, np.uint8)
    canvas[400 : 400 + 384, 700 : 700 + 384] = portrait
    moved = registry_model.detect(canvas)
    assert len(moved) == 1
    expected = (found[0].centre_px[0] + 700, found[0].centre_px[1] + 400)
    assert math.dist(moved[0].centre_px, expected) < 25
    assert moved[0].side_px == pytest.approx(found[0].side_px, rel=0.2)


def test_detector_counts_two_faces_and_none(registry_model, portrait: np.ndarray):
    both = np.concatenate([portrait, portrait], 1)
    assert len(registry_model.detect(both)) == 2
    assert registry_model.detect(gradient()) == []
    assert registry_model.detect(np.zeros((64, 64, 3), np.uint8)) == []
