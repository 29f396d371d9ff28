"""Whether lips and sound belong together: SyncNet, which measures, and the expert of Wav2Lip, which teaches.

Both come from `talk3d weights fetch`; neither is ever replaced by something else. What they hear (cepstra, mel) is made here, in plain torch.

Reference: Chung and Zisserman, Out of time (ACCV-W 2016); Prajwal et al., A lip sync expert is all you need (arXiv 2008.10010).
"""

import math
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.errors import ConfigError
from talk3d.io.catalogue import load_published
from talk3d.perception.speech import SAMPLE_RATE_HZ, mel_triangles
from talk3d.types import Waveform

NUM_FRAMES = 5
"""Video frames that are looked at together."""
SYNC_FPS = 25.0
"""Of the films that both learnt from."""
CEPSTRA = 20
"""Steps of 10 ms that SyncNet hears with them."""
MEL_STEPS = 16
"""Steps of 12.5 ms that the expert hears with them."""

FACE_LAYERS = (
    (32, 7, 1, 3, 0),
    (64, 5, (1, 2), 1, 2),
    (128, 3, 2, 1, 3),
    (256, 3, 2, 1, 2),
    (512, 3, 2, 1, 2),
    (512, 3, 2, 1, 0),
    (512, 3, 1, 0, 0),
    (512, 1, 1, 0, 0),
)
"""The expert's: channels, kernel, stride, padding, and how many residual layers follow."""
AUDIO_LAYERS = ((32, 3, 1, 1, 2), (64, 3, (3, 1), 1, 2), (128, 3, 3, 1, 2), (256, 3, (3, 2), 1, 2), (512, 3, 1, 0, 0), (512, 1, 1, 0, 0))


@runtime_checkable
class SyncNetwork(Protocol):
    """Turns lips and sound into vectors that lie close together where they belong together."""

    source: str
    """Which network it is, to be recorded with what it measured."""

    def see(self, faces: Float[Tensor, "t 3 h w"]) -> Float[Tensor, "n d"]:
        """Embed every run of five video frames: n = t - 4."""
        ...

    def hear(self, waveform: Waveform) -> Float[Tensor, "n d"]:
        """Embed the sound that goes with every run of five frames at 25 frames a second, as many as the sound holds."""
        ...


def _pool(*sizes: tuple[int, ...]) -> nn.Module:
    kernel, stride, *padding = sizes
    kind = nn.MaxPool2d if len(kernel) == 2 else nn.MaxPool3d
    return kind(kernel, stride, padding[0] if padding else 0)  # pyright: ignore[reportArgumentType]


def _embedding() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))


