"""The generator: its parts in order, and the numbers of two known ones."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from talk3d.errors import ConfigError
from talk3d.models.generator import GeneratorConfig, TriplaneGenerator
from talk3d.models.renderer import RendererConfig
from talk3d.models.superresolution import PUBLISHED
from talk3d.ops.geometry import head_camera
from talk3d.presets import FFHQ512, TINY
from talk3d.types import Camera, Triplane

SUPERRESOLUTION = {
    "tiny128": (PUBLISHED["SuperresolutionHybrid2X"], 1),
    "tiny512": (PUBLISHED["SuperresolutionHybrid8XDC"], 2),
}
"""Of the fixtures, with how their stored pictures are thinned out."""


def test_it_paints_and_renders_its_sizes() -> None:
    generator = TriplaneGenerator(TINY).eval()
    ws = generator.mapping(torch.randn(2, 8))
    assert ws.shape == (2, generator.num_ws, 16) and generator.num_ws == 8
    triplane = generator.triplane(ws)
    assert triplane.planes.shape == (2, 3, 4, 32, 32) and triplane.axes == "fixed"
    rendering = generator.render(ws, head_camera(torch.zeros(2, 3)))
    assert rendering.image.shape == (2, 3, 64, 64) and rendering.raw.shape == (2, 3, 16, 16)


def test_render_is_paint_then_render_and_takes_labels() -> None:
    generator = TriplaneGenerator(TINY).eval()
    ws, camera = generator.mapping(torch.randn(2, 8)), head_camera(torch.randn(2, 3) * 0.2)
    expected = generator.render_triplane(generator.triplane(ws), ws[:, -1], camera).image
    assert generator.render(ws, camera).image.equal(expected)
    assert generator.render(ws, camera.to_label()).image.equal(expected)
    assert not generator.render(ws, camera, jitter=True).image.equal(expected)
    assert generator.render(ws, camera, neural_rendering_resolution=9).raw.shape == (2, 3, 9, 9)


def test_c_scale_zero_ignores_the_camera() -> None:
    config = replace(TINY, c_dim=25, mapping_layers=2)
    generator, deaf = TriplaneGenerator(config), TriplaneGenerator(replace(config, c_scale=0.0))
    deaf.load_state_dict(generator.state_dict())
    z, labels = torch.randn(1, 8), torch.randn(2, 1, 25)
    assert deaf.mapping(z, labels[0]).equal(deaf.mapping(z, labels[1]))
    assert not generator.mapping(z, labels[0]).equal(generator.mapping(z, labels[1]))


def test_planes_are_thirds_of_the_channels() -> None:
    generator = TriplaneGenerator(TINY).eval()
    ws = generator.mapping(torch.randn(1, 8))
    flat = generator.backbone["synthesis"](ws)
    torch.testing.assert_close(generator.triplane(ws).planes[:, 1], flat[:, 4:8])


def test_names_and_shapes_are_the_published_ones(shared: Path) -> None:
    """A meta-device model of full size has exactly the published entries."""
    published = json.loads((shared / "fixtures" / "state_dict_keys.json").read_text())["eg3d_ffhq512_128"]
    with torch.device("meta"):
        mine = {name: list(value.shape) for name, value in TriplaneGenerator(FFHQ512).state_dict().items()}
    assert mine == published


@pytest.fixture(scope="module")
def arrays(shared: Path) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    found = {}
    for name in SUPERRESOLUTION:
        weights, expected = (np.load(shared / "fixtures" / f"eg3d_{name}_{kind}.npz") for kind in ("weights", "expected"))
        found[name] = (
            {key: torch.from_numpy(weights[key]) for key in weights.files},
            {key: torch.from_numpy(expected[key]).float() for key in expected.files},
        )
    return found


def make(name: str, axes: str, arrays) -> tuple[TriplaneGenerator, dict[str, torch.Tensor]]:
    renderer = RendererConfig(
        plane_axes=axes,
        neural_rendering_resolution=32,
        depth_resolution=12,
        depth_resolution_importance=12,
        superresolution=SUPERRESOLUTION[name][0],
    )
    generator = TriplaneGenerator(GeneratorConfig(z_dim=64, channel_base=2048, channel_max=32, renderer=renderer)).eval()
    weights, expected = arrays[name]
    generator.load_state_dict(weights, strict=True)
    return generator, expected


@pytest.mark.parametrize("name", SUPERRESOLUTION)
def test_mapping_planes_and_points_of_known_generators(name: str, arrays) -> None:
    generator, expected = make(name, "fixed", arrays)
    with torch.no_grad():
        ws = generator.mapping(expected["z"], expected["c"])
        torch.testing.assert_close(ws, expected["ws"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(generator.mapping(expected["z"], expected["c"], 0.7, 7), expected["ws_trunc_0.7_cut7"], atol=1e-5, rtol=1e-5)
        triplane = generator.triplane(ws)
        flat = triplane.planes.flatten(1, 2)
        torch.testing.assert_close(flat[:1, :, ::4, ::4], expected["planes_every_4th_pixel"], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(torch.stack([flat.mean(), flat.std()]), expected["planes_mean_std"], atol=1e-4, rtol=1e-4)
        first = Triplane(planes=triplane.planes[:1], axes="fixed")
        sigma, colour = generator.query(first, expected["query_points"])
        torch.testing.assert_close(sigma, expected["query_sigma"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(colour, expected["query_rgb"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "axes"), [("tiny128", "fixed"), ("tiny128", "released"), ("tiny512", "fixed")])
def test_pictures_of_known_generators(name: str, axes: str, arrays) -> None:
    generator, expected = make(name, axes, arrays)
    step = SUPERRESOLUTION[name][1]
    count = 1 if name == "tiny512" else 2  # the larger one is slow
    with torch.no_grad():
        rendering = generator.render(expected["ws"][:count], Camera.from_label(expected["c"][:count]))
    torch.testing.assert_close(rendering.raw, expected[f"image_raw_{axes}_axes"][:count], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rendering.depth, expected[f"image_depth_{axes}_axes"][:count], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rendering.image[..., ::step, ::step], expected[f"image_{axes}_axes"][:count], atol=1e-3, rtol=1e-3)


def test_zero_conditioning_ignores_the_camera_as_a_label_of_zeros_would() -> None:
    config = replace(TINY, c_dim=25, mapping_layers=2)
    generator, deaf = TriplaneGenerator(config), TriplaneGenerator(replace(config, c_gen_conditioning_zero=True))
    deaf.load_state_dict(generator.state_dict())
    z, label = torch.randn(1, 8), torch.randn(1, 25)
    assert deaf.mapping(z, label).equal(generator.mapping(z, torch.zeros(1, 25)))
    with pytest.raises(ConfigError, match="give labels"):
        generator.mapping(z)


def test_a_clamp_bounds_the_backbone() -> None:
    free, bounded = TriplaneGenerator(TINY), TriplaneGenerator(replace(TINY, conv_clamp=0.01))
    bounded.load_state_dict(free.state_dict())
    ws = free.mapping(torch.randn(1, 8))
    assert free.triplane(ws).planes.abs().max() > 0.1
    # four resolutions, each adding at most 0.01
    assert 0.01 < bounded.triplane(ws).planes.abs().max() <= 0.04 + 1e-6


def test_the_raw_picture_stays_what_was_rendered() -> None:
    """At the input side of a module that adds without doubling, which needs no resizing, the raw picture is still that before it."""
    sizes = replace(TINY.renderer, superresolution=replace(PUBLISHED["SuperresolutionHybrid2X"], input_side=16, channels=(8, 8)))
    generator = TriplaneGenerator(replace(TINY, renderer=sizes)).eval()
    ws, camera = generator.mapping(torch.randn(1, 8)), head_camera(torch.zeros(1, 3))
    rendering = generator.render(ws, camera)
    features, _, _ = generator.render_rays(generator.triplane(ws), generator.rays(camera, 16))
    torch.testing.assert_close(rendering.raw.flatten(2), 2 * features.transpose(1, 2)[:, :3] - 1)
    assert rendering.raw.equal(rendering.features[:, :3]) and rendering.image.shape[-1] == 32
