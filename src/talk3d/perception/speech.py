"""What a listener would see of speech: log-mel windows for every video frame. Plain torch, no weights; linear in time.

Every number depends on the sound within `CONTEXT_S` of it, so pieces of a long sound with that much around them give the same features as the whole.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from talk3d.errors import ConfigError
from talk3d.types import AudioFeatures, Waveform

SAMPLE_RATE_HZ = 16000
HOP = 320
"""Samples between steps, 20 ms."""
WINDOW = 640
"""Samples under one step, 40 ms."""
NUM_BANDS = 64
NUM_STEPS = 16
"""Steps in the window of one video frame, 320 ms."""
RANGE_DB = 55.0
"""What is quieter than the loudest band of the speech around by more than this is silence, -1."""
QUIETEST_DB = -65.0
"""The loudest band of speech is never taken to be quieter than this (full scale 0), so that noise in a long pause is not raised to speech."""
LEVEL_STEPS = 500
"""How far the loudness of the surroundings reaches to either side, 10 s."""
LEVEL_OFFSET_DB = 2.5
"""From the mean of the surroundings to their loud syllables."""
CONTEXT_S = 10.5
"""Sound within this of a frame decides its features; `level_db` makes it half a window."""


def speech_features(waveform: Waveform, num_frames: int, fps: float, level_db: float | None = None) -> AudioFeatures:
    """Log-mel features, a window of 16 steps of 20 ms centred on the mid-time of each video frame, in [-1, 1].

    Loudness is taken out: 1 is as loud as the loud syllables of the speech within ten seconds, -1 is 55 dB below it, or silence.

    Args:
        waveform: 16 kHz mono; sample 0 is the start of frame 0.
        num_frames: video frames; sound that is missing at the end is silence.
        fps: video frames a second.
        level_db: loudness of the speech where it is known, in place of that of the surroundings; for live sound.

    Raises:
        ConfigError: the sample rate is not 16 kHz.
    """
    if waveform.sample_rate_hz != SAMPLE_RATE_HZ:
        raise ConfigError(f"speech features need sound at {SAMPLE_RATE_HZ} Hz, got {waveform.sample_rate_hz}: read it with read_audio(path)")
    steps = mel_steps(waveform.samples, num_frames, fps)
    level = speech_level(steps) if level_db is None else steps.new_full((len(steps),), level_db)
    scaled = 2 * (steps - level[:, None]) / RANGE_DB + 1
    middle = (torch.arange(num_frames, dtype=torch.float64) + 0.5) / fps * SAMPLE_RATE_HZ / HOP
    index = middle.round().long()[:, None] + torch.arange(NUM_STEPS)  # the steps begin half a window early, so this is centred
    return AudioFeatures(values=scaled.clamp(-1, 1)[index], fps=fps, source="logmel64")


def mel_steps(samples: Float[Tensor, " n"], num_frames: int, fps: float) -> Float[Tensor, "m c"]:
    """Energy of 64 mel bands in dB (full scale 0) at every 20 ms, padded by silence to cover the windows of `num_frames` frames.

    Step m is centred on 20 (m - 8) + 10 ms, half a window of steps early.
    """
    total = math.ceil(num_frames / fps * SAMPLE_RATE_HZ / HOP) + NUM_STEPS + 1
    lead = NUM_STEPS // 2 * HOP + (WINDOW - HOP) // 2
    wanted = (total - 1) * HOP + WINDOW
    sound = F.pad(samples.float(), (lead, max(wanted - lead - len(samples), 0)))[:wanted]
    emphasised = sound - 0.97 * F.pad(sound, (1, 0))[:-1]
    window = torch.hann_window(WINDOW)
    power = torch.stft(emphasised, WINDOW, HOP, window=window, center=False, return_complex=True).abs().square() / window.sum().square()  # c m
    return 10 * torch.log10((mel_filters() @ power).clamp_min(1e-14)).mT


def speech_level(steps: Float[Tensor, "m c"]) -> Float[Tensor, " m"]:
    """How loud speech is around each step in dB, see `QUIETEST_DB`.

    Loudness is that of the loudest band over 0.4 s; a mean over ten seconds to either side, of its cube, follows the loud parts whatever the
    pauses, and one bang moves it little.
    """
    loudest = (10 ** (steps.double() / 10)).amax(-1)[None, None]
    short = F.avg_pool1d(F.pad(loudest, (10, 10)), 21, 1)
    wide = F.avg_pool1d(short**3, 2 * LEVEL_STEPS + 1, 1, LEVEL_STEPS, count_include_pad=False) ** (1 / 3)
    return (10 * torch.log10(wide.clamp_min(1e-14)) + LEVEL_OFFSET_DB).float()[0, 0].clamp_min(QUIETEST_DB)


def mel_filters() -> Float[Tensor, "c f"]:
    """Triangles of 64 mel bands from 0 to 8 kHz, of equal area (Slaney)."""
    triangles, _ = mel_triangles(NUM_BANDS, WINDOW // 2 + 1, 0.0, SAMPLE_RATE_HZ / 2)
    return (triangles / triangles.sum(-1, keepdim=True).clamp_min(1e-12)).float()


def mel_triangles(num_bands: int, num_bins: int, low_hz: float, high_hz: float) -> tuple[Float[Tensor, "c f"], Float[Tensor, "c 1"]]:
    """Triangles of height 1 over the bins from 0 to 8 kHz, and the width of each at its foot in Hz.

    Reference: Slaney, Auditory Toolbox, 1998: linear to 1 kHz, logarithmic above.
    """
    edges = _mel_to_hz(torch.linspace(_hz_to_mel(low_hz), _hz_to_mel(high_hz), num_bands + 2, dtype=torch.float64))
    bins = torch.linspace(0, SAMPLE_RATE_HZ / 2, num_bins, dtype=torch.float64)
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return torch.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clamp_min(0), high - low


def _hz_to_mel(hz: float) -> float:
    """Slaney's mel scale."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def _mel_to_hz(mel: Tensor) -> Tensor:
    """Inverse of Slaney's mel scale."""
    return torch.where(mel < 15, mel * 200 / 3, 1000 * ((mel - 15) * math.log(6.4) / 27).exp())
