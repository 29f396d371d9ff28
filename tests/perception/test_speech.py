"""Speech features: bands and times by hand, loudness, silence, and the same numbers from pieces as from the whole."""

import math

import pytest
import torch

from talk3d.errors import ConfigError
from talk3d.perception import speech
from talk3d.types import Waveform


def sound(samples: torch.Tensor) -> Waveform:
    return Waveform(samples=samples, sample_rate_hz=16000)


def babble(seconds: float, seed: int = 0) -> torch.Tensor:
    """Bursts of noise and tones with pauses, speech-like in loudness only."""
    count = round(seconds * 16000)
    time = torch.arange(count) / 16000
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    loud = (torch.sin(2 * math.pi * 1.7 * time).clamp_min(0) * (0.3 + 0.2 * torch.sin(time))).float()
    return 0.3 * loud * (noise + 3 * torch.sin(2 * math.pi * 300 * time))


def test_silence_is_minus_one_everywhere():
    features = speech.speech_features(sound(torch.zeros(16000)), 25, 25.0)
    assert features.values.shape == (25, 16, 64)
    assert (features.values == -1).all()
    assert (features.source, features.fps) == ("logmel64", 25.0)


def test_a_click_at_mid_frame_lies_in_the_middle_of_its_window():
    for frame in (0, 7, 24):
        samples = torch.zeros(16000)
        samples[round((frame + 0.5) * 640)] = 1
        window = speech.speech_features(sound(samples), 25, 25.0).values[frame].mean(-1)
        assert window.argsort(descending=True)[:2].sort().values.tolist() == [7, 8]


def test_a_tone_lights_the_band_of_its_pitch():
    centres = [400, 1000, 2500, 5000]
    for hz in centres:
        tone = 0.3 * torch.sin(2 * math.pi * hz * torch.arange(32000) / 16000)
        band = int(speech.speech_features(sound(tone), 50, 25.0).values[25, 8].argmax())
        weights = speech.mel_filters()[band]
        peak = float((weights * torch.linspace(0, 8000, 321)).sum())
        assert peak == pytest.approx(hz, rel=0.08)


def test_mel_filters_have_unit_area_and_slaneys_corner():
    filters = speech.mel_filters()
    assert torch.allclose(filters.sum(-1), torch.ones(64), atol=1e-5)
    assert speech._hz_to_mel(1000.0) == pytest.approx(15.0)
    assert speech._mel_to_hz(torch.tensor([speech._hz_to_mel(6400.0)], dtype=torch.float64)).item() == pytest.approx(6400.0)


def test_loudness_does_not_matter_but_pauses_stay_silent():
    samples = babble(12)
    loud, soft = (speech.speech_features(sound(gain * samples), 300, 25.0).values for gain in (1.0, 0.1))
    assert (loud - soft).abs().max() < 1e-3
    gap = samples.clone()
    gap[6 * 16000 :] = 0
    assert (speech.speech_features(sound(gap), 300, 25.0).values[160:] == -1).all()


def test_a_long_pause_does_not_raise_noise_to_speech():
    samples = torch.cat([babble(8), 2e-4 * torch.randn(16000 * 12, generator=torch.Generator().manual_seed(3))])
    values = speech.speech_features(sound(samples), 500, 25.0).values
    assert values[220:440].mean() < -0.7


def test_pieces_with_context_give_the_same_numbers_as_the_whole():
    samples = babble(34)
    whole = speech.speech_features(sound(samples), 850, 25.0).values
    context = math.ceil(speech.CONTEXT_S * 25)
    piece = sound(samples[(300 - context) * 640 : (400 + context) * 640])
    part = speech.speech_features(piece, 100 + 2 * context, 25.0).values[context:-context]
    assert torch.allclose(part, whole[300:400], atol=1e-5)


def test_a_known_level_makes_the_features_local():
    samples = babble(4)
    whole = speech.speech_features(sound(samples), 100, 25.0, level_db=-40.0).values
    part = speech.speech_features(sound(samples[40 * 640 :]), 60, 25.0, level_db=-40.0).values
    assert torch.allclose(part[10:], whole[50:], atol=1e-6)


def test_sound_that_ends_early_is_silence_and_other_rates_are_refused():
    values = speech.speech_features(sound(babble(1)), 100, 25.0).values
    assert (values[40:] == -1).all()
    with pytest.raises(ConfigError, match="16000"):
        speech.speech_features(Waveform(samples=torch.zeros(100), sample_rate_hz=44100), 1, 25.0)