class SyncNet(nn.Module):
    """The two streams of SyncNet with the names of the published file (syncnet_v2.model)."""

    source = "SyncNet v2"

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_flat(1, 64, 3, padding=1),
            _pool((1, 1), (1, 1)),
            *_flat(64, 192, 3, padding=1),
            _pool((3, 3), (1, 2)),
            *_flat(192, 384, 3, padding=1),
            *_flat(384, 256, 3, padding=1),
            *_flat(256, 256, 3, padding=1),
            _pool((3, 3), (2, 2)),
            *_flat(256, 512, (5, 4)),
        )
        self.netfcaud = _embedding()
        self.netfclip = _embedding()
        self.netcnnlip = nn.Sequential(
            *_deep(3, 96, (5, 7, 7), stride=(1, 2, 2)),
            _pool((1, 3, 3), (1, 2, 2)),
            *_deep(96, 256, (1, 5, 5), stride=(1, 2, 2), padding=(0, 1, 1)),
            _pool((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *_deep(256, 256, (1, 3, 3), padding=(0, 1, 1)),
            *_deep(256, 256, (1, 3, 3), padding=(0, 1, 1)),
            *_deep(256, 256, (1, 3, 3), padding=(0, 1, 1)),
            _pool((1, 3, 3), (1, 2, 2)),
            *_deep(256, 512, (1, 6, 6)),
        )

    def lips(self, windows: Float[Tensor, "b 3 5 224 224"]) -> Float[Tensor, "b 1024"]:
        """Embed five frames each, blue first, 0 … 255."""
        return self.netfclip(self.netcnnlip(windows).flatten(1))

    def sound(self, windows: Float[Tensor, "b 1 13 20"]) -> Float[Tensor, "b 1024"]:
        """Embed the cepstra of 0.2 s each."""
        return self.netfcaud(self.netcnnaud(windows).flatten(1))

    def see(self, faces: Float[Tensor, "t 3 h w"]) -> Float[Tensor, "n 1024"]:
        """Embed every run of five frames: RGB in [-1, 1], the face with its surroundings, as SyncNet's own detector cuts it."""
        pictures = _resized(faces, 224).flip(1) * 127.5 + 127.5
        windows = pictures.unfold(0, NUM_FRAMES, 1).permute(0, 1, 4, 2, 3)  # n 3 5 h w
        return torch.cat([self.lips(part) for part in windows.split(16)])

    def hear(self, waveform: Waveform) -> Float[Tensor, "n 1024"]:
        """Embed the sound that goes with every run of five frames."""
        steps = cepstra(waveform)
        windows = steps.unfold(1, CEPSTRA, 4).permute(1, 0, 2)[:, None]  # n 1 c 20
        return self.sound(windows.to(_device(self)))


def _flat(channels: int, depth: int, kernel: int | tuple[int, int], padding: int = 0) -> list[nn.Module]:
    return [nn.Conv2d(channels, depth, kernel, padding=padding), nn.BatchNorm2d(depth), nn.ReLU()]


def _deep(
    channels: int, depth: int, kernel: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1), padding: tuple[int, int, int] = (0, 0, 0)
) -> list[nn.Module]:
    return [nn.Conv3d(channels, depth, kernel, stride, padding), nn.BatchNorm3d(depth), nn.ReLU()]


class _Layer(nn.Module):
    """Convolution and norm, with a path around them where nothing changes size."""

    def __init__(self, channels: int, depth: int, kernel: int, stride: int | tuple[int, int], padding: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(nn.Conv2d(channels, depth, kernel, stride, padding), nn.BatchNorm2d(depth))
        self.around = (channels, kernel, stride, padding) == (depth, 3, 1, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        out = self.conv_block(x)
        return (out + x if self.around else out).relu()


def _stack(first: int, *layers: tuple[int, int, int | tuple[int, int], int, int]) -> nn.Sequential:
    """Layers of (depth, kernel, stride, padding), each followed by a number of residual ones."""
    modules, channels = [], first
    for depth, kernel, stride, padding, followers in layers:
        modules += [_Layer(channels, depth, kernel, stride, padding), *(_Layer(depth, depth, 3, 1, 1) for _ in range(followers))]
        channels = depth
    return nn.Sequential(*modules)


class SyncExpert(nn.Module):
    """The expert of Wav2Lip, to load the published file (lipsync_expert.pth).

    Names and sizes follow the architecture as it is described with the paper; they could not be compared with a list of those in the file,
    so loading, which is strict, is the proof.
    """

    source = "Wav2Lip sync expert"

    def __init__(self) -> None:
        super().__init__()
        self.face_encoder = _stack(15, *FACE_LAYERS)
        self.audio_encoder = _stack(1, *AUDIO_LAYERS)

    def lips(self, windows: Float[Tensor, "b 15 48 96"]) -> Float[Tensor, "b 512"]:
        """Embed the lower halves of five frames each, blue first, 0 … 1; unit vectors, nothing negative."""
        return F.normalize(self.face_encoder(windows).flatten(1), dim=-1)

    def sound(self, windows: Float[Tensor, "b 1 80 16"]) -> Float[Tensor, "b 512"]:
        """Embed the mel spectrum of 0.2 s each; unit vectors, nothing negative."""
        return F.normalize(self.audio_encoder(windows).flatten(1), dim=-1)

    def see(self, faces: Float[Tensor, "t 3 h w"]) -> Float[Tensor, "n 512"]:
        """Embed every run of five frames, differentiably: RGB in [-1, 1], cut to the face from brow to chin and ear to ear."""
        pictures = _resized(faces, 96).flip(1) * 0.5 + 0.5
        windows = pictures[:, :, 48:].unfold(0, NUM_FRAMES, 1).permute(0, 4, 1, 2, 3)  # n 5 3 48 96
        return self.lips(windows.flatten(1, 2))

    def hear(self, waveform: Waveform) -> Float[Tensor, "n 512"]:
        """Embed the sound that goes with every run of five frames."""
        steps = expert_mel(waveform)
        starts = [start for start in (int(3.2 * i) for i in range(steps.shape[1])) if start + MEL_STEPS <= steps.shape[1]]
        windows = torch.stack([steps[:, start : start + MEL_STEPS] for start in starts])[:, None]  # n 1 c 16
        return self.sound(windows.to(_device(self)))


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _resized(faces: Float[Tensor, "t 3 h w"], side: int) -> Float[Tensor, "t 3 s s"]:
    if faces.shape[-2:] == (side, side):
        return faces
    return F.interpolate(faces, (side, side), mode="bilinear", align_corners=False, antialias=True)


def load_syncnet(path: Path | None = None, device: str = "cpu") -> SyncNet:
    """Return the published SyncNet, frozen; `path` in place of the file in the cache folder.

    Raises:
        WeightsError: the weights are not there, or do not fit.
    """
    network = SyncNet()
    load_published("syncnet", network, path)
    return network.eval().requires_grad_(False).to(device)


def load_sync_expert(path: Path | None = None, device: str = "cpu") -> SyncExpert:
    """Return the published expert, frozen; `path` in place of the file in the cache folder.

    Raises:
        WeightsError: the weights are not there, or do not fit.
    """
    network = SyncExpert()
    load_published("sync-expert", network, path)
    return network.eval().requires_grad_(False).to(device)


def cepstra(waveform: Waveform, count: int = 13) -> Float[Tensor, "c m"]:
    """Mel-frequency cepstra at every 10 ms over 25 ms, of sound on the scale of 16-bit integers, as SyncNet (13) and DeepSpeech (26) learnt them.

    26 triangles between 0 and 8 kHz on the mel scale of HTK, their corners on whole bins of 512; an orthonormal cosine transform,
    liftered by 22; the first one is replaced by the logarithm of the energy.

    Raises:
        ConfigError: the sound is not at 16 kHz, or shorter than a window.
    """
    samples = _checked(waveform, 400).double() * 32768
    emphasised = samples - 0.97 * F.pad(samples, (1, 0))[:-1]
    emphasised[0] = samples[0]
    missing = -(len(samples) - 400) % 160
    pieces = F.pad(emphasised, (0, missing)).unfold(0, 400, 160)
    power = torch.fft.rfft(pieces, 512).abs().square() / 512
    tiny = torch.finfo(torch.float64).eps
    energy = power.sum(-1)
    bands = (power @ _htk_triangles().mT).clamp_min(tiny).log()
    k, n = torch.arange(count, dtype=torch.float64)[:, None], torch.arange(26, dtype=torch.float64)
    cosines = torch.cos(math.pi * k * (2 * n + 1) / 52) * math.sqrt(2 / 26)
    cosines[0] /= math.sqrt(2)
    lifter = 1 + 11 * torch.sin(math.pi * k[:, 0] / 22)
    found = (bands @ cosines.mT) * lifter
    found[:, 0] = energy.clamp_min(tiny).log()
    return found.mT.float()


def _htk_triangles() -> Float[Tensor, "26 f"]:
    highest = 2595 * math.log10(1 + 8000 / 700)
    hz = 700 * (10 ** (torch.linspace(0, highest, 28, dtype=torch.float64) / 2595) - 1)
    corners = (513 * hz / SAMPLE_RATE_HZ).floor()
    bins = torch.arange(257, dtype=torch.float64)
    low, peak, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (bins - low) / (peak - low), (high - bins) / (high - peak)
    return torch.where(bins < peak, rising, falling).clamp_min(0).nan_to_num(0)


def expert_mel(waveform: Waveform) -> Float[Tensor, "80 m"]:
    """Mel spectrum at every 12.5 ms over 50 ms in [-4, 4], as the expert learnt it; the ends are mirrored.

    Raises:
        ConfigError: the sound is not at 16 kHz, or shorter than a window.
    """
    samples = _checked(waveform, 800)
    emphasised = samples - 0.97 * F.pad(samples, (1, 0))[:-1]
    spectrum = torch.stft(emphasised, 800, 200, window=torch.hann_window(800), center=True, pad_mode="reflect", return_complex=True).abs()
    triangles, width_hz = mel_triangles(80, 401, 55.0, 7600.0)
    bands = (2 * triangles / width_hz).float() @ spectrum  # each triangle has the area of one
    level = 20 * bands.clamp_min(1e-5).log10() - 20
    return (8 * (level + 100) / 100 - 4).clamp(-4, 4)


def _checked(waveform: Waveform, shortest: int) -> Float[Tensor, " n"]:
    if waveform.sample_rate_hz != SAMPLE_RATE_HZ or len(waveform.samples) <= shortest:
        given = f"{len(waveform.samples)} samples at {waveform.sample_rate_hz} Hz"
        raise ConfigError(f"this network needs sound at {SAMPLE_RATE_HZ} Hz of more than {shortest} samples, got {given}: use read_audio(path)")
    return waveform.samples.float()
