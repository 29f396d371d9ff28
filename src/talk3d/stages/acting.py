"""What the person does beside speaking: blinks and small motion of head, brows and gaze, from a performance or made up in the clip's manner.

All of it is a function of the frame's number and the seed, so that it does not depend on how the sound was cut or where a film was gone on with.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from talk3d.errors import ConfigError
from talk3d.io.clips import load_clip, read_openface_blink
from talk3d.models.avatar import Performance
from talk3d.stages.viewpoints import ping_pong
from talk3d.types import Clip

USUAL_INTERVAL_S, USUAL_LENGTH_S = 4.0, 0.16
"""Of blinks, where the clip shows none."""
WAVES, SLOWEST_HZ, FASTEST_HZ = 9, 0.07, 0.8
"""Sinusoids that a made-up motion is the sum of, in each axis."""
MOST_SWAY_DEG = 3.0
"""Standard deviation that a made-up motion does not exceed."""
SWAY = 0.5
"""A made-up motion is this much of the clip's."""


@dataclass(frozen=True, kw_only=True)
class ActingConfig:
    """What the person does beside speaking."""

    performer: Path | None = None
    """Whose head motion and blinks are taken: a clip of `talk3d track`, a video, or a table of OpenFace (.csv, blinks only, a row per frame)."""
    blinks: Literal["auto", "performed", "generated", "none"] = "auto"
    """From the training video or the performer, made up at the clip's rate, or none; auto makes them up unless camera or performer bring them."""
    head_motion: float = 1.0
    """How much the head moves by itself under a camera that does not come from a film; 1 is half of what the clip shows, 0 holds it still."""
    expression: float = 1.0
    """How far the face moves with speech; 1 as learnt, 0 not at all. For other values than 1 the planes are made twice."""
    seed: int = 0
    """Of made-up blinks and motion."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        if not 0 <= self.head_motion <= 4 or not 0 <= self.expression <= 3:
            raise ConfigError(
                f"head motion goes from 0 to 4 and expression from 0 to 3, got {self.head_motion:g} and {self.expression:g}: 1 is as learnt"
            )
        if self.seed < 0:
            raise ConfigError(f"a seed is a number from 0 up, got {self.seed}: give such a one")


@dataclass(frozen=True, kw_only=True)
class BlinkHabit:
    """How somebody blinks."""

    interval_s: float
    """Mean time from blink to blink."""
    length_s: float
    """Mean time that the eyes are more than half shut."""
    depth: float
    """Mean of how far they shut, 0 … 1."""
    rest: float
    """What the measure says between blinks."""


def blink_habit(blink: Float[Tensor, "t 1"], fps: float) -> BlinkHabit:
    """Measure how somebody blinks; where they do not, as people usually do."""
    shut = blink[:, 0].cpu().double().numpy()
    low = shut < 0.5
    rest = float(np.median(shut[low])) if low.any() else 0.0
    edges = np.flatnonzero(np.diff(np.concatenate([[True], low, [True]]).astype(int)))
    starts, stops = edges[::2], edges[1::2]
    if not len(starts) or low.mean() < 0.5:
        return BlinkHabit(interval_s=USUAL_INTERVAL_S, length_s=USUAL_LENGTH_S, depth=1.0, rest=min(rest, 0.2))
    return BlinkHabit(
        interval_s=float(np.clip(len(shut) / fps / len(starts), 1.5, 12.0)),
        length_s=float(np.clip((stops - starts).mean() / fps, 0.08, 0.4)),
        depth=float(np.mean([shut[start:stop].max() for start, stop in zip(starts, stops, strict=True)])),
        rest=rest,
    )


def made_up_blinks(frames: Int[Tensor, " b"], fps: float, habit: BlinkHabit, seed: int = 0) -> Float[Tensor, "b 1"]:
    """How far the eyes are shut at these frames: one blink in every interval, at a random time of it; eyes shut faster than they open."""
    time = frames.double().numpy() / fps
    cells = np.floor(time / habit.interval_s).astype(int)
    shut = np.zeros_like(time)
    for cell in range(max(int(cells.min()) - 1, 0), int(cells.max()) + 2):
        middle = (cell + np.random.default_rng((seed, cell)).uniform(0.2, 0.8)) * habit.interval_s
        side = np.where(time < middle, 0.75, 1.25) * habit.length_s
        near = np.clip(np.abs(time - middle) / side, 0, 1)
        shut = np.maximum(shut, 0.5 + 0.5 * np.cos(math.pi * near))
    return torch.from_numpy(habit.rest + (habit.depth - habit.rest) * shut).float()[:, None]


def sway(frames: Int[Tensor, " b"], fps: float, seed: int = 0) -> Float[Tensor, "b 3"]:
    """A slow random motion of mean 0 and variance 1 in each of three axes: sums of sinusoids, slow ones larger."""
    random = np.random.default_rng((seed, 2**31))
    rates = np.geomspace(SLOWEST_HZ, FASTEST_HZ, WAVES)[:, None] * random.uniform(0.85, 1.15, (WAVES, 3))
    phases = random.uniform(0, 2 * math.pi, (WAVES, 3))
    weights = 1 / rates
    weights /= np.sqrt(0.5 * (weights**2).sum(0))
    time = frames.double().numpy()[:, None, None] / fps
    return torch.from_numpy((weights * np.sin(2 * math.pi * rates * time + phases)).sum(1)).float()


@dataclass(frozen=True, kw_only=True)
class Acts:
    """What happens at b frames beside speech."""

    blink: Float[Tensor, "b 1"]
    head_pose: Float[Tensor, "b 3"]
    anchors: Float[Tensor, "b 6"]
    upper_face: Float[Tensor, "b 5"]
    turn: Float[Tensor, "b 3"]
    """How far the head is from its mean pose, radians; zeros where the camera moves with the performance."""


class Actor:
    """Tells what the person does at any frame."""

    def __init__(
        self,
        config: ActingConfig,
        own: Performance,
        fps: float,
        *,
        performed: Performance | None = None,
        blink: Float[Tensor, "t 1"] | None = None,
        follows: bool = False,
    ) -> None:
        """Choose where everything comes from.

        Args:
            config: what is wanted.
            own: of the avatar.
            fps: frames a second.
            performed: of a performer, in place of the avatar's own.
            blink: of a performer; that of the performance if left out.
            follows: the camera is that of the performance, so the head moves as it does.
        """
        self.fps, self.seed, self.follows = fps, config.seed, follows
        source = performed or own
        self.pose, self.anchors, self.upper_face = source.head_pose.cpu(), source.anchors.cpu(), source.upper_face.cpu()
        self.blink = (source.blink if blink is None else blink).cpu()
        given = follows or performed is not None or blink is not None
        self.blinks = config.blinks if config.blinks != "auto" else "performed" if given else "generated"
        self.habit = blink_habit(own.blink, fps)
        pose, others = own.head_pose.cpu(), torch.cat([own.anchors, own.upper_face], 1).cpu()
        self.mean_pose, self.mean_others = pose.mean(0), others.mean(0)
        moved = pose - self.mean_pose
        self.gain = torch.linalg.lstsq(moved.double(), (others - self.mean_others).double(), driver="gelsd").solution.float()
        """How anchors, brows, gaze and cheeks move with the head's angles, in the clip."""
        self.brow_spread = SWAY * config.head_motion * (others - self.mean_others - moved @ self.gain)[:, 6:8].square().mean(0).sqrt()
        most = math.radians(MOST_SWAY_DEG)
        self.spread = config.head_motion * (SWAY * moved.square().mean(0).sqrt()).clamp(max=most)
        self.scale = None if performed is None else config.head_motion
        """How much of a performer's own motion is taken; None makes it up."""

    def at(self, frames: Int[Tensor, " b"]) -> Acts:
        """Return what happens at these frames."""
        performed = ping_pong(frames, len(self.pose))
        if self.follows:
            pose, anchors, upper_face = (values[performed] for values in (self.pose, self.anchors, self.upper_face))
            return Acts(blink=self._blink(frames), head_pose=pose, anchors=anchors, upper_face=upper_face, turn=torch.zeros_like(pose))
        turn = self.spread * sway(frames, self.fps, self.seed) if self.scale is None else self.scale * (self.pose[performed] - self.pose.mean(0))
        anchors, upper_face = (self.mean_others + turn @ self.gain).split([6, 5], 1)
        if self.scale is not None:
            upper_face = self.upper_face[performed]
        else:
            upper_face = upper_face + F.pad(self.brow_spread * sway(frames, self.fps, self.seed + 1)[:, :1], (0, 3))
        return Acts(blink=self._blink(frames), head_pose=self.mean_pose + turn, anchors=anchors, upper_face=upper_face, turn=turn)

    def _blink(self, frames: Int[Tensor, " b"]) -> Float[Tensor, "b 1"]:
        if self.blinks == "generated":
            return made_up_blinks(frames, self.fps, self.habit, self.seed)
        if self.blinks == "none":
            return torch.full((len(frames), 1), self.habit.rest)
        return self.blink[ping_pong(frames, len(self.blink))]


