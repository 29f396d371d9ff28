"""Rendering of volumes that are known in closed form, and of occupied space only."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from talk3d.errors import ConfigError
from talk3d.models.renderer import GuidedRenderer, PointDecoder, RendererConfig, TriplaneRenderer
from talk3d.models.superresolution import SuperresolutionConfig
from talk3d.ops.geometry import head_camera, move_camera, project, rotation_from_vector
from talk3d.ops.planes import project_points, sample_planes
from talk3d.ops.rays import limit_to_occupied
from talk3d.ops.volume import segment_weights, stratified_distances
from talk3d.types import Rays, Triplane

SIZES = RendererConfig(
    w_dim=6,
    plane_channels=4,
    plane_resolution=16,
    decoder_hidden=8,
    feature_channels=5,
    neural_rendering_resolution=12,
    depth_resolution=24,
    depth_resolution_importance=24,
    superresolution=SuperresolutionConfig(input_side=12, channels=(4, 4), up=(False, True), matte=True),
)


class Blob(nn.Module):
    """Decoder of a volume given by formula instead: planes of coordinates come in, a grey ball comes out."""

    radius, extinction = 0.25, 60.0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        position = x[..., :3]
        inside = (position - torch.tensor([0.0, 0.1, 0.0])).norm(dim=-1, keepdim=True) < self.radius
        inside = inside & (x[..., 3:] > 2.9)  # all three planes were hit
        density = torch.where(inside, math.log(math.expm1(self.extinction)) + 1, -30.0)
        return density, torch.cat([torch.full_like(x[..., :3], 0.75), position[..., :2] + 0.5], -1)


def coordinate_planes(side: int = 64) -> Triplane:
    """Planes whose mean at a point is the point itself, and as fourth number 3 as long as it is inside the cube."""
    centres = (torch.arange(side) + 0.5) / side - 0.5
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    planes = torch.zeros(1, 3, 4, side, side)
    planes[0, 0, 0], planes[0, 0, 1], planes[0, 1, 2] = columns, rows, rows
    planes[:, :, 3] = 1
    return Triplane(planes=3 * planes, axes="fixed")


def ball() -> TriplaneRenderer:
    torch.manual_seed(0)
    renderer = TriplaneRenderer(SIZES)
    setattr(renderer, "decoder", Blob())  # noqa: B010
    return renderer


def random_volume(batch: int = 1) -> tuple[TriplaneRenderer, Triplane]:
    torch.manual_seed(0)
    renderer = TriplaneRenderer(SIZES)
    return renderer, Triplane(planes=2 * torch.randn(batch, 3, 4, 16, 16), axes="fixed")


def test_decoder_is_two_layers_with_softplus_and_stretched_sigmoid() -> None:
    decoder = PointDecoder(4, 8, 5)
    x = torch.randn(2, 3, 4)
    density, features = decoder(x)
    out = decoder.net[2](torch.log1p(torch.exp(decoder.net[0](x))))
    torch.testing.assert_close(density, out[..., :1])
    torch.testing.assert_close(features, 1.002 / (1 + torch.exp(-out[..., 1:])) - 0.001)


def test_query_looks_up_and_decodes() -> None:
    renderer, triplane = random_volume()
    points = torch.rand(1, 9, 3) - 0.5
    found = renderer.query(triplane, points)
    expected = renderer.decoder(sample_planes(triplane.planes, project_points(points, "fixed", 1.0)))
    torch.testing.assert_close(found, expected)
    outside = renderer.query(triplane, torch.full((1, 1, 3), 2.0))
    torch.testing.assert_close(outside, renderer.decoder(torch.zeros(1, 1, 4)))


def test_shapes_and_ranges() -> None:
    renderer, triplane = random_volume(2)
    rendering = renderer.render_triplane(triplane, torch.randn(2, 6), head_camera(torch.randn(2, 3) * 0.2))
    assert rendering.image.shape == (2, 3, 24, 24) and rendering.alpha.shape == (2, 1, 24, 24)
    assert rendering.raw.shape == (2, 3, 12, 12) and rendering.features.shape == (2, 5, 12, 12)
    assert rendering.raw.equal(rendering.features[:, :3])
    assert rendering.raw_alpha.min() >= 0 and rendering.raw_alpha.max() <= 1 + 1e-5
    assert rendering.depth.min() >= 2.25 and rendering.depth.max() <= 3.3 + 1e-5
    small = renderer.render_triplane(triplane, torch.randn(2, 6), head_camera(torch.zeros(2, 3)), neural_rendering_resolution=5)
    assert small.raw.shape == (2, 3, 5, 5) and small.image.shape == (2, 3, 24, 24)


def test_a_ball_appears_where_the_camera_sees_it() -> None:
    renderer, camera = ball(), head_camera(torch.tensor([[0.5, -0.2, 0.0]]))
    side = 48
    rendering = renderer.render_triplane(coordinate_planes(), torch.zeros(1, 6), camera, neural_rendering_resolution=side)
    mask = rendering.raw_alpha[0, 0] > 0.5
    rows, columns = mask.nonzero().float().add(0.5).div(side).mean(0)
    centre = project(torch.tensor([[0.0, 0.1, 0.0]]), camera[0])[0]
    assert (columns.item(), rows.item()) == pytest.approx(centre.tolist(), abs=0.5 / side)
    distance = (camera.cam2world[0, :3, 3] - torch.tensor([0.0, 0.1, 0.0])).norm().item()
    radius = camera.intrinsics[0, 0, 0].item() * math.tan(math.asin(Blob.radius / distance))
    assert mask.float().mean().item() == pytest.approx(math.pi * radius**2, rel=0.06)
    # solid grey inside, nothing outside, and the nearest depth is the front of the ball
    assert rendering.raw[0, :, mask].mean().item() == pytest.approx(0.5, abs=0.03)
    assert rendering.raw[0, :, 0, 0].tolist() == pytest.approx([-1, -1, -1])
    assert rendering.depth[0, 0][mask].min().item() == pytest.approx(distance - Blob.radius, abs=0.03)


def test_everything_occupied_equals_full_rendering_inside_the_cube() -> None:
    """With spans that end inside the cube both look at the same samples."""
    torch.manual_seed(0)
    renderer = TriplaneRenderer(RendererConfig(**{**vars(SIZES), "ray_start": 2.75, "ray_end": 3.05, "box_warp": 1.2}))
    triplane = Triplane(planes=2 * torch.randn(2, 3, 4, 16, 16), axes="fixed")
    w, camera = torch.randn(2, 6), head_camera(torch.tensor([[0.1, 0.0, 0.0], [-0.2, 0.1, 0.0]]))
    whole = renderer.render_triplane(triplane, w, camera)
    limited = renderer.render_triplane(triplane, w, camera, occupied=torch.ones(16, 16, 16, dtype=torch.bool))
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(limited, name), value, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_tight_occupancy_renders_nearly_the_same() -> None:
    renderer, planes = ball(), coordinate_planes()
    occupied = renderer.occupancy(planes, side=64)
    assert 0.05 < occupied.float().mean() < 0.3
    camera = head_camera(torch.tensor([[0.3, 0.1, 0.0]]))
    whole = renderer.render_triplane(planes, torch.zeros(1, 6), camera, neural_rendering_resolution=32)
    limited = renderer.render_triplane(planes, torch.zeros(1, 6), camera, neural_rendering_resolution=32, occupied=occupied)
    assert (whole.raw - limited.raw).abs().mean() < 0.02 and (whole.raw_alpha - limited.raw_alpha).abs().mean() < 0.01
    assert limited.raw_alpha[0, 0, 0, 0] == 0 and limited.depth[0, 0, 0, 0].item() == pytest.approx(3.3)


def test_where_nothing_is_occupied_the_picture_is_black() -> None:
    renderer, triplane = random_volume()
    nothing = torch.zeros(8, 8, 8, dtype=torch.bool)
    rendering = renderer.render_triplane(triplane, torch.zeros(1, 6), head_camera(torch.zeros(1, 3)), occupied=nothing)
    assert rendering.raw.eq(-1).all() and rendering.raw_alpha.eq(0).all() and torch.allclose(rendering.depth, torch.tensor(3.3))


def test_occupied_rendering_gives_each_volume_of_a_batch_its_own_picture() -> None:
    renderer, triplane = random_volume(2)
    occupied = torch.zeros(16, 16, 16, dtype=torch.bool)
    occupied[4:12, 5:11, 3:12] = True
    w, camera = torch.randn(2, 6), head_camera(torch.tensor([[0.3, 0.1, 0.0], [-0.4, 0.0, 0.0]]))
    together = renderer.render_triplane(triplane, w, camera, occupied=occupied)
    for i in range(2):
        alone = Triplane(planes=triplane.planes[i : i + 1], axes="fixed")
        one = renderer.render_triplane(alone, w[i : i + 1], camera[i : i + 1], occupied=occupied)
        torch.testing.assert_close(together.image[i : i + 1], one.image, atol=1e-5, rtol=1e-4)


def test_gradients_reach_planes_through_occupied_rendering() -> None:
    renderer, triplane = random_volume()
    planes = triplane.planes.requires_grad_()
    occupied = torch.zeros(16, 16, 16, dtype=torch.bool)
    occupied[4:12, 5:11, 3:12] = True
    rendering = renderer.render_triplane(Triplane(planes=planes, axes="fixed"), torch.zeros(1, 6), head_camera(torch.zeros(1, 3)), occupied=occupied)
    rendering.image.square().sum().backward()
    assert planes.grad is not None and planes.grad.isfinite().all() and planes.grad.abs().sum() > 0


def test_occupancy_holds_the_ball_with_a_margin_in_z_y_x_order() -> None:
    occupied = ball().occupancy(coordinate_planes(), side=32, dilation=2)
    centres = (torch.arange(32) + 0.5) / 32 - 0.5
    z, y, x = torch.meshgrid(centres, centres, centres, indexing="ij")
    distance = (torch.stack([x, y, z], -1) - torch.tensor([0.0, 0.1, 0.0])).norm(dim=-1)
    assert occupied[distance < Blob.radius].all()
    assert not occupied[distance > Blob.radius + 3 * math.sqrt(3) / 32].any()


def test_jitter_is_repeatable_and_its_absence_deterministic() -> None:
    renderer, triplane = random_volume()
    w, camera = torch.randn(1, 6), head_camera(torch.zeros(1, 3))
    still = renderer.render_triplane(triplane, w, camera).image
    assert still.equal(renderer.render_triplane(triplane, w, camera).image)
    jittered = [renderer.render_triplane(triplane, w, camera, generator=torch.Generator().manual_seed(seed)).image for seed in (1, 1, 2)]
    assert jittered[0].equal(jittered[1]) and not jittered[0].equal(jittered[2])


def changed(**settings) -> tuple[TriplaneRenderer, Triplane]:
    """The random volume with other settings and the same weights."""
    renderer, triplane = random_volume()
    other = TriplaneRenderer(replace(SIZES, **settings))
    other.load_state_dict(renderer.state_dict())
    return other, triplane


def test_space_that_nothing_fills_is_white_with_white_back() -> None:
    camera, w = head_camera(torch.tensor([[0.2, 0.1, 0.0]])), torch.randn(1, 6)
    black, triplane = random_volume()
    white, _ = changed(white_back=True)
    on_black, on_white = (renderer.render_triplane(triplane, w, camera) for renderer in (black, white))
    torch.testing.assert_close(on_white.raw, on_black.raw + 2 * (1 - on_black.raw_alpha))
    nothing = torch.zeros(8, 8, 8, dtype=torch.bool)
    assert white.render_triplane(triplane, w, camera, occupied=nothing).features.eq(1).all()


def test_automatic_limits_see_the_whole_cube_and_nothing_else() -> None:
    """A cube of even density: the opacity of a ray follows from how long it is inside; samples elsewhere would see the decoder's zero density."""
    renderer, triplane = changed(ray_start="auto", ray_end="auto", depth_resolution_importance=0, box_warp=0.5)

    class Even(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.full_like(x[..., :1], math.log(math.expm1(3.0)) + 1), torch.zeros_like(x[..., :1]).expand(*x.shape[:-1], 5)

    setattr(renderer, "decoder", Even())  # noqa: B010
    rays = renderer.rays(head_camera(torch.tensor([[0.3, 0.1, 0.0]])), 11)
    _, opacity, _ = renderer.render_rays(triplane, rays)
    torch.testing.assert_close(opacity, 1 - torch.exp(-3 * (rays.far - rays.near)))


def test_one_automatic_limit_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="'auto' for both"):
        replace(SIZES, ray_start="auto")


