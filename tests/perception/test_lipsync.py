"""SyncNet and the expert: names, sizes, shapes; what they hear against numbers of the libraries that they learnt with."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from talk3d.errors import ConfigError, WeightsError
from talk3d.io.catalogue import CATALOGUE
from talk3d.perception.lipsync import SyncExpert, SyncNet, SyncNetwork, cepstra, expert_mel, load_sync_expert, load_syncnet
from talk3d.types import Waveform


def chirp(seconds: float = 1.0) -> Waveform:
    t = np.arange(round(16000 * seconds)) / 16000
    noise = np.random.default_rng(0).standard_normal(len(t))
    sound = 0.3 * np.sin(2 * np.pi * 220 * t * (1 + 0.5 * t)) + 0.1 * np.sin(2 * np.pi * 1700 * t) + 0.01 * noise
    return Waveform(samples=torch.from_numpy(np.round(sound * 32768) / 32768).float(), sample_rate_hz=16000)


def test_names_and_sizes_are_the_published_ones(has_published_sizes: Callable[..., None]) -> None:
    with torch.device("meta"):
        syncnet, expert = SyncNet(), SyncExpert()
    has_published_sizes("syncnet", syncnet, file_bytes=CATALOGUE["syncnet"].size_bytes)
    has_published_sizes("sync-expert", expert)


def test_cepstra_are_those_of_python_speech_features() -> None:
    """Version 0.6, `mfcc(samples, 16000)` on 16-bit samples: its first step and the one at half a second."""
    truth = [20.1493, -8.3821, -1.5272, 10.559, 33.8331, -4.7681, -48.4514, -30.0968, 4.7503, -19.2218, -44.7793, -26.7151, 1.8374]
    middle = [20.2822, -0.8672, -2.0109, -8.0187, 16.1402, -12.3763, -57.534, -34.3312, 6.3251, -7.4487, -29.2473, 1.7237, 30.2316]
    found = cepstra(chirp())
    assert found.shape == (13, 99)
    assert torch.allclose(found[:, [0, 50]].mT, torch.tensor([truth, middle]), atol=2e-4)


def test_mel_is_that_of_librosa() -> None:
    """Slaney's filters and mirrored ends, from an independent implementation (transformers' `audio_utils`)."""
    found = expert_mel(chirp())
    assert found.shape == (80, 81) and found.min() >= -4 and found.max() <= 4
    assert torch.allclose(found[[0, 20, 40, 79], 40], torch.tensor([-3.1508, -2.2881, 1.4141, -0.5452]), atol=2e-4)
    assert (expert_mel(Waveform(samples=torch.zeros(16000), sample_rate_hz=16000)) == -4).all()


@pytest.mark.parametrize("hear", [cepstra, expert_mel])
def test_unfit_sound_is_refused(hear: Callable[[Waveform], Tensor]) -> None:
    for samples, rate in ((torch.zeros(16000), 44100), (torch.zeros(300), 16000)):
        with pytest.raises(ConfigError, match="16000 Hz"):
            hear(Waveform(samples=samples, sample_rate_hz=rate))


def test_syncnet_sees_and_hears_every_run_of_five_frames(tmp_path: Path) -> None:
    torch.save(SyncNet().state_dict(), tmp_path / "syncnet.model", _use_new_zipfile_serialization=False)  # as the published file is
    network = load_syncnet(tmp_path / "syncnet.model")
    assert isinstance(network, SyncNetwork)
    faces = torch.rand(6, 3, 224, 224) * 2 - 1
    seen = network.see(faces)
    assert seen.shape == (2, 1024)
    window = (faces[1:6].flip(1) * 127.5 + 127.5).transpose(0, 1)[None]
    assert torch.allclose(network.lips(window), seen[1:], atol=1e-4)
    assert network.hear(chirp(0.4)).shape == (5, 1024)  # 39 steps hold five windows of 20, 4 apart
    assert network.sound(torch.zeros(2, 1, 13, 20)).shape == (2, 1024)
    with pytest.raises(WeightsError, match="does not fit"):
        load_sync_expert(_saved(tmp_path, network.state_dict()))


def _saved(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": state, "optimizer": {"state": {}, "param_groups": []}, "global_step": 7}, folder / "expert.pth")
    return folder / "expert.pth"


def test_the_expert_gives_unit_vectors_without_negatives(tmp_path: Path) -> None:
    network = load_sync_expert(_saved(tmp_path, SyncExpert().state_dict()))
    assert isinstance(network, SyncNetwork)
    faces = (torch.rand(7, 3, 60, 60) * 2 - 1).requires_grad_()
    seen = network.see(faces)
    heard = network.hear(chirp())
    assert seen.shape == (3, 512) and heard.shape == (21, 512)  # 81 steps: the last window starts at int(3.2 · 20) = 64
    for vectors in (seen, heard):
        assert vectors.min() >= 0 and torch.allclose(vectors.norm(dim=-1), torch.ones(len(vectors)), atol=1e-4)
    seen.sum().backward()
    assert faces.grad is not None
    assert faces.grad[:, :, 35:].abs().max() > 0 and faces.grad[:, :, :25].abs().max() == 0  # only the lower half is looked at
