import json
import logging
import math
from pathlib import Path

import pytest
import torch

from talk3d.errors import ConfigError
from talk3d.ops.geometry import HEAD_PIVOT, SPINE_TOP, Neck, head_camera, look_at, project, view_angles
from talk3d.stages.viewpoints import CameraConfig, ViewLimit, Viewpoints, held, ping_pong, trained_views, turned, zoomed
from talk3d.types import Camera

FILMED = head_camera(torch.tensor([[-0.2, 0.1, 0.0], [0.0, 0.0, 0.05], [0.3, -0.1, 0.0]]))


def degrees(camera: Camera) -> torch.Tensor:
    return view_angles(camera.cam2world[:, :3, :3]).rad2deg()


def at(config: CameraConfig, *frames: int) -> Camera:
    return Viewpoints(config, 25.0, FILMED).at(torch.tensor(frames))


def test_ping_pong_shows_the_ends_once() -> None:
    assert ping_pong(torch.arange(10), 4).tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3]
    assert ping_pong(torch.arange(4), 2).tolist() == [0, 1, 0, 1]
    assert ping_pong(torch.arange(3), 1).tolist() == [0, 0, 0]


def test_the_fixed_camera_stands_where_it_is_put() -> None:
    camera = at(CameraConfig(camera="fixed", yaw_deg=20.0, pitch_deg=-5.0, roll_deg=3.0, zoom=1.5), 0, 99)
    torch.testing.assert_close(degrees(camera), torch.tensor([[20.0, -5.0, 3.0]]).expand(2, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(camera.intrinsics[:, 0, 0], 1.5 * FILMED.intrinsics[:2, 0, 0])
    torch.testing.assert_close(project(torch.tensor(HEAD_PIVOT).expand(2, 1, 3), camera), torch.full((2, 1, 2), 0.5))


def test_the_tracked_camera_goes_back_and_forth_and_so_do_given_ones() -> None:
    torch.testing.assert_close(at(CameraConfig(), 0, 2, 3, 4).cam2world, FILMED.cam2world[[0, 2, 1, 0]])
    given = Viewpoints(CameraConfig(camera="orbit"), 25.0, FILMED, given=FILMED[:2])
    torch.testing.assert_close(given.at(torch.tensor([3])).cam2world, FILMED.cam2world[[1]])
    assert not given.follows and Viewpoints(CameraConfig(), 25.0, FILMED).follows
    for unfit in (FILMED[:0], FILMED[0]):
        with pytest.raises(ConfigError, match="no camera"):
            Viewpoints(CameraConfig(), 25.0, FILMED, given=unfit)


def test_the_orbit_swings_and_repeats() -> None:
    config = CameraConfig(camera="orbit", orbit_yaw_deg=25.0, orbit_period_s=0.8, zoom=0.9)
    yaw = degrees(at(config, 0, 5, 15, 20, 25))[:, 0]
    torch.testing.assert_close(yaw, torch.tensor([0.0, 25.0, -25.0, 0.0, 25.0]), atol=1e-2, rtol=0)


def test_a_path_goes_through_its_keys_smoothly_and_holds_the_last(tmp_path: Path) -> None:
    path = tmp_path / "path.json"
    path.write_text(
        json.dumps([{"time_s": 0}, {"time_s": 1, "yaw_deg": 20, "zoom": 1.2}, {"time_s": 2, "yaw_deg": 20, "pitch_deg": 10, "roll_deg": -4}])
    )
    config = CameraConfig(camera="path", camera_path=path)
    camera = at(config, 0, 25, 50, 5000)
    expected = torch.tensor([[0.0, 0, 0], [20, 0, 0], [20, 10, -4], [20, 10, -4]])
    torch.testing.assert_close(degrees(camera)[[0, 2, 3]], expected[[0, 2, 3]], atol=1e-3, rtol=0)
    assert camera.intrinsics[1, 0, 0] == pytest.approx(1.2 * float(FILMED.intrinsics[0, 0, 0]))
    between = degrees(at(config, *range(26)))[:, 0]
    assert (between.diff() > 0).all() and float(between.max()) <= 20.001
    path.write_text('[{"time_s": 3, "yaw_deg": 12}]')
    torch.testing.assert_close(degrees(at(config, 0, 75, 200))[:, 0], torch.full((3,), 12.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "no camera path"),
        ("[]", "JSON list"),
        ('{"time_s": 0}', "JSON list"),
        ('[{"yaw_deg": 3}]', "lacks time_s"),
        ('[{"time_s": 0, "yaw": 3}]', "has yaw"),
        ('[{"time_s": 0, "yaw_deg": 1000}]', "yaw_deg of 1000"),
        ('[{"time_s": 0, "zoom": 0}]', "zoom of 0"),
        ('[{"time_s": 1}, {"time_s": 1}]', "do not grow"),
    ],
)
def test_unfit_paths_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "path.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        at(CameraConfig(camera="path", camera_path=path), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"camera": "fixed", "yaw_deg": 90.0},
        {"camera": "fixed", "pitch_deg": -1000.0},
        {"camera": "fixed", "roll_deg": 181.0},
        {"camera": "fixed", "zoom": 0.0},
        {"camera": "fixed", "yaw_deg": math.nan},
        {"orbit_yaw_deg": 90.0},
        {"orbit_period_s": 0.0},
        {"orbit_period_s": math.nan},
        {"camera": "path"},
        {"yaw_deg": 20.0},
        {"camera": "orbit", "pitch_deg": 5.0},
        {"camera": "tracked", "zoom": 1.5},
        {"camera_path": Path("x.json")},
    ],
)
def test_unfit_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        CameraConfig(**settings)  # pyright: ignore[reportArgumentType]