def test_density_noise_is_for_training_with_randomness() -> None:
    renderer, triplane = changed(density_noise=2.0)
    w, camera = torch.randn(1, 6), head_camera(torch.zeros(1, 3))

    def picture(mode: bool, seeded: bool, model: TriplaneRenderer) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0) if seeded else None
        return model.train(mode).render_triplane(triplane, w, camera, generator=generator).raw

    plain, _ = random_volume()
    assert picture(True, False, renderer).equal(picture(True, False, plain))
    assert picture(False, True, renderer).equal(picture(False, True, plain))
    assert not torch.allclose(picture(True, True, renderer), picture(True, True, plain))


def test_disparity_sampling_puts_samples_nearer() -> None:
    even, triplane = random_volume()
    near, _ = changed(disparity_space_sampling=True)
    camera = head_camera(torch.zeros(1, 3))
    rays = near.rays(camera, 5)
    distances = stratified_distances(rays, SIZES.depth_resolution, disparity=True)
    weights = segment_weights(near._decode(triplane, rays, distances, None)[0], distances)
    assert distances.mean() < stratified_distances(rays, SIZES.depth_resolution).mean() and weights.isfinite().all()
    assert not torch.allclose(near.render_rays(triplane, rays)[0], even.render_rays(triplane, rays)[0])


