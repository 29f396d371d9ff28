"""What a listener would see of speech: windows of features for every video frame, by one of several encoders behind one protocol.

The builtin one is log-mel, in plain torch and without weights; every number of it depends on the sound within `CONTEXT_S`. The others are wav2vec 2.0
and HuBERT through the optional package transformers, which is imported only when one of them is asked for.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from talk3d.errors import ConfigError, WeightsError
from talk3d.io.catalogue import find, sha256_of
from talk3d.io.published import read_checkpoint
from talk3d.types import AudioFeatures, Waveform

SpeechKind = Literal["logmel", "wav2vec2", "hubert", "ctc44", "deepspeech"]
"""Names of the encoders: log-mel, hidden states of wav2vec 2.0 or HuBERT, and the symbols of wav2vec 2.0 or DeepSpeech in
the published windows."""
PUBLISHED_FPS = 25
"""Frames a second for which the published windows are made."""
SAMPLE_RATE_HZ = 16000
HOP = 320
"""Samples between steps, 20 ms."""
WINDOW = 640
"""Samples under one step, 40 ms."""
NUM_BANDS = 64
NUM_STEPS = 16
"""Steps in the window of one video frame, 320 ms."""
NUM_SYMBOLS = 44
"""Of the Esperanto network whose logits the published system listens to."""
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


@runtime_checkable
class SpeechEncoder(Protocol):
    """Turns sound into what the avatar listens to: one window of 16 steps around the mid-time of every video frame."""

    source: str
    """Which encoder it is; an avatar can only be driven by the one it was trained with."""

    def __call__(self, waveform: Waveform, num_frames: int, fps: float, start: int = 0, stop: int | None = None) -> AudioFeatures:
        """Encode frames `start` … `stop` of a sound that has `num_frames`; a frame's numbers do not depend on which others are asked for.

        Raises:
            ConfigError: the sound's rate is not 16 kHz, or the frame rate is one that the encoder cannot serve.
        """
        ...


class LogMelSpeech:
    """The builtin encoder: `speech_features`, with enough sound around a part to equal the whole's."""

    source = "logmel64"

    def __init__(self, level_db: float | None = None) -> None:
        """Choose the loudness of the speech, for live sound; see `speech_features`."""
        self.level_db = level_db

    def __call__(self, waveform: Waveform, num_frames: int, fps: float, start: int = 0, stop: int | None = None) -> AudioFeatures:
        """See `SpeechEncoder`."""
        stop = num_frames if stop is None else stop
        second = max(1, round(fps))
        margin = (math.ceil(CONTEXT_S) + 1) * second
        low, high = max(start - margin, 0) // second * second, min(stop + margin, num_frames)
        begin, end = (round(frame / fps * waveform.sample_rate_hz) for frame in (low, high))
        samples = waveform.samples[begin : end if high < num_frames else None]
        features = speech_features(replace(waveform, samples=samples), high - low, fps, self.level_db)
        return replace(features, values=features.values[start - low : stop - low])


def load_speech(kind: SpeechKind = "logmel", folder: Path | None = None, device: str = "cpu") -> SpeechEncoder:
    """Return a speech encoder.

    Args:
        kind: `logmel` is builtin; the others need weights, and all but `deepspeech` the package transformers.
        folder: of those weights (config.json and pytorch_model.bin or model.safetensors; for deepspeech its file), in place of the cache folder.
        device: where to compute.

    Raises:
        ConfigError: the package transformers is not installed.
        WeightsError: the weights are not there, not the ones expected, or do not fit.
    """
    if kind == "logmel":
        return LogMelSpeech()
    place = folder or find("wav2vec2" if kind == "ctc44" else kind)
    if kind == "deepspeech":
        from talk3d.perception.deepspeech import DeepSpeechEncoder  # it builds on this module

        return DeepSpeechEncoder(place, device)
    return TransformerSpeech(kind, place, device)


def load_speech_of(source: str, device: str = "cpu") -> SpeechEncoder:
    """Return the encoder that made features of this source.

    Raises:
        ConfigError: this version has none, or the package transformers is not installed.
        WeightsError: its weights are not there, or are others.
    """
    name, _, digest = source.partition(":")
    kinds = [kind for kind in get_args(SpeechKind) if kind == ("logmel" if source == LogMelSpeech.source else digest and name)]
    if not kinds:
        raise ConfigError(f"the avatar listens to {source!r} features, which this version cannot make: train it again")
    encoder = load_speech(kinds[0], device=device)
    if encoder.source != source:
        raise ConfigError(
            f"the avatar listens to {source!r} features, the weights here make {encoder.source!r}: put its own in place, or train it again"
        )
    return encoder


