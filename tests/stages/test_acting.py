import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from talk3d.errors import ConfigError
from talk3d.models.avatar import Performance
from talk3d.ops.geometry import head_camera
from talk3d.stages.acting import ActingConfig, Actor, BlinkHabit, blink_habit, made_up_blinks, performance_of, read_performer, sway

FPS = 25.0


def performance(count: int = 500) -> Performance:
    """A head that turns by known sinusoids, whose anchors and gaze follow linearly, whose brows move too, and that blinks for 4 frames every 100."""
    time = torch.arange(count) / FPS
    pose = torch.stack([0.06 * torch.sin(time), 0.02 * torch.cos(0.7 * time), 0.01 * torch.sin(1.9 * time)], -1) + torch.tensor([0.1, 0.0, 0.0])
    blink = 0.02 + 0.9 * ((torch.arange(count) % 100 >= 50) & (torch.arange(count) % 100 < 54)).float()
    gain = torch.arange(18.0).reshape(3, 6) / 10
    brows = 0.03 * torch.sin(2.3 * time)[:, None].expand(-1, 2)
    upper_face = torch.cat([brows, 0.1 - pose[:, :2], 0.2 + pose[:, 1:2]], 1)
    return Performance(cameras=head_camera(pose), blink=blink[:, None], head_pose=pose, anchors=0.3 + pose @ gain, upper_face=upper_face)


def test_blinks_are_measured() -> None:
    habit = blink_habit(performance().blink, FPS)
    assert habit.interval_s == pytest.approx(4.0) and habit.length_s == pytest.approx(0.16)
    assert habit.depth == pytest.approx(0.92) and habit.rest == pytest.approx(0.02)
    usual = blink_habit(torch.zeros(50, 1), FPS)
    assert usual.interval_s == 4.0 and usual.depth == 1.0 and usual.rest == 0.0
    assert blink_habit(torch.ones(50, 1), FPS).interval_s == 4.0


def test_made_up_blinks_have_the_habits_statistics_for_ever() -> None:
    habit = BlinkHabit(interval_s=3.0, length_s=0.2, depth=0.9, rest=0.05)
    shut = made_up_blinks(torch.arange(25 * 600), FPS, habit, seed=3)
    assert float(shut.min()) == pytest.approx(0.05) and float(shut.max()) == pytest.approx(0.9, abs=0.01)
    again = blink_habit(shut, FPS)
    assert again.interval_s == pytest.approx(3.0, rel=0.02) and again.length_s == pytest.approx(0.2, abs=0.04)
    starts = np.flatnonzero(np.diff((shut[:, 0].numpy() > 0.5).astype(int)) == 1)
    assert np.std(np.diff(starts)) > 10
    hour = made_up_blinks(torch.arange(25 * 3600, 25 * 3600 + 4), FPS, habit, seed=3)
    assert torch.equal(made_up_blinks(torch.tensor([25 * 3600 + 2]), FPS, habit, seed=3), hour[2:3])
    assert not torch.equal(shut, made_up_blinks(torch.arange(25 * 600), FPS, habit, seed=4))


def test_the_made_up_motion_is_slow_and_of_unit_variance() -> None:
    moved = sway(torch.arange(25 * 1200), FPS, seed=1)
    torch.testing.assert_close(moved.mean(0), torch.zeros(3), atol=0.1, rtol=0)
    torch.testing.assert_close(moved.std(0), torch.ones(3), atol=0.15, rtol=0)
    assert float(moved.diff(dim=0).abs().max()) < 0.2
    assert torch.equal(sway(torch.tensor([777]), FPS, seed=1), moved[777:778])


def test_an_actor_who_follows_the_camera_does_what_was_performed() -> None:
    own = performance()
    acts = Actor(ActingConfig(), own, FPS, follows=True).at(torch.tensor([3, 499, 500]))
    torch.testing.assert_close(acts.head_pose, own.head_pose[[3, 499, 498]])
    torch.testing.assert_close(acts.anchors, own.anchors[[3, 499, 498]])
    torch.testing.assert_close(acts.blink, own.blink[[3, 499, 498]])
    torch.testing.assert_close(acts.upper_face, own.upper_face[[3, 499, 498]])
    assert not acts.turn.any()


