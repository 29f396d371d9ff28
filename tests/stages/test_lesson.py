"""The lesson's terms: named, weighted, switchable, and blind to what is not learnt from."""

import copy
import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from talk3d.errors import ConfigError, WeightsError
from talk3d.metrics.image import ssim
from talk3d.models.avatar import Avatar, PersonalizedGenerator, Prior
from talk3d.stages.lesson import Lesson, LessonConfig, LossWeights, lids_brows_gaze, structure_loss
from talk3d.stages.train import TrainConfig, train
from talk3d.training.losses import unusual
from talk3d.types import Clip

QUICK = LessonConfig(steps=4, listening_steps=1, listening_frames=4, reading_steps=2, weights=LossWeights(structure=0.3, lips=0.02))


@pytest.fixture
def avatar(prior: Prior, clip: Clip) -> Avatar:
    ws = prior.generator.mapping(torch.randn(1, 8))
    person = PersonalizedGenerator.from_generator(prior.generator, ws, {"source_sha256": clip.source_sha256})
    return train(person, clip, TrainConfig(steps=1, listening_steps=1, listening_frames=4, reading_steps=1)).requires_grad_(True)


def terms(avatar: Avatar, clip: Clip, config: LessonConfig, num_frames: int = 11) -> dict[str, float]:
    lesson = Lesson(copy.deepcopy(avatar), clip, config, num_frames=num_frames, device="cpu", seed=0)
    lesson.listen(lambda *_: None)
    return {name: float(value) for name, value in lesson.step(0).items()}


def test_terms_are_named_and_a_weight_of_zero_leaves_one_out(avatar: Avatar, clip: Clip) -> None:
    found = terms(avatar, clip, QUICK)
    assert {"image", "detail", "alpha", "raw", "structure", "lips"} == found.keys()
    assert all(value >= 0 for value in found.values())
    bare = terms(avatar, clip, replace(QUICK, weights=LossWeights(structure=0.0, lips=0.0, detail=0.0)))
    assert found.keys() - bare.keys() == {"structure", "lips", "detail"}
    with pytest.raises(ConfigError, match="cannot be negative"):
        LossWeights(image=-1.0)
    for number in ({"learning_rate": float("nan")}, {"mouth_rate": -1.0}, {"listening_steps": -3}, {"audio_noise": float("inf")}):
        with pytest.raises(ConfigError, match=f"{next(iter(number))} cannot be negative"):
            LessonConfig(**number)
    with pytest.raises(ConfigError, match="1 frame a step"):
        LessonConfig(listening_frames=0)
    for share in ({"tracked_mouth": 1.5}, {"unusual_frames": -0.1}, {"average_decay": 2.0}):
        with pytest.raises(ConfigError, match="a share"):
            LessonConfig(**share)


def test_a_term_whose_network_is_not_there_is_refused(avatar: Avatar, clip: Clip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("talk3d.io.catalogue.cache_folder", lambda: tmp_path)
    with pytest.raises(WeightsError, match="talk3d weights fetch lpips-alex"):
        terms(avatar, clip, replace(QUICK, weights=LossWeights(perceptual=0.1)))


def test_structure_is_one_less_the_similarity() -> None:
    image, target = (2 * torch.rand(2, 3, 24, 24) - 1 for _ in range(2))
    even = structure_loss(image, target, torch.ones(2, 1, 24, 24))
    torch.testing.assert_close(even, 1 - ssim(0.5 * (image + 1), 0.5 * (target + 1)).mean())
    assert structure_loss(target, target, torch.ones(2, 1, 24, 24)).abs() < 1e-6


def test_frames_beyond_those_to_learn_from_are_not_looked_at(avatar: Avatar, clip: Clip) -> None:
    frames = clip.frames.copy()
    frames[8:] = 255
    values = [terms(avatar, one, QUICK, num_frames=8) for one in (clip, dataclasses.replace(clip, frames=frames))]
    assert values[0] == values[1]


def test_the_ear_learns_by_listening_and_then_stays_as_it_is(avatar: Avatar, clip: Clip) -> None:
    lesson = Lesson(copy.deepcopy(avatar), clip, replace(QUICK, listening_steps=3), num_frames=11, device="cpu", seed=0)
    heard: list[float] = []
    states = []
    for work in (lambda: None, lambda: lesson.listen(lambda *_: None), lambda: heard.append(float(lesson.step(0)["image"]))):
        work()
        states.append({name: value.clone() for name, value in lesson.avatar.state_dict().items()})
    ear = [name for name in states[0] if name.startswith(("conditioner.audio_", "conditioner.mouth_head"))]
    before, listened, after = states
    assert ear and not all(before[name].equal(listened[name]) for name in ear)
    assert all(listened[name].equal(after[name]) for name in ear)
    changed = {name for name in after if not listened[name].equal(after[name])}
    assert {"predictor.bases", "predictor.near", "personalized.identity"} <= changed
    assert all(before[name].equal(listened[name]) for name in before if name not in ear)


def test_unusual_frames_are_drawn_as_often_as_asked(avatar: Avatar, clip: Clip) -> None:
    chances = [
        Lesson(copy.deepcopy(avatar), clip, replace(QUICK, unusual_frames=share), num_frames=9, device="cpu", seed=0).chances
        for share in (0.0, 1.0, 0.5)
    ]
    torch.testing.assert_close(chances[0], torch.full((9,), 1 / 9))
    torch.testing.assert_close(chances[2], (chances[0] + chances[1]) / 2)
    assert chances[1].max() > chances[1].min()


def test_what_is_drawn_does_not_depend_on_held_out_eyes_and_brows(avatar: Avatar, clip: Clip) -> None:
    track = replace(clip.track, blink=clip.track.blink.clone(), upper_face=clip.track.upper_face.clone())
    track.blink[clip.num_training_frames :], track.upper_face[clip.num_training_frames :] = 9.0, -9.0
    assert clip.num_training_frames < clip.num_frames
    one, other = (
        Lesson(copy.deepcopy(avatar), given, QUICK, num_frames=9, device="cpu", seed=0).chances for given in (clip, replace(clip, track=track))
    )
    assert one.equal(other)


def test_frames_of_shut_eyes_are_unusual() -> None:
    shut = torch.zeros(100, dtype=torch.bool)
    shut[[40, 41, 70]] = True
    brows = 0.1 * torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    values = lids_brows_gaze(shut.float()[:, None], brows)
    torch.testing.assert_close(values.std(0, correction=0), torch.ones(5))
    chances = unusual(values, num_components=5)
    assert chances[shut].min() > chances[~shut].mean() * 3
    still = lids_brows_gaze(torch.zeros(100, 1), torch.zeros(100, 4))
    torch.testing.assert_close(unusual(still, num_components=5), torch.full((100,), 0.01))


def test_the_bases_see_the_tracked_mouth_as_often_as_asked(avatar: Avatar, clip: Clip) -> None:
    loud = copy.deepcopy(avatar)
    with torch.no_grad():
        loud.predictor.near.normal_()
        loud.conditioner.mouth_head.bias.add_(5.0)
    images = []
    for share in (0.0, 1.0):
        for model in (loud, avatar):
            model = copy.deepcopy(model)
            model.predictor.near.data.copy_(loud.predictor.near)
            lesson = Lesson(model, clip, replace(QUICK, tracked_mouth=share), num_frames=11, device="cpu", seed=0)
            images.append(lesson._render(torch.tensor([2, 5])).raw.detach())
    assert not torch.allclose(images[0], images[1]) and torch.allclose(images[2], images[3])
