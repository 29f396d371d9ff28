"""Samples along rays and their composition into pictures."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from talk3d.types import Rays


def stratified_distances(
    rays: Rays, num_samples: int, generator: torch.Generator | None = None, *, disparity: bool = False
) -> Float[Tensor, "b r s"]:
    """Left edges of equal intervals between near and far, each moved right by a random part of an interval.

    Args:
        rays: where to sample.
        num_samples: samples on a ray, at least 2.
        generator: randomness of the jitter; None draws none and returns the left edges.
        disparity: intervals equal in inverse distance instead of distance.

    Reference: EG3D (arXiv 2112.07945), importance renderer; networks of the released models rely on these edges.
    """
    near, far = rays.near, rays.far
    edges = torch.arange(num_samples, device=near.device, dtype=near.dtype).expand(*near.shape[:-1], num_samples)
    if generator is not None:
        edges = edges + torch.rand(edges.shape, device=near.device, dtype=near.dtype, generator=generator)
    if disparity:
        part = edges / (num_samples - 1)
        return 1 / ((1 - part) / near + part / far)
    return near + edges * ((far - near) / (num_samples - 1))


def importance_distances(
    distances: Float[Tensor, "b r s"], weights: Float[Tensor, "b r q"], num_samples: int, generator: torch.Generator | None = None
) -> Float[Tensor, "b r n"]:
    """Draw further distances where the coarse weights are: inverse-transform sampling of the smoothed weights, without gradient.

    Args:
        distances: s coarse distances.
        weights: their s - 1 segment weights.
        num_samples: distances to draw.
        generator: randomness of the draw; None takes evenly spaced quantiles from 0 to 1.

    Reference: NeRF (arXiv 2003.08934), section 5.2, as EG3D applies it to s - 1 weights.
    """
    with torch.no_grad():
        padded = F.pad(weights, (1, 1), value=-torch.inf)
        peaks = torch.maximum(padded[..., :-1], padded[..., 1:])
        smooth = (peaks[..., :-1] + peaks[..., 1:]) / 2 + 0.01
        bins = (distances[..., :-1] + distances[..., 1:]) / 2
        density = smooth[..., 1:-1] + 1e-5
        cdf = F.pad((density / density.sum(-1, keepdim=True)).cumsum(-1), (1, 0))
        if generator is None:
            quantiles = torch.linspace(0, 1, num_samples, device=cdf.device, dtype=cdf.dtype).expand(*cdf.shape[:-1], num_samples).contiguous()
        else:
            quantiles = torch.rand((*cdf.shape[:-1], num_samples), device=cdf.device, dtype=cdf.dtype, generator=generator)
        above = torch.searchsorted(cdf.contiguous(), quantiles, right=True)
        low, high = (above - 1).clamp(min=0), above.clamp(max=cdf.shape[-1] - 1)
        cdf_low, cdf_high = cdf.gather(-1, low), cdf.gather(-1, high)
        bin_low, bin_high = bins.gather(-1, low), bins.gather(-1, high)
        width = cdf_high - cdf_low
        width = torch.where(width < 1e-5, torch.ones_like(width), width)
        return bin_low + (quantiles - cdf_low) / width * (bin_high - bin_low)


def segment_weights(density: Float[Tensor, "b r s"], distances: Float[Tensor, "b r s"]) -> Float[Tensor, "b r q"]:
    """Weight of each of the s - 1 segments between samples: opacity times transmittance before it.

    Reference: EG3D's midpoint marcher: alpha = 1 - exp(-softplus(mean density - 1) · length).
    """
    lengths = distances[..., 1:] - distances[..., :-1]
    middle = (density[..., 1:] + density[..., :-1]) / 2
    alpha = 1 - torch.exp(-F.softplus(middle - 1) * lengths)
    transmittance = torch.cumprod(F.pad(1 - alpha + 1e-10, (1, 0), value=1.0), -1)[..., :-1]
    return alpha * transmittance


def composite(
    features: Float[Tensor, "b r s c"], density: Float[Tensor, "b r s"], distances: Float[Tensor, "b r s"], *, white_back: bool = False
) -> tuple[Float[Tensor, "b r c"], Float[Tensor, "b r 1"], Float[Tensor, "b r 1"]]:
    """Integrate samples sorted by distance; behind them everything is 0, or 1 with `white_back`.

    Returns:
        Features, opacity in [0, 1], and mean distance (clamped to the span of all distances, +far where nothing is hit).
    """
    weights = segment_weights(density, distances)
    # the mean of neighbouring samples, folded into per-sample weights: half of either adjoining segment
    per_sample = (F.pad(weights, (1, 0)) + F.pad(weights, (0, 1))) / 2
    rendered = (per_sample.unsqueeze(-2).to(features.dtype) @ features).squeeze(-2).to(density.dtype)
    opacity = weights.sum(-1, keepdim=True)
    hit = opacity > 0  # where nothing is, dividing would also spoil the gradient
    depth = (per_sample * distances).sum(-1, keepdim=True) / torch.where(hit, opacity, torch.ones_like(opacity))
    depth = torch.where(hit, depth, torch.full_like(depth, float("inf"))).clamp(distances.min(), distances.max())
    if white_back:
        rendered = rendered + 1 - opacity
    return rendered, opacity, depth
