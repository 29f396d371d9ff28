"""StyleGAN2's FIR up- and down-sampling in plain convolutions, so that nothing has to be compiled.

The filter is outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64 throughout. Must not import anything above `types`.
"""

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_TAPS = (0.125, 0.375, 0.375, 0.125)


@functools.cache
def _taps(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The filter's taps there, made once: CUDA graphs must not copy them from the host. Whoever asks first, training may use them, too."""
    with torch.inference_mode(False):
        return torch.tensor(_TAPS, dtype=dtype, device=device)


def fir_filter() -> Float[Tensor, "4 4"]:
    """Return the filter: a constant, which the published networks nevertheless store beside their weights."""
    taps = torch.tensor(_TAPS)
    return torch.outer(taps, taps)


def fir(x: Float[Tensor, "b c h w"], pad: tuple[int, int], gain: float = 1.0, stride: int = 1) -> Float[Tensor, "b c i j"]:
    """Zero-pad by `pad` (before, after) on both axes, then correlate every channel with gain · filter, keeping the valid part.

    Compiled, it is sums of shifted copies, which are fused: GPUs are slow at convolutions of single channels (a pretraining step: 164 → 130 ms).

    Reference: StyleGAN2 (arXiv 1912.04958), upfirdn with the [1, 3, 3, 1] kernel.
    """
    if torch.compiler.is_compiling():
        return _fir_by_shifts(x, pad, gain, stride)
    channels = x.shape[1]
    taps = _taps(x.dtype, x.device)
    rows = taps.view(1, 1, 4, 1).expand(channels, 1, 4, 1)
    columns = (gain * taps).view(1, 1, 1, 4).expand(channels, 1, 1, 4)
    x = F.pad(x, (*pad, *pad))
    x = F.conv2d(x, rows, stride=(stride, 1), groups=channels)
    return F.conv2d(x, columns, stride=(1, stride), groups=channels)


def _fir_by_shifts(x: Float[Tensor, "b c h w"], pad: tuple[int, int], gain: float, stride: int) -> Float[Tensor, "b c i j"]:
    x = F.pad(x, (*pad, *pad))
    for axis, factor in ((2, 1.0), (3, gain)):
        parts = [x.narrow(axis, start, x.shape[axis] - 3) for start in range(4)]
        x = factor * (_TAPS[0] * (parts[0] + parts[3]) + _TAPS[1] * (parts[1] + parts[2]))
    return x[:, :, ::stride, ::stride]


def upsample2(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
    """Double the sides: zeros inserted (sample first), FIR pad (2, 1), gain 4.

    Equals out[2i] = (x[i-1] + 3 x[i]) / 4 and out[2i+1] = (3 x[i] + x[i+1]) / 4 on each axis with zeros outside: bilinear interpolation but for
    the borders, where that repeats the outermost x instead.
    """
    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    for axis in (2, 3):
        for end in (0, -1):
            x.select(axis, end).mul_(0.75)
    return x


def downsample2(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
    """Halve even sides: out[i] = (x[2i-1] + 3 x[2i] + 3 x[2i+1] + x[2i+2]) / 8 on each axis, zeros outside."""
    return fir(x, (1, 1), stride=2)
