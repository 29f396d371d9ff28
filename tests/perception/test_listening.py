import math
from collections.abc import Iterator

import pytest
import torch

from talk3d.errors import ConfigError, MediaError
from talk3d.perception.listening import count_frames, listen, voice_gate
from talk3d.perception.speech import LogMelSpeech, speech_features
from talk3d.types import AudioFeatures, Waveform

RATE = 16000


def wave(samples: torch.Tensor) -> Waveform:
    return Waveform(samples=samples, sample_rate_hz=RATE)


def syllables(duration_s: float, level: float = 0.3) -> torch.Tensor:
    """A buzz of 150 Hz through three formants, four syllables a second, as loud as speech is uneven."""
    time = torch.arange(round(duration_s * RATE)) / RATE
    buzz = torch.stack([torch.sin(2 * math.pi * 150 * k * time) * math.exp(-(((150 * k - 500) / 400) ** 2)) for k in range(1, 20)]).sum(0)
    return level * buzz / buzz.abs().max() * torch.sin(2 * math.pi * 2 * time).square()


def pieces(samples: torch.Tensor, length: int) -> Iterator[Waveform]:
    return (wave(piece) for piece in samples.split(length))


@pytest.mark.parametrize("level_db", [None, -35.0])
@pytest.mark.parametrize("fps", [25.0, 30.0])
def test_the_features_are_bit_equal_however_the_sound_is_cut(level_db: float | None, fps: float) -> None:
    samples = syllables(17.3) + 0.01 * torch.randn(round(17.3 * RATE))
    whole = list(listen([wave(samples)], LogMelSpeech(), fps, level_db=level_db))
    assert torch.cat([frames for frames, _ in whole]).tolist() == list(range(round(17.3 * fps)))
    for length in (333, 16000, 100000):
        cut = list(listen(pieces(samples, length), LogMelSpeech(), fps, level_db=level_db))
        assert all(torch.equal(one, other) for (_, one), (_, other) in zip(whole, cut, strict=True))


def test_without_the_gate_they_are_the_encoders_own() -> None:
    speech = wave(syllables(30.0))
    heard = torch.cat([windows for _, windows in listen([speech], LogMelSpeech(), 25.0, voice_activity=False)])
    torch.testing.assert_close(heard, speech_features(speech, 750, 25.0).around(torch.arange(750)), atol=1e-4, rtol=0)
    live = torch.cat([windows for _, windows in listen([speech], LogMelSpeech(), 25.0, voice_activity=False, level_db=-30.0)])
    torch.testing.assert_close(live, speech_features(speech, 750, 25.0, -30.0).around(torch.arange(750)), atol=1e-4, rtol=0)


def test_blocks_before_the_first_frame_wanted_are_left_out() -> None:
    speech = wave(syllables(9.0))
    whole, late = (list(listen([speech], LogMelSpeech(), 25.0, first=first)) for first in (0, 120))
    assert int(late[0][0][0]) == 100
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(whole[2:], late, strict=True))


class Ear:
    """An encoder that has to hear everything first."""

    source = "hubert:0123456789ab"

    def __call__(self, waveform: Waveform, num_frames: int, fps: float, start: int = 0, stop: int | None = None) -> AudioFeatures:
        total = waveform.samples.abs().sum()
        ramp = torch.arange(start, stop or num_frames) + total
        return AudioFeatures(values=ramp[:, None, None].expand(-1, 16, 3), fps=fps, source=self.source)


def test_other_encoders_hear_the_whole_sound_first_and_cannot_be_live() -> None:
    samples = syllables(5.0)
    whole, cut = (torch.cat([windows for _, windows in listen(chunks, Ear(), 25.0)]) for chunks in ([wave(samples)], pieces(samples, 999)))
    assert torch.equal(whole, cut) and len(whole) == 125
    with pytest.raises(ConfigError, match="whole sound"):
        next(listen([wave(samples)], Ear(), 25.0, level_db=-30.0))


def test_unfit_chunks_are_refused() -> None:
    with pytest.raises(MediaError, match="empty"):
        next(listen([], LogMelSpeech(), 25.0))
    with pytest.raises(MediaError, match="empty"):
        next(listen([wave(torch.zeros(0))], LogMelSpeech(), 25.0))
    with pytest.raises(MediaError, match="not numbers"):
        next(listen([wave(torch.zeros(900)), wave(torch.full((5,), math.inf))], LogMelSpeech(), 25.0))
    with pytest.raises(ConfigError, match="16000 Hz"):
        next(listen([Waveform(samples=torch.zeros(900), sample_rate_hz=8000)], LogMelSpeech(), 25.0))


@pytest.mark.parametrize(("num_samples", "expected"), [(16000, 25), (1600, 2), (16, 1), (0, 1)])
def test_there_are_as_many_frames_as_fit(num_samples: int, expected: int) -> None:
    assert count_frames(num_samples, 25.0) == expected
    if num_samples:
        assert sum(len(frames) for frames, _ in listen([wave(torch.zeros(num_samples))], LogMelSpeech(), 25.0)) == expected


def test_only_voices_are_let_through() -> None:
    silence, second = torch.zeros(10 * RATE), RATE
    time = torch.arange(10 * RATE) / RATE
    clicks = silence.clone()
    clicks[[3 * RATE, 7 * RATE]] = 1.0
    for nothing in (silence, clicks, 0.3 * torch.sin(2 * math.pi * 50 * time), 0.01 * torch.randn(10 * RATE)):
        assert not voice_gate(nothing).any()
    said = torch.cat([silence[:second], syllables(3.0), silence[: 2 * second], syllables(4.0)])
    for noise in (0.0, 0.002):
        gate = voice_gate(said + noise * torch.randn(len(said)))
        assert len(gate) == len(said) and float(gate.min()) >= 0 and float(gate.max()) <= 1
        assert (gate[round(1.1 * second) : round(3.9 * second)] == 1).all() and (gate[round(6.1 * second) : round(9.9 * second)] == 1).all()
        assert not gate[: round(0.8 * second)].any() and not gate[round(4.3 * second) : round(5.8 * second)].any()
    live = voice_gate(said, -35.0)
    assert (live[round(1.1 * second) : round(3.9 * second)] == 1).all() and not live[round(4.3 * second) : round(5.8 * second)].any()


def test_the_quiet_whole_is_the_gate_of_the_whole() -> None:
    class Remember(Ear):
        def __call__(self, waveform: Waveform, num_frames: int, fps: float, start: int = 0, stop: int | None = None) -> AudioFeatures:
            self.samples = waveform.samples
            return super().__call__(waveform, num_frames, fps, start, stop)

    samples = syllables(50.0) * (torch.arange(50 * RATE) % (8 * RATE) < 5 * RATE)
    ear = Remember()
    next(listen([wave(samples)], ear, 25.0))
    torch.testing.assert_close(ear.samples, samples * voice_gate(samples), atol=1e-5, rtol=0)
