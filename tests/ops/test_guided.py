"""Look-ups by rows against plain look-ups, and guided samples against closed forms."""

import math

import pytest
import torch

from talk3d.ops.geometry import Neck, head_camera
from talk3d.ops.guided import Cells, RowLookup, SteppedRays, guided_bins, guided_weights, swept
from talk3d.ops.planes import project_points, sample_planes
from talk3d.ops.rays import camera_rays

CPU = torch.device("cpu")


@pytest.mark.parametrize("axes", ["fixed", "released"])
def test_rows_hold_what_plain_look_ups_find(axes) -> None:
    planes, points = torch.randn(2, 3, 5, 8, 8), 1.4 * torch.rand(2, 40, 3) - 0.7  # some lie outside, where there is nothing
    lookup = RowLookup.of(axes, 8, 0.9, CPU)
    volume = torch.arange(2).repeat_interleave(40)
    found = lookup(lookup.rows(list(planes.unbind(1))), points.flatten(0, 1), volume)
    expected = 3 * sample_planes(planes, project_points(points, axes, 0.9)).flatten(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-4)  # at the outer edge, points are held a thousandth of a pixel inside
    inside = (points.flatten(0, 1).abs() < 0.4).all(-1)
    torch.testing.assert_close(found[inside], expected[inside], atol=1e-5, rtol=1e-5)
    alone = lookup(lookup.rows([plane[:1] for plane in planes.unbind(1)]), points[0])
    torch.testing.assert_close(alone, found[:40])


def test_rows_learn_what_plain_look_ups_teach() -> None:
    planes, points, slope = torch.randn(2, 3, 5, 8, 8), 1.2 * torch.rand(2, 40, 3) - 0.6, torch.randn(2, 40, 5)
    fast, plain = planes.clone().requires_grad_(), planes.double().requires_grad_()
    lookup, volume = RowLookup.of("fixed", 8, 0.9, CPU), torch.arange(2).repeat_interleave(40)
    (lookup(lookup.rows(list(fast.unbind(1))), points.flatten(0, 1), volume) * slope.flatten(0, 1)).sum().backward()
    (3 * sample_planes(plain, project_points(points.double(), "fixed", 0.9)) * slope).sum().backward()
    assert fast.grad is not None and plain.grad is not None
    torch.testing.assert_close(fast.grad, plain.grad.float(), atol=0.02, rtol=1e-3)  # at the outer edge, see above
    torch.testing.assert_close(fast.grad[..., 2:-2, 2:-2], plain.grad.float()[..., 2:-2, 2:-2], atol=1e-4, rtol=1e-4)


def test_cells_know_which_points_they_hold() -> None:
    full = torch.rand(6, 6, 6) > 0.6
    cells, points = Cells.of(full, 0.8), 1.2 * torch.rand(500, 3) - 0.6
    place = ((points / 0.8 + 0.5) * 6).floor().long()
    inside = ((place >= 0) & (place < 6)).all(1)
    x, y, z = place.clamp(0, 5).unbind(1)
    assert cells.occupied(points).equal(full[z, y, x] & inside)


def test_the_span_holds_all_full_cells() -> None:
    full = torch.zeros(16, 16, 16, dtype=torch.bool)
    full[3:9, 5:7, 12:15] = True
    eyes = torch.tensor([[0.0, 0.0, 2.7], [2.0, 1.0, -1.0]])
    near, far = Cells.of(full, 1.0).span(eyes)
    corners = torch.cartesian_prod(torch.tensor([12.0, 15.0]), torch.tensor([5.0, 7.0]), torch.tensor([3.0, 9.0])) / 16 - 0.5  # x y z
    distance = (corners - eyes[:, None]).norm(dim=-1)
    assert (near <= distance.amin(1)).all() and (far >= distance.amax(1)).all()
    assert (far - near < distance.amax(1) - distance.amin(1) + 1.0).all()


def test_rays_are_split_and_walked_one_by_one() -> None:
    count, distances = 5, torch.rand(5, 3)
    rays = SteppedRays(
        origins=torch.rand(count, 3),
        directions=torch.rand(count, 3),
        volume=torch.arange(count),
        near=torch.rand(count, 1),
        step=torch.rand(count, 1),
    )
    parts = rays.split(2)
    assert [len(part.volume) for part in parts] == [2, 2, 1] and torch.cat([part.near for part in parts]).equal(rays.near)
    points = rays.points(distances)
    for k in range(count):
        torch.testing.assert_close(points[3 * k + 1], rays.origins[k] + distances[k, 1] * rays.directions[k])