class TransformerSpeech:
    """wav2vec 2.0 or HuBERT through the package transformers: hidden states, or the published windows of 44 symbols.

    The sound goes through in cells with overlap, so memory does not grow with it. Hidden states come from cells of 20 s with 2 s around them,
    after one normalisation of the whole sound; each step has mean 0 and variance 1, its time is 12.5 + 20 k ms, and steps are interpolated to
    half the time of a video frame. The published windows (`ctc44`) follow the published recipe to the letter: cells of 1 s with 0.2 s around
    them, each normalised on its own, raw logits.
    """

    def __init__(self, kind: SpeechKind, folder: Path, device: str = "cpu") -> None:
        """Load a network that `save_pretrained` wrote or the hub serves; only local files are read.

        Raises:
            ConfigError: the package transformers is not installed.
            WeightsError: the folder does not hold such a network.
        """
        self.logits, self.device = kind == "ctc44", device
        self.network, digest = _transformer(folder)
        if self.logits and self.network.config.vocab_size != NUM_SYMBOLS:
            raise WeightsError(f"{folder} knows {self.network.config.vocab_size} symbols, ctc44 needs {NUM_SYMBOLS}: talk3d weights fetch wav2vec2")
        self.network.to(device)
        self.source = f"{kind}:{digest[:12]}"
        self.cell, self.margin = (50, 10) if self.logits else (1000, 100)
        self._given: Tensor | None = None
        self._sound = torch.zeros(0)
        self._cells: dict[int, Tensor] = {}
        self._mean, self._spread = 0.0, 1.0

    def __call__(self, waveform: Waveform, num_frames: int, fps: float, start: int = 0, stop: int | None = None) -> AudioFeatures:
        """See `SpeechEncoder`."""
        if waveform.sample_rate_hz != SAMPLE_RATE_HZ or (self.logits and fps != PUBLISHED_FPS):
            given = f"{waveform.sample_rate_hz} Hz and {fps:g} frames a second"
            raise ConfigError(f"{self.source} features need {SAMPLE_RATE_HZ} Hz, and ctc44 25 frames a second, got {given}: use another --speech")
        stop = num_frames if stop is None else stop
        self._listen_to(waveform.samples)
        if self.logits:  # symbols 2 j - 8 … 2 j + 7, zeros outside
            wanted = torch.arange(2 * start - 8, 2 * stop + 6)
            steps = self._steps(wanted) * ((wanted >= 0) & (wanted < self._count()))[:, None]
        else:
            place = ((torch.arange(2 * start, 2 * stop + 14, dtype=torch.float64) - 6.5) / (2 * fps) - 0.0125) / 0.02
            lower = place.floor()
            steps = torch.lerp(self._steps(lower.long()), self._steps(lower.long() + 1), (place - lower).float()[:, None])
        return AudioFeatures(values=steps.unfold(0, NUM_STEPS, 2).transpose(1, 2), fps=fps, source=self.source)

    def _listen_to(self, samples: Float[Tensor, " n"]) -> None:
        """Take a sound, and forget the one before; a very short one is lengthened by silence."""
        if self._given is samples:
            return
        self._given, self._cells = samples, {}
        self._sound = F.pad(samples.float(), (0, max(3 * HOP - len(samples), 0)))
        self._mean, self._spread = float(self._sound.mean()), math.sqrt(float(self._sound.var(correction=0)) + 1e-7)

    def _count(self) -> int:
        """Steps that the network makes of the sound."""
        return len(self._sound) // HOP - 1 if self.logits else (len(self._sound) - 400) // HOP + 1

    def _steps(self, wanted: Int[Tensor, " m"]) -> Float[Tensor, "m c"]:
        """Steps of the sound by their number, those at its ends repeated beyond them."""
        index = wanted.clamp(0, self._count() - 1)
        first, last = (min(int(number) // self.cell, self._last_cell()) for number in (index.min(), index.max()))
        self._cells = {number: self._cells[number] if number in self._cells else self._encode(number) for number in range(first, last + 1)}
        return torch.cat(list(self._cells.values()))[index - first * self.cell]

    def _last_cell(self) -> int:
        """Number of the last cell; that of the published recipe takes all that is left when no whole one fits any more."""
        return max((len(self._sound) // HOP - self.margin) // self.cell, 0) if self.logits else (self._count() - 1) // self.cell

    @torch.no_grad()
    def _encode(self, number: int) -> Float[Tensor, "m c"]:
        """Encode one cell of the sound."""
        low, high = number * self.cell - self.margin, (number + 1) * self.cell + self.margin
        if self.logits:
            end = len(self._sound) // HOP if number == self._last_cell() else high
            samples = F.pad(self._sound[max(low, 0) * HOP : end * HOP], (max(-low, 0) * HOP, 0))
            samples = (samples - samples.mean()) / (samples.var(correction=0) + 1e-7).sqrt()
            logits = self.network(samples[None].to(self.device)).logits[0, self.margin :].cpu()
            return logits if number == self._last_cell() else logits[: self.cell]
        samples = (self._sound[max(low, 0) * HOP : high * HOP + 80] - self._mean) / self._spread
        hidden = self.network.base_model(samples[None].to(self.device)).last_hidden_state[0]
        start = self.margin + min(low, 0)
        return F.layer_norm(hidden[start : start + self.cell], hidden.shape[-1:]).cpu()


def _transformer(folder: Path) -> tuple[Any, str]:
    """A network for speech from local files, frozen, and the sha256 of its weights. The file is read by our own readers."""
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"speech features by a network need the package transformers ({error}): pip install 'talk3d[speech]'") from error
    files = [path for name in ("model.safetensors", "pytorch_model.bin") if (path := folder / name).is_file()]
    if not files:
        raise WeightsError(f"{folder} holds neither model.safetensors nor pytorch_model.bin: give the folder of a wav2vec 2.0 or HuBERT model")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what it would say at length is said below, in one line
    transformers.logging.disable_progress_bar()
    try:
        state = load_file(files[0]) if files[0].suffix == ".safetensors" else read_checkpoint(files[0])
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = {"wav2vec2": transformers.Wav2Vec2ForCTC, "hubert": transformers.HubertForCTC}[config.model_type]
        network, facts = kind.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise WeightsError(f"{folder} holds no speech network that can be read ({str(error).partition(chr(10))[0]}): fetch it again") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in facts[kind] if "masked_spec_embed" not in str(name)]
    if wrong:
        raise WeightsError(f"{files[0]} does not fit its config: {wrong[:5]} are missing, unexpected or of another shape; fetch it again")
    return network.float().eval().requires_grad_(False), sha256_of(files[0])