def test_the_decoder_scales_with_its_learning_rate_factor() -> None:
    plain, scaled = PointDecoder(4, 8, 5), PointDecoder(4, 8, 5, lr=0.5)
    with torch.no_grad():
        for layer in (0, 2):
            scaled.net[layer].weight.copy_(2 * plain.net[layer].weight)
            scaled.net[layer].bias.copy_(2 * plain.net[layer].bias.normal_())
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(scaled(x), plain(x))


def test_features_are_what_super_resolution_is_given() -> None:
    renderer, triplane = random_volume(2)
    camera, occupied = head_camera(torch.randn(2, 3) * 0.2), torch.rand(8, 8, 8) > 0.3
    whole = renderer.render_triplane(triplane, torch.randn(2, 6), camera, occupied=occupied)
    features, alpha, depth = renderer.render_features(triplane, camera, SIZES.neural_rendering_resolution, occupied=occupied)
    assert features.equal(whole.features) and alpha.equal(whole.raw_alpha) and depth.equal(whole.depth)


def test_one_style_serves_all_volumes() -> None:
    renderer, triplane = random_volume(2)
    w, camera = torch.randn(1, 6), head_camera(torch.randn(2, 3) * 0.2)
    expected = renderer.render_triplane(triplane, w.expand(2, -1), camera).image
    torch.testing.assert_close(renderer.render_triplane(triplane, w, camera).image, expected, atol=1e-5, rtol=1e-4)


