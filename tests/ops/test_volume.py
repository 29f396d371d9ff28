"""Sampling and compositing against closed forms and slow twins."""

import math

import pytest
import torch
import torch.nn.functional as F

from talk3d.ops.geometry import head_camera
from talk3d.ops.rays import camera_rays
from talk3d.ops.volume import composite, importance_distances, segment_weights, stratified_distances
from talk3d.types import Rays


def rays(count: int = 3, near: float = 2.25, far: float = 3.3) -> Rays:
    direction = torch.tensor([0.0, 0.0, 1.0]).expand(1, count, 3)
    return Rays(origins=torch.zeros(1, count, 3), directions=direction, near=torch.full((1, count, 1), near), far=torch.full((1, count, 1), far))


def raw_density(extinction: torch.Tensor | float) -> torch.Tensor:
    """The raw density whose softplus(raw - 1) is `extinction`."""
    return torch.log(torch.expm1(torch.as_tensor(extinction, dtype=torch.float64))).float() + 1


def test_without_jitter_samples_are_the_left_edges() -> None:
    torch.testing.assert_close(stratified_distances(rays(), 5), torch.linspace(2.25, 3.3, 5).expand(1, 3, 5))


def test_jitter_moves_samples_inside_their_interval_and_can_be_repeated() -> None:
    found = [stratified_distances(rays(200), 8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert found[0].equal(found[1]) and not found[0].equal(found[2])
    step = 1.05 / 7
    moved = (found[0] - stratified_distances(rays(200), 8)) / step
    assert moved.min() >= -1e-5 and moved.max() <= 1 + 1e-5
    assert moved.mean().item() == pytest.approx(0.5, abs=0.03)


def test_weights_of_constant_density_telescope_to_the_closed_form() -> None:
    distances = torch.sort(torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(3)))[0]
    weights = segment_weights(raw_density(2.5).expand(2, 3, 20), distances)
    assert weights.shape == (2, 3, 19)
    torch.testing.assert_close(weights.sum(-1), 1 - torch.exp(-2.5 * (distances[..., -1] - distances[..., 0])))


def test_weights_equal_a_loop_over_segments() -> None:
    distances, density = torch.sort(torch.rand(1, 1, 7))[0], torch.randn(1, 1, 7)
    found, left = segment_weights(density, distances)[0, 0], 1.0
    for k in range(6):
        middle = (density[0, 0, k] + density[0, 0, k + 1]).item() / 2
        alpha = 1 - math.exp(-math.log1p(math.exp(middle - 1)) * (distances[0, 0, k + 1] - distances[0, 0, k]).item())
        assert found[k].item() == pytest.approx(alpha * left, abs=1e-6)
        left *= 1 - alpha


def test_opacity_of_a_sphere_of_constant_density() -> None:
    """Beer and Lambert: 1 - exp(-extinction · chord), with the chord of every ray known."""
    camera = camera_rays(head_camera(torch.zeros(1, 3)), 9, 2.0, 3.4)
    centre, radius, extinction = torch.tensor([0.0, 0.0, 0.2]), 0.3, 4.0
    distances = stratified_distances(camera, 600)
    points = camera.origins.unsqueeze(-2) + distances.unsqueeze(-1) * camera.directions.unsqueeze(-2)
    inside = (points - centre).norm(dim=-1) < radius
    density = torch.where(inside, raw_density(extinction), torch.tensor(-30.0))
    _, opacity, depth = composite(torch.ones(1, 81, 600, 1), density, distances)
    along = ((centre - camera.origins) * camera.directions).sum(-1)
    off_axis = ((centre - camera.origins).square().sum(-1) - along.square()).clamp(min=0).sqrt()
    chord = 2 * (radius**2 - off_axis.square()).clamp(min=0).sqrt()
    expected = 1 - torch.exp(-extinction * chord)
    assert 10 < (chord > 0).sum() < 81
    torch.testing.assert_close(opacity.squeeze(-1), expected, atol=0.01, rtol=0)
    middle = 40
    # mean distance of absorption along a chord of length c entered at e: e + 1/s - c exp(-s c) / (1 - exp(-s c))
    c, e = 2 * radius, 2.7 - radius
    assert depth[0, middle].item() == pytest.approx(e + 1 / extinction - c / math.expm1(extinction * c), abs=0.004)


def test_composite_equals_midpoint_colours_and_distances() -> None:
    distances, density, features = torch.sort(torch.rand(2, 3, 9))[0], 3 * torch.randn(2, 3, 9), torch.randn(2, 3, 9, 4)
    weights = segment_weights(density, distances)
    colour = (weights.unsqueeze(-1) * (features[..., 1:, :] + features[..., :-1, :]) / 2).sum(-2)
    depth = (weights * (distances[..., 1:] + distances[..., :-1]) / 2).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    rendered, opacity, found = composite(features, density, distances)
    torch.testing.assert_close(rendered, colour)
    torch.testing.assert_close(opacity, weights.sum(-1, keepdim=True))
    torch.testing.assert_close(found, depth)


def test_empty_space_is_black_clear_and_far() -> None:
    distances = torch.linspace(2, 3, 6).expand(1, 2, 6)
    rendered, opacity, depth = composite(torch.ones(1, 2, 6, 3), torch.full((1, 2, 6), -1e3), distances)
    assert rendered.eq(0).all() and opacity.eq(0).all() and depth.eq(3).all()


def test_empty_space_lets_gradients_through() -> None:
    density = torch.tensor([[[-200.0, -200.0, -200.0], [0.0, 5.0, 5.0]]], requires_grad=True)
    distances = torch.tensor([1.0, 2.0, 3.0]).expand(1, 2, 3)
    _, _, depth = composite(torch.ones(1, 2, 3, 1), density, distances)
    (gradient,) = torch.autograd.grad(depth.sum(), density)
    assert gradient.isfinite().all() and not gradient[0, 0].any() and gradient[0, 1].any()


def test_importance_samples_gather_where_the_weights_are() -> None:
    distances = torch.linspace(0, 1, 33).expand(1, 1, 33)
    weights = torch.zeros(1, 1, 32)
    weights[..., 20] = 1.0
    for generator in (None, torch.Generator().manual_seed(0)):
        found = importance_distances(distances, weights, 400, generator)[0, 0]
        near = (found - distances[0, 0, 20]).abs() < 3 / 32
        assert near.float().mean() > 0.85
        assert found.min() >= 0 and found.max() <= 1
    assert importance_distances(distances, weights, 9)[0, 0].diff().ge(0).all()


def test_importance_samples_of_equal_weights_are_even() -> None:
    distances = torch.linspace(0, 1, 33).expand(1, 1, 33)
    found = importance_distances(distances, torch.full((1, 1, 32), 0.1), 5)[0, 0]
    torch.testing.assert_close(found, torch.linspace(0.5 / 32, 30.5 / 32, 5), atol=1e-5, rtol=0)


def test_importance_samples_equal_a_slow_twin() -> None:
    count, wanted = 9, 7
    distances, weights = torch.sort(torch.rand(1, 1, count))[0], torch.rand(1, 1, count - 1)
    found = importance_distances(distances, weights, wanted)[0, 0]
    t, w = distances[0, 0].tolist(), weights[0, 0].tolist()
    peaks = [max(w[max(i - 1, 0) : i + 1]) for i in range(count)]
    smooth = [(peaks[k] + peaks[k + 1]) / 2 + 0.01 for k in range(count - 1)]
    bins = [(t[k] + t[k + 1]) / 2 for k in range(count - 1)]
    inner = [v + 1e-5 for v in smooth[1:-1]]
    cdf = [sum(inner[:k]) / sum(inner) for k in range(len(inner) + 1)]
    for j in range(wanted - 1):
        u = j / (wanted - 1)
        i = max(k for k, value in enumerate(cdf) if value <= u)
        assert found[j].item() == pytest.approx(bins[i] + (u - cdf[i]) / (cdf[i + 1] - cdf[i]) * (bins[i + 1] - bins[i]), abs=1e-5)


def test_importance_samples_carry_no_gradient() -> None:
    distances = torch.linspace(0, 1, 9).expand(1, 1, 9).clone().requires_grad_()
    assert not importance_distances(distances, torch.rand(1, 1, 8, requires_grad=True), 4).requires_grad


def test_gradients_of_weights_and_composite() -> None:
    distances = torch.sort(torch.rand(1, 2, 5, dtype=torch.float64))[0].requires_grad_()
    density = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    features = torch.randn(1, 2, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(segment_weights, (density, distances))
    assert torch.autograd.gradcheck(composite, (features, density, distances))


def test_weights_stay_finite_with_extreme_densities() -> None:
    density = torch.tensor([-1e4, 1e4, -1e4, 1e4, 0.0])
    density.requires_grad_()
    weights = segment_weights(density.view(1, 1, 5), torch.linspace(2, 3, 5).view(1, 1, 5))
    weights.sum().backward()
    assert weights.isfinite().all() and density.grad is not None and density.grad.isfinite().all()
    assert F.relu(weights - 1).sum() == 0


@pytest.mark.parametrize("jitter", [False, True])
def test_disparity_samples_are_even_in_inverse_distance(jitter: bool) -> None:
    found = stratified_distances(rays(50), 8, torch.Generator().manual_seed(0) if jitter else None, disparity=True)
    part = (1 / found - 1 / 2.25) / (1 / 3.3 - 1 / 2.25) * 7 - torch.arange(8)
    if jitter:
        assert part.min() >= -1e-4 and part.max() <= 1 + 1e-4 and part.mean().item() == pytest.approx(0.5, abs=0.05)
    else:
        assert found[0, 0, 0].item() == pytest.approx(2.25) and found[0, 0, -1].item() == pytest.approx(3.3)
        torch.testing.assert_close(part, torch.zeros_like(part), atol=1e-4, rtol=0)


def test_each_ray_has_its_own_limits() -> None:
    own = Rays(**{**vars(rays(2)), "near": torch.tensor([[[1.0], [2.0]]]), "far": torch.tensor([[[2.0], [6.0]]])})
    assert stratified_distances(own, 3)[0].tolist() == [[1.0, 1.5, 2.0], [2.0, 4.0, 6.0]]


def test_white_back_fills_what_is_left() -> None:
    distances, density, features = torch.sort(torch.rand(2, 3, 9))[0], 3 * torch.randn(2, 3, 9), torch.rand(2, 3, 9, 4)
    black, opacity, _ = composite(features, density, distances)
    white, _, _ = composite(features, density, distances, white_back=True)
    torch.testing.assert_close(white, black + 1 - opacity)


def test_depth_is_held_inside_the_distances_of_the_whole_batch() -> None:
    """Backward spans and empty rays: the mean distance may leave the ray's own span, and nothing at all is infinitely far."""
    distances = torch.stack([torch.linspace(2, 3, 6), torch.linspace(4, 5, 6), torch.linspace(-1, -2, 6)])[:, None]
    density = torch.stack([torch.full((6,), -1e3), torch.full((6,), 3.0), torch.full((6,), -1e3)])[:, None]
    depth = composite(torch.ones(3, 1, 6, 2), density, distances)[2]
    assert depth[0].item() == 5 and 4 < depth[1].item() < 5 and depth[2].item() == 5
