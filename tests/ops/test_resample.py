"""Up- and down-sampling against the definition in zero insertion and a two-dimensional filter."""

import pytest
import torch
import torch.nn.functional as F

from talk3d.ops.resample import _fir_by_shifts, _taps, downsample2, fir, fir_filter, upsample2

FILTER = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 64


def slow_fir(x: torch.Tensor, pad: tuple[int, int], gain: float) -> torch.Tensor:
    """Pad and correlate with the whole filter, one output pixel at a time."""
    x = F.pad(x, (*pad, *pad))
    height, width = x.shape[2] - 3, x.shape[3] - 3
    out = torch.zeros(*x.shape[:2], height, width)
    for i in range(height):
        for j in range(width):
            out[:, :, i, j] = (x[:, :, i : i + 4, j : j + 4] * FILTER * gain).sum((2, 3))
    return out


@pytest.mark.parametrize(("pad", "gain", "shape"), [((1, 1), 1.0, (2, 3, 5, 6)), ((2, 1), 4.0, (1, 2, 4, 3)), ((0, 0), 2.0, (1, 1, 4, 4))])
def test_fir_equals_the_two_dimensional_filter(pad: tuple[int, int], gain: float, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(fir(x, pad, gain), slow_fir(x, pad, gain))


def test_fir_with_a_stride_keeps_every_other_pixel() -> None:
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fir(x, (1, 1), stride=2), fir(x, (1, 1))[..., ::2, ::2])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 4), (1, 2, 3, 5)])
def test_upsampling_is_zero_insertion_and_filter(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    spread = torch.zeros(*shape[:2], 2 * shape[2], 2 * shape[3])
    spread[..., ::2, ::2] = x
    torch.testing.assert_close(upsample2(x), slow_fir(spread, (2, 1), 4.0))


def test_downsampling_equals_its_formula() -> None:
    x = torch.randn(1, 1, 1, 8).expand(1, 1, 8, 8)
    row = F.pad(x[0, 0, 0], (1, 1))
    expected = torch.stack([(row[2 * i] + 3 * row[2 * i + 1] + 3 * row[2 * i + 2] + row[2 * i + 3]) / 8 for i in range(4)])
    torch.testing.assert_close(downsample2(x)[0, 0, 1], expected)
    torch.testing.assert_close(downsample2(x)[0, 0, 0], 7 / 8 * expected)  # the border above is zero
    assert downsample2(torch.randn(2, 3, 6, 4)).shape == (2, 3, 3, 2)


def test_both_keep_a_constant_away_from_the_border() -> None:
    x = torch.full((1, 2, 8, 8), 3.0)
    torch.testing.assert_close(upsample2(x)[..., 1:-1, 1:-1], torch.full((1, 2, 14, 14), 3.0))
    torch.testing.assert_close(downsample2(x)[..., 1:-1, 1:-1], torch.full((1, 2, 2, 2), 3.0))


def test_gradients() -> None:
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(upsample2, (x,)) and torch.autograd.gradcheck(downsample2, (x,))


def test_what_was_first_filtered_without_gradients_can_be_learnt_from_later() -> None:
    _taps.cache_clear()
    with torch.inference_mode():
        fir(torch.randn(1, 2, 4, 4), (2, 1))
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    fir(x, (2, 1)).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_the_stored_filter_is_the_one_applied() -> None:
    torch.testing.assert_close(fir_filter(), FILTER)


@pytest.mark.parametrize(("pad", "gain", "stride"), [((1, 1), 4.0, 1), ((2, 1), 1.0, 1), ((1, 1), 1.0, 2)])
def test_shifted_sums_are_the_same_filter(pad: tuple[int, int], gain: float, stride: int) -> None:
    x = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_fir_by_shifts(x, pad, gain, stride), fir(x, pad, gain, stride))
