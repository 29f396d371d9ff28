"""Animate: sound in, frames of the talking avatar out, one small batch at a time, for as long as the sound lasts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from talk3d.errors import ConfigError, MediaError
from talk3d.io.media import VideoWriter, read_audio
from talk3d.models.avatar import Avatar
from talk3d.ops.geometry import head_camera, orbit
from talk3d.perception.speech import SAMPLE_RATE_HZ, SpeechEncoder, load_speech_of
from talk3d.types import Camera, Driving, Progress, Rendering, Waveform, silent

CHUNK_S = 30
"""Length of sound whose features are in memory at once."""
SOUND_HZ = 44100
"""Sample rate of the sound in written videos."""
NEIGHBOURS = 4
"""Frames to either side that the audio encoder listens to as well."""
Heard = tuple[Int[Tensor, " b"], Float[Tensor, "b n f w"]]
"""Numbers of some frames, and the speech features of their surroundings."""
LEVELS = {"white": 1.0, "grey": 0.5, "black": 0.0}


@dataclass(frozen=True, kw_only=True)
class AnimateConfig:
    """From where the avatar is seen, and before what."""

    camera: Literal["tracked", "fixed", "orbit"] = "tracked"
    """The camera of the training video, one that stands still, or one that swings from side to side."""
    yaw_deg: float = 0.0
    """Of the fixed camera; positive moves it to the head's left."""
    pitch_deg: float = 0.0
    """Of the fixed camera; positive moves it up."""
    orbit_yaw_deg: float = 25.0
    """Largest turn of the swinging camera to either side."""
    orbit_pitch_deg: float = 8.0
    """How far the swinging camera moves up and down altogether."""
    orbit_period_s: float = 4.0
    """Seconds until the swing repeats."""
    background: Literal["plate", "white", "grey", "black"] = "plate"
    """The background of the training video, or a colour."""
    batch_size: int = 4
    """Frames rendered at once; changes speed and memory, not the frames."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        if self.orbit_period_s <= 0 or self.batch_size < 1:
            raise ConfigError(
                f"animate needs a positive orbit period and batch size, got {self.orbit_period_s} s and {self.batch_size}: give positive numbers"
            )
        if not all(math.isfinite(angle) for angle in (self.yaw_deg, self.pitch_deg, self.orbit_yaw_deg, self.orbit_pitch_deg)):
            raise ConfigError("the camera's angles must be finite numbers of degrees")


def animate(
    avatar: Avatar,
    audio: Waveform | Path | str,
    cameras: Camera | None = None,
    config: AnimateConfig | None = None,
    *,
    device: str = "cpu",
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Yield RGB frames of the avatar speaking, at the avatar's frame rate, as they are rendered.

    There are as many frames as fit the sound, at least one. Where the sound outlasts the training video, the person's performance (blinks,
    and for the tracked camera its motion) goes back and forth. With any camera but the tracked one the head keeps its mean pose.

    Args:
        avatar: who speaks; moved to `device`.
        audio: what is said: 16 kHz mono, or a file with sound.
        cameras: one per frame, in place of the config's; goes back and forth if there are fewer.
        config: from where the avatar is seen, and before what.
        device: where to render.

    Raises:
        MediaError: the sound is empty, not finite, or cannot be read.
        ConfigError: the sound's rate is not 16 kHz, the avatar listens to features that cannot be made here, or `cameras` is empty.
        WeightsError: the weights of the avatar's speech encoder are not there.
    """
    config = config or AnimateConfig()
    waveform = audio if isinstance(audio, Waveform) else read_audio(audio)
    _check_sound(waveform)
    encoder = load_speech_of(avatar.audio_source, device)
    if cameras is not None and (cameras.cam2world.ndim != 3 or not len(cameras)):
        raise ConfigError(f"cameras has no camera per frame (cam2world {tuple(cameras.cam2world.shape)}): give (t, 4, 4), or leave it out")
    return _frames(avatar.to(device).eval(), _speech(waveform, encoder, avatar.fps, config.batch_size), cameras, config, device)