def smooth_head() -> tuple[TriplaneRenderer, Triplane]:
    """A volume with a soft surface: planes of low frequencies, and a decoder that looks at them closely."""
    torch.manual_seed(2)
    renderer = TriplaneRenderer(replace(SIZES, depth_resolution=48, depth_resolution_importance=48))
    coarse = torch.nn.functional.interpolate(torch.randn(6, 4, 4, 4), size=(16, 16), mode="bicubic").view(2, 3, 4, 16, 16)
    window = (1 - torch.linspace(-1, 1, 16).square()).clamp(min=0)
    with torch.no_grad():
        layer = renderer.decoder.net[2]
        layer.weight[0] *= 25
        layer.bias[0] = 10
    return renderer, Triplane(planes=8 * coarse * window * window[:, None], axes="fixed")


def test_guided_rendering_looks_like_the_plain_one() -> None:
    renderer, volumes = smooth_head()
    camera = head_camera(torch.tensor([[0.3, 0.1, 0.0], [-0.4, 0.0, 0.0]]))
    occupied = renderer.occupancy(Triplane(planes=volumes.planes[:1], axes="fixed"), side=32) | renderer.occupancy(
        Triplane(planes=volumes.planes[1:], axes="fixed"), side=32
    )
    with torch.no_grad():
        plain = renderer.render_triplane(volumes, torch.zeros(1, 6), camera, occupied=occupied)
        guided = GuidedRenderer(renderer, occupied, torch.float32)
        guided.num_coarse, guided.num_fine = 48, 24  # this volume is all wisps
        features, alpha, depth = guided(list(volumes.planes.unbind(1)), camera)
        assert 0.1 < float(plain.raw_alpha.mean()) < 0.9
        assert float((alpha - plain.raw_alpha).square().mean()) < 10**-4 and float((features - plain.features).square().mean() / 4) < 10**-4
        solid = plain.raw_alpha > 0.5
        assert float((depth - plain.depth)[solid].abs().mean()) < 0.01
        guided.compact = False  # as on a GPU: all points are looked at, and what is empty is told so
        for found, expected in zip(guided(list(volumes.planes.unbind(1)), camera)[:2], (features, alpha), strict=True):
            assert float((found - expected).square().mean()) < 10**-5  # rays that hardly see anything are left out on the CPU