def test_turning_moves_cameras_round_the_head() -> None:
    turn = torch.tensor([[0.1, -0.05, 0.02]])
    angles = torch.tensor([[0.3, 0.1, -0.1]])
    torch.testing.assert_close(turned(head_camera(angles), turn).cam2world, look_at(angles + turn), atol=1e-5, rtol=0)
    shifted = head_camera(angles)
    shifted.cam2world[:, :3, 3] += torch.tensor([0.1, 0.0, 0.2])
    there = project(torch.tensor(HEAD_PIVOT)[None, None], shifted)
    torch.testing.assert_close(project(torch.tensor(HEAD_PIVOT)[None, None], turned(shifted, turn)), there, atol=1e-5, rtol=0)


@pytest.mark.parametrize("yaw", [0.0, 0.6])
def test_a_head_that_comes_to_a_pose_leaves_its_shoulders_where_they_are_seen(yaw: float) -> None:
    neck, rest, spine = Neck.of((1.0,) + 6 * (0.0,), -0.2, torch.device("cpu")), torch.tensor([0.1, -0.05, 0.0]), torch.tensor(SPINE_TOP)
    pose, turn, shoulder = torch.tensor([[0.3, 0.2, -0.1]]), torch.tensor([[0.15, -0.1, 0.05]]), torch.tensor([[[0.25, -0.6, -0.1]]])

    def at(pose: torch.Tensor) -> torch.Tensor:
        """Where the shoulder is in a head that is held so: what `straighten` takes back."""
        return spine + (shoulder - spine) @ (neck.swing(pose, rest) + torch.eye(3))

    before = head_camera(torch.tensor([[yaw, 0.1, 0.05]]))
    after = held(before, pose, turn)
    torch.testing.assert_close(neck.straighten(at(pose), neck.swing(pose, rest)), shoulder, atol=1e-5, rtol=0)
    torch.testing.assert_close(project(at(pose), after), project(at(pose - turn), before), atol=1e-5, rtol=0)
    assert float((project(torch.zeros(1, 1, 3), after) - project(torch.zeros(1, 1, 3), before)).norm()) > 0.01  # and the face does not


def test_zoom_leaves_the_centre() -> None:
    camera = zoomed(FILMED, 2.0)
    torch.testing.assert_close(camera.intrinsics[:, :2, 2], FILMED.intrinsics[:, :2, 2])
    torch.testing.assert_close(camera.intrinsics[:, 1, 1], 2 * FILMED.intrinsics[:, 1, 1])


def test_it_is_said_when_more_is_seen_than_was_learnt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text('[{"time_s": 0}, {"time_s": 2, "zoom": 0.5}]')
    for config in (CameraConfig(camera="fixed", zoom=0.5), CameraConfig(camera="path", camera_path=keys)):
        caplog.clear()
        Viewpoints(config, 25.0, FILMED)
        assert "a zoom of 0.5 shows" in caplog.text
    caplog.clear()
    Viewpoints(CameraConfig(camera="orbit", zoom=0.7), 25.0, FILMED)
    assert caplog.text == ""


def test_views_beyond_what_is_known_fade_to_the_nearest_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    limit = ViewLimit(FILMED, {})
    yaw = torch.linspace(-80, 80, 161).deg2rad()
    camera = head_camera(torch.stack([yaw, 0 * yaw, 0 * yaw], -1))
    with caplog.at_level(logging.WARNING):
        limited = limit(camera)
        limit(camera)
    assert caplog.text.count("yaw -35 to 35") == 1
    seen = degrees(limited)[:, 0]
    inside = yaw.rad2deg().abs() <= 35
    assert torch.equal(limited.cam2world[inside], camera.cam2world[inside])
    assert float(seen.abs().max()) <= 40 and (seen.diff() > 0).all() and float(seen.diff().max()) <= 1.001
    torch.testing.assert_close(degrees(limit(head_camera(torch.tensor([[1.0, 0.0, 0.0]])))), torch.tensor([[39.93, 0, 0]]), atol=0.1, rtol=0)


def test_the_range_is_what_was_trained_or_verified() -> None:
    assert trained_views(FILMED)["yaw_deg"] == pytest.approx([math.degrees(-0.2), math.degrees(0.3)], abs=1e-3)
    assert ViewLimit(FILMED, {}).high.tolist() == [35.0, 18.0, 15.0]
    wide = {"views": {"yaw_deg": [-60.0, 20.0], "pitch_deg": [0.0, 30.0], "roll_deg": [0.0, 0.0]}}
    limit = ViewLimit(FILMED, wide)
    assert limit.low.tolist() == [-60.0, -18.0, -15.0] and limit.high.tolist() == [35.0, 30.0, 15.0]
