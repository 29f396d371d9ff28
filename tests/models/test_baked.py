"""What is baked against its plain twins, and ways that fail given up for the next."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import talk3d
from talk3d.models import baked
from talk3d.models.avatar import Avatar
from talk3d.models.baked import BakedAvatar, BakedDeltaplane
from talk3d.types import Camera, Driving, Rendering, Triplane


@pytest.mark.parametrize("released", [False, True])
def test_baked_planes_are_identity_and_delta(make_predictor, identity, released: bool) -> None:
    predictor = make_predictor(released=released, num_bases=0 if released else 3)
    for module in predictor.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    predictor.scale.fill_(1.0 if released else 1.7)
    predictor.eval()
    tokens, coefficients = torch.randn(3, 5, 6), torch.randn(3, 0 if released else 3)
    with torch.no_grad():
        expected = identity + predictor(identity, tokens, None if released else coefficients)
        found = torch.stack(BakedDeltaplane(predictor, identity, torch.float32)(tokens, coefficients), 1)
    assert (expected.planes - identity.planes).std() > 0.05
    torch.testing.assert_close(found, expected.planes, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("deaf", [True, False])
def test_a_network_that_tokens_do_not_move_is_painted_once(make_predictor, identity, deaf: bool) -> None:
    predictor = make_predictor(num_bases=3).eval()
    with torch.no_grad():
        for block in predictor.transformer[0].blocks:
            block.attn2.to_out[0].weight.mul_(0 if deaf else 1)
        planes = BakedDeltaplane(predictor, identity, torch.float32)
        tokens, coefficients = torch.randn(4, 5, 6), torch.randn(4, 3)
        expected = planes(tokens, coefficients)
        planes.fold(torch.randn(4, 5, 6))
        assert (planes.same is not None) == deaf
        for found, plane in zip(planes(tokens, coefficients), expected, strict=True):
            torch.testing.assert_close(found, plane, atol=1e-5, rtol=1e-5)
    assert float((expected[0][0] - expected[0][1]).abs().max()) > 0.01  # the bases move it all the same


@pytest.fixture(scope="module")
def sample() -> Avatar:
    assert talk3d.__file__ is not None
    return talk3d.load_avatar(Path(talk3d.__file__).parent / "assets" / "sample_avatar.safetensors").eval()


def moment(avatar: Avatar, *frames: int) -> tuple[Driving, Camera]:
    performance, index = avatar.performance, torch.tensor(frames)
    return Driving(
        audio=torch.randn(len(frames), 8, 16, 64),
        blink=performance.blink[index],
        head_pose=performance.head_pose[index],
        anchors=performance.anchors[index],
        upper_face=performance.upper_face[index],
    ), performance.cameras[index]


def psnr(found: Rendering, expected: Rendering) -> float:
    """Decibels of the worst picture."""
    difference = (found.image.clamp(-1, 1) - expected.image.clamp(-1, 1)) / 2
    return float(-10 * difference.square().flatten(1).mean(1).max().log10())


def test_a_baked_avatar_looks_like_the_plain_one(sample: Avatar) -> None:
    driving, camera = moment(sample, 3, 400)
    with torch.no_grad():
        expected = sample.render(driving, camera)
    found = sample.bake().render(driving, camera)
    assert psnr(found, expected) > 45
    assert float((found.alpha - expected.alpha).abs().mean()) < 2e-3
    assert found.raw.equal(found.features[:, :3]) and found.depth.shape == expected.depth.shape
    assert sample.bake().render(driving, camera).image.equal(found.image)


@pytest.mark.parametrize("expression", [0.4, 1.5])
def test_expressions_lie_on_the_line_from_rest(sample: Avatar, expression: float) -> None:
    driving, camera = moment(sample, 3, 400)
    rest, person = torch.randn(16, 64), sample.personalized
    calm = replace(driving, audio=rest.expand_as(driving.audio))
    with torch.no_grad():
        planes = torch.lerp(sample.deltaplane(calm).planes, sample.deltaplane(driving).planes, expression)
        expected = person.render(person.triplane + Triplane(planes=planes, axes=person.triplane.axes), camera, driving.head_pose)
    assert psnr(sample.bake(rest=rest, expression=expression).render(driving, camera), expected) > 45


def test_a_short_batch_is_filled_up_for_the_recorded_work(sample: Avatar, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []

    def record(work, inputs):
        recorded.append(len(inputs[0]))
        return lambda new: work(*new)

    model = BakedAvatar(sample)
    monkeypatch.setattr(baked, "_Recorded", record)
    monkeypatch.setattr(model, "_graphs", {})
    whole = model.render(*moment(sample, 3, 400, 90))
    driving, camera = moment(sample, 10)
    alone = model.render(driving, camera)
    assert recorded == [3] and len(alone.image) == 1 and len(whole.image) == 3
    assert psnr(alone, BakedAvatar(sample).render(driving, camera)) > 60


def test_baking_keeps_a_snapshot(sample: Avatar) -> None:
    driving, camera = moment(sample, 10)
    before = sample.bake()
    expected = before.render(driving, camera).image
    kept = sample.personalized.w.clone()
    try:
        sample.personalized.w.add_(1)
        assert before.render(driving, camera).image.equal(expected)
    finally:
        sample.personalized.w.copy_(kept)


def test_what_fails_is_given_up_with_a_warning(sample: Avatar, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def failing(*_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("no compiler\nat all")

    model = BakedAvatar(sample)
    driving, camera = moment(sample, 10)
    expected = model.render(driving, camera).image
    monkeypatch.setattr(baked, "_Recorded", failing)
    monkeypatch.setattr(model, "_graphs", {})
    monkeypatch.setattr(model, "_compiled", failing)
    for _ in range(2):
        assert model.render(driving, camera).image.equal(expected)
    assert [record.getMessage() for record in caplog.records] == ["no CUDA graph: no compiler", "not compiled: no compiler"]
