"""What the sound says of the mouth, learned from the tracked landmarks alone.

The audio encoder first learns to tell the shape of the mouth, which takes seconds, because no picture is rendered; the deltaplane predictor
then starts from a token that already means something, and learns in hundreds of steps what would take it tens of thousands.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from talk3d.models.conditioning import Conditioner
from talk3d.ops.geometry import fit_similarity
from talk3d.types import AudioFeatures

RIGID = (33, 133, 362, 263, 168, 6, 197, 195, 5, 1, 2, 98, 327, 151, 9)
"""Eye corners, bridge and base of the nose, forehead: points that speech does not move."""
MOUTH = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 185, 40, 39, 37, 0, 267, 269, 270, 409, 78, 95, 88, 178)
MOUTH += (87, 14, 317, 402, 318, 324, 308, 191, 80, 81, 82, 13, 312, 311, 310, 415, 152, 148, 377)
"""Outer and inner lips, and the chin."""


@dataclass(frozen=True, kw_only=True)
class MouthShapes:
    """The mouth in every frame, as standardised principal components."""

    values: Float[Tensor, "t k"]
    importance: Float[Tensor, " k"]
    """Share of each component in the mouth's motion; sums to 1."""


def mouth_shapes(landmarks: Float[Tensor, "t n 2"], num_components: int = 8) -> MouthShapes:
    """Describe the mouth of each frame, with head motion in the picture plane taken out."""
    points = landmarks.float()
    middle = points.median(0).values[list(RIGID)]
    scale, rotation, shift = fit_similarity(points[:, list(RIGID)], middle.expand(len(points), -1, -1))
    mouth = scale[:, None, None] * points[:, list(MOUTH)] @ rotation.mT + shift[:, None]
    flat = mouth.flatten(1)
    centred = flat - flat.mean(0)
    left, spread, _ = torch.linalg.svd(centred, full_matrices=False)
    values, weights = torch.zeros(len(flat), num_components), torch.zeros(num_components)
    count = min(num_components, len(spread))
    values[:, :count], weights[:count] = left[:, :count] * len(flat) ** 0.5, spread[:count]
    return MouthShapes(values=values, importance=weights / weights.sum().clamp(min=1e-9))


def hearing_loss(
    conditioner: Conditioner, audio: AudioFeatures, shapes: MouthShapes, frames: Int[Tensor, " b"], noise: Float[Tensor, "b n f w"]
) -> Float[Tensor, ""]:
    """Mean square error of the mouth's components read off the audio tokens of these frames, weighted by importance.

    Args:
        conditioner: what listens.
        audio: features of the clip.
        shapes: what should be heard.
        frames: which frames.
        noise: added to their features.
    """
    weight = conditioner.mouth_head.weight
    heard = conditioner.mouth_head(conditioner.audio_token((audio.around(frames) + noise).to(weight)))
    error = (heard - shapes.values[frames].to(weight)).square()
    return (error * shapes.importance.to(weight)).sum(1).mean()
