import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from talk3d.metrics.film import Networks, Watched
from talk3d.models.avatar import Avatar
from talk3d.perception.facetemplate import load_template
from talk3d.perception.landmarks import FaceBox, FaceObservation
from talk3d.stages.views import TOKENS, Bench, attention_rows, front_view, make_scene, network_share, real_pictures, see_orbit
from talk3d.types import Clip, silent

SIDE = 64


def a_bench(avatar: Avatar, clip: Clip) -> Bench:
    return Bench(avatar=avatar, clip=clip, frames=torch.arange(12, 16), batch_size=3, device="cpu", progress=silent)


def test_a_film_has_the_clips_cameras_and_is_timed(make_avatar: Callable[..., Any], clip: Clip) -> None:
    avatar = make_avatar(side=SIDE)
    bench = a_bench(avatar, clip)
    film = bench.film("avatar")
    assert film.shape == (4, SIDE, SIDE, 3) and film.dtype == np.uint8
    torch.testing.assert_close(avatar.filmed, clip.track.cameras.cam2world[12:])
    assert len(bench.render_s) == 2 and min(bench.render_s) > 0
    green = (255 * clip.track.blink[12:, 0]).numpy()
    np.testing.assert_allclose(film[:, 0, 0, 1], green, atol=1)


def test_the_scene_is_the_real_film_at_another_size(clip: Clip) -> None:
    scene = make_scene(clip, torch.arange(12, 16), SIDE // 2, lambda pictures: Watched(None, pictures), 0.1)
    assert scene.pictures.shape == (4, SIDE // 2, SIDE // 2, 3) and scene.mattes.shape == (4, 1, SIDE // 2, SIDE // 2)
    torch.testing.assert_close(scene.landmarks, clip.track.landmarks[12:] / 2)
    assert len(scene.waveform.samples) == 4 * 640
    pictures, _ = real_pictures(clip, torch.arange(12, 16), SIDE)
    np.testing.assert_array_equal(pictures, clip.frames[12:])


class TurningModel:
    """A face model for KnownAvatar, whose blue is the camera's yaw: sees a template turned by as much."""

    source, kind = "turning", "registry"

    def detect(self, frame: np.ndarray) -> list[FaceBox]:
        return [FaceBox(centre_px=(32.0, 32.0), side_px=32.0, angle_rad=0.0, score=1.0)]

    def observe(self, frame: np.ndarray, box: FaceBox) -> FaceObservation:
        yaw = frame[0, 0, 2] / 255
        shape = load_template("registry").points[:478].numpy()
        x = math.cos(yaw) * shape[:, 0] - math.sin(yaw) * shape[:, 2]
        points = 32 + 60 * np.stack([x, -shape[:, 1]], -1)
        return FaceObservation(landmarks=points.astype(np.float32), score=1.0, eyes_shut=(0.0, 0.0), expression=np.zeros(0, np.float32))


def test_an_orbit_is_measured_against_the_frontal_view(make_avatar: Callable[..., Any], clip: Clip) -> None:
    avatar = make_avatar(side=SIDE)
    measures, rows = see_orbit(a_bench(avatar, clip), Networks(face=TurningModel(), published={}))
    found = {entry.name: entry for entry in measures}
    yaws = torch.atan2(avatar.filmed[:, 0, 3], avatar.filmed[:, 2, 3])
    assert sorted(set(round(float(yaw)) for yaw in yaws.rad2deg())) != [0] and len(avatar.seen) == 4
    # KnownAvatar shows turns to one side only, as blue from 0: half of the views are off by their whole yaw
    assert found["orbit_pose_error"].value == pytest.approx((15 + 30) / 4, abs=2.5)
    assert found["orbit_found"].value == 1 and found["orbit_found"].num_frames == 20
    assert found["orbit_likeness_-30"].num_frames == 4 and found["orbit_csim"].value is None
    assert [label.split(": ")[1] for label, _ in rows[0]] == ["-30°", "-15°", "+0°", "+15°", "+30°"]
    blind, _ = see_orbit(a_bench(avatar, clip), Networks(face=None, published={}, missing_face="a face model: gone"))
    assert all(entry.value is None and entry.needs == "a face model: gone" for entry in blind)


def test_the_front_plane_is_drawn_as_it_lies_in_the_head() -> None:
    cells = 16
    maps = torch.zeros(1, 3 * cells**2, 1)
    plane = maps[0, : cells**2, 0].view(cells, cells)
    plane[12:, :] = 1  # rows grow with y: the upper quarter of the head
    drawn = front_view(maps, 40, box_warp=0.6)[0, 0]
    assert float(drawn[:4].mean()) > 0.9 and float(drawn[20:].mean()) == 0
    plane.zero_()
    plane[:, 12:] = 1  # columns grow with x: the picture's right
    drawn = front_view(maps, 40, box_warp=0.6)[0, 0]
    assert float(drawn[:, -4:].mean()) > 0.9 and float(drawn[:, :20].mean()) == 0


def test_attention_is_shown_for_every_token(tiny_avatar: Avatar, clip_of: Callable[..., Clip]) -> None:
    bench = a_bench(tiny_avatar, clip_of(side=32))
    rows = attention_rows(bench, torch.tensor([12, 14]))
    assert len(rows) == 2 and len(rows[0]) == 1 + len(TOKENS)
    assert all(picture.shape == (64, 64, 3) for row in rows for _, picture in row)
    scores = tiny_avatar.score_maps(bench.driving(torch.tensor([12, 14])))
    torch.testing.assert_close(scores.sum(-1), torch.ones(scores.shape[:-1]))


def test_the_share_of_motion_is_the_networks_or_the_bases(tiny_avatar: Avatar, clip_of: Callable[..., Clip]) -> None:
    driving = a_bench(tiny_avatar, clip_of(side=32)).driving(torch.tensor([12, 13, 14]))
    tiny_avatar, predictor = (found := copy.deepcopy(tiny_avatar)), found.predictor
    with torch.no_grad():
        for bases in (predictor.bases, predictor.near):
            if bases is not None:
                bases.zero_()
        for layer in predictor.out.values():
            layer.weight.normal_()
        assert network_share(tiny_avatar, driving) == pytest.approx(1, abs=0.05)  # nothing else moves the planes
        for layer in predictor.out.values():
            layer.weight.zero_()
        predictor.near.normal_()
        assert network_share(tiny_avatar, driving) == 0


def test_an_avatar_without_a_network_has_no_attention(make_avatar: Callable[..., Any], clip: Clip) -> None:
    assert attention_rows(a_bench(make_avatar(side=SIDE), clip), torch.tensor([12])) == []
