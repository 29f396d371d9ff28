"""Personalisation of a small synthetic clip: which frames are looked at, that the person is found, and exact resuming."""

import dataclasses
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from talk3d.errors import ConfigError, ShapeError, TrackingError, WeightsError
from talk3d.models.avatar import PersonalizedGenerator, Prior
from talk3d.models.encoder import Encoder
from talk3d.ops.compositing import premultiply
from talk3d.perception.nod import USUAL_THROAT, find_throat
from talk3d.presets import TINY, TINY_ENCODER
from talk3d.stages.personalize import (
    PersonalizeConfig,
    _wide_views,
    background_plate,
    choose_frames,
    face_emphasis,
    foreground,
    personalize,
    where_steady,
    with_neck,
)
from talk3d.types import Clip, FaceMasks, WideViews

SHORT = PersonalizeConfig(num_frames=4, frames_per_step=2, inversion_steps=10, tuning_steps=10)


def with_track(clip: Clip, **changes: torch.Tensor) -> Clip:
    return dataclasses.replace(clip, track=replace(clip.track, **changes))


@pytest.fixture
def still(clip_of: Callable[..., Clip]) -> Clip:
    """Twenty training frames and four more in which nothing happens."""
    clip = clip_of(24, num_training_frames=20)
    landmarks = clip.track.landmarks[:1].repeat(24, 1, 1)
    frames = np.repeat(clip.frames[:1], 24, 0)
    clip = with_track(clip, landmarks=landmarks, head_pose=torch.zeros(24, 3), blink=torch.zeros(24, 1))
    return dataclasses.replace(clip, frames=frames)


def test_the_most_different_frames_are_chosen_and_the_held_out_part_never(still: Clip) -> None:
    pose, blink, landmarks = still.track.head_pose.clone(), still.track.blink.clone(), still.track.landmarks.clone()
    pose[5, 0], pose[9, 0], pose[22, 0] = 0.7, -0.7, 1.5
    landmarks[12, [87, 14, 317], 1] += 10
    blink[17] = 1
    chosen = choose_frames(with_track(still, head_pose=pose, blink=blink, landmarks=landmarks), 5).tolist()
    assert set(chosen[1:]) == {5, 9, 12, 17} and chosen[0] not in {5, 9, 12, 17} and max(chosen) < 20


def test_blurred_and_unsure_frames_are_left_out(still: Clip) -> None:
    pose, confidence = still.track.head_pose.clone(), torch.ones(24, 1)
    pose[:, 1] = 0.01 * torch.arange(24)
    pose[[3, 7, 8], 0] = torch.tensor([1.5, -1.5, 0.5])
    confidence[7] = 0.2
    frames = still.frames.copy()
    frames[[3, 10, 11, 13]] = 128  # no detail at all
    changed = dataclasses.replace(with_track(still, head_pose=pose, confidence=confidence), frames=frames)
    assert set(choose_frames(changed, 15).tolist()) == set(range(20)) - {3, 7, 10, 11, 13}
    assert choose_frames(changed, 2).tolist()[1] == 8


def test_a_clip_of_another_size_is_refused(prior: Prior, clip_of: Callable[..., Clip]) -> None:
    with pytest.raises(ShapeError, match="the clip has 48 pixels a side, the prior paints 64: track the video again with --size-px 64"):
        personalize(clip_of(8, 48), prior, SHORT)


def test_too_few_usable_frames_are_refused(still: Clip) -> None:
    with pytest.raises(TrackingError, match="usable training frames, 25 needed"):
        choose_frames(still, 25)
    with pytest.raises(TrackingError, match="0 usable training frames"):
        choose_frames(with_track(still, confidence=torch.zeros(24, 1)), 1)


