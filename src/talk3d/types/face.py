"""What tracking knows of a face in every frame."""

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from talk3d.types.camera import Camera


@dataclass(frozen=True, kw_only=True)
class FaceTrack:
    """The face through t frames. All first axes are t."""

    cameras: Camera
    """The camera of each crop in the head space of the prior; smooth in time."""
    head_pose: Float[Tensor, "t 3"]
    """Yaw, pitch, roll of the head against the source camera in radians; 0 faces it."""
    landmarks: Float[Tensor, "t n 2"]
    """MediaPipe's face points (n 468 or 478) in pixels of the crop; pixel centres at half-integers."""
    anchors: Float[Tensor, "t 6"]
    """Nose bridge, left and right outer eye corner as x, y in [-1, 1] of the source frame;
    projected from the rigid pose, so speech cannot move them."""
    blink: Float[Tensor, "t 1"]
    """0 open … 1 shut, mean of both eyes."""
    upper_face: Float[Tensor, "t 5"]
    """How far the right and the left brow are drawn up from where they usually are, in distances between the outer eye corners; where the eyes
    look, as `gaze` says it, gone over where they are shut; and how far smiles draw the upper cheeks up, as brows."""
    confidence: Float[Tensor, "t 1"]
    """0 … 1; 0 where the face was not seen and the values are interpolated."""
    crop: Float64[np.ndarray, "t 2 3"]
    """Affine map from source pixels to crop pixels, pixel centres at half-integers."""
    eyes_shut: Float[Tensor, "t 2"] | None = None
    """The left and the right eye of the subject apart, 0 open … 1 shut."""
    gaze: Float[Tensor, "t 2"] | None = None
    """How far the irises are from where they would be if the eyes looked ahead, in eye widths: to the subject's left, and up. Rough: irises are
    found to about 0.005, which small looks aside do not exceed (people rendered with looks of a tenth of the full way: no correlation)."""
    expression: Float[Tensor, "t e"] | None = None
    """ARKit's 52 blendshapes in MediaPipe's order, 0 … 1; e is 0 where the face model does not give them."""


def with_cheeks(upper_face: Tensor) -> Tensor:
    """Return it with cheeks at rest where a file of before they were followed has four numbers a frame; anything else as it is."""
    return F.pad(upper_face, (0, 1)) if upper_face.shape[1:] == (4,) else upper_face


@dataclass(frozen=True, kw_only=True)
class FaceMasks:
    """Where the person is in every crop."""

    person: UInt8[np.ndarray, "t h w"]
    """Soft matte of head, neck and shoulders: 0 background … 255 person."""
    source: str
    """What made it."""
    parts: UInt8[np.ndarray, "t h w"] | None = None
    """Which part of the face each pixel shows, see `talk3d.perception.parsing.REGIONS`; None where nobody told them apart."""
