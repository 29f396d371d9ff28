"""Sound: the waveform, and what a speech encoder makes of it for each video frame."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Waveform:
    """Mono sound; sample 0 belongs to the start of video frame 0."""

    samples: Float[Tensor, " n"]
    """In [-1, 1]."""
    sample_rate_hz: int

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.samples.shape[0] / self.sample_rate_hz

    def cut(self, start_s: float, length_s: float) -> "Waveform":
        """The sound of this span of time, silence where there is none."""
        first, last = round(start_s * self.sample_rate_hz), round((start_s + length_s) * self.sample_rate_hz)
        samples = self.samples[max(first, 0) : max(last, 0)]
        before = min(max(-first, 0), last - first)
        return Waveform(samples=F.pad(samples, (before, last - first - before - len(samples))), sample_rate_hz=self.sample_rate_hz)


@dataclass(frozen=True, kw_only=True)
class AudioFeatures:
    """One window of speech features per video frame, centred on the frame's mid-time."""

    values: Float[Tensor, "t f w"]
    """t video frames, f feature steps inside the window, w channels."""
    fps: float
    """Video frames a second."""
    source: str
    """The encoder that made them; an avatar can only be driven by features of the encoder it was trained with."""

    def around(self, frames: Int[Tensor, " b"], context: int = 8) -> Float[Tensor, "b n f w"]:
        """Windows of frames i - context/2 … i + context/2 - 1 for each i, the clip's ends repeated.

        Reference: Talk3D (arXiv 2403.20153), audio encoder; AD-NeRF's eight-frame context.
        """
        offsets = torch.arange(-(context // 2), context - context // 2, device=frames.device)
        index = (frames[:, None] + offsets).clamp(0, self.values.shape[0] - 1)
        return self.values[index.to(self.values.device)]
