"""The lesson's terms: named, weighted, switchable, and blind to what is not learnt from."""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from talk3d.errors import ConfigError, WeightsError
from talk3d.models.avatar import Avatar, PersonalizedGenerator, Prior
from talk3d.perception.facetemplate import load_template
from talk3d.perception.identity import ArcFace, load_identity
from talk3d.perception.lipsync import SyncExpert
from talk3d.stages.lesson import NEGLIGIBLE, NEGLIGIBLE_NEAR, Lesson, LessonConfig, LossWeights, lids_brows_gaze
from talk3d.stages.train import TrainConfig, train
from talk3d.training.losses import SideViews, unusual
from talk3d.types import Clip

QUICK = LessonConfig(steps=4, listening_steps=1, listening_frames=4, reading_steps=2, weights=LossWeights(structure=0.3, lips=0.02, sides=0.0))


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
    bare = terms(avatar, clip, replace(QUICK, weights=LossWeights(structure=0.0, lips=0.0, detail=0.0, sides=0.0)))
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
    for name, network in (("perceptual", "lpips-alex"), ("identity", "arcface"), ("sync", "sync-expert")):
        with pytest.raises(WeightsError, match=f"talk3d weights fetch {network} ") as said:
            terms(avatar, clip, replace(QUICK, weights=LossWeights(**{name: 0.1})))
        assert "\n" not in str(said.value)


def lesson_of(avatar: Avatar, clip: Clip, config: LessonConfig, num_frames: int = 11) -> Lesson:
    return Lesson(copy.deepcopy(avatar), clip, config, num_frames=num_frames, device="cpu", seed=5)


def test_frames_are_rendered_with_the_neck_bent_as_the_head_is_held(avatar: Avatar, clip: Clip) -> None:
    person, index = avatar.personalized, torch.tensor([1, 8])
    person.renderer.renderer_config = replace(person.renderer.renderer_config, rest_pose=(0.0, 0.0, 0.0))
    lesson, track = lesson_of(avatar, clip, QUICK), replace(clip.track, head_pose=clip.track.head_pose + torch.tensor([0.5, 0.0, 0.0]))
    lesson.clip = replace(clip, track=track)
    with torch.no_grad():
        found, planes, _ = lesson._render(index, torch.Generator(), torch.Generator().manual_seed(0))
        held = track.head_pose[index].float()
        bent, straight = (person.render(planes, track.cameras[index], pose, torch.Generator().manual_seed(0)).raw for pose in (held, None))
    torch.testing.assert_close(found.raw, bent)
    assert float((bent - straight).abs().mean()) > 1e-4