def write_animation(
    avatar: Avatar,
    audio: Waveform | Path | str,
    path: str | Path,
    config: AnimateConfig | None = None,
    *,
    cameras: Camera | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> int:
    """Write a video of the avatar speaking, with the sound, and return its number of frames; the file appears only when it is whole.

    Args:
        avatar: who speaks.
        audio: what is said: 16 kHz mono, or a file with sound, whose own quality is kept.
        path: ends in .mp4, .m4v, .mov or .mkv.
        config: from where the avatar is seen, and before what.
        cameras: see `animate`.
        device: where to render.
        progress: hears every frame.

    Raises:
        MediaError: the sound cannot be used, or the file cannot be written.
        ConfigError: see `animate`.
    """
    waveform = audio if isinstance(audio, Waveform) else read_audio(audio)
    frames = animate(avatar, waveform, cameras, config, device=device)
    sound = audio if isinstance(audio, Waveform) else read_audio(audio, SOUND_HZ)
    total = count_frames(waveform, avatar.fps)
    with VideoWriter(path, avatar.resolution, avatar.resolution, fps=avatar.fps, audio=sound) as writer:
        for number, frame in enumerate(frames, 1):
            writer.write(frame)
            progress("animate", number, total, {})
    return total


def count_frames(waveform: Waveform, fps: float) -> int:
    """Return how many frames belong to a sound: its length rounded to whole frames, at least one."""
    return max(1, round(waveform.duration_s * fps))


def ping_pong(frames: Int[Tensor, " b"], length: int) -> Int[Tensor, " b"]:
    """Fold frame numbers into 0 … length - 1, back and forth, with the ends shown once: 0 1 2 1 0 1 2."""
    period = max(2 * (length - 1), 1)
    folded = frames % period
    return torch.minimum(folded, period - folded) if length > 1 else torch.zeros_like(frames)


def composite(rendering: Rendering, background: Float[Tensor, "#b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
    """Lay a rendering over a background; all in [0, 1] but the rendering's own picture."""
    return (0.5 * (rendering.image + 1) + (1 - rendering.alpha) * background).clamp(0, 1)


def to_uint8(pictures: Float[Tensor, "b 3 h w"]) -> UInt8[np.ndarray, "b h w 3"]:
    """Turn pictures in [0, 1] into RGB 0..255."""
    return (255 * pictures + 0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # b h w 3


def _frames(
    avatar: Avatar, speech: Iterator[Heard], cameras: Camera | None, config: AnimateConfig, device: str
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    stand = _Stand(avatar, cameras, config, device)
    for frames, audio in speech:
        with torch.no_grad():  # never held across a yield: the caller's own tensors are none of our business
            pictures = stand.render(frames, audio.to(device))
        yield from pictures


class _Stand:
    """Where camera, tokens and background of any frame come from."""

    def __init__(self, avatar: Avatar, cameras: Camera | None, config: AnimateConfig, device: str) -> None:
        performance = avatar.performance
        self.avatar, self.device = avatar, device
        self.blink = performance.blink
        self.head_pose, self.anchors = performance.head_pose, performance.anchors
        if cameras is None and config.camera == "tracked":
            self.cameras = performance.cameras
        else:
            self.cameras = cameras if cameras is not None else _path(config, avatar.fps)
            self.head_pose, self.anchors = self.head_pose.mean(0, keepdim=True), self.anchors.mean(0, keepdim=True)
        self.repeats = cameras is None and config.camera == "orbit"
        side = avatar.resolution
        plate = 0.5 * (avatar.background + 1) if config.background == "plate" else torch.full((3, side, side), LEVELS[config.background])
        self.background = plate.to(device)

    def render(self, frames: Int[Tensor, " b"], audio: Float[Tensor, "b n f c"]) -> UInt8[np.ndarray, "b h w 3"]:
        """Render these frames."""
        length = len(self.cameras)
        index = frames % length if self.repeats else ping_pong(frames, length)
        driving = Driving(
            audio=audio, blink=self._at(self.blink, frames), head_pose=self._at(self.head_pose, frames), anchors=self._at(self.anchors, frames)
        )
        rendering = self.avatar.render(driving, self.cameras[index.to(self.cameras.cam2world.device)].to(self.device))
        return to_uint8(composite(rendering, self.background[None]))

    def _at(self, values: Float[Tensor, "t c"], frames: Int[Tensor, " b"]) -> Float[Tensor, "b c"]:
        return values[ping_pong(frames, len(values)).to(values.device)].to(self.device)


def _path(config: AnimateConfig, fps: float) -> Camera:
    """One camera that stands still, or those of one swing."""
    if config.camera == "fixed":
        return head_camera(torch.tensor([[math.radians(config.yaw_deg), math.radians(config.pitch_deg), 0.0]]))
    period = max(1, round(config.orbit_period_s * fps))
    return orbit(period, yaw_deg=config.orbit_yaw_deg, pitch_deg=config.orbit_pitch_deg, period_frames=period)


def _check_sound(waveform: Waveform) -> None:
    """Refuse sound that cannot drive an avatar."""
    if not waveform.samples.numel():
        raise MediaError("the sound is empty: give at least a fraction of a second of it")
    if not bool(waveform.samples.isfinite().all()):
        raise MediaError("the sound holds values that are not numbers: clean it, or give the file itself")
    if waveform.sample_rate_hz != SAMPLE_RATE_HZ:
        raise ConfigError(f"speech features need sound at {SAMPLE_RATE_HZ} Hz, got {waveform.sample_rate_hz}: read it with read_audio(path)")


def _speech(waveform: Waveform, encoder: SpeechEncoder, fps: float, batch_size: int) -> Iterator[Heard]:
    """Yield frame numbers and their speech features, computed piece by piece."""
    total, chunk = count_frames(waveform, fps), CHUNK_S * max(1, round(fps))
    for start in range(0, total, chunk):
        stop = min(start + chunk, total)
        low, high = max(start - NEIGHBOURS, 0), min(stop + NEIGHBOURS, total)
        features = encoder(waveform, total, fps, low, high)
        for first in range(start, stop, batch_size):
            frames = torch.arange(first, min(first + batch_size, stop))
            yield frames, features.around(frames - low)
