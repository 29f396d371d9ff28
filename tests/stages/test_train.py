"""Training on a small synthetic clip: it lowers its losses, resumes exactly, and knows whose video it is."""

import copy
import dataclasses
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from talk3d.errors import ConfigError, WeightsError
from talk3d.models.avatar import Avatar, PersonalizedGenerator, Prior
from talk3d.ops.compositing import premultiply
from talk3d.ops.geometry import head_camera
from talk3d.perception.lipsync import SyncExpert
from talk3d.presets import BUILTIN256, TINY
from talk3d.stages.lesson import LossWeights
from talk3d.stages.personalize import background_plate
from talk3d.stages.train import TrainConfig, avatar_sizes, picture_error, train, with_rays
from talk3d.types import Clip

SHORT = TrainConfig(steps=10, frames_per_step=2, listening_steps=3, listening_frames=4, reading_steps=3)


@pytest.fixture
def person(prior: Prior, clip: Clip) -> PersonalizedGenerator:
    ws = prior.generator.mapping(torch.randn(1, 8))
    return PersonalizedGenerator.from_generator(prior.generator, ws, {"source_sha256": clip.source_sha256})


def test_the_talking_part_is_as_wide_as_the_planes() -> None:
    large = avatar_sizes(BUILTIN256.renderer)
    assert (large.deltaplane.plane_channels, large.deltaplane.plane_resolution, large.deltaplane.widths[0]) == (24, 128, 24)
    assert large.deltaplane.token_width == large.conditioning.token_width
    assert large.conditioning.audio_channels == 64 and avatar_sizes(BUILTIN256.renderer, 44).conditioning.audio_channels == 44
    small = avatar_sizes(TINY.renderer).deltaplane
    assert (small.plane_channels, small.plane_resolution, small.plane_axes) == (4, 32, "fixed")


def error(avatar: Avatar, clip: Clip, frames: torch.Tensor) -> float:
    with torch.no_grad():
        return (avatar.render(clip.driving(frames), clip.track.cameras[frames]).image - premultiply(*clip.images(frames))).abs().mean().item()


