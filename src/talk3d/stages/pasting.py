"""Back into the picture: the rendered head in the film that it was tracked in, frame by frame."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from talk3d.errors import ConfigError
from talk3d.io.catalogue import sha256_of
from talk3d.io.clips import load_clip
from talk3d.io.media import read_frames, scan_video
from talk3d.ops.compositing import inner_matte, inverse, match_colours, paste, resample, soft_window
from talk3d.stages.acting import clip_index, performance_of
from talk3d.stages.viewpoints import ping_pong
from talk3d.types import Rendering

PERSON = 0.9
"""A pixel that is more than this a person's is compared at the seam."""


class Film:
    """The film that a clip was made from, whose frames get another head; it goes back and forth where the sound is longer."""

    def __init__(self, clip: Path, video: Path | None, fps: float, side: int) -> None:
        """Find the film and everything known of its frames.

        Args:
            clip: of the film, from `talk3d track`.
            video: the film, if it is not where it was when it was tracked.
            fps: frames a second wanted.
            side: of the rendered pictures, px.

        Raises:
            ConfigError: the film is not there, or is another one.
            MediaError: the clip cannot be read.
        """
        self.clip = load_clip(clip)
        path = video or Path(self.clip.source)
        if not path.is_file():
            raise ConfigError(f"the film of {clip} is not at {path} any more: give it with --source VIDEO")
        if sha256_of(path) != self.clip.source_sha256:
            raise ConfigError(f"{path} is not the film that {clip} was made from: give that one with --source VIDEO, or track this one")
        self.scan = scan_video(path, self.clip.fps)
        self.index, self.performance = clip_index(self.clip, fps), performance_of(self.clip, fps)
        self.start = int(self.clip.check.get("first_frame", 0))
        self.scale = side / self.clip.frames.shape[1]
        self.window = soft_window(side)

    def frames(self, first: int) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The film's own frames, without end, from one on."""

        def order() -> Iterator[int]:
            number = first
            while True:
                yield self.start + int(self.place(torch.tensor([number])))
                number += 1

        return read_frames(self.scan, order())

    def place(self, frames: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Numbers of the clip's frames that are shown at some frames."""
        return self.index[ping_pong(frames, len(self.index))]

    def put_back(self, frame: UInt8[np.ndarray, "h w 3"], number: int, rendering: Rendering) -> UInt8[np.ndarray, "h w 3"]:
        """Lay one rendered head into the film's frame."""
        place = int(self.place(torch.tensor([number])))
        crop = self.clip.track.crop[place] * self.scale
        alpha = rendering.alpha[0].clamp(0, 1).cpu()
        side = alpha.shape[-1]
        colour = (0.5 * (rendering.image[0].cpu() + 1) / alpha.clamp_min(1e-3)).clamp(0, 1)
        source = resample(torch.from_numpy(frame).permute(2, 0, 1).float() / 255, inverse(crop), (side, side))  # 3 s s
        person = torch.from_numpy(self.clip.masks.person[place].astype(np.float32) / 255)[None]
        person = resample(person, np.array([[1.0, 0, 0], [0, 1, 0]]) / self.scale, (side, side))
        shared = ((person > PERSON) & (alpha > PERSON)).float()
        return paste(frame, match_colours(colour, source, shared, self.window), inner_matte(alpha) * self.window, crop)


PICTURES = ("image", "alpha", "raw", "raw_alpha", "features", "depth")


def one_of(rendering: Rendering, number: int) -> Rendering:
    """One picture of a batch."""
    return replace(rendering, **{name: getattr(rendering, name)[number : number + 1] for name in PICTURES})
