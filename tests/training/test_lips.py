"""The lip reader: its windows sit on the skull, and it learns to read shapes."""

import torch

from talk3d.training.lips import CROP_SIDE, LipReader, mouth_crops, mouth_windows, teach
from talk3d.training.losses import MOUTH, RIGID, MouthShapes


def faces(count: int) -> torch.Tensor:
    """A face that turns, grows and wanders in the picture, its lips opening as they like, pixels."""
    rest = 60 + 40 * torch.rand(478, 2, generator=torch.Generator().manual_seed(1))
    points = rest.expand(count, -1, -1).clone()
    time = torch.arange(count, dtype=torch.float32)
    points[:, [14, 17], 1] += 5 * (time % 3 - 1)[:, None]
    angle, size = 0.2 * torch.sin(time), 1 + 0.1 * torch.cos(2 * time)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)], -2)
    return size[:, None, None] * points @ turn.mT + 10 * torch.stack([time.sin(), time.cos()], -1)[:, None]


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
    crop = mouth_crops(picture, window)
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
