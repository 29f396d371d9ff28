"""Super-resolution: the published sizes, what reaches the picture, and what stays as it was."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from talk3d.models.stylegan2 import resize_to
from talk3d.models.superresolution import PUBLISHED, BakedConv, BakedSuperresolution, Superresolution, SuperresolutionConfig
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


def published(name: str, **changes) -> Superresolution:
    """A published module with little in it: a tenth of its channels are enough to see sizes."""
    config = PUBLISHED[f"SuperresolutionHybrid{name}"]
    return Superresolution(replace(config, channels=(4, 4), **changes), feature_channels=6, w_dim=5)


@pytest.mark.parametrize(("name", "side", "expected"), [("8X", 150, 512), ("2X", 80, 128), ("4X", 64, 256), ("4X", 160, 320), ("Deepfp32", 160, 320)])
def test_only_the_fourfold_ones_take_larger_features_as_they_are(name: str, side: int, expected: int) -> None:
    with torch.no_grad():
        image, alpha = published(name)(*inputs(side))
    assert image.shape[-1] == alpha.shape[-1] == expected


def test_resizing_is_antialiased_where_the_file_says_so() -> None:
    for name, antialias in (("2X", True), ("2X", False)):
        network = published(name, input_side=8, antialias=antialias)
        features, alpha, w = inputs(13)
        resized = F.interpolate(features, size=(8, 8), mode="bilinear", align_corners=False, antialias=antialias)
        torch.testing.assert_close(network(features, alpha, w)[0], network(resized, alpha[..., :8, :8], w)[0])
        other = F.interpolate(features, size=(8, 8), mode="bilinear", align_corners=False, antialias=not antialias)
        assert not torch.allclose(network(features, alpha, w)[0], network(other, alpha[..., :8, :8], w)[0])
    assert not PUBLISHED["SuperresolutionHybridDeepfp32"].antialias


def test_a_clamp_bounds_every_layer() -> None:
    features, alpha, w = inputs()
    free, bounded = published("2X", input_side=8), published("2X", input_side=8, conv_clamp=0.4)
    bounded.load_state_dict(free.state_dict())
    with torch.no_grad():
        loose = published("2X", input_side=8, conv_clamp=1e6)
        loose.load_state_dict(free.state_dict())
        assert loose(features, alpha, w)[0].equal(free(features, alpha, w)[0])
        x, image = bounded.block0(features, features[:, :3], w[:, None].expand(-1, 3, -1), noise=False)
        assert x.abs().max() <= 0.4 and (image - features[:, :3]).abs().max() <= 0.4 + 1e-6
        x, image = free.block0(features, features[:, :3], w[:, None].expand(-1, 3, -1), noise=False)
        assert x.abs().max() > 0.4 and (image - features[:, :3]).abs().max() > 0.4


def test_the_published_modules_store_their_filter_but_for_one() -> None:
    for name, config in PUBLISHED.items():
        with torch.device("meta"):
            stored = Superresolution(config, feature_channels=32, w_dim=512).state_dict()
        assert ("resample_filter" in stored) == (name != "SuperresolutionHybrid8XDC")
        assert stored["block0.conv0.weight"].shape == (config.channels[0], 32, 3, 3)


def test_one_style_for_all_samples_equals_the_same_for_each() -> None:
    network = make(True).double()
    features, alpha, _ = (x.double() for x in inputs())
    w, towards = torch.randn(1, 5).double(), torch.randn(2, 3, 32, 32).double()

    def gradients(style: torch.Tensor) -> list[torch.Tensor]:
        network.zero_grad()
        image, _ = network(features, alpha, style)
        (image * towards).sum().backward()
        return [image.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]

    for found, expected in zip(gradients(w), gradients(w.expand(2, -1)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize(("matte", "up", "clamp"), [(True, (True, True), None), (False, (False, True), 0.4), (False, (True, False), 256.0)])
def test_baked_it_does_the_same(matte: bool, up: tuple[bool, bool], clamp: float | None) -> None:
    config = SuperresolutionConfig(input_side=8, channels=(4, 6), up=up, matte=matte, conv_clamp=clamp)
    network = Superresolution(config, feature_channels=6, w_dim=5)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    features, alpha, w = inputs(5)
    with torch.no_grad():
        expected = network(features, alpha, w[:1])
        found = BakedSuperresolution(network, w[:1], torch.float32)(features, alpha)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_both_ways_to_double_the_sides_agree() -> None:
    layer = make(True).block0.conv0
    torch.nn.init.normal_(layer.bias)
    x, w = torch.randn(2, 6, 8, 8), torch.randn(1, 5)
    with torch.no_grad():
        found = [BakedConv.of_layer(layer, w, torch.float32, fourfold=fourfold)(x) for fourfold in (False, True)]
        torch.testing.assert_close(found[0], layer(x, w, noise=False), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    assert found[1].is_contiguous(memory_format=torch.channels_last)
