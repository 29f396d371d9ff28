"""The shift between sound and lips, found on lips and voices made by hand."""

import numpy as np
import pytest
import torch

from talk3d.metrics.offset import REACH_S, sound_offset
from talk3d.types import Waveform

FPS = 25.0
RATE = 16000


def syllables(times_s: np.ndarray, seed: int = 0) -> np.ndarray:
    """How far a mouth is open, 0 … 1: a few slow waves of random phase."""
    generator = np.random.default_rng(seed)
    waves = [np.sin(2 * np.pi * (hz * times_s + generator.uniform())) for hz in generator.uniform(1.5, 5.0, 12)]
    return np.clip(np.mean(waves, 0) * 2, 0, 1)


def face(opening: np.ndarray) -> np.ndarray:
    """A still face of 100 px between the eyes whose lips and jaw open."""
    points = np.zeros((len(opening), 468, 2), np.float32)
    points[:, 33], points[:, 263], points[:, 168] = (-50, 0), (50, 0), (0, 0)
    points[:, 152, 1] = 110 + 30 * opening
    for upper, lower in ((82, 87), (13, 14), (312, 317)):
        points[:, upper, 1], points[:, lower, 1] = 60, 60 + 30 * opening
    return points


def voice(length_s: float, late_s: float, seed: int = 0, noise: float = 0.01) -> Waveform:
    """Noise as loud as the mouth is open, in a murmur."""
    times = np.arange(round(length_s * RATE)) / RATE
    generator = np.random.default_rng(9)
    samples = generator.normal(size=len(times)) * 0.1 * syllables(times - late_s, seed) + generator.normal(size=len(times)) * noise
    return Waveform(samples=torch.from_numpy(samples.astype(np.float32)), sample_rate_hz=RATE)


def frames(length_s: float, seed: int = 0) -> np.ndarray:
    return face(syllables((np.arange(round(length_s * FPS)) + 0.5) / FPS, seed))


@pytest.mark.parametrize("late_ms", [0, 280, -280, 35, 600])
def test_the_shift_is_found_within_a_hundredth_of_a_second(late_ms: int):
    points = frames(16)
    found = sound_offset(points, np.arange(len(points)), voice(16, late_ms / 1000), FPS)
    assert found is not None
    assert found.sure
    assert found.late_s == pytest.approx(late_ms / 1000, abs=0.01)
    assert found.spread_s < 0.02
    assert found.correlation == pytest.approx(found.curve.max())
    assert found.correlation > 0.7


def test_another_rate_and_noise_do_not_matter():
    points = face(syllables((np.arange(480) + 0.5) / 30))
    found = sound_offset(points, np.arange(480), voice(16, 0.2, noise=0.05), 30.0)
    assert found is not None
    assert found.sure
    assert found.late_s == pytest.approx(0.2, abs=0.015)


def test_the_same_clip_twice_gives_the_same_numbers():
    points, sound = frames(10), voice(10, 0.1, noise=0.1)
    first, second = (sound_offset(points, np.arange(250), sound, FPS) for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.late_s, first.spread_s, first.agreement) == (second.late_s, second.spread_s, second.agreement)


def test_a_voice_of_another_film_is_never_sure():
    points = frames(16, seed=1)
    for seed in range(2, 8):
        found = sound_offset(points, np.arange(400), voice(16, 0.0, seed), FPS)
        assert found is not None
        assert not found.sure


def test_short_clips_must_be_clear_and_shifts_out_of_reach_are_not_sure():
    short = sound_offset(frames(5), np.arange(125), voice(5, 0.1), FPS)
    assert short is not None
    assert short.sure
    assert short.late_s == pytest.approx(0.1, abs=0.02)
    for seed in range(2, 14):
        chance = sound_offset(frames(5, seed=1), np.arange(125), voice(5, 0.0, seed), FPS)
        assert chance is not None
        assert not chance.sure
    least = sound_offset(frames(2.9), np.arange(72), voice(2.9, 0.1), FPS)
    assert least is not None
    assert not least.sure
    far = sound_offset(frames(16), np.arange(400), voice(16, REACH_S + 0.3), FPS)
    assert far is not None
    assert not far.sure


def test_frames_without_a_face_and_jumps_at_cuts_do_not_count():
    points = frames(24)
    points[400:] *= np.float32(1.7)
    seen = np.r_[0:200, 300:600]
    found = sound_offset(points[seen], seen, voice(24, 0.12), FPS, (400,))
    assert found is not None
    assert found.sure
    assert found.late_s == pytest.approx(0.12, abs=0.01)


def test_silence_a_still_face_and_next_to_nothing_give_no_number():
    seen = np.arange(250)
    assert sound_offset(frames(10), seen, Waveform(samples=torch.zeros(160000), sample_rate_hz=RATE), FPS) is None
    assert sound_offset(face(np.full(250, 0.3)), seen, voice(10, 0), FPS) is None
    assert sound_offset(frames(10)[:0], seen[:0], voice(10, 0), FPS) is None
    assert sound_offset(frames(1.5), seen[:38], voice(1.5, 0), FPS) is None
