"""Equalised and modulated layers against explicit kernels per sample."""

import math

import pytest
import torch
import torch.nn.functional as F

from talk3d.models.layers import EqualLinear, SynthesisLayer, ToImage, modulated_conv
from talk3d.ops.resample import fir


@pytest.mark.parametrize("activation", ["linear", "lrelu"])
def test_linear_layer_scales_weight_and_bias(activation) -> None:
    layer = EqualLinear(6, 4, activation=activation, lr=0.01, bias_init=0.5)
    assert layer.weight.std().item() == pytest.approx(100, rel=0.5) and layer.bias[0].item() == pytest.approx(50)
    x = torch.randn(2, 3, 6)
    expected = x @ (layer.weight.T * 0.01 / math.sqrt(6)) + 0.5
    if activation == "lrelu":
        expected = torch.where(expected > 0, expected, 0.2 * expected) * math.sqrt(2)
    torch.testing.assert_close(layer(x), expected)


def slow_modulated(x: torch.Tensor, weight: torch.Tensor, style: torch.Tensor, up: bool, demodulate: bool) -> torch.Tensor:
    """One explicit kernel for each sample; doubling by zero insertion and a true convolution."""
    out = []
    for one, scale in zip(x, style, strict=True):
        kernel = weight * scale[None, :, None, None]
        if demodulate:
            kernel = kernel / (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            spread = torch.zeros(one.shape[0], 2 * one.shape[1] - 1, 2 * one.shape[2] - 1)
            spread[:, ::2, ::2] = one
            out.append(fir(F.conv2d(spread[None], kernel.flip(2, 3), padding=2), (1, 1), gain=4)[0])
        else:
            out.append(F.conv2d(one[None], kernel, padding=kernel.shape[-1] // 2)[0])
    return torch.stack(out)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("demodulate", [False, True])
def test_modulated_convolution_equals_one_kernel_per_sample(up: bool, demodulate: bool) -> None:
    x, weight, style = torch.randn(3, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.randn(3, 4)
    found = modulated_conv(x, weight, style, up=up, demodulate=demodulate)
    assert found.shape == (3, 6, 10, 10) if up else (3, 6, 5, 5)
    torch.testing.assert_close(found, slow_modulated(x, weight, style, up, demodulate), atol=1e-5, rtol=1e-4)


def test_modulated_convolution_has_right_gradients() -> None:
    x, weight, style = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 2, 3, 3), (2, 2, 3, 3), (2, 2)))
    assert torch.autograd.gradcheck(lambda *a: modulated_conv(*a, up=True), (x, weight, style))


def test_synthesis_layer_adds_noise_only_when_asked() -> None:
    layer = SynthesisLayer(4, 6, 8, 5)
    x, w = torch.randn(2, 4, 5, 5), torch.randn(2, 8)
    torch.testing.assert_close(layer(x, w, noise=True), layer(x, w, noise=False))  # its strength starts at zero
    with torch.no_grad():
        layer.noise_strength.fill_(0.7)
        layer.bias.normal_()
    before = modulated_conv(x, layer.weight, layer.affine(w)) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x, w, noise=False), F.leaky_relu(before, 0.2) * math.sqrt(2))
    torch.testing.assert_close(layer(x, w), F.leaky_relu(before + 0.7 * layer.noise_const, 0.2) * math.sqrt(2))


def test_styles_start_around_one() -> None:
    assert SynthesisLayer(4, 6, 8, 5).affine(torch.zeros(1, 8)).eq(1).all() and ToImage(4, 3, 8).affine(torch.zeros(1, 8)).eq(1).all()


def test_image_layer_is_a_matrix_per_pixel() -> None:
    layer = ToImage(4, 3, 8)
    with torch.no_grad():
        layer.bias.normal_()
    x, w = torch.randn(2, 4, 5, 5), torch.randn(2, 8)
    matrix = layer.weight[:, :, 0, 0] * (layer.affine(w) / 2)[:, None]  # b o i
    expected = torch.einsum("boi,bihw->bohw", matrix, x) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x, w), expected, atol=1e-5, rtol=1e-4)