def test_it_learns_the_clip_and_listens(person: PersonalizedGenerator, clip: Clip) -> None:
    heard: list[tuple[str, dict[str, float]]] = []

    def listen(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        heard.append((stage, dict(values)))

    frames = torch.arange(12)
    still = head_camera(torch.zeros(clip.num_frames, 3))  # as the picture is
    clip = replace(clip, track=replace(clip.track, cameras=still, head_pose=torch.zeros(clip.num_frames, 3)))
    plain = replace(SHORT, mouth_emphasis=0.0, face_emphasis=0.0, listening_steps=160, listening_frames=12, audio_noise=0.0)
    config = replace(plain, steps=40, renderer_rate=1e-2, identity_rate=2e-2, average_decay=0.8)
    untrained = train(copy.deepcopy(person), clip, replace(SHORT, steps=1, renderer_rate=0.0, identity_rate=0.0, learning_rate=0.0))
    avatar = train(person, clip, config, progress=listen)
    assert error(avatar, clip, frames) < 0.85 * error(untrained, clip, frames)
    lesson = [values["hearing"] for stage, values in heard if stage == "listen"]
    assert min(lesson[-2:]) < 0.7 * max(lesson[:3])
    losses = [values for stage, values in heard if stage == "train"]
    assert losses[-1]["image"] < 0.85 * losses[0]["image"]
    assert not avatar.training and avatar.resolution == 64 and (avatar.fps, avatar.audio_source) == (25.0, "logmel64")
    assert avatar.provenance["source_sha256"] == clip.source_sha256 and avatar.provenance["frames"] == 12
    driving = clip.driving(frames[:2])
    louder = replace(driving, audio=driving.audio + 1)
    with torch.no_grad():
        assert not torch.allclose(avatar.deltaplane(driving).planes, avatar.deltaplane(louder).planes)


def test_it_listens_to_whatever_features_the_clip_has(person: PersonalizedGenerator, clip: Clip) -> None:
    audio = replace(clip.audio, values=clip.audio.values[..., :44], source="ctc44:0123456789ab")
    avatar = train(person, replace(clip, audio=audio), replace(SHORT, steps=1))
    assert avatar.audio_source == audio.source and avatar.config.conditioning.audio_channels == 44


def test_the_performance_is_the_training_part(person: PersonalizedGenerator, clip: Clip) -> None:
    avatar = train(person, clip, replace(SHORT, steps=1))
    performance = avatar.performance
    assert performance.blink.equal(clip.track.blink[:12]) and performance.head_pose.equal(clip.track.head_pose[:12])
    assert performance.anchors.equal(clip.track.anchors[:12]) and performance.cameras.cam2world.equal(clip.track.cameras.cam2world[:12])
    assert avatar.background.equal(background_plate(clip))


def test_held_out_frames_are_not_looked_at(person: PersonalizedGenerator, clip: Clip) -> None:
    frames, config = clip.frames.copy(), replace(SHORT, steps=2)
    frames[12:] = 255
    one, other = (train(copy.deepcopy(person), c, config) for c in (clip, dataclasses.replace(clip, frames=frames)))
    assert all(value.equal(other.state_dict()[name]) for name, value in one.state_dict().items())


def test_rates_of_zero_leave_the_person_as_it_is(person: PersonalizedGenerator, clip: Clip) -> None:
    before = {name: value.clone() for name, value in person.state_dict().items()}
    avatar = train(person, clip, replace(SHORT, steps=4, renderer_rate=0.0, identity_rate=0.0))
    for name, value in avatar.personalized.state_dict().items():
        torch.testing.assert_close(value, before[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(temporal=1.0, likeness=0.3), LossWeights(temporal=0.5, sync=0.1)])
def test_a_stopped_run_continues_exactly(
    person: PersonalizedGenerator, clip: Clip, tmp_path: Path, weights: LossWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = SyncExpert().eval().requires_grad_(False)
    monkeypatch.setattr("talk3d.training.lips.load_sync_expert", lambda device: expert)
    config = replace(SHORT, weights=weights, settling_steps=4)
    whole = train(copy.deepcopy(person), clip, config, seed=3)

    def stop(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        if stage == "train" and step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(copy.deepcopy(person), clip, config, seed=3, progress=stop, checkpoint=tmp_path / "check")
    resumed = train(copy.deepcopy(person), clip, config, seed=3, checkpoint=tmp_path / "check")
    for name, value in whole.state_dict().items():
        assert resumed.state_dict()[name].equal(value), name


def test_the_same_person_is_seen_with_more_rays(person: PersonalizedGenerator, clip: Clip) -> None:
    fine, before = with_rays(person, 24, 4), person.renderer.renderer_config
    config = fine.renderer.renderer_config
    assert config == replace(before, neural_rendering_resolution=24, depth_resolution=4, depth_resolution_importance=4)
    assert all(value.equal(fine.state_dict()[name]) for name, value in person.state_dict().items())
    with torch.no_grad():
        one, other = (model.render(model.triplane, clip.track.cameras[:1]) for model in (person, fine))
    assert other.image.shape == one.image.shape and other.raw.shape[-1] == 24
    assert with_rays(person, None, None).renderer.renderer_config == before
    trained = train(person, clip, replace(SHORT, steps=1, rays=24)).personalized.renderer.renderer_config
    assert trained == replace(before, neural_rendering_resolution=24)
    with pytest.raises(ConfigError, match="positive numbers"):
        TrainConfig(rays=-1)


def test_validation_frames_are_not_learnt_from_and_choose_what_is_kept(person: PersonalizedGenerator, clip: Clip) -> None:
    frames, config = clip.frames.copy(), replace(SHORT, steps=2, validation_share=0.3)
    frames[9:][clip.masks.person[9:] > 0] = 255  # three of twelve; what is behind the person is that of the whole training part
    one, other = (train(copy.deepcopy(person), c, config) for c in (clip, dataclasses.replace(clip, frames=frames)))
    assert frames.tobytes() != clip.frames.tobytes()
    assert all(value.equal(other.state_dict()[name]) for name, value in one.state_dict().items())
    seen: list[float] = []

    def listen(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        seen.extend([values["validation"]] if "validation" in values else [])

    wild = replace(config, steps=10, validation_every=5, learning_rate=0.3, identity_rate=0.3, renderer_rate=0.3, average_decay=0.0)
    kept = train(copy.deepcopy(person), clip, wild, progress=listen)
    assert len(seen) == 2
    found = float(picture_error(kept, clip, torch.arange(9, 12), "cpu"))
    assert found == pytest.approx(min(seen), rel=1e-4)
    with pytest.raises(ConfigError, match="a share below 1"):
        TrainConfig(validation_share=1.0)


def test_the_person_of_another_video_is_refused(person: PersonalizedGenerator, clip: Clip) -> None:
    with pytest.raises(WeightsError, match="another video"):
        train(person, dataclasses.replace(clip, source_sha256="b" * 64), SHORT)
    with pytest.raises(ConfigError, match="positive numbers"):
        TrainConfig(frames_per_step=0)


def test_the_given_person_stays_as_it_was(person: PersonalizedGenerator, clip: Clip) -> None:
    before = {name: value.clone() for name, value in person.state_dict().items()}
    train(person, clip, replace(SHORT, steps=2))
    assert not person.training and all(bool((person.state_dict()[name] == value).all()) for name, value in before.items())