def test_emphasis_is_one_with_bumps_over_the_face(clip: Clip) -> None:
    landmarks = clip.track.landmarks[:2]
    weight = face_emphasis(landmarks, 64, mouth=3.0, face=2.0)
    assert weight.shape == (2, 1, 64, 64) and weight.min() >= 1 and weight.max() < 10
    assert weight[0, 0, 37, 31] > 4 > weight[0, 0, 60, 3] and weight[0, 0, 60, 3] < 1.2
    assert face_emphasis(landmarks, 64, 0.0, 0.0).eq(1).all()
    wide = face_emphasis(2 * landmarks, 128, 3.0, 2.0)  # the same face, twice the size
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(wide, 2), weight, atol=0.05, rtol=0)


def test_wide_views_lie_over_black_and_count_beyond_the_crops(clip: Clip) -> None:
    mattes = np.zeros((1, 64, 64), np.uint8)
    mattes[:, 32:] = 255
    mattes[:, 60:] = 51
    wide = WideViews(frames=torch.tensor([2]), pictures=np.full((1, 64, 64, 3), 255, np.uint8), mattes=mattes, beyond=mattes == 0)
    views = _wide_views(replace(clip, wide=wide))
    assert views is not None and views.emphasis is not None
    assert (views.target.image[0, :, :32] == -1).all() and (views.target.image[0, :, 32:60] == 1).all()
    torch.testing.assert_close(views.target.image[0, :, 60:], torch.full((3, 4, 64), -0.6))
    assert torch.equal(views.emphasis[0, 0], torch.from_numpy(wide.beyond[0]).float())
    assert views.head_pose is not None and views.head_pose.equal(clip.track.head_pose[2:3].float())
    assert _wide_views(clip) is None


def error(person: PersonalizedGenerator, clip: Clip, frames: torch.Tensor) -> float:
    target = premultiply(*clip.images(frames))
    with torch.no_grad():
        triplane = replace(person.triplane, planes=person.identity.expand(len(frames), -1, -1, -1, -1))
        return (person.render(triplane, clip.track.cameras[frames]).image - target).abs().mean().item()


