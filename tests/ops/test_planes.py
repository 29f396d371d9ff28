"""Tri-plane look-up against explicit interpolation, and the roll-out against explicit loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from talk3d.ops.planes import convolve_rolled_out, gather_planes, project_points, roll_out, sample_planes

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


def test_gathered_corners_and_their_gradients_equal_the_lookup() -> None:
    planes, coordinates = torch.randn(2, 3, 4, 5, 6, requires_grad=True), 2.4 * torch.rand(2, 3, 20, 2) - 1.2
    coordinates[0, 0, 0] = torch.tensor([1 / 6, -1.0])  # a pixel's centre along the row, the border along the column
    weight = torch.randn(2, 20, 4)
    found, expected = (look_up(planes, coordinates) for look_up in (gather_planes, sample_planes))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((x * weight).sum(), planes)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


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


@pytest.mark.parametrize("order", ["consistent", "released"])
def test_convolution_of_the_split_roll_out_equals_the_whole(order) -> None:
    """Values and gradients, zero borders included, for sides down to a single pixel."""
    for height, width in ((5, 5), (1, 1), (2, 2)):
        planes = torch.randn(2, 3, 4, height, width, dtype=torch.float64, requires_grad=True)
        weights = [torch.randn(5, 12, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        biases = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        found = torch.stack(convolve_rolled_out(planes, weights, biases, order), 1)
        rolled = roll_out(planes, order).unbind(1)
        expected = torch.stack([F.conv2d(x, w, b, padding=1) for x, w, b in zip(rolled, weights, biases, strict=True)], 1)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
        towards = torch.randn_like(found)
        leaves = [planes, *weights, *biases]
        pairs = zip(torch.autograd.grad(found, leaves, towards), torch.autograd.grad(expected, leaves, towards), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10)


def test_released_roll_out_equals_its_formula() -> None:
    a, b, c = torch.randn(3, 1, 2, 4, 4).unbind(0)

    def rows(profile: torch.Tensor) -> torch.Tensor:
        return profile[..., :, None].expand(-1, -1, 4, 4)

    def columns(profile: torch.Tensor) -> torch.Tensor:
        return profile[..., None, :].expand(-1, -1, 4, 4)

    def over_rows(plane: torch.Tensor) -> torch.Tensor:
        return plane.mean(-2)

    def over_columns(plane: torch.Tensor) -> torch.Tensor:
        return plane.mean(-1)

    expected = [
        torch.cat([a, rows(over_rows(b)), columns(over_columns(c))], 1),
        torch.cat([columns(over_columns(a)), b, rows(over_rows(c))], 1),
        torch.cat([rows(over_rows(a)), columns(over_columns(b)), c], 1),
    ]
    torch.testing.assert_close(roll_out(torch.stack([a, b, c], 1), "released"), torch.stack(expected, 1))
