"""Listening to sound as it comes: chunks in, speech features out, block by block, the same however the sound was cut.

A block is computed from sound whose bounds depend on the block alone, so it does not matter when which sound arrived. With the builtin encoder the
loudness of the surroundings is looked up `CONTEXT_S` ahead; where the loudness of the speech is given, for live sound, `LIVE_CONTEXT_S`. The other
encoders normalise the whole sound and hear all of it first. Where nobody speaks the sound is made silent, so that the mouth rests.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from talk3d.errors import ConfigError, MediaError
from talk3d.perception.speech import CONTEXT_S as LEVEL_S
from talk3d.perception.speech import HOP, NUM_STEPS, SAMPLE_RATE_HZ, LogMelSpeech, SpeechEncoder, mel_steps, speech_level
from talk3d.types import Waveform

CONTEXT_S = LEVEL_S + 0.5
"""Sound within this of a frame may decide its features."""
LIVE_CONTEXT_S = 0.5
"""The same where the loudness of the speech is given."""
BLOCK_S, LIVE_BLOCK_S = 2.0, 0.2
"""Length of a block."""
BEFORE, AFTER = 4, 3
"""Frames to either side that the audio encoder listens to as well."""
PIECE_S = 20.0
"""Whole sounds are made quiet in pieces of this length."""
VOICE_BANDS = slice(5, 50)
"""Mel bands between 0.25 and 4 kHz, where voices are."""
VOICE_DB, NOISE_DB = 30.0, 6.0
"""Voice is within 30 dB of the loud syllables, and 6 dB above the steady noise."""
SHORTEST = 4
"""Steps of 20 ms; what is shorter is a click."""
LEAD, HANG = 4, 10
"""Steps that are let through before and after the voice, for what is soft at the ends of words."""
NOISE_STEPS = 250
"""The noise is the quietest moment within 5 s to either side."""

Heard = tuple[Int[Tensor, " b"], Float[Tensor, "b n f w"]]
"""Numbers of some frames, and the speech features of their surroundings."""


def listen(
    chunks: Iterable[Waveform],
    encoder: SpeechEncoder,
    fps: float,
    *,
    level_db: float | None = None,
    voice_activity: bool = True,
    first: int = 0,
) -> Iterator[Heard]:
    """Yield the numbers of video frames and what is heard round them, in blocks, as soon as enough sound is there.

    There are as many frames as fit the sound, at least one.

    Args:
        chunks: 16 kHz mono, of any length, also none.
        encoder: what the avatar listens with.
        fps: video frames a second.
        level_db: loudness of the speech (full scale 0), for live sound.
        voice_activity: make the sound silent where nobody speaks.
        first: blocks that end before this frame are left out.

    Raises:
        MediaError: there is no sound at all, or some that is no number.
        ConfigError: the rate is not 16 kHz, or the encoder cannot serve live sound.
    """
    if not isinstance(encoder, LogMelSpeech):
        if level_db is not None:
            raise ConfigError(
                f"{encoder.source} features need the whole sound: leave the loudness of the speech out, or train with --track.speech logmel"
            )
        blocks = _listen_to_all(_Sound(chunks, fps), encoder, fps, voice_activity=voice_activity)
        yield from ((frames, windows) for frames, windows in blocks if int(frames[-1]) >= first)
        return
    encoder = LogMelSpeech(level_db)
    context, block = (CONTEXT_S, BLOCK_S) if level_db is None else (LIVE_CONTEXT_S, LIVE_BLOCK_S)
    sound, start, second, length = _Sound(chunks, fps), 0, max(1, round(fps)), max(1, round(block * fps))
    while True:
        stop = start + length
        end = round(((stop + AFTER) / fps + context) * SAMPLE_RATE_HZ)
        if not sound.fill(end):
            stop = min(stop, sound.num_frames)
            if start >= stop:
                return
        low = max(start - BEFORE, 0)
        origin = int(max(low - context * fps, 0)) // second * second
        piece = sound.between(round(origin / fps * SAMPLE_RATE_HZ), end)
        if stop <= first:
            start = stop
            continue
        total = int(len(piece) / SAMPLE_RATE_HZ * fps) if sound.count >= end else sound.num_frames - origin
        high = min(stop + AFTER - origin, total)
        if voice_activity:
            piece = piece * voice_gate(piece, level_db)
        features = encoder(Waveform(samples=piece, sample_rate_hz=SAMPLE_RATE_HZ), total, fps, low - origin, high)
        frames = torch.arange(start, stop)
        yield frames, features.around(frames - low)
        start = stop


def count_frames(num_samples: int, fps: float) -> int:
    """Return how many frames belong to so much sound: its length rounded to whole frames, at least one."""
    return max(1, round(num_samples / SAMPLE_RATE_HZ * fps))


def voice_gate(samples: Float[Tensor, " n"], level_db: float | None = None) -> Float[Tensor, " n"]:
    """1 where somebody may be speaking, 0 where nobody does: hum, steady noise, clicks, silence; soft between.

    Args:
        samples: 16 kHz mono.
        level_db: loudness of the speech where it is known; else that of the surroundings, and steady noise is found as well.
    """
    count, early = math.ceil(len(samples) / HOP), NUM_STEPS // 2
    steps = mel_steps(samples, count, SAMPLE_RATE_HZ / HOP)[early : early + count]
    loud = steps[:, VOICE_BANDS].amax(-1)
    if level_db is None:
        level = speech_level(steps)
        mean = F.avg_pool1d(loud[None, None], 11, 1, 5, count_include_pad=False)
        noise = -F.max_pool1d(-mean, 2 * NOISE_STEPS + 1, 1, NOISE_STEPS)[0, 0]
        threshold = torch.maximum(level - VOICE_DB, noise + NOISE_DB)
    else:
        threshold = torch.full_like(loud, level_db - VOICE_DB)
    active = (loud > threshold).float()[None, None]
    worn = -F.max_pool1d(F.pad(-active, (0, SHORTEST - 1), value=0.0), SHORTEST, 1)  # starts of long enough runs
    full = F.max_pool1d(F.pad(worn, (SHORTEST - 1, 0)), SHORTEST, 1)
    wide = F.max_pool1d(F.pad(full, (HANG, LEAD)), HANG + LEAD + 1, 1)
    soft = F.avg_pool1d(F.pad(wide, (2, 2), mode="replicate"), 5, 1)
    return F.interpolate(soft, scale_factor=HOP, mode="linear", align_corners=False)[0, 0, : len(samples)]


class _Sound:
    """Sound that comes in chunks; what is not needed any more is forgotten."""

    def __init__(self, chunks: Iterable[Waveform], fps: float) -> None:
        self.chunks, self.fps = iter(chunks), fps
        self.samples, self.forgotten, self.ended = torch.zeros(0), 0, False

    @property
    def count(self) -> int:
        """Samples that have come so far."""
        return self.forgotten + len(self.samples)

    @property
    def num_frames(self) -> int:
        """Frames that belong to what has come."""
        return count_frames(self.count, self.fps)

    def fill(self, end: int | None) -> bool:
        """Wait until the sound reaches `end`; False if it is over before that."""
        parts, count = [self.samples], self.count
        while not self.ended and (end is None or count < end):
            chunk = next(self.chunks, None)
            self.ended = chunk is None
            if chunk is not None:
                check_sound(chunk)
                parts.append(chunk.samples.float())
                count += len(chunk.samples)
        self.samples = torch.cat(parts)
        if not count:
            raise MediaError("the sound is empty: give at least a fraction of a second of it")
        return end is not None and count >= end

    def between(self, start: int, end: int) -> Float[Tensor, " n"]:
        """Samples start … end, and forget those before."""
        self.samples, self.forgotten = self.samples[start - self.forgotten :], start
        return self.samples[: end - start]


def check_sound(waveform: Waveform) -> None:
    """Refuse sound that cannot drive an avatar.

    Raises:
        MediaError: some of it is no number.
        ConfigError: its rate is not 16 kHz.
    """
    if not bool(waveform.samples.isfinite().all()):
        raise MediaError("the sound holds values that are not numbers: clean it, or give the file itself")
    if waveform.sample_rate_hz != SAMPLE_RATE_HZ:
        raise ConfigError(f"speech features need sound at {SAMPLE_RATE_HZ} Hz, got {waveform.sample_rate_hz}: read it with read_audio(path)")


def _listen_to_all(sound: _Sound, encoder: SpeechEncoder, fps: float, *, voice_activity: bool) -> Iterator[Heard]:
    """Hear a sound to its end, then encode it block by block."""
    sound.fill(None)
    waveform, total = Waveform(samples=sound.samples, sample_rate_hz=SAMPLE_RATE_HZ), sound.num_frames
    if voice_activity:
        waveform = replace(waveform, samples=_quiet(waveform.samples))
    length = max(1, round(BLOCK_S * fps))
    for start in range(0, total, length):
        frames = torch.arange(start, min(start + length, total))
        low, high = max(start - BEFORE, 0), min(start + length + AFTER, total)
        yield frames, encoder(waveform, total, fps, low, high).around(frames - low)


def _quiet(samples: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The whole sound, silent where nobody speaks."""
    piece, margin = round(PIECE_S * SAMPLE_RATE_HZ), round(CONTEXT_S) * SAMPLE_RATE_HZ
    gates = []
    for start in range(0, len(samples), piece):
        origin = max(start - margin, 0)
        gates.append(voice_gate(samples[origin : start + piece + margin])[start - origin :][:piece])
    return samples * torch.cat(gates)
