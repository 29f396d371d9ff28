"""DeepSpeech 0.1: the symbols that a listener of 2017 hears, 29 of them, which older talking heads are driven by.

The published file is a frozen TensorFlow graph; only its constants are read, TensorFlow is not needed. Their names are those of the variables of
Mozilla's release. They are known from public code, and a file that lacks them is refused.

Reference: Hannun et al., Deep Speech (arXiv 1412.5567).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.errors import ConfigError, WeightsError
from talk3d.io.catalogue import sha256_of
from talk3d.io.graphs import read_constants
from talk3d.perception.lipsync import cepstra
from talk3d.perception.speech import NUM_STEPS, SAMPLE_RATE_HZ
from talk3d.types import AudioFeatures, Waveform

NUM_CEPSTRA, NUM_CONTEXT, NUM_SYMBOLS = 26, 9, 29
CEILING = 20.0
"""Rectified values are cut off above this."""
FORGET_BIAS = 1.0
"""Added to the forget gate's bias, which the file holds without it."""
CELL, MARGIN = 1000, 100
"""Steps of 20 ms that go through the network together, and steps around them, so that memory does not grow with the sound."""
LAYERS = ("1", "2", "3", "5", "6")
LSTM = "bidirectional_rnn/{}/basic_lstm_cell/{}"


class DeepSpeech(nn.Module):
    """Three dense layers on 19 steps of cepstra, a bidirectional LSTM, two dense layers."""

    def __init__(self, constants: dict[str, Tensor]) -> None:
        """Build it from the constants of the published graph.

        Raises:
            WeightsError: one is missing, or their sizes do not go together.
        """
        super().__init__()
        names = [f"{kind}{layer}" for layer in LAYERS for kind in "hb"] + [
            LSTM.format(way, part) for way in ("fw", "bw") for part in ("kernel", "bias")
        ]
        missing = [name for name in names if name not in constants]
        if missing:
            raise WeightsError(f"the graph is not DeepSpeech 0.1: it lacks {', '.join(missing[:5])}; talk3d weights fetch deepspeech")
        try:
            self.dense = nn.ModuleDict({layer: _dense(constants[f"h{layer}"], constants[f"b{layer}"]) for layer in LAYERS})
            self.lstm = _lstm(constants)
            self(torch.zeros(1, NUM_CEPSTRA * (2 * NUM_CONTEXT + 1)))
        except (RuntimeError, ValueError) as error:
            raise WeightsError(f"the graph is not DeepSpeech 0.1: its sizes do not go together ({str(error)[:80]})") from error

    def forward(self, windows: Float[Tensor, "m 494"]) -> Float[Tensor, "m 29"]:
        """Return logits for every step of 20 ms."""
        x = windows
        for layer in ("1", "2", "3"):
            x = self.dense[layer](x).clamp(0, CEILING)
        x = self.dense["5"](self.lstm(x)[0]).clamp(0, CEILING)
        return self.dense["6"](x)


def _dense(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[0], weight.shape[1])
    layer.load_state_dict({"weight": weight.mT, "bias": bias})
    return layer


def _lstm(constants: dict[str, Tensor]) -> nn.LSTM:
    """Gates come in TensorFlow as input, candidate, forget, output, in torch as input, forget, candidate, output."""
    width = constants[LSTM.format("fw", "bias")].shape[0] // 4
    features = constants[LSTM.format("fw", "kernel")].shape[0] - width
    state = {}
    for way, suffix in (("fw", ""), ("bw", "_reverse")):
        kernel, bias = (constants[LSTM.format(way, part)] for part in ("kernel", "bias"))
        gates = [torch.cat([kernel, bias[None]]).chunk(4, 1)[number] for number in (0, 2, 1, 3)]
        gates[1] = torch.cat([gates[1][:-1], gates[1][-1:] + FORGET_BIAS])
        ordered = torch.cat(gates, 1).mT.contiguous()
        state |= {f"weight_ih_l0{suffix}": ordered[:, :features], f"weight_hh_l0{suffix}": ordered[:, features:-1]}
        state |= {f"bias_ih_l0{suffix}": ordered[:, -1], f"bias_hh_l0{suffix}": torch.zeros(4 * width)}
    network = nn.LSTM(features, width, bidirectional=True)
    network.load_state_dict(state)
    return network


def windows_of(cepstra: Float[Tensor, "26 k"]) -> Float[Tensor, "m 494"]:
    """Every second step of cepstra with nine such steps to either side, zeros beyond the ends, normalised over the whole sound."""
    padded = F.pad(cepstra[:, ::2], (NUM_CONTEXT, NUM_CONTEXT))
    windows = padded.unfold(1, 2 * NUM_CONTEXT + 1, 1).permute(1, 2, 0).flatten(1)  # m 19 26, then one row a step
    return (windows - windows.mean()) / windows.std(correction=0).clamp_min(1e-8)


def load_deepspeech(path: Path, device: str = "cpu") -> DeepSpeech:
    """Return the published network, frozen.

    Raises:
        WeightsError: the file cannot be read, or holds another network.
    """
    return DeepSpeech(read_constants(path)).eval().requires_grad_(False).to(device)


class DeepSpeechEncoder:
    """Windows of 16 logits as in the published recipe, for 25 frames a second: steps 2 j - 8 … 2 j + 7 for frame j, zeros outside the sound.

    Sounds of up to 20 s go through at once, as published; in longer ones the LSTM starts anew 2 s before every 20 s.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        """Load the published graph.

        Raises:
            WeightsError: the file cannot be read, or holds another network.
        """
        self.network, self.device = load_deepspeech(path, device), device
        self.source = f"deepspeech:{sha256_of(path)[:12]}"
        self._given: Tensor | None = None
        self._logits = torch.zeros(0, NUM_SYMBOLS)

    def __call__(self, waveform: Waveform, num_frames: int, fps: float, start: int = 0, stop: int | None = None) -> AudioFeatures:
        """See `talk3d.perception.speech.SpeechEncoder`."""
        if waveform.sample_rate_hz != SAMPLE_RATE_HZ or fps != 25:
            given = f"{waveform.sample_rate_hz} Hz and {fps:g} frames a second"
            raise ConfigError(f"deepspeech features need {SAMPLE_RATE_HZ} Hz and 25 frames a second, got {given}: use another --speech")
        if self._given is not waveform.samples:
            samples = F.pad(waveform.samples, (0, max(800 - len(waveform.samples), 0)))
            windows = windows_of(cepstra(Waveform(samples=samples, sample_rate_hz=SAMPLE_RATE_HZ), NUM_CEPSTRA))
            self._given, self._logits = waveform.samples, torch.cat([self._encode(windows, low) for low in range(0, len(windows), CELL)])
        wanted = torch.arange(2 * start - 8, 2 * (num_frames if stop is None else stop) + 6)
        last = len(self._logits) - 1
        steps = self._logits[wanted.clamp(0, last)] * ((wanted >= 0) & (wanted <= last))[:, None]
        return AudioFeatures(values=steps.unfold(0, NUM_STEPS, 2).transpose(1, 2), fps=fps, source=self.source)

    @torch.no_grad()
    def _encode(self, windows: Float[Tensor, "m 494"], low: int) -> Float[Tensor, "k 29"]:
        begin = max(low - MARGIN, 0)
        return self.network(windows[begin : low + CELL + MARGIN].to(self.device)).cpu()[low - begin :][:CELL]
