"""A tracked video, what drives one frame, what a renderer returns, and how long work reports where it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from talk3d.errors import ShapeError
from talk3d.types.audio import AudioFeatures, Waveform
from talk3d.types.camera import Camera
from talk3d.types.face import FaceMasks, FaceTrack


@dataclass(frozen=True, kw_only=True)
class Driving:
    """What the avatar's tokens and linear bases are made of, for b frames (the null token needs nothing)."""

    audio: Float[Tensor, "b n f w"]
    """Speech features of the frame and its neighbours."""
    blink: Float[Tensor, "b 1"]
    """0 open … 1 shut."""
    head_pose: Float[Tensor, "b 3"]
    """Yaw, pitch, roll in radians."""
    anchors: Float[Tensor, "b 6"]
    """Where the head sits in the source frame, see `FaceTrack.anchors`."""
    upper_face: Float[Tensor, "b 5"]
    """What brows, eyes and cheeks do, see `FaceTrack.upper_face`."""

    def to(self, device: torch.device | str) -> "Driving":
        """Return it on another device, as float32."""
        return Driving(**{part.name: getattr(self, part.name).to(device, torch.float32) for part in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """Pictures of the volume, over black."""

    image: Float[Tensor, "b 3 H W"]
    """[-1, 1], premultiplied by `alpha` (empty space is -1)."""
    alpha: Float[Tensor, "b 1 H W"]
    """Opacity in [0, 1]."""
    raw: Float[Tensor, "b 3 h w"]
    """The picture before super-resolution, [-1, 1]."""
    raw_alpha: Float[Tensor, "b 1 h w"]
    """Opacity before super-resolution, [0, 1]."""
    features: Float[Tensor, "b c h w"]
    """Rendered features; `raw` is their first three channels."""
    depth: Float[Tensor, "b 1 h w"]
    """Distance along the ray in scene units."""


WIDER = 1.5
"""How far a wide view reaches, in crops."""


@dataclass(frozen=True, kw_only=True)
class WideViews:
    """Some frames of the training part cut wider than the crops, about the same middle: what lies round the crops, as far as the film shows it."""

    frames: Int[Tensor, " k"]
    """Their numbers in the clip."""
    pictures: UInt8[np.ndarray, "k h w 3"]
    """RGB 0..255."""
    mattes: UInt8[np.ndarray, "k h w"]
    """0 background … 255 person."""
    beyond: Bool[np.ndarray, "k h w"]
    """Where they show what the crops do not."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A person's video, ready for learning: constant rate, stable crop, everything known per frame."""

    frames: UInt8[np.ndarray, "t h w 3"]
    """RGB 0..255; a memory map where it was loaded from disk."""
    fps: float
    waveform: Waveform
    audio: AudioFeatures
    track: FaceTrack
    masks: FaceMasks
    source: str
    """Whole path of the video it came from."""
    source_sha256: str
    num_training_frames: int
    """Frames before this one are for training, the rest is held out."""
    check: Mapping[str, Any] = field(default_factory=dict)
    """What was noticed about the video: rates, duplicates, which models were used, warnings."""
    wide: WideViews | None = None
    """None where the film shows nothing round the crops."""

    def __post_init__(self) -> None:
        """Hold every per-frame array to the same length."""
        lengths = {
            "frames": len(self.frames),
            "audio": self.audio.values.shape[0],
            "cameras": len(self.track.cameras),
            "head_pose": len(self.track.head_pose),
            "landmarks": len(self.track.landmarks),
            "blink": len(self.track.blink),
            "crop": len(self.track.crop),
            "masks": len(self.masks.person),
        }
        if len(set(lengths.values())) != 1:
            raise ShapeError(f"a clip needs as many of everything as frames, got {lengths}: track the video again")

    @property
    def num_frames(self) -> int:
        """Number of video frames."""
        return len(self.frames)

    def driving(self, frames: Int[Tensor, " b"]) -> Driving:
        """What was happening at these frames: the true inputs of self-driven rendering."""
        return Driving(
            audio=self.audio.around(frames),
            blink=self.track.blink[frames],
            head_pose=self.track.head_pose[frames],
            anchors=self.track.anchors[frames],
            upper_face=self.track.upper_face[frames],
        )

    def images(self, frames: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 1 h w"]]:
        """Pictures in [-1, 1] and person mattes in [0, 1] of these frames."""
        rgb = torch.from_numpy(np.stack([self.frames[int(i)] for i in frames])).permute(0, 3, 1, 2)  # b 3 h w
        matte = torch.from_numpy(np.stack([self.masks.person[int(i)] for i in frames]))[:, None]
        return rgb.float() / 127.5 - 1, matte.float() / 255

    def wide_cameras(self) -> Camera:
        """Return the cameras of the wide views; none where there are none."""
        cameras = self.track.cameras[torch.zeros(0, dtype=torch.int64) if self.wide is None else self.wide.frames]
        intrinsics = cameras.intrinsics.clone()
        intrinsics[:, 0, 0] /= WIDER
        intrinsics[:, 1, 1] /= WIDER
        intrinsics[:, :2, 2] = 0.5 + (intrinsics[:, :2, 2] - 0.5) / WIDER
        return Camera(cam2world=cameras.cam2world, intrinsics=intrinsics)

    def save(self, path: str | Path) -> None:
        """Write the clip as one folder; an existing clip there is replaced only when the new one is whole."""
        from talk3d.io.clips import save_clip

        save_clip(self, Path(path))


def spread_evenly(total: int, most: int) -> Int[Tensor, " k"]:
    """Return which of `total` frames to look at when at most `most` are: the first, the last and others between them, equally far apart."""
    return torch.linspace(0, total - 1, min(total, most)).round().long()


@runtime_checkable
class Progress(Protocol):
    """A listener that long-running stages call after every step."""

    def __call__(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        """Hear that `step` of `total` (0: unknown) of `stage` is done; `values` are current losses or counts."""
        ...


def silent(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
    """Listen to nothing: the default `Progress`."""
