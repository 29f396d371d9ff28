"""Person and avatar: what they keep, and that a silent avatar is the person exactly."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from talk3d.models.avatar import RELEASED, Avatar, AvatarConfig, Performance, PersonalizedGenerator
from talk3d.models.conditioning import Conditioner
from talk3d.models.deltaplane import DeltaplaneConfig, DeltaplanePredictor
from talk3d.models.generator import TriplaneGenerator
from talk3d.ops.geometry import head_camera
from talk3d.presets import TINY, TINY_AVATAR
from talk3d.types import Driving

CAMERA = head_camera(torch.tensor([[0.2, 0.1, 0.0], [-0.3, 0.0, 0.0], [0.0, 0.0, 0.0]]))


@pytest.fixture
def generator() -> TriplaneGenerator:
    torch.manual_seed(3)
    return TriplaneGenerator(TINY).eval()


@pytest.fixture
def avatar(generator: TriplaneGenerator) -> Avatar:
    count = 3
    return Avatar(
        personalized=PersonalizedGenerator.from_generator(generator, generator.mapping(torch.randn(1, 8)), {"prior": "none"}),
        config=TINY_AVATAR,
        performance=Performance(
            cameras=CAMERA,
            blink=torch.rand(count, 1),
            head_pose=torch.randn(count, 3),
            anchors=torch.rand(count, 6),
            upper_face=torch.randn(count, 5) / 20,
        ),
        background=torch.zeros(3, 64, 64),
        audio_source="logmel64",
        fps=25.0,
        provenance={},
    ).eval()


def driving(count: int = 3) -> Driving:
    return Driving(
        audio=torch.randn(count, 8, 16, 64),
        blink=torch.rand(count, 1),
        head_pose=torch.randn(count, 3),
        anchors=torch.rand(count, 6),
        upper_face=torch.randn(count, 5) / 20,
    )


def speak(avatar: Avatar) -> None:
    """Give the talking part something to say."""
    for layer in avatar.predictor.out.values():
        assert isinstance(layer, nn.Conv2d)
        nn.init.normal_(layer.weight, std=0.5)


def test_person_renders_what_the_generator_does(generator: TriplaneGenerator) -> None:
    ws = generator.mapping(torch.randn(1, 8))
    person = PersonalizedGenerator.from_generator(generator, ws, {"prior": "none"})
    torch.testing.assert_close(person.triplane.planes, generator.triplane(ws).planes)
    person.occupied.fill_(True)
    expected = generator.render_triplane(generator.triplane(ws), ws[:, -1], CAMERA[:1], occupied=person.occupied)
    torch.testing.assert_close(person.render(person.triplane, CAMERA[:1]).image, expected.image)
    assert not person.training and person.provenance == {"prior": "none"}


def test_person_owns_its_weights(generator: TriplaneGenerator) -> None:
    person = PersonalizedGenerator.from_generator(generator, generator.mapping(torch.randn(1, 8)), {})
    before = person.renderer.decoder.net[0].weight.clone()
    with torch.no_grad():
        generator.decoder.net[0].weight.add_(1)
    assert person.renderer.decoder.net[0].weight.equal(before)
    assert not any("backbone" in name for name in person.state_dict())


def test_an_avatar_knows_its_film(avatar: Avatar) -> None:
    known = copy.copy(avatar)
    known.provenance = {"source_sha256": "a1"}
    assert known.is_of("a1") and not known.is_of("b2")
    known.provenance = {}
    assert known.is_of("b2")


def test_a_new_avatar_is_the_person_exactly(avatar: Avatar) -> None:
    person = avatar.personalized
    triplane = replace(person.triplane, planes=person.identity.expand(3, -1, -1, -1, -1))
    with torch.no_grad():
        assert avatar.render(driving(), CAMERA).image.equal(person.render(triplane, CAMERA).image)
    assert avatar.resolution == 64


def test_the_head_turns_on_shoulders_that_stay(generator: TriplaneGenerator, avatar: Avatar) -> None:
    ws = generator.mapping(torch.randn(1, 8))
    avatar.personalized = PersonalizedGenerator.from_generator(generator.with_renderer(rest_pose=(0.1, 0.0, 0.0), throat_y=-0.28), ws, {})
    avatar.personalized.occupied.fill_(True)
    rest = replace(driving(1), head_pose=torch.tensor([[0.1, 0.0, 0.0]]))
    turned = replace(rest, head_pose=torch.tensor([[0.6, 0.0, 0.0]]))
    with torch.no_grad():
        still = avatar.personalized.render(avatar.personalized.triplane, CAMERA[:1]).raw
        assert torch.allclose(avatar.render(rest, CAMERA[:1]).raw, still, atol=1e-5)
        moved = (avatar.render(turned, CAMERA[:1]).raw - still).abs().mean((0, 1, 3))  # of each row
    assert float(moved[: len(moved) // 2].max()) < 1e-5 and float(moved[-2:].max()) > 1e-3


def test_a_talking_avatar_moves(avatar: Avatar) -> None:
    speak(avatar)
    with torch.no_grad():
        first, second = (avatar.render(driving(), CAMERA).image for _ in range(2))
    assert not torch.allclose(first, second)


def test_what_depends_on_the_person_is_computed_once_and_anew_when_a_weight_changes(avatar: Avatar) -> None:
    speak(avatar)
    given = driving()
    with torch.no_grad():
        first = avatar.deltaplane(given).planes
        kept = avatar._prefix
        assert kept is not None and avatar.deltaplane(given).planes.equal(first) and avatar._prefix is kept
        for weight in (avatar.predictor.transformer[0].proj_in["lin_xy"].weight, avatar.personalized.identity):
            weight.mul_(2)
            second = avatar.deltaplane(given).planes
            assert not torch.allclose(second, first) and avatar._prefix is not kept
            first, kept = second, avatar._prefix
        avatar.load_state_dict(avatar.state_dict())
        assert avatar.deltaplane(given).planes.equal(first) and avatar._prefix is not kept


def test_nothing_is_kept_with_gradients_or_in_training(avatar: Avatar) -> None:
    avatar.deltaplane(driving())
    assert avatar._prefix is None
    with torch.no_grad():
        avatar.train().deltaplane(driving())
        assert avatar._prefix is None


def test_tokens_drop_only_with_a_generator(avatar: Avatar) -> None:
    speak(avatar)
    given = driving(40)
    with torch.no_grad():
        whole, dropped = avatar.deltaplane(given).planes, avatar.deltaplane(given, torch.Generator().manual_seed(0)).planes
        assert whole.equal(avatar.train().deltaplane(given).planes)
    assert not whole.equal(dropped)


@pytest.fixture
def released(generator: TriplaneGenerator) -> Avatar:
    """An avatar of the released topology in a small size, with batch norm that has seen something."""
    sizes = DeltaplaneConfig(plane_channels=4, plane_resolution=32, widths=(8, 8, 16), head_width=8, token_width=16, released=True)
    conditioning = replace(RELEASED.conditioning, audio_channels=64, token_width=16)
    avatar = Avatar(
        personalized=PersonalizedGenerator.from_generator(generator, generator.mapping(torch.randn(1, 8)), {}),
        config=AvatarConfig(conditioning=conditioning, deltaplane=sizes),
        performance=Performance(
            cameras=CAMERA, blink=torch.rand(3, 1), head_pose=torch.randn(3, 3), anchors=torch.rand(3, 6), upper_face=torch.randn(3, 5) / 20
        ),
        background=torch.zeros(3, 64, 64),
        audio_source="logmel64",
        fps=25.0,
        provenance={},
    )
    with torch.no_grad():
        assert avatar.deltaplane(driving()).planes.eq(0).all()
        for stage in avatar.predictor.Upnet.slots(3):
            nn.init.normal_(stage.conv1.weight)
        avatar.deltaplane(driving())
    return avatar.eval()


def test_the_released_avatar_talks_from_its_cache_as_without_it(released: Avatar) -> None:
    given = driving()
    tokens = released.conditioner(given)
    expected = released.predictor(released.personalized.triplane, tokens).planes
    with torch.no_grad():
        first, again = released.deltaplane(given).planes, released.deltaplane(given).planes
        assert first.equal(again) and first.abs().max() > 0
        torch.testing.assert_close(first, expected)
        released.train().deltaplane(given)  # running statistics move
        assert not torch.allclose(released.eval().deltaplane(given).planes, first)


def test_released_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        predictor, conditioner = DeltaplanePredictor(RELEASED.deltaplane), Conditioner(RELEASED.conditioning)
    assert sum(buffer.numel() for name, buffer in predictor.named_buffers() if name != "scale") == 5_538 + 2_850
    assert sum(parameter.numel() for parameter in conditioner.parameters()) == 34_240 + 3_685 + 10_496 + 25_792 + 64
