"""Priors, persons and avatars survive the disk; what does not fit is refused in one line."""

from pathlib import Path

import pytest
import torch
from torch import nn

from talk3d.errors import WeightsError
from talk3d.io.avatars import load_avatar, load_person, load_prior, save_avatar
from talk3d.io.weights import load_tensors, save_tensors
from talk3d.models.avatar import Avatar, Performance, PersonalizedGenerator, Prior
from talk3d.models.generator import TriplaneGenerator
from talk3d.ops.geometry import head_camera
from talk3d.presets import BUILTIN256, TINY, TINY_AVATAR
from talk3d.types import Driving


@pytest.fixture
def prior() -> Prior:
    torch.manual_seed(3)
    return Prior(generator=TriplaneGenerator(TINY).eval(), w_std=0.7, provenance={"dataset": "none", "steps": 0})


@pytest.fixture
def person(prior: Prior) -> PersonalizedGenerator:
    ws = prior.generator.mapping(torch.randn(1, 8))
    return PersonalizedGenerator.from_generator(prior.generator, ws, {"source_sha256": "abc", "frames": [1, 2]})


@pytest.fixture
def avatar(person: PersonalizedGenerator) -> Avatar:
    person.occupied[:5] = False
    made = Avatar(
        personalized=person,
        config=TINY_AVATAR,
        performance=Performance(
            cameras=head_camera(torch.randn(4, 3) * 0.2), blink=torch.rand(4, 1), head_pose=torch.randn(4, 3), anchors=torch.rand(4, 6)
        ),
        background=torch.rand(3, 64, 64) * 2 - 1,
        audio_source="logmel64",
        fps=30.0,
        provenance={"source_sha256": "abc", "train": {"steps": 3}},
    )
    for layer in made.predictor.out.values():
        assert isinstance(layer, nn.Conv2d)
        nn.init.normal_(layer.weight, std=2.0)
    return made.eval()


def halves(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


def test_a_prior_comes_back_within_half_precision(prior: Prior, tmp_path: Path) -> None:
    prior.save(tmp_path / "prior.safetensors")
    back = load_prior(tmp_path / "prior.safetensors")
    assert back.generator.config == TINY and back.w_std == 0.7 and back.provenance == prior.provenance and not back.training
    for name, value in prior.generator.state_dict().items():
        assert back.generator.state_dict()[name].equal(halves(value)), name


def test_a_person_comes_back_within_half_precision(person: PersonalizedGenerator, tmp_path: Path) -> None:
    person.save(str(tmp_path / "person.safetensors"))
    back = load_person(tmp_path / "person.safetensors")
    assert back.provenance == person.provenance and back.renderer.renderer_config == TINY.renderer
    assert back.identity.equal(halves(person.identity)) and back.occupied.equal(person.occupied) and back.w.equal(halves(person.w))
    camera = head_camera(torch.zeros(1, 3))
    with torch.no_grad():
        torch.testing.assert_close(back.render(back.triplane, camera).raw, person.render(person.triplane, camera).raw, atol=0.02, rtol=0)


def test_an_avatar_gives_the_same_frames_and_performance(avatar: Avatar, tmp_path: Path) -> None:
    avatar.save(tmp_path / "avatar.safetensors")
    back = load_avatar(tmp_path / "avatar.safetensors")
    assert (back.fps, back.audio_source, back.provenance, back.config) == (30.0, "logmel64", avatar.provenance, TINY_AVATAR)
    assert back.personalized.provenance == avatar.personalized.provenance and not back.training
    torch.testing.assert_close(back.performance.cameras.to_label(), avatar.performance.cameras.to_label())
    for name in ("blink", "head_pose", "anchors"):
        assert getattr(back.performance, name).equal(getattr(avatar.performance, name))
    torch.testing.assert_close(back.background, avatar.background, atol=1e-3, rtol=0)
    driving = Driving(audio=torch.randn(2, 8, 16, 64), blink=torch.rand(2, 1), head_pose=torch.randn(2, 3), anchors=torch.rand(2, 6))
    with torch.no_grad():
        mine, theirs = (model.render(driving, avatar.performance.cameras[:2]) for model in (avatar, back))
        silent = avatar.personalized.render(avatar.personalized.triplane, avatar.performance.cameras[:1]).image
    assert (mine.image - theirs.image).abs().mean() < 0.1 * (mine.image[:1] - silent).abs().mean()
    assert (mine.image - theirs.image).abs().mean() < 0.02
    back.save(tmp_path / "again.safetensors")
    assert load_tensors(tmp_path / "again.safetensors", "avatar")[0]["personalized.identity"].equal(avatar.personalized.identity.half())


def test_each_reader_refuses_the_other_files(prior: Prior, person: PersonalizedGenerator, avatar: Avatar, tmp_path: Path) -> None:
    prior.save(tmp_path / "prior")
    person.save(tmp_path / "person")
    avatar.save(tmp_path / "avatar")
    readers = {"prior": load_prior, "person": load_person, "avatar": load_avatar}
    for name, read in readers.items():
        for other in readers.keys() - {name}:
            with pytest.raises(WeightsError, match=f"holds {other}, expected a talk3d {name}"):
                read(tmp_path / other)


@pytest.mark.parametrize("change", ["config", "weights"])
def test_a_file_of_another_version_is_refused_in_one_line(prior: Prior, tmp_path: Path, change: str) -> None:
    prior.save(tmp_path / "prior")
    tensors, header = load_tensors(tmp_path / "prior", "prior")
    if change == "config":
        header["config"]["colour"] = "red"
    else:
        del tensors["backbone.mapping.w_avg"]
    save_tensors(tmp_path / "prior", tensors, header)
    with pytest.raises(WeightsError, match="incompatible version" if change == "config" else "does not fit the model") as caught:
        load_prior(tmp_path / "prior")
    assert "\n" not in str(caught.value)


def test_saving_where_nothing_can_be_written_is_an_error(avatar: Avatar, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot write"):
        save_avatar(avatar, tmp_path / "missing" / "avatar")


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="give the path of a saved avatar"):
        load_avatar(tmp_path / "avatar")


def test_the_builtin_prior_is_a_head() -> None:
    prior = load_prior()
    assert prior.generator.config == BUILTIN256 and prior.w_std > 0
    ws = prior.generator.mapping(torch.zeros(1, 128) + 1e-3, truncation_psi=0.0)
    with torch.no_grad():
        rendering = prior.generator.render(ws, head_camera(torch.zeros(1, 3)), neural_rendering_resolution=24)
    alpha = rendering.raw_alpha[0, 0]
    assert alpha[12, 12] > 0.9 and alpha[0, 0] < 0.1  # solid in the middle, nothing in the corner
    assert 2.3 < rendering.depth[0, 0, 12, 12] < 2.9