def test_bent_necks_look_alike_in_all_ways_of_rendering() -> None:
    renderer, volumes = smooth_head()
    place = (1.05, 0.0, 0.1, 0.0, 0.0, 0.02, 0.0)
    renderer.renderer_config = replace(renderer.renderer_config, rest_pose=(0.1, 0.0, 0.0), throat_y=-0.24, head_space=place)
    camera, held = head_camera(torch.tensor([[0.3, 0.1, 0.0], [-0.4, 0.0, 0.0]])), torch.tensor([[0.5, 0.1, 0.0], [-0.5, 0.1, 0.1]])
    everywhere = torch.ones(8, 8, 8, dtype=torch.bool)
    with torch.no_grad():
        straight = renderer.render_triplane(volumes, torch.zeros(1, 6), camera, occupied=everywhere)
        bent = renderer.renderer_config.bent(volumes, held)
        plain = renderer.render_triplane(bent, torch.zeros(1, 6), camera, occupied=everywhere)
        guided = GuidedRenderer(renderer, everywhere, torch.float32)
        guided.num_coarse, guided.num_fine = 48, 24
        for guided.compact in (True, False):
            features, alpha, _ = guided(list(volumes.planes.unbind(1)), camera, held)
            assert float((alpha - plain.raw_alpha).square().mean()) < 10**-4 and float((features - plain.features).square().mean() / 4) < 10**-4
        rays, hit = limit_to_occupied(renderer.rays(camera, 12), everywhere, renderer.renderer_config.box_warp)
        for together, alone in zip(
            renderer._render_all(bent, rays, hit, None), renderer._render_hit(bent, rays, hit, torch.Generator()), strict=True
        ):
            assert float((together - alone).square().mean()) < 10**-3  # one of them jittered
    moved = (plain.features - straight.features).abs().mean((0, 1, 3))  # of each row, from above
    assert float(moved[:4].max()) < 1e-3 < 0.05 < float(moved[-3:].max())
    assert (
        renderer.renderer_config.bent(volumes, None) is volumes and replace(renderer.renderer_config, rest_pose=None).bent(volumes, held) is volumes
    )