def bent() -> tuple[Neck, torch.Tensor, torch.Tensor]:
    """A neck, its rest, and two ways to bend it."""
    neck, rest = Neck.of((1.0,) + 6 * (0.0,), -0.2, torch.device("cpu")), torch.tensor([0.1, 0.0, 0.0])
    return neck, rest, neck.swing(torch.tensor([[0.5, 0.1, 0.0], [-0.3, 0.0, 0.1]]), rest)


@pytest.mark.parametrize("compact", [True, False])
def test_points_of_rays_come_to_rest_as_points_do(compact: bool) -> None:
    neck, _, swing = bent()
    rays = camera_rays(head_camera(torch.tensor([[0.5, 0.1, 0.0], [-0.3, 0.0, 0.1]])), 6, 0.0, 1.0)
    stepped, distances = SteppedRays.of(rays, torch.ones(2), torch.ones(2), neck, swing), 2.3 + torch.rand(72, 3)
    points = stepped.points(distances)
    expected = neck.straighten(points.view(2, -1, 3), swing).view(-1, 3)
    torch.testing.assert_close(stepped.at_rest(points, distances, neck, compact=compact), expected, atol=1e-5, rtol=0)
    assert (expected - points).norm(dim=1).max() > 0.05
    part = stepped[10:20]
    torch.testing.assert_close(part.at_rest(points[30:60], distances[10:20], neck, compact=compact), expected[30:60], atol=1e-5, rtol=0)
    straight = SteppedRays.of(rays, torch.ones(2), torch.ones(2), neck, None)
    assert straight.at_rest(points, distances, neck, compact=compact).equal(points) and straight.points(distances).equal(points)


def test_shoulders_are_looked_for_wherever_they_swing() -> None:
    neck, rest, _ = bent()
    full = torch.zeros(32, 32, 32, dtype=torch.bool)
    full[14:18, 1:3, 24:28] = True  # z y x: a shoulder
    full[20:24, 20:24, 14:18] = True  # and a nose
    reach = swept(full, 1.0, neck, (0.1, 0.0, 0.0))
    assert reach[full].all() and reach[:, 8:].equal(full[:, 8:])  # above the chin nothing swings
    cells = Cells.of(reach, 1.0)
    shoulder = torch.tensor([[0.3125, -0.4375, 0.0]])
    for yaw in (-0.41, 0.0, 0.2):
        turned = neck.swing(torch.tensor([[0.1 + yaw, 0.0, 0.0]]), rest)[0] + torch.eye(3)
        assert bool(cells.occupied((shoulder - neck.pivot) @ turned + neck.pivot)), yaw  # the inverse of a rotation is its transpose


def test_even_weights_give_even_samples() -> None:
    torch.testing.assert_close(guided_bins(torch.full((2, 8), 0.1), 4), torch.tensor([1.0, 3.0, 5.0, 7.0]).expand(2, 4))


def test_jitter_moves_samples_inside_their_shares_alone() -> None:
    jittered = guided_bins(torch.full((500, 8), 0.1), 4, torch.Generator().manual_seed(0))
    assert (jittered >= torch.arange(4) * 2.0).all() and (jittered <= torch.arange(4) * 2.0 + 2).all()
    torch.testing.assert_close(jittered.mean(0), torch.tensor([1.0, 3.0, 5.0, 7.0]), atol=0.1, rtol=0)
    assert jittered.std(0).min() > 0.5  # a uniform place in a width of 2 has .577


def test_samples_lie_where_the_weights_are() -> None:
    weights = torch.zeros(1, 10)
    weights[0, 6] = 0.9
    bins = guided_bins(weights, 9)
    assert ((bins >= 6) & (bins <= 7)).sum() >= 8 and (bins.diff() > 0).all()


def test_shares_of_even_density_add_up_to_the_closed_form() -> None:
    """The outermost samples stand for half a step more, so even samples cover the whole ray."""
    samples, length, extinction = 20, 0.7, 2.5
    raw = math.log(math.expm1(extinction)) + 1
    distances = (2 + length * (torch.arange(samples) + 0.5) / samples).expand(3, -1)
    shares = guided_weights(torch.full((3, samples), raw), distances)
    torch.testing.assert_close(shares.sum(1), torch.full((3,), 1 - math.exp(-extinction * length)))
    assert (shares.diff() < 0).all()
