"""DeepSpeech from the constants of a graph: TensorFlow's LSTM step by step, the windows of the published recipe, unfit files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from talk3d.errors import ConfigError, WeightsError
from talk3d.perception import deepspeech, speech
from talk3d.perception.deepspeech import DeepSpeech, DeepSpeechEncoder, windows_of
from talk3d.perception.lipsync import cepstra
from talk3d.types import Waveform

HIDDEN, CELLS = 6, 5


def constants() -> dict[str, Tensor]:
    """Random ones, with the names of the published graph and small sizes."""
    sizes = {"1": (494, HIDDEN), "2": (HIDDEN, HIDDEN), "3": (HIDDEN, HIDDEN), "5": (2 * CELLS, HIDDEN), "6": (HIDDEN, 29)}
    found = {f"h{layer}": 0.5 * torch.randn(size) for layer, size in sizes.items()} | {
        f"b{layer}": torch.randn(size[1]) for layer, size in sizes.items()
    }
    for way in ("fw", "bw"):
        found[f"bidirectional_rnn/{way}/basic_lstm_cell/kernel"] = torch.randn(HIDDEN + CELLS, 4 * CELLS)
        found[f"bidirectional_rnn/{way}/basic_lstm_cell/bias"] = torch.randn(4 * CELLS)
    return found


def slow(weights: dict[str, Tensor], windows: Tensor) -> Tensor:
    """As TensorFlow computes it: gates in the order input, candidate, forget, output, one added to the forget gate."""

    def dense(x: Tensor, layer: str) -> Tensor:
        return (x @ weights[f"h{layer}"] + weights[f"b{layer}"]).clamp(0, 20)

    x = dense(dense(dense(windows, "1"), "2"), "3")
    ways = []
    for way, steps in (("fw", list(x)), ("bw", list(x.flip(0)))):
        output, memory, outputs = torch.zeros(CELLS), torch.zeros(CELLS), []
        for step in steps:
            kernel, bias = (weights[f"bidirectional_rnn/{way}/basic_lstm_cell/{part}"] for part in ("kernel", "bias"))
            gate, candidate, forget, show = (torch.cat([step, output]) @ kernel + bias).chunk(4)
            memory = memory * (forget + 1).sigmoid() + gate.sigmoid() * candidate.tanh()
            output = memory.tanh() * show.sigmoid()
            outputs.append(output)
        ways.append(torch.stack(outputs if way == "fw" else outputs[::-1]))
    return dense(torch.cat(ways, 1), "5") @ weights["h6"] + weights["b6"]


def sound(count: int) -> Waveform:
    return Waveform(samples=0.1 * torch.randn(count, generator=torch.Generator().manual_seed(1)), sample_rate_hz=16000)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DeepSpeechEncoder:
    (tmp_path / "graph.pb").write_bytes(b"a graph")
    found = constants()
    monkeypatch.setattr(deepspeech, "read_constants", lambda path: found)
    loaded = speech.load_speech("deepspeech", tmp_path / "graph.pb")
    assert isinstance(loaded, DeepSpeechEncoder) and isinstance(loaded, speech.SpeechEncoder)
    return loaded


def test_the_network_is_tensorflows() -> None:
    weights, windows = constants(), torch.randn(12, 494)
    torch.testing.assert_close(DeepSpeech(weights)(windows), slow(weights, windows), atol=1e-4, rtol=1e-4)


def test_windows_hold_nine_steps_to_either_side() -> None:
    steps = torch.arange(26 * 40.0).view(26, 40)
    windows = windows_of(steps)
    assert windows.shape == (20, 494)
    assert float(windows.mean()) == pytest.approx(0, abs=1e-5) and float(windows.std(correction=0)) == pytest.approx(1, abs=1e-5)
    raw = torch.stack([steps[:, 2 * k] if 0 <= k < 20 else torch.zeros(26) for k in range(5 - 9, 5 + 10)]).flatten()
    scale = (raw.max() - raw.min()) / (windows[5].max() - windows[5].min())
    torch.testing.assert_close((windows[5] - windows[5].min()) * scale + raw.min(), raw, atol=1e-2, rtol=1e-4)


def test_frames_get_the_published_windows(encoder: DeepSpeechEncoder) -> None:
    waveform = sound(40 * 640)
    found = encoder(waveform, 40, 25.0)
    assert found.values.shape == (40, 16, 29) and found.source.startswith("deepspeech:")
    logits = encoder.network(windows_of(cepstra(waveform, 26)))
    assert len(logits) == 80
    truth = torch.nn.functional.pad(logits, (0, 0, 8, 8)).unfold(0, 16, 2).transpose(1, 2)[:40]
    torch.testing.assert_close(found.values, truth)
    torch.testing.assert_close(encoder(waveform, 40, 25.0, 10, 20).values, truth[10:20])
    assert encoder(sound(100), 1, 25.0).values.isfinite().all()
    for rate, fps in ((16000, 30.0), (8000, 25.0)):
        with pytest.raises(ConfigError, match="25 frames a second"):
            encoder(Waveform(samples=torch.zeros(8000), sample_rate_hz=rate), 5, fps)


def test_long_sound_goes_through_in_cells(encoder: DeepSpeechEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoder(sound(60 * 640), 60, 25.0).values
    monkeypatch.setattr(deepspeech, "CELL", 50)
    monkeypatch.setattr(deepspeech, "MARGIN", 120)  # so much around each cell that it hears everything
    parts = encoder(sound(60 * 640), 60, 25.0).values
    torch.testing.assert_close(parts, whole)


def test_other_graphs_are_refused() -> None:
    weights = constants()
    with pytest.raises(WeightsError, match="lacks b2"):
        DeepSpeech({name: value for name, value in weights.items() if name != "b2"})
    with pytest.raises(WeightsError, match="do not go together"):
        DeepSpeech(weights | {"h2": torch.zeros(3, 4)})
