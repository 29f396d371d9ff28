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
from talk3d.ops.compositing import premultiply
from talk3d.stages.personalize import PersonalizeConfig, _wide_views, choose_frames, face_emphasis, personalize
from talk3d.types import Clip, WideViews

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
