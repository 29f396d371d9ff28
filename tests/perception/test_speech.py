"""Speech features: bands and times by hand, loudness, silence, the same numbers from pieces as from the whole; networks with random weights."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from talk3d.errors import ConfigError, WeightsError
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


def test_a_part_of_log_mel_is_the_part_of_the_whole() -> None:
    encoder = speech.load_speech()
    assert isinstance(encoder, speech.SpeechEncoder) and encoder.source == "logmel64"
    waveform = sound(babble(34, seed=2))
    whole = encoder(waveform, 850, 25.0)
    assert torch.equal(whole.values, speech.speech_features(waveform, 850, 25.0).values)
    for low, high in ((0, 10), (396, 420), (840, 850)):
        torch.testing.assert_close(encoder(waveform, 850, 25.0, low, high).values, whole.values[low:high], atol=1e-4, rtol=0)


def test_a_source_leads_to_its_encoder() -> None:
    assert isinstance(speech.load_speech_of("logmel64"), speech.LogMelSpeech)
    for source in ("mystery:0123", "logmel32", "logmel", "hubert", ""):
        with pytest.raises(ConfigError, match="train it again"):
            speech.load_speech_of(source)


def tiny(folder: Path, kind: str = "wav2vec2", symbols: int = 44) -> Path:
    """A small network with random weights in a folder, with the names that the published files have."""
    folder.mkdir(exist_ok=True)
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": [8] * 7, "vocab_size": symbols}
    shape = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
    config = {"wav2vec2": transformers.Wav2Vec2Config, "hubert": transformers.HubertConfig}[kind](**sizes, **shape, conv_bias=True)
    network = {"wav2vec2": transformers.Wav2Vec2ForCTC, "hubert": transformers.HubertForCTC}[kind](config)
    config.architectures = [type(network).__name__]
    config.save_pretrained(folder)
    state = {key.replace("parametrizations.weight.original0", "weight_g"): value for key, value in network.state_dict().items()}
    torch.save({key.replace("parametrizations.weight.original1", "weight_v"): value for key, value in state.items()}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
def test_hidden_states_come_at_their_times(kind: speech.SpeechKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = speech.load_speech(kind, tiny(tmp_path, kind))
    assert isinstance(encoder, speech.TransformerSpeech) and isinstance(encoder, speech.SpeechEncoder)
    assert encoder.source == f"{kind}:{speech.sha256_of(tmp_path / 'pytorch_model.bin')[:12]}"
    waveform = sound(babble(3, seed=3))
    features = encoder(waveform, 75, 25.0)
    assert features.values.shape == (75, 16, 16) and features.source == encoder.source
    samples = (waveform.samples - waveform.samples.mean()) / waveform.samples.std(correction=0)
    hidden = torch.nn.functional.layer_norm(encoder.network.base_model(samples[None]).last_hidden_state[0], (16,))
    assert encoder._count() == len(hidden) == 149
    for frame, step in ((10, 8), (40, 0), (60, 15)):  # at (frame + 1/2) / 25 + (step - 7.5) / 50 seconds, between steps at 12.5 + 20 k ms
        place = ((frame + 0.5) / 25 + (step - 7.5) / 50 - 0.0125) / 0.02
        low, part = int(place), place - int(place)
        expected = (1 - part) * hidden[low] + part * hidden[low + 1]
        torch.testing.assert_close(features.values[frame, step], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(features.values[0, 0], hidden[0], atol=1e-4, rtol=0)  # the ends are repeated
    torch.testing.assert_close(encoder(waveform, 75, 25.0, 20, 30).values, features.values[20:30])
    assert encoder(waveform, 90, 30.0).values.shape == (90, 16, 16)
    assert encoder(sound(torch.zeros(100)), 1, 25.0).values.isfinite().all()
    again = speech.load_speech(kind, tmp_path)
    monkeypatch.setattr(speech, "find", lambda name: tmp_path)
    assert speech.load_speech_of(encoder.source).source == again.source
    with pytest.raises(ConfigError, match="weights here make"):
        speech.load_speech_of(f"{kind}:0123456789ab")


def test_long_sound_goes_through_in_cells(tmp_path: Path) -> None:
    encoder = speech.load_speech("wav2vec2", tiny(tmp_path))
    assert isinstance(encoder, speech.TransformerSpeech)
    waveform = sound(babble(63, seed=4))
    lengths: list[int] = []
    encoder.network.base_model.register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1]))
    whole = encoder(waveform, 1575, 25.0).values
    assert lengths == [22 * 16000 + 80, 24 * 16000 + 80, 24 * 16000 + 80, 5 * 16000]
    assert whole.stride(0) == 2 * whole.shape[2]  # windows are views of one array
    parts = torch.cat([encoder(waveform, 1575, 25.0, low, min(low + 400, 1575)).values for low in range(0, 1575, 400)])
    torch.testing.assert_close(parts, whole)
    assert len(encoder._cells) <= 2


def published_recipe(network: torch.nn.Module, samples: torch.Tensor) -> torch.Tensor:
    """The released way from sound to windows, written as the buffer of 320-sample chunks that it is."""
    buffer, found = [torch.zeros(320)] * 10, []
    for chunk in [*samples.split(320), None]:
        if chunk is not None:
            buffer.append(chunk)
            if len(buffer) < 70:
                continue
        heard = torch.cat(buffer)
        heard = (heard - heard.mean()) / torch.sqrt(heard.var(correction=0) + 1e-7)
        logits = network(heard[None]).logits[0]
        found.append(logits[10 : len(logits) - 9] if chunk is not None else logits[10:])
        buffer = buffer[-20:]
    steps = torch.cat(found)
    padded = torch.nn.functional.pad(steps, (0, 0, 8, 8))
    return padded.unfold(0, 16, 2).transpose(1, 2)


@pytest.mark.parametrize("num_frames", [1, 20, 29, 30, 31, 35, 79, 80, 82])
def test_published_windows_follow_the_published_recipe(num_frames: int, tmp_path: Path) -> None:
    encoder = speech.load_speech("ctc44", tiny(tmp_path))
    assert isinstance(encoder, speech.TransformerSpeech)
    waveform = sound(babble(4, seed=5)[: num_frames * 640])
    found = encoder(waveform, num_frames, 25.0)
    truth = published_recipe(encoder.network, waveform.samples)
    if num_frames > 1:  # 2 t chunks give 2 t - 1 symbols, which give t windows
        assert found.values.shape == truth.shape == (num_frames, 16, 44)
        torch.testing.assert_close(found.values, truth)
    part = encoder(waveform, num_frames, 25.0, num_frames // 2, num_frames)
    torch.testing.assert_close(part.values, found.values[num_frames // 2 :])


def test_unfit_networks_and_rates_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match=r"neither model\.safetensors"):
        speech.load_speech("hubert", tmp_path)
    encoder = speech.load_speech("ctc44", tiny(tmp_path))
    for rate, fps in ((16000, 30.0), (8000, 25.0)):
        with pytest.raises(ConfigError, match="ctc44 25 frames"):
            encoder(Waveform(samples=torch.zeros(8000), sample_rate_hz=rate), 5, fps)
    with pytest.raises(WeightsError, match="knows 32 symbols"):
        speech.load_speech("ctc44", tiny(tmp_path / "english", symbols=32))
    state = torch.load(tmp_path / "pytorch_model.bin")
    torch.save({key: value for key, value in state.items() if "layers.1." not in key}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="does not fit its config"):
        speech.load_speech("wav2vec2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(WeightsError, match="no speech network"):
        speech.load_speech("wav2vec2", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin"):
        speech.load_speech("wav2vec2", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'talk3d\[speech\]'"):
        speech.load_speech("wav2vec2", tmp_path)
