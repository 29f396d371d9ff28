"""Super-resolution: the published sizes, what reaches the picture, and what stays as it was."""

import pytest
import torch

from talk3d.models.stylegan2 import resize_to
from talk3d.models.superresolution import PUBLISHED, Superresolution, SuperresolutionConfig
from talk3d.ops.resample import upsample2

SIDES = {"8XDC": 512, "8X": 512, "4X": 256, "Deepfp32": 256, "2X": 128}


@pytest.mark.parametrize("name", SIDES)
def test_published_sizes(name: str) -> None:
    assert PUBLISHED[f"SuperresolutionHybrid{name}"].output_side == SIDES[name]


def inputs(side: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 6, side, side), torch.rand(2, 1, side, side), torch.randn(2, 5)


def make(matte: bool, up: tuple[bool, bool] = (True, True), input_side: int = 8) -> Superresolution:
    return Superresolution(SuperresolutionConfig(input_side=input_side, channels=(4, 4), up=up, matte=matte), feature_channels=6, w_dim=5)


@pytest.mark.parametrize("matte", [False, True])
@pytest.mark.parametrize(("side", "up"), [(8, (True, True)), (5, (False, True)), (16, (True, False))])
def test_shapes(matte: bool, side: int, up: tuple[bool, bool]) -> None:
    network = make(matte, up)
    image, alpha = network(*inputs(side))
    assert image.shape == (2, 3, network.config.output_side, network.config.output_side) and alpha.shape == (2, 1, *image.shape[2:])


@pytest.mark.parametrize("matte", [False, True])
def test_without_contributions_it_upsamples_the_raw_picture(matte: bool) -> None:
    network = make(matte)
    with torch.no_grad():
        for block in (network.block0, network.block1):
            block.torgb.weight.zero_()
    features, alpha, w = inputs()
    image, refined = network(features, alpha, w)
    torch.testing.assert_close(image, upsample2(upsample2(features[:, :3])))
    expected = (upsample2(upsample2(2 * alpha - 1)) + 1) / 2 if matte else resize_to(alpha, 32)
    torch.testing.assert_close(refined, expected)


def test_every_layer_uses_the_style_row_and_no_noise() -> None:
    network = make(True)
    with torch.no_grad():
        for block in (network.block0, network.block1):
            for layer in (block.conv0, block.conv1):
                layer.noise_strength.fill_(5.0)
    features, alpha, w = inputs()
    image, _ = network(features, alpha, w)
    with torch.no_grad():
        for block in (network.block0, network.block1):
            for layer in (block.conv0, block.conv1):
                layer.noise_const.zero_()
    torch.testing.assert_close(network(features, alpha, w)[0], image)
    assert not torch.allclose(network(features, alpha, 2 * w)[0], image)


def test_features_are_not_written_into() -> None:
    features, alpha, w = inputs()
    kept = features.clone()
    make(False, (False, True))(features, alpha, w)
    assert features.equal(kept)