def test_samples_of_training_show_and_teach_what_many_samples_do() -> None:
    """Its slow twin takes 192 samples on every ray, all with gradients; training takes 48, jittered, where a look found something."""
    renderer, volumes = smooth_head()
    camera = head_camera(torch.tensor([[0.3, 0.1, 0.0], [-0.4, 0.0, 0.0]]))
    twin = TriplaneRenderer(replace(renderer.renderer_config, depth_resolution=192, depth_resolution_importance=0))
    twin.load_state_dict(renderer.state_dict())
    occupied = renderer.occupancy(Triplane(planes=volumes.planes[:1], axes="fixed"), side=32)
    results = []
    for one, generator in ((renderer, torch.Generator().manual_seed(0)), (twin, None)):
        planes = volumes.planes.clone().requires_grad_()
        moved = Triplane(planes=planes, axes="fixed")
        found = one.render_triplane(moved, torch.zeros(1, 6), camera, generator=generator, occupied=occupied)
        (found.features.square().sum() + found.raw_alpha.square().sum() + found.depth.sum()).backward()
        assert planes.grad is not None
        results.append((found.features.detach(), found.raw_alpha.detach(), found.depth.detach(), planes.grad.flatten()))
    (features, alpha, depth, slope), (true_features, true_alpha, true_depth, true_slope) = results
    assert float((alpha - true_alpha).square().mean()) < 10**-4 and float((features - true_features).square().mean()) < 10**-4
    assert float((depth - true_depth)[true_alpha > 0.5].abs().mean()) < 0.01
    assert float(torch.cosine_similarity(slope, true_slope, dim=0)) > 0.99 and float(slope.norm() / true_slope.norm()) == pytest.approx(1, abs=0.05)


def test_guided_rendering_of_nothing_is_black_or_white() -> None:
    renderer, _ = random_volume()
    planes = [torch.zeros(1, 4, 16, 16)] * 3
    for white, level in ((False, -1.0), (True, 1.0)):
        changed_renderer = TriplaneRenderer(replace(SIZES, white_back=white))
        changed_renderer.load_state_dict(renderer.state_dict())
        with torch.no_grad():
            changed_renderer.decoder.net[2].bias[0] = -50
            guided = GuidedRenderer(changed_renderer, torch.zeros(8, 8, 8, dtype=torch.bool), torch.float32)
            features, alpha, depth = guided(planes, head_camera(torch.zeros(1, 3)))
        assert features.eq(level).all() and alpha.eq(0).all() and depth.isfinite().all()


def test_planes_that_lie_elsewhere_in_head_space_are_seen_by_moved_cameras() -> None:
    renderer, volumes = smooth_head()
    one = Triplane(planes=volumes.planes[:1], axes="fixed")
    place = (1.1, 0.1, -0.2, 0.05, 0.02, -0.03, 0.01)
    camera, everywhere = head_camera(torch.tensor([[0.3, 0.1, 0.0]])), torch.ones(8, 8, 8, dtype=torch.bool)
    turn, shift = rotation_from_vector(torch.tensor(place[1:4])), torch.tensor(place[4:])
    moved = move_camera(camera, place[0], turn, shift)
    with torch.no_grad():
        limits = replace(renderer.renderer_config, ray_start=1.1 * 2.25, ray_end=1.1 * 3.3)  # of a head that is larger in the planes' space
        results = []
        for config, seen_from in ((limits, moved), (replace(renderer.renderer_config, head_space=place), camera)):
            renderer.renderer_config = config
            plain = renderer.render_triplane(one, torch.zeros(1, 6), seen_from)
            guided = GuidedRenderer(renderer, everywhere, torch.float32)(list(one.planes.unbind(1)), seen_from)
            results.append((plain.image, plain.depth, *guided))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert float(results[0][0].std()) > 0.01


def test_all_volumes_together_look_and_teach_as_one_after_the_other() -> None:
    renderer, triplane = random_volume(3)
    camera = head_camera(torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.1, 0.0], [-0.4, 0.0, 0.1]]))
    occupied = torch.zeros(16, 16, 16, dtype=torch.bool)
    occupied[4:12, 3:9, 5:13] = True
    rays, hit = limit_to_occupied(renderer.rays(camera, 12), occupied, renderer.renderer_config.box_warp)
    assert hit.any(1).all() and not hit.all()
    together = renderer._render_all(triplane, rays, hit, None)
    for number in range(3):
        index = hit[number].nonzero()[:, 0]
        one = Rays(**{name: getattr(rays, name)[number : number + 1, index] for name in ("origins", "directions", "near", "far")})
        alone = renderer.render_found(Triplane(planes=triplane.planes[number : number + 1], axes=triplane.axes), one, None)
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[number : number + 1, index], part, atol=1e-5, rtol=1e-4)
    features, alpha, depth = (x[~hit] for x in together)
    assert features.eq(0).all() and alpha.eq(0).all() and depth.equal(rays.far[~hit])