def test_the_person_looks_like_the_clip_more_than_the_average_does(clip: Clip, prior: Prior) -> None:
    heard: list[tuple[int, dict[str, float]]] = []

    def listen(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        assert stage == "personalize" and total == 60
        heard.append((step, dict(values)))

    before = prior.generator.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    config = replace(SHORT, inversion_steps=25, tuning_steps=35, tuning_rate=3e-3)
    person = personalize(clip, prior, config, progress=listen)
    frames = choose_frames(clip, 4)
    average = PersonalizedGenerator.from_generator(prior.generator, prior.generator.mapping(torch.randn(1, 8), None, 0.0), {})
    assert error(person, clip, frames) < 0.75 * error(average, clip, frames)
    kept, drift = choose_frames(clip, 5).tolist()[4:], person.provenance.pop("drift")
    chosen = {"frames": frames.tolist(), "validation_frames": kept, "seed": 0}
    assert person.provenance == {"prior": {"dataset": "none"}, "source_sha256": "a" * 64} | chosen and 0 < drift < 1
    assert {"person", "offset"} <= heard[0][1].keys() and not {"person", "offset"} & heard[-1][1].keys()
    assert any("locality" in values for _, values in heard)
    assert all(value.equal(before[name]) for name, value in prior.generator.state_dict().items()), "the prior was changed"


def test_the_neck_is_straight_as_the_head_is_mostly_held(clip: Clip, prior: Prior) -> None:
    config = replace(SHORT, inversion_steps=1, tuning_steps=1)
    renderer = personalize(clip, prior, config).renderer.renderer_config
    assert renderer.throat_y == USUAL_THROAT, "without an encoder nothing tells"
    rest = renderer.rest_pose
    assert rest == pytest.approx(clip.track.head_pose[: clip.num_training_frames].mean(0).tolist(), abs=1e-6)
    assert prior.generator.renderer_config.rest_pose is None, "the prior was changed"


def test_where_the_neck_bends_is_told_by_frames_in_which_the_face_was_seen(clip: Clip, prior: Prior) -> None:
    torch.manual_seed(4)
    guessing = Prior(generator=prior.generator, w_std=prior.w_std, provenance={}, encoder=Encoder(TINY_ENCODER, TINY.renderer.w_dim))
    turns = 0.3 * torch.randn(16, 3)
    clip = with_track(clip, head_pose=turns)
    mean = tuple(turns[: clip.num_training_frames].mean(0).tolist())
    few = torch.tensor([0, 2, 3, 5, 6, 9])
    seen = torch.zeros(16, 1)
    seen[few] = 1.0
    found = with_neck(guessing, with_track(clip, confidence=seen)).generator.renderer_config
    expected = find_throat(guessing.with_renderer(rest_pose=mean), *clip.images(few), clip.track.cameras[few], turns[few])
    assert found.rest_pose == mean and found.throat_y == pytest.approx(expected, abs=1e-4)
    assert with_neck(guessing, clip).generator.renderer_config.throat_y != pytest.approx(expected, abs=1e-6)


def test_held_out_frames_are_not_looked_at(clip: Clip, prior: Prior) -> None:
    frames, config = clip.frames.copy(), replace(SHORT, inversion_steps=2, tuning_steps=2)
    frames[12:] = 255
    one, other = (personalize(c, prior, config) for c in (clip, dataclasses.replace(clip, frames=frames)))
    assert one.identity.equal(other.identity)


@pytest.mark.parametrize("when", [5, 15])
def test_a_stopped_run_continues_exactly(clip: Clip, prior: Prior, tmp_path: Path, when: int) -> None:
    whole = personalize(clip, prior, SHORT, seed=3)

    def stop(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        if step == when:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        personalize(clip, prior, SHORT, seed=3, progress=stop, checkpoint=tmp_path / "check")
    resumed = personalize(clip, prior, SHORT, seed=3, checkpoint=tmp_path / "check")
    for name, value in whole.state_dict().items():
        assert resumed.state_dict()[name].equal(value), name


def test_unfit_settings_and_checkpoints_are_refused(clip: Clip, prior: Prior, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="positive numbers"):
        PersonalizeConfig(num_frames=0)
    (tmp_path / "check").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="damaged"):
        personalize(clip, prior, SHORT, checkpoint=tmp_path / "check")


def test_a_frame_is_never_chosen_twice_even_if_all_look_the_same(still: Clip) -> None:
    assert len(set(choose_frames(still, 8).tolist())) == 8


def discs(side: int, centres: list[tuple[int, int]], radius: int) -> np.ndarray:
    rows, columns = np.mgrid[:side, :side]
    return np.stack([np.where((rows - y) ** 2 + (columns - x) ** 2 < radius**2, 255, 0).astype(np.uint8) for x, y in centres])


def scene(clip_of: Callable[..., Clip], wall: np.ndarray, masks: np.ndarray) -> Clip:
    frames = np.where(masks[..., None] > 0, np.uint8(250), wall[None]).astype(np.uint8)
    return clip_of(len(masks), wall.shape[0], frames=frames, masks=FaceMasks(person=masks, source="test"), num_training_frames=len(masks))


def test_the_wall_behind_a_moving_person_comes_back(clip_of: Callable[..., Clip]) -> None:
    side = 64
    wall = np.stack(np.broadcast_arrays(np.linspace(0, 255, side)[None], np.linspace(255, 0, side)[:, None], np.full((side, side), 77.0)), -1)
    wall = wall.round().astype(np.uint8)
    found = background_plate(scene(clip_of, wall, discs(side, [(14, 32), (50, 32), (32, 12), (32, 52)], 9)))
    torch.testing.assert_close(found, torch.from_numpy(wall).permute(2, 0, 1).float() / 127.5 - 1, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [64, 50])
def test_what_was_never_uncovered_continues_smoothly(clip_of: Callable[..., Clip], side: int) -> None:
    flat = background_plate(scene(clip_of, np.full((side, side, 3), 100, np.uint8), discs(side, [(side // 2, side // 2)] * 3, side // 4)))
    torch.testing.assert_close(flat, torch.full((3, side, side), 100 / 127.5 - 1), atol=0.02, rtol=0)
    ramp = np.broadcast_to(np.linspace(50, 200, side)[None, :, None], (side, side, 3)).round().astype(np.uint8)
    found = background_plate(scene(clip_of, ramp, discs(side, [(side // 2, side // 2)] * 3, side // 4)))
    torch.testing.assert_close(found, torch.from_numpy(ramp.copy()).permute(2, 0, 1).float() / 127.5 - 1, atol=0.35, rtol=0)
    assert found.diff(dim=-1).abs().max() < 0.35


def test_what_was_seldom_uncovered_leaves_no_seam(clip_of: Callable[..., Clip]) -> None:
    """The wall is brighter in the one frame of ten that shows a ring round the head: its mean would jump by 0.7 from pixel to pixel."""
    masks = np.concatenate([discs(64, [(32, 32)] * 9, 20), discs(64, [(32, 32)], 12)])
    wall = np.full((10, 64, 64, 3), 100, np.uint8)
    wall[9] = 200
    frames = np.where(masks[..., None] > 0, np.uint8(250), wall).astype(np.uint8)
    clip = clip_of(10, 64, frames=frames, masks=FaceMasks(person=masks, source="test"), num_training_frames=10)
    found = background_plate(clip)
    torch.testing.assert_close(found[:, :6], torch.full((3, 6, 64), 110 / 127.5 - 1))
    assert found[0, 32, 12] > 0.3
    assert found.diff(dim=-1).abs().max() < 0.3


def test_a_person_who_fills_the_picture_has_a_grey_wall(clip_of: Callable[..., Clip]) -> None:
    found = background_plate(scene(clip_of, np.full((32, 32, 3), 9, np.uint8), np.full((3, 32, 32), 255, np.uint8)))
    assert found.eq(0).all()


def test_the_plate_is_steady_where_enough_frames_show_the_same(clip_of: Callable[..., Clip]) -> None:
    """Six frames: the left half of the wall never changes, the right half flickers, and the middle is covered in all but three."""
    masks = discs(64, [(32, 32)] * 6, 12)
    masks[:3] = 0
    wall = np.full((6, 64, 64, 3), 100, np.uint8)
    wall[::2, :, 48:] = 160
    frames = np.where(masks[..., None] > 0, np.uint8(250), wall).astype(np.uint8)
    clip = clip_of(6, 64, frames=frames, masks=FaceMasks(person=masks, source="test"), num_training_frames=6)
    steady = where_steady(clip, background_plate(clip))
    assert steady.shape == (1, 64, 64) and set(steady.unique().tolist()) == {0.0, 1.0}
    assert steady[0, :, :14].eq(1).all() and steady[0, :, 48:].eq(0).all() and steady[0, 32, 32] == 0


def test_targets_are_the_person_and_the_hair_that_a_matte_leaves_out(clip_of: Callable[..., Clip]) -> None:
    masks = discs(64, [(20, 32), (44, 32), (32, 20), (32, 44), (32, 32), (20, 32)], 10)
    clip = scene(clip_of, np.full((64, 64, 3), 200, np.uint8), masks)
    clip.frames[4, 32, 44] = 0  # two pixels beside the last disc, and one far from it
    clip.frames[4, 5, 5] = 0
    plate = background_plate(clip)
    target = foreground(clip, torch.tensor([4]), plate, where_steady(clip, plate))
    assert target.alpha[0, 0, 32, 44] > 0.94 and target.alpha[0, 0, 32, 46] == 0 and target.alpha[0, 0, 5, 5] == 0
    torch.testing.assert_close(target.image[0, :, 32, 32], torch.full((3,), 250 / 127.5 - 1))
    over = target.image + (1 - target.alpha) * (plate + 1)
    near = slice(16, 48)
    torch.testing.assert_close(over[0, :, near, near], clip.images(torch.tensor([4]))[0][0, :, near, near], atol=0.09, rtol=0)
