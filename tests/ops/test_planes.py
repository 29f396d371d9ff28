"""Tri-plane look-up against explicit interpolation, and the roll-out against explicit loops."""

import math

import pytest
import torch

from talk3d.ops.planes import project_points, roll_out, sample_planes

AXES = {"fixed": "xy xz zy", "released": "xy xz zx"}
"""Along the columns and the rows of each plane."""


@pytest.mark.parametrize("axes", AXES)
def test_projection_takes_the_axes_of_each_plane(axes) -> None:
    points = torch.rand(2, 5, 3) - 0.5
    found = project_points(points, axes, 0.5)
    assert found.shape == (2, 3, 5, 2)
    for plane, (column, row) in enumerate(AXES[axes].split()):
        torch.testing.assert_close(found[:, plane, :, 0], 4 * points[..., "xyz".index(column)])
        torch.testing.assert_close(found[:, plane, :, 1], 4 * points[..., "xyz".index(row)])


def slow_sample(plane: torch.Tensor, column: float, row: float) -> torch.Tensor:
    """Bilinear look-up in one plane c h w, zeros outside, half-pixel centres."""
    height, width = plane.shape[1:]
    x, y = (column + 1) * width / 2 - 0.5, (row + 1) * height / 2 - 0.5
    total = torch.zeros(plane.shape[0])
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * plane[:, i, j]
    return total


def test_lookup_is_the_mean_of_three_bilinear_ones() -> None:
    planes, coordinates = torch.randn(2, 3, 4, 5, 6), 2.4 * torch.rand(2, 3, 20, 2) - 1.2
    found = sample_planes(planes, coordinates)
    assert found.shape == (2, 20, 4)
    for b in range(2):
        for n in range(20):
            expected = sum(slow_sample(planes[b, p], *coordinates[b, p, n].tolist()) for p in range(3)) / 3
            torch.testing.assert_close(found[b, n], expected, atol=1e-5, rtol=1e-5)


def test_outside_the_planes_there_is_nothing() -> None:
    assert sample_planes(torch.ones(1, 3, 2, 4, 4), torch.full((1, 3, 3, 2), 1.5)).eq(0).all()


def test_gradients_of_the_lookup() -> None:
    planes = torch.randn(1, 3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    coordinates = (1.6 * torch.rand(1, 3, 4, 2, dtype=torch.float64) - 0.8).requires_grad_()
    assert torch.autograd.gradcheck(sample_planes, (planes, coordinates))


def test_roll_out_equals_explicit_means_over_the_unshared_axis() -> None:
    """Each plane is looked at as a function of its two world axes; the other planes are averaged over the axis it does not have."""
    side, planes = 4, torch.randn(2, 3, 2, 4, 4)
    rolled = roll_out(planes)
    assert rolled.shape == (2, 3, 6, 4, 4)
    axes = AXES["fixed"].split()
    for target in range(3):
        column, row = axes[target]
        for channel_block, source in enumerate(range(3)):
            their_column, their_row = axes[source]
            for i in range(side):
                for j in range(side):
                    place = {row: i, column: j}
                    rows = [place[their_row]] if their_row in place else range(side)
                    columns = [place[their_column]] if their_column in place else range(side)
                    expected = sum(planes[:, source, :, r, c] for r in rows for c in columns) / (len(rows) * len(columns))
                    found = rolled[:, target, 2 * channel_block : 2 * channel_block + 2, i, j]
                    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
