"""GFPGAN: names, sizes, the modulated convolution against its definition, and that nothing in it is left to chance."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from talk3d.errors import WeightsError
from talk3d.io.catalogue import CATALOGUE
from talk3d.perception import restoration
from talk3d.perception.restoration import GFPGAN, Restoration, load_restoration, widths


def test_names_and_sizes_are_the_published_ones(has_published_sizes: Callable[..., None]) -> None:
    with torch.device("meta"):
        network = GFPGAN()
    has_published_sizes("gfpgan", network, file_bytes=CATALOGUE["gfpgan"].size_bytes)
    assert widths(512) == {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128, 512: 64}


def test_the_modulated_convolution_is_its_definition() -> None:
    layer = restoration._Modulated(6, 4, 3, demodulate=True).double()
    x, style = torch.randn(2, 6, 5, 7, dtype=torch.double), torch.randn(2, restoration.STYLE, dtype=torch.double)
    out = layer(x, style)
    for number in range(2):
        weight = layer.weight[0] * layer.modulation(style[number])[None, :, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        assert torch.allclose(out[number], F.conv2d(x[number], weight, padding=1), atol=1e-10)


def test_a_small_one_restores_the_same_twice() -> None:
    network = GFPGAN(32, narrow=1 / 64).eval().requires_grad_(False)
    assert isinstance(network, Restoration)
    pictures = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    restored = network(pictures)
    assert restored.shape == (2, 3, 32, 32) and restored.abs().max() <= 1
    assert torch.equal(restored, network(pictures)) and torch.allclose(restored[1:], network(pictures[1:]), atol=1e-5)
    assert network(torch.zeros(1, 3, 20, 20)).shape == (1, 3, 32, 32)
    restored.sum().backward()
    assert pictures.grad is not None and pictures.grad.abs().max() > 0
    noises = network.stylegan_decoder.noises
    noises.get_buffer("noise2").add_(1)
    network.stylegan_decoder.style_convs[1].weight.fill_(1)
    assert not torch.equal(restored, network(pictures))  # the stored noise counts


def test_files_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"params_ema": GFPGAN(32, narrow=1 / 64).state_dict()}, tmp_path / "small.pth")
    with pytest.raises(WeightsError, match="does not fit"):
        load_restoration(tmp_path / "small.pth")
