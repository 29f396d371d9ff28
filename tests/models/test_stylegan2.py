"""Mapping and synthesis: which rows drive what, truncation, and sizes."""

import math

import pytest
import torch

from talk3d.errors import ConfigError
from talk3d.models.stylegan2 import MappingNetwork, SynthesisBlock, SynthesisNetwork, resize_to
from talk3d.ops.resample import upsample2


def test_mapping_without_layers_is_affine_in_the_normalised_latent() -> None:
    network = MappingNetwork(z_dim=6, c_dim=0, w_dim=5, num_ws=4, num_layers=0)
    z = torch.randn(3, 6)
    ws = network(z)
    unit = z / z.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(ws, (unit @ network.affine.weight.T / math.sqrt(6) + network.affine.bias)[:, None].expand(3, 4, 5))
    torch.testing.assert_close(network(10 * z), ws)


def test_mapping_with_layers_and_label_equals_the_formula() -> None:
    network = MappingNetwork(z_dim=6, c_dim=25, w_dim=5, num_ws=2)
    z, label = torch.randn(3, 6), torch.randn(3, 25)

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()

    x = torch.cat([unit(z), unit(label @ network.embed.weight.T / 5)], 1)
    for layer in (network.fc0, network.fc1):
        x = x @ layer.weight.T * 0.01 / math.sqrt(x.shape[1]) + 0.01 * layer.bias
        x = torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)
    torch.testing.assert_close(network(z, label)[:, 0], x)
    with pytest.raises(ConfigError, match="conditioned on 25"):
        network(z)


def test_truncation_moves_rows_before_the_cutoff_towards_the_average() -> None:
    network = MappingNetwork(z_dim=6, c_dim=0, w_dim=5, num_ws=4, num_layers=0)
    network.w_avg.normal_()
    z = torch.randn(2, 6)
    ws, average = network(z), network.w_avg
    torch.testing.assert_close(network(z, None, 0.0), average.expand(2, 4, 5))
    torch.testing.assert_close(network(z, None, 0.7), average + 0.7 * (ws - average))
    torch.testing.assert_close(network(z, None, 0.7, 3), torch.cat([average + 0.7 * (ws[:, :3] - average), ws[:, 3:]], 1))


def test_synthesis_has_the_channels_rows_and_sides_of_its_config() -> None:
    network = SynthesisNetwork(w_dim=5, resolution=16, image_channels=12, channel_base=64, channel_max=8)
    assert network.num_ws == 6 and network.resolutions == [4, 8, 16]
    assert [getattr(network, f"b{side}").conv1.weight.shape[0] for side in network.resolutions] == [8, 8, 4]
    assert network(torch.randn(2, 6, 5)).shape == (2, 12, 16, 16)


def test_each_row_drives_its_layers() -> None:
    """Block 4: convolution row 0, image row 1. Block 2^k: up-convolution 2k - 5, convolution 2k - 4, image 2k - 3."""
    network = SynthesisNetwork(w_dim=5, resolution=16, image_channels=3, channel_base=64, channel_max=8)
    ws = torch.randn(1, 6, 5)
    x, image = network.b4(None, None, ws[:, [0, 0, 1]])
    x, image = network.b8(x, image, ws[:, [1, 2, 3]])
    x, image = network.b16(x, image, ws[:, [3, 4, 5]])
    torch.testing.assert_close(network(ws), image)
    leaf = ws.clone().requires_grad_()
    network(leaf).square().sum().backward()
    assert leaf.grad is not None and (leaf.grad.abs().sum(-1) > 0).all()


def test_noise_can_be_left_out() -> None:
    network = SynthesisNetwork(w_dim=5, resolution=8, image_channels=3, channel_base=64, channel_max=8)
    ws = torch.randn(1, 4, 5)
    with torch.no_grad():
        network.b8.conv1.noise_strength.fill_(1.0)
    assert not torch.allclose(network(ws), network(ws, noise=False))


@pytest.mark.parametrize("up", [False, True])
def test_blocks_add_to_the_running_image(up: bool) -> None:
    block = SynthesisBlock(4, 6, w_dim=5, resolution=16 if up else 8, image_channels=3, up=up)
    x, image, ws = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 5)
    kept = image.clone()
    features, with_image = block(x, image, ws)
    same, alone = block(x, None, ws)
    torch.testing.assert_close(features, same)
    torch.testing.assert_close(with_image - alone, upsample2(image) if up else image, atol=1e-5, rtol=1e-4)
    assert image.equal(kept)


def test_resizing_keeps_constants_and_leaves_equal_sizes_alone() -> None:
    x = torch.randn(1, 2, 8, 8)
    assert resize_to(x, 8) is x
    torch.testing.assert_close(resize_to(torch.full((1, 2, 8, 8), 0.3), 3), torch.full((1, 2, 3, 3), 0.3))
    torch.testing.assert_close(resize_to(x, 4).mean(), x.mean(), atol=0.05, rtol=0)