def test_else_the_head_moves_by_itself_and_anchors_brows_and_gaze_with_it() -> None:
    own = performance()
    frames = torch.arange(2500)
    acts = Actor(ActingConfig(seed=5), own, FPS).at(frames)
    torch.testing.assert_close(acts.head_pose - own.head_pose.mean(0), acts.turn)
    torch.testing.assert_close(acts.anchors, 0.3 + acts.head_pose @ (torch.arange(18.0).reshape(3, 6) / 10), atol=1e-4, rtol=0)
    torch.testing.assert_close(acts.upper_face[:, 2:4], 0.1 - acts.head_pose[:, :2], atol=1e-4, rtol=0)
    torch.testing.assert_close(acts.upper_face[:, 4:], 0.2 + acts.head_pose[:, 1:2], atol=1e-4, rtol=0)
    torch.testing.assert_close(acts.upper_face[:, :2].std(0), 0.5 * own.upper_face[:, :2].std(0), rtol=0.3, atol=0)
    assert acts.upper_face[:, 0].equal(acts.upper_face[:, 1])
    expected = 0.5 * (own.head_pose - own.head_pose.mean(0)).square().mean(0).sqrt()
    torch.testing.assert_close(acts.turn.std(0), expected, rtol=0.3, atol=0)
    still = Actor(ActingConfig(head_motion=0.0), own, FPS).at(frames)
    assert not still.turn.any() and still.head_pose.std(0).max() < 1e-6 and still.upper_face.std(0).max() < 1e-6
    wild = replace(own, head_pose=10 * own.head_pose)
    assert Actor(ActingConfig(), wild, FPS).at(frames).turn.std(0).rad2deg().max() < 3.6


def test_a_performer_lends_motion_and_blinks() -> None:
    own, other = performance(), performance(100)
    other = replace(other, head_pose=other.head_pose + 0.5)
    acts = Actor(ActingConfig(), own, FPS, performed=other).at(torch.tensor([7, 99, 100]))
    torch.testing.assert_close(acts.turn, (other.head_pose - other.head_pose.mean(0))[[7, 99, 98]])
    torch.testing.assert_close(acts.head_pose, own.head_pose.mean(0) + acts.turn)
    torch.testing.assert_close(acts.blink, other.blink[[7, 99, 98]])
    torch.testing.assert_close(acts.upper_face, other.upper_face[[7, 99, 98]])


@pytest.mark.parametrize(("blinks", "follows", "performed"), [("auto", False, False), ("generated", True, True), ("none", True, True)])
def test_blinks_can_be_chosen(blinks: str, follows: bool, performed: bool) -> None:
    own = performance()
    config = ActingConfig(blinks=blinks)  # pyright: ignore[reportArgumentType]
    acts = Actor(config, own, FPS, performed=own if performed else None, follows=follows).at(torch.arange(500))
    habit = blink_habit(own.blink, FPS)
    expected = torch.full((500, 1), habit.rest) if blinks == "none" else made_up_blinks(torch.arange(500), FPS, habit)
    torch.testing.assert_close(acts.blink, expected)


def test_performances_are_read_from_clips_and_tables(clip, tmp_path: Path) -> None:
    own = performance()
    clip.save(tmp_path / "clip")
    read, blink = read_performer(tmp_path / "clip", 25.0)
    assert read is not None and blink is read.blink
    torch.testing.assert_close(read.head_pose, clip.track.head_pose)
    assert len(performance_of(clip, 50.0).blink) == 32
    torch.testing.assert_close(performance_of(clip, 12.5).anchors, clip.track.anchors[::2])
    (tmp_path / "au.csv").write_text("frame, AU45_r\n1, 0.5\n2, 4.0\n")
    read, blink = read_performer(tmp_path / "au.csv", 25.0)
    assert read is None and blink.flatten().tolist() == [0.25, 1.0]
    acts = Actor(ActingConfig(seed=2), own, FPS, blink=blink).at(torch.arange(4))
    assert acts.blink.flatten().tolist() == [0.25, 1.0, 0.25, 1.0]
    torch.testing.assert_close(acts.turn, Actor(ActingConfig(seed=2), own, FPS).at(torch.arange(4)).turn)
    with pytest.raises(ConfigError, match="does not exist"):
        read_performer(tmp_path / "nobody", 25.0)


@pytest.mark.parametrize("settings", [{"head_motion": -1.0}, {"expression": math.nan}, {"expression": 4.0}, {"seed": -1}])
def test_unfit_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        ActingConfig(**settings)  # pyright: ignore[reportArgumentType]
