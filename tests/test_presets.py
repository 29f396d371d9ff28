"""The presets fit together, and are the sizes they are named after."""

import pytest
import torch

from talk3d.models.deltaplane import DeltaplanePredictor
from talk3d.models.generator import GeneratorConfig, TriplaneGenerator
from talk3d.presets import BUILTIN256, FFHQ512, TINY, TINY_AVATAR
from talk3d.stages.train import avatar_sizes


@pytest.mark.parametrize(("sizes", "side"), [(TINY, 64), (BUILTIN256, 256), (FFHQ512, 512)])
def test_pictures_have_the_named_size_and_rays_feed_super_resolution(sizes: GeneratorConfig, side: int) -> None:
    renderer = sizes.renderer
    assert renderer.superresolution.output_side == side
    assert renderer.neural_rendering_resolution <= renderer.superresolution.input_side
    assert renderer.plane_axes == "fixed" and renderer.plane_resolution % 8 == 0


@pytest.mark.parametrize("sizes", [TINY, BUILTIN256])
def test_ours_refine_the_matte_and_take_normally_distributed_codes(sizes: GeneratorConfig) -> None:
    assert sizes.renderer.superresolution.matte and sizes.mapping_layers == 0 and sizes.c_dim == 0


def test_the_published_one_has_the_published_number_of_weights() -> None:
    with torch.device("meta"):
        generator = TriplaneGenerator(FFHQ512)
    assert sum(parameter.numel() for parameter in generator.parameters()) == 30_662_136


@pytest.mark.parametrize("sizes", [TINY, BUILTIN256])
def test_talking_parts_fit_their_generators(sizes: GeneratorConfig) -> None:
    configs = [avatar_sizes(sizes.renderer)] + [TINY_AVATAR] * (sizes is TINY)
    for config in configs:
        deltaplane = config.deltaplane
        assert (deltaplane.plane_channels, deltaplane.plane_resolution) == (sizes.renderer.plane_channels, sizes.renderer.plane_resolution)
        assert deltaplane.token_width == config.conditioning.token_width and deltaplane.widths[2] % deltaplane.head_width == 0
        assert deltaplane.num_bases + deltaplane.num_near == config.conditioning.num_coefficients
        with torch.device("meta"):
            DeltaplanePredictor(deltaplane)