def test_frames_are_drawn_one_by_one_unless_a_term_needs_consecutive_ones(
    avatar: Avatar, clip: Clip, clip_of: Callable[..., Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = lesson_of(avatar, clip, QUICK)
    expected = torch.multinomial(plain.chances, 4, replacement=True, generator=torch.Generator().manual_seed(5))
    assert plain.chances.shape == (11,) and plain._draw().equal(expected)
    for frames_per_step, count in ((4, 2), (5, 2), (2, 1)):
        pairs = lesson_of(avatar, clip, replace(QUICK, frames_per_step=frames_per_step, weights=LossWeights(temporal=1.0)))
        drawn = torch.stack([pairs._draw() for _ in range(60)]).view(60, count, 2)
        assert drawn[..., 1].equal(drawn[..., 0] + 1) and set(drawn[..., 0].flatten().tolist()) == set(range(10))
    monkeypatch.setattr("talk3d.training.lips.load_sync_expert", lambda device: SyncExpert())
    both = LossWeights(temporal=1.0, sync=1.0)
    cut = replace(clip_of(16), check={"cuts": [5]})
    for given, starts in ((clip, set(range(7))), (cut, {0, 5, 6})):
        runs = lesson_of(avatar, given, replace(QUICK, frames_per_step=1, weights=both))
        drawn = torch.stack([runs._draw() for _ in range(60)])
        assert drawn.equal(drawn[:, :1] + torch.arange(5)) and set(drawn[:, 0].tolist()) == starts
    with pytest.raises(ConfigError, match="frames_per_step of 2 or more, got 1"):
        LessonConfig(frames_per_step=1, weights=LossWeights(temporal=0.1))
    with pytest.raises(ConfigError, match="need 5 frames in a row, got 4 frames"):
        lesson_of(avatar, clip, replace(QUICK, weights=both), num_frames=4)


def test_a_run_is_driven_in_one_way(avatar: Avatar, clip: Clip) -> None:
    lesson = lesson_of(avatar, clip, replace(QUICK, tracked_mouth=0.5, weights=LossWeights(temporal=1.0)))
    seen: list[torch.Tensor] = []
    coefficients = lesson.avatar.conditioner.coefficients

    def watch(driving: object, mouth: torch.Tensor) -> torch.Tensor:
        seen.append(mouth.detach())
        return coefficients(driving, mouth)

    lesson.avatar.conditioner.coefficients = watch
    index = torch.tensor([2, 3, 6, 7, 0, 1, 4, 5])
    lesson._render(index, *(torch.Generator().manual_seed(seed) for seed in (5, 6)))
    tracked = (seen[0] == lesson.heard.shapes.values[index]).all(1).view(4, 2)
    assert tracked[:, 0].equal(tracked[:, 1]) and tracked.any() and not tracked.all()
    noise = lesson._driving(index, torch.Generator().manual_seed(5)).audio - clip.driving(index).audio
    torch.testing.assert_close(noise[::2], noise[1::2], atol=1e-5, rtol=0)
    assert not torch.allclose(noise[0], noise[2])


def test_sides_are_held_as_the_settled_person_shows_them(avatar: Avatar, clip: Clip) -> None:
    def decay(share: float) -> float:
        return 0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2

    lesson = lesson_of(avatar, clip, replace(QUICK, steps=8, settling_steps=3, weights=LossWeights()))
    assert lesson.sides is not None and lesson.modules["sides"] is lesson.sides
    fitted, rates, settled = lesson.sides.pictures.clone(), [], avatar
    for number in range(5):
        if number == 3:
            average = lesson.average.module
            assert isinstance(average, Avatar)
            settled = copy.deepcopy(average)
        lesson.step(number)
        assert lesson.sides.pictures.equal(fitted) == (number < 3)
        rates.append(lesson.optimizer.param_groups[0]["lr"] / lesson.rates[0])
    assert rates == pytest.approx([decay(0) / 50, 2 * decay(1 / 3) / 50, 3 * decay(2 / 3) / 50, decay(0) / 50, 2 * decay(1 / 5) / 50])
    person, expected = settled.personalized, SideViews(clip.track.cameras[:11])
    with torch.no_grad():
        tokens = settled.conditioner(clip.driving(torch.arange(11))).mean(0, keepdim=True)
        expected.take(person, person.triplane + settled.predictor.predict(settled.predictor.prepare(person.triplane), tokens, lesson.rest))
    torch.testing.assert_close(lesson.sides.pictures, expected.pictures)
    for steps, weight in ((5, 1.0), (8, 0.0)):  # too short, nothing to hold
        plain = lesson_of(avatar, clip, replace(QUICK, steps=steps, settling_steps=3, weights=LossWeights(sides=weight)))
        plain.step(3)
        assert plain.optimizer.param_groups[0]["lr"] == pytest.approx(4 * decay(3 / steps) / 50 * plain.rates[0])


def test_sides_are_held_with_the_face_at_rest_and_the_head_as_in_the_frame(avatar: Avatar, clip: Clip) -> None:
    lesson = lesson_of(avatar, clip, replace(QUICK, weights=LossWeights()))
    model, index = lesson.avatar, torch.tensor([4, 7])
    model.conditioner.config = replace(model.conditioner.config, drop_rate=0.0)
    torch.nn.init.normal_(model.predictor.near)
    torch.nn.init.normal_(model.predictor.bases)
    _, planes, coefficients = lesson._render(index, *(torch.Generator().manual_seed(seed) for seed in (5, 6)))
    rest = lesson._at_rest(planes, coefficients)
    driving = lesson._driving(index, torch.Generator().manual_seed(5))
    held = torch.cat([lesson.rest[:, :-5], coefficients[:1, -5:]], 1)
    expected = model.personalized.triplane + model.predictor(model.personalized.triplane, model.conditioner(driving)[:1], held)
    assert not torch.allclose(held, lesson.rest, atol=1e-2)
    torch.testing.assert_close(rest.planes, expected.planes, atol=1e-4, rtol=1e-4)
    assert model.conditioner.limits is not None
    seen = model.conditioner.limits(clip.driving(torch.arange(11)))
    mean = torch.cat([2 * seen.blink, 20 * seen.upper_face[:, :4], 4 * seen.head_pose, 4 * seen.anchors[:, :2]], 1).mean(0)
    torch.testing.assert_close(lesson.rest[0, -10:], mean)
    assert lesson_of(avatar, clip, QUICK).sides is None and float(lesson.step(0)["sides"]) >= 0


def test_the_first_step_is_that_of_adam(avatar: Avatar, clip: Clip) -> None:
    """Gradients of any memory layout move their own weights: by the rate, in closed form, where they are not negligible."""
    lesson = lesson_of(avatar, clip, LessonConfig(frames_per_step=2, listening_steps=0))
    before = [part.detach().clone() for part in lesson.parameters]
    lesson.step(0)
    rates = {part: group["lr"] for group in lesson.optimizer.param_groups for part in group["params"]}
    moved = 0
    for part, old in zip(lesson.parameters, before, strict=True):
        if part.grad is not None:
            negligible = NEGLIGIBLE_NEAR if part is lesson.avatar.predictor.near else NEGLIGIBLE
            expected = old - rates[part] * part.grad / (part.grad.abs() + negligible)
            torch.testing.assert_close(part.detach(), expected, rtol=0, atol=1e-2 * rates[part])
            moved += 1
    assert moved > 100


@pytest.mark.parametrize(("cores", "sizes"), [(1, [4]), (2, [2, 2]), (3, [2, 2]), (8, [1, 1, 1, 1])])
def test_threads_find_the_gradients_that_one_thread_finds(
    avatar: Avatar, clip: Clip, monkeypatch: pytest.MonkeyPatch, cores: int, sizes: list[int]
) -> None:
    lesson, index, twin = (lesson_of(avatar, clip, QUICK), torch.tensor([2, 9, 4, 0]), lesson_of(avatar, clip, QUICK))
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    found = lesson._find_gradients(index)
    losses = torch.zeros([])
    for part, seed in zip(index.split(sizes), torch.randint(2**62, (len(sizes),), generator=twin.generators["choice"]).tolist(), strict=True):
        choice, rays = (torch.Generator().manual_seed(seed) for _ in range(2))
        terms = twin._compare(twin._render(part, choice, rays)[0], part, choice)
        losses = losses + sum(getattr(QUICK.weights, name) * term for name, term in terms.items()) * len(part) / 4
    losses.backward()
    torch.testing.assert_close(sum(getattr(QUICK.weights, name) * value for name, value in found.items()), losses.detach())
    for mine, plain in zip(lesson.avatar.parameters(), twin.avatar.parameters(), strict=True):
        assert (mine.grad is None) == (plain.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, plain.grad, atol=1e-6, rtol=1e-3)


def test_pictures_are_compared_over_what_is_behind_them(avatar: Avatar, clip: Clip) -> None:
    lesson, index = lesson_of(avatar, clip, QUICK), torch.tensor([1, 4])
    choice, rays = (torch.Generator().manual_seed(3) for _ in range(2))
    target, _ = lesson._target(index)
    exact = replace(lesson._render(index, choice, rays)[0], image=target.image, alpha=target.alpha)
    thinner = replace(exact, alpha=target.alpha - 0.1)
    terms = [lesson._compare(rendering, index, torch.Generator().manual_seed(3)) for rendering in (exact, thinner)]
    for name in ("image", "detail", "structure"):
        assert terms[0][name].abs() < 1e-6 < 1e-3 < terms[1][name], name


def test_consecutive_frames_serve_both_terms_that_need_them(avatar: Avatar, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("talk3d.training.lips.load_sync_expert", lambda device: SyncExpert().eval().requires_grad_(False))
    found = terms(avatar, clip, replace(QUICK, weights=LossWeights(sync=0.1, temporal=1.0, likeness=0.3)))
    assert {"image", "detail", "alpha", "raw", "structure", "sides", "sync", "temporal", "likeness"} == found.keys()
    assert all(value >= 0 for value in found.values())


def test_faces_are_compared_at_the_points_of_the_film(avatar: Avatar, clip: Clip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save(ArcFace().state_dict(), tmp_path / "arcface.pth")
    monkeypatch.setattr("talk3d.stages.lesson.load_identity", lambda device: load_identity(tmp_path / "arcface.pth", device))
    flat = load_template("registry").points[:468, :2] * torch.tensor([1.0, -1.0])
    track = replace(clip.track, landmarks=(32 + 40 * flat).expand(clip.num_frames, -1, -1).clone())
    lesson = lesson_of(avatar, replace(clip, track=track), replace(QUICK, weights=LossWeights(identity=0.1, likeness=0.1)))
    index = torch.tensor([1, 4])
    filmed = lesson._target(index)[0].image
    same = lesson._read_faces(filmed, filmed, index)
    assert same.keys() == {"identity", "likeness"} and all(abs(value) < 1e-5 for value in same.values())
    stranger = filmed.flip(1).clone().requires_grad_()  # red is blue
    for name, value in lesson._read_faces(stranger, filmed, index).items():
        (gradient,) = torch.autograd.grad(value, stranger)
        assert value > 1e-4 and (gradient.abs().amax((1, 2, 3)) > 0).all(), name
        with torch.no_grad():  # a step against the gradient makes the faces more alike
            nearer = stranger - 0.02 * gradient / gradient.abs().max()
        assert lesson._read_faces(nearer, filmed, index)[name] < value


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
    ear = [name for name in states[0] if name.startswith(("conditioner.audio_", "conditioner.mouth_"))]
    before, listened, after = states
    assert ear and not all(before[name].equal(listened[name]) for name in ear)
    assert all(listened[name].equal(after[name]) for name in ear)
    changed = {name for name in after if not listened[name].equal(after[name])}
    assert {"predictor.bases", "predictor.near", "personalized.identity"} <= changed
    assert all(before[name].equal(listened[name]) for name in before if name not in ear)


def test_bases_learn_only_where_they_may(avatar: Avatar, clip: Clip) -> None:
    lesson = Lesson(copy.deepcopy(avatar), clip, QUICK, num_frames=11, device="cpu", seed=0)
    for number in range(2):
        lesson.step(number)
    for bases, share in zip((lesson.avatar.predictor.near, lesson.avatar.predictor.bases), lesson.reach, strict=True):
        assert bases is not None
        shut = (share == 0).expand_as(bases)
        assert shut.any() and not bases[shut].any() and bases[~shut].any()


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
            generators = (torch.Generator().manual_seed(seed) for seed in (0, 1))
            images.append(lesson._render(torch.tensor([2, 5]), *generators)[0].raw.detach())
    assert not torch.allclose(images[0], images[1]) and torch.allclose(images[2], images[3])
