"""The lip reader: its windows sit on the skull, and it learns to read shapes. The expert: lips and sound must move together."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from talk3d.errors import ConfigError, WeightsError
from talk3d.ops.geometry import head_camera, project
from talk3d.perception.lipsync import SyncExpert
from talk3d.training.lips import (
    CROP_SIDE,
    FACE,
    FACE_EXTENT,
    FACE_SIDE,
    LipReader,
    SyncLoss,
    face_windows,
    mouth_looks,
    mouth_windows,
    teach,
    window_crops,
)
from talk3d.training.losses import MOUTH, RIGID, MouthShapes, mouth_shapes
from talk3d.types import Waveform


def faces(count: int) -> torch.Tensor:
    """A face that turns, grows and wanders in the picture, its lips opening as they like, pixels."""
    rest = 60 + 40 * torch.rand(478, 2, generator=torch.Generator().manual_seed(1))
    points = rest.expand(count, -1, -1).clone()
    time = torch.arange(count, dtype=torch.float32)
    points[:, [14, 17], 1] += 5 * (time % 3 - 1)[:, None]
    angle, size = 0.2 * torch.sin(time), 1 + 0.1 * torch.cos(2 * time)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)], -2)
    return size[:, None, None] * points @ turn.mT + 10 * torch.stack([time.sin(), time.cos()], -1)[:, None]


def test_looks_tell_how_far_the_mouth_is_open_however_the_head_is_held_and_lit() -> None:
    draws = torch.rand(4, 120, generator=torch.Generator().manual_seed(3))
    opening, light, side = draws[0], 0.5 * draws[3], 128
    angles = torch.stack([0.6 * draws[1] - 0.3, 0.3 * draws[2] - 0.15, 0 * draws[0]], -1)
    cameras = head_camera(angles)
    lips = project(torch.tensor([[0.0, -0.1, 0.175]]).expand(120, 1, 3), cameras)
    grid = (torch.arange(side) + 0.5) / side
    across, down = (line - lips[:, :, axis : axis + 1] for axis, line in enumerate((grid[None, None], grid[None, :, None])))
    dark = (side * (0.04 - across.abs())).clamp(0, 1) * (side * (0.01 + 0.02 * opening[:, None, None] - down.abs())).clamp(0, 1)
    pictures = (0.1 - 0.8 * dark)[:, None].expand(-1, 3, -1, -1)
    looks = mouth_looks(pictures, cameras)
    torch.testing.assert_close(mouth_looks(pictures + light[:, None, None, None], cameras), looks, atol=1e-5, rtol=0)
    told = F.pad(mouth_shapes(looks, angles, 120).values, (0, 1), value=1.0)
    fitted = told @ torch.linalg.lstsq(told, opening[:, None]).solution
    assert torch.corrcoef(torch.stack([fitted[:, 0], opening]))[0, 1] > 0.98


def test_windows_follow_the_skull_and_not_the_lips() -> None:
    landmarks, side = faces(9), 256
    windows = mouth_windows(landmarks, side)
    still = next(point for point in RIGID if point not in MOUTH)
    places = []
    for point in (still, 14):
        seen = landmarks[:, point] * 2 / side - 1
        places.append(torch.linalg.solve(windows[:, :, :2], (seen - windows[:, :, 2])[..., None])[..., 0])  # in the window's own coordinates
    assert places[0].std(0).max() < 1e-3
    assert places[1][:, 1].std() > 0.05
    mouth = landmarks[1, list(MOUTH)].mean(0) * 2 / side - 1
    assert (torch.linalg.solve(windows[1, :, :2], mouth - windows[1, :, 2]).abs() < 0.5).all()


def test_crops_show_what_the_window_covers() -> None:
    ramp = torch.linspace(-1 + 1 / 256, 1 - 1 / 256, 256)
    picture = torch.stack([ramp.expand(256, 256), ramp[:, None].expand(256, 256), torch.zeros(256, 256)])[None]
    window = torch.tensor([[[0.25, 0.0, 0.1], [0.0, 0.25, -0.2]]])
    crop = window_crops(picture, window)
    inner = (torch.arange(CROP_SIDE) + 0.5) / CROP_SIDE * 2 - 1
    torch.testing.assert_close(crop[0, 0, 0], 0.25 * inner + 0.1, atol=1e-4, rtol=0)
    torch.testing.assert_close(crop[0, 1, :, 0], 0.25 * inner - 0.2, atol=1e-4, rtol=0)


def test_it_learns_to_read_how_far_a_mouth_is_open() -> None:
    torch.manual_seed(0)
    opening = torch.rand(64)
    rows = torch.arange(CROP_SIDE) + 0.5
    dark = ((rows[None] - CROP_SIDE / 2).abs() < 1 + 8 * opening[:, None])[:, None, :, None]
    crops = torch.where(dark, -0.8, 0.4).expand(-1, 3, -1, CROP_SIDE).contiguous()
    values = (opening - opening.mean())[:, None] / opening.std()
    reader = LipReader(1, width=4)
    teach(reader, crops, values, torch.ones(1), 150, torch.Generator().manual_seed(0))
    assert (reader(crops) - values).square().mean() < 0.2
    assert not any(parameter.requires_grad for parameter in reader.parameters())
    shapes = MouthShapes(values=values, importance=torch.ones(1))
    assert reader.loss(crops, crops, shapes) == 0 < reader.loss(crops.flip(0), crops, shapes)


def test_the_expert_sees_the_face_from_brow_to_chin() -> None:
    rest, side = faces(1), 256
    rest[:, FACE[0]] += torch.tensor([30.0, 0.0])  # wider than high
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    landmarks = torch.cat([rest, rest, rest, 1.5 * rest @ turn.mT + 7, rest])
    landmarks[4, FACE[-1], 1] += 9  # the chin falls: the window stays
    windows = face_windows(landmarks, side)
    seen = landmarks[:4, list(FACE)] * 2 / side - 1
    places = torch.linalg.solve(windows[:4, None, :, :2], (seen - windows[:4, None, :, 2])[..., None])[..., 0]
    torch.testing.assert_close(places.amin(1) * FACE_EXTENT, -torch.ones(4, 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(places.amax(1) * FACE_EXTENT, torch.ones(4, 2), atol=1e-3, rtol=0)
    assert windows[4].equal(windows[0])
    assert window_crops(torch.zeros(5, 3, side, side), windows, FACE_SIDE).shape == (5, 3, 96, 96)


def speech(num_frames: int) -> Waveform:
    """Noise that is now loud, now faint."""
    generator = torch.Generator().manual_seed(2)
    loud = (torch.rand(num_frames, generator=generator) * 3 - 4).pow(3).mul(0.2).exp().repeat_interleave(640)
    return Waveform(samples=loud * torch.randn(len(loud), generator=generator) * 0.3, sample_rate_hz=16000)


class KnownExpert(nn.Module):
    """Sees how bright each frame is, and hears how loud."""

    def see(self, pictures: torch.Tensor) -> torch.Tensor:
        return F.normalize(pictures.mean((1, 2, 3))[None] + 1, dim=-1)

    def sound(self, mel: torch.Tensor) -> torch.Tensor:
        return F.normalize(F.adaptive_avg_pool1d(mel.mean(2) + 4, 5)[:, 0], dim=-1)


def test_lips_that_move_with_the_sound_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("talk3d.training.lips.load_sync_expert", lambda device: KnownExpert())
    loss = SyncLoss(speech(20), faces(20), 25.0, 64)
    bright = F.adaptive_avg_pool1d(loss.mel.mean(0)[None, 16:32], 5)[0] / 4  # frames 5 to 9
    pictures = bright.view(5, 1, 1, 1).expand(-1, 3, 64, 64).clone().requires_grad_()
    fitting = loss(pictures, 5)
    frozen, late, shifted = loss(pictures[:1].expand(5, -1, -1, -1), 5), loss(pictures.roll(1, 0), 5), loss(pictures, 7)
    assert fitting.abs() < 1e-5 and min(frozen, late, shifted) > 0.01
    late.backward()
    assert pictures.grad is not None and (pictures.grad.abs().amax((1, 2, 3)) > 0).all()
    assert loss(-torch.ones(5, 3, 64, 64), 5).item() == pytest.approx(6.9078, abs=1e-3)  # nothing is seen: it stays finite


def test_the_published_expert_sees_and_hears_the_same_moment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("talk3d.io.catalogue.cache_folder", lambda: tmp_path)
    with pytest.raises(WeightsError, match="talk3d weights fetch sync-expert"):
        SyncLoss(speech(20), faces(20), 25.0, 64)
    with pytest.raises(ConfigError, match="25 frames a second, got 30"):
        SyncLoss(speech(20), faces(20), 30.0, 64)
    torch.save({"state_dict": SyncExpert().state_dict()}, tmp_path / "lipsync_expert.pth")
    landmarks, waveform = faces(20), speech(20)
    loss = SyncLoss(waveform, landmarks[:15], 25.0, 256)
    assert loss.mel.shape == (80, 49)  # of 15 frames, and none after these
    pictures = (torch.rand(5, 3, 256, 256) * 2 - 1).requires_grad_()
    found = loss(pictures, 4)
    expert = loss.expert
    seen = expert.see(window_crops(pictures, face_windows(landmarks[:15], 256)[4:9], 96))
    torch.testing.assert_close(found, -torch.log((seen @ expert.hear(waveform)[4])[0]))
    found.backward()
    assert pictures.grad is not None and (pictures.grad.abs().amax((1, 2, 3)) > 0).all()
    assert not any(parameter.requires_grad for parameter in expert.parameters())
    last = loss(pictures, 10)
    assert torch.isfinite(last) and last > 0