def clip_index(clip: Clip, fps: float) -> Int[Tensor, " t"]:
    """Numbers of the clip's frames that are shown one after the other at another frame rate."""
    count = max(1, round(clip.num_frames * fps / clip.fps))
    return (torch.arange(count) * clip.fps / fps).round().long().clamp(max=clip.num_frames - 1)


def performance_of(clip: Clip, fps: float) -> Performance:
    """Return how the person of a clip moved, in all its frames, at another frame rate."""
    return Performance.of(clip.track, clip_index(clip, fps))


def read_performer(path: Path, fps: float) -> tuple[Performance | None, Float[Tensor, "t 1"]]:
    """Return what a performer did, and the blinks: of a clip, a video, which is tracked, or a table of OpenFace, which has blinks only.

    Args:
        path: of it.
        fps: frames a second of the avatar.

    Raises:
        ConfigError: there is nothing at the path.
        Talk3DError: it cannot be read, or no face can be found in it.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist: give a clip of `talk3d track`, a video, or a table of OpenFace that ends in .csv")
    if path.suffix.lower() == ".csv":
        return None, read_openface_blink(path)
    if path.is_dir():
        clip = load_clip(path)
    else:
        from talk3d.stages.track import TrackConfig, track  # it brings the face models

        clip = track(path, TrackConfig(fps=fps))
    performed = performance_of(clip, fps)
    return performed, performed.blink
