"""The five tokens: order, values, and when they are dropped."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from talk3d.models.conditioning import RELEASED, AudioAttention, Conditioner, ConditioningConfig, Limits, PositionalMLP, TurnedMouth, posture
from talk3d.types import Driving

AUDIO, BLINK, NULL, ROTATION, LANDMARKS = range(5)


def driving(count: int = 3, channels: int = 12) -> Driving:
    return Driving(
        audio=torch.randn(count, 8, 16, channels),
        blink=torch.rand(count, 1),
        head_pose=torch.randn(count, 3),
        anchors=torch.rand(count, 6),
        upper_face=torch.randn(count, 5) / 20,
    )


def conditioner(**config) -> Conditioner:
    return Conditioner(ConditioningConfig(audio_channels=12, token_width=10, **config))


def test_tokens_are_audio_blink_null_rotation_landmarks() -> None:
    model, given = conditioner(), driving()
    tokens = model(given)
    assert tokens.shape == (3, 5, 10)
    torch.testing.assert_close(tokens[:, BLINK], model.blink_encoder(given.blink))
    torch.testing.assert_close(tokens[:, NULL], model.null_vector[0].expand(3, -1))
    torch.testing.assert_close(tokens[:, ROTATION], model.camera_encoder(given.head_pose, given.anchors)[0])
    torch.testing.assert_close(tokens[:, LANDMARKS], model.camera_encoder(given.head_pose, given.anchors)[1])
    vectors = torch.stack([torch.stack([model.audio_net(window.T[None])[0] for window in frame]) for frame in given.audio])
    torch.testing.assert_close(tokens[:, AUDIO], model.audio_att_net(vectors))


@pytest.mark.parametrize("changed", ["audio", "blink", "head_pose", "anchors"])
def test_each_input_reaches_its_token_and_no_other(changed: str) -> None:
    model, given = conditioner(), driving()
    other = Driving(**{**vars(given), changed: vars(given)[changed] + 0.3})
    moved = (model(given) != model(other)).any(-1).any(0)
    expected = {"audio": AUDIO, "blink": BLINK, "head_pose": ROTATION, "anchors": LANDMARKS}[changed]
    assert moved.nonzero()[:, 0].tolist() == [expected]


def test_tokens_drop_only_with_a_generator_and_never_the_audio() -> None:
    model, given = conditioner(drop_rate=0.25), driving(400)
    whole = model(given)
    assert whole.equal(model(given))
    dropped = model(given, torch.Generator().manual_seed(0))
    replaced = (dropped == model.null_vector).all(-1)
    kept = (dropped == whole).all(-1)
    assert (replaced | kept).all()
    assert not replaced[:, AUDIO].any() and replaced[:, NULL].all()
    for token in (BLINK, ROTATION, LANDMARKS):
        assert replaced[:, token].float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert dropped.equal(model(given, torch.Generator().manual_seed(0)))
    runs = (model(given, torch.Generator().manual_seed(0), 4) == model.null_vector).all(-1).view(100, 4, -1)
    assert runs.equal(runs[:, :1].expand(-1, 4, -1)) and runs.any() and not runs[..., 1].all()


@pytest.mark.parametrize(("rate", "expected"), [(0.0, False), (1.0, True)])
def test_drop_rates_at_the_ends(rate: float, expected: bool) -> None:
    model, given = conditioner(drop_rate=rate), driving()
    tokens = model(given, torch.Generator().manual_seed(0))
    for token in (BLINK, ROTATION, LANDMARKS):
        assert (tokens[:, token] == model.null_vector[0]).all().item() is expected


def test_coefficients_are_the_mouth_heard_and_what_was_tracked() -> None:
    model, given = conditioner(mouth_shapes=3), driving()
    found = model.heard_coefficients(model(given), given)
    assert found.shape == (3, model.config.num_coefficients) == (3, 13)
    torch.testing.assert_close(found[:, :3], model.mouth_head(model(given)[:, AUDIO]))
    tracked = torch.cat([2 * given.blink, 20 * given.upper_face[:, :4], 4 * given.head_pose, 4 * given.anchors[:, :2]], 1)
    torch.testing.assert_close(found[:, 3:], tracked)


@pytest.mark.parametrize("cheeks", [False, True])
def test_how_the_head_is_turned_and_cheeks_are_drawn_up_adds_to_the_mouth_that_is_heard(cheeks: bool) -> None:
    model, given = conditioner(mouth_shapes=3, limits=True, cheeks=cheeks), driving()
    tokens = model(given)
    assert isinstance(model.mouth_turned, TurnedMouth) and model.limits is not None
    torch.testing.assert_close(model.heard(tokens, given), model.mouth_head(tokens[:, AUDIO]))  # nothing at first
    for parameter in model.mouth_turned.parameters():
        torch.nn.init.normal_(parameter)
    added = model.heard(tokens, given) - model.mouth_head(tokens[:, AUDIO])
    torch.testing.assert_close(added, model.mouth_turned(tokens[:, AUDIO], model.limits.within(posture(given))), atol=1e-4, rtol=1e-4)
    assert added.abs().min() > 0
    smiling = replace(given, upper_face=given.upper_face + torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1]))
    assert model.heard(tokens, smiling).equal(model.heard(tokens, given)) != cheeks
    torch.testing.assert_close(model(smiling), tokens)  # they are in no token


@pytest.mark.parametrize("cheeks", [False, True])
def test_what_goes_beyond_what_was_learnt_counts_as_its_edge(cheeks: bool) -> None:
    model = conditioner(mouth_shapes=3, limits=True, cheeks=cheeks)
    pose, upper = torch.randn(400, 3) * torch.tensor([0.2, 0.1, 0.05]), torch.randn(400, 5) * 0.01 + 0.1
    model.limits.learn(pose, upper)
    seen = torch.cat([pose, upper], 1).numpy()
    low, high = (torch.from_numpy(np.quantile(seen, share, axis=0)) for share in (Limits.share, 1 - Limits.share))
    usual = Driving(**vars(driving()) | {"head_pose": pose.median(0).values.repeat(3, 1), "upper_face": upper.median(0).values.repeat(3, 1)})
    for edge, sign in ((low, -1.0), (high, 1.0)):
        at_edge = Driving(**vars(usual) | {"head_pose": edge[:3].repeat(3, 1), "upper_face": edge[3:].repeat(3, 1)})
        beyond = Driving(**vars(usual) | {"head_pose": at_edge.head_pose + sign, "upper_face": at_edge.upper_face + sign})
        for found, expected in zip(_all_of(model, beyond), _all_of(model, at_edge), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.limits.within(posture(beyond)), torch.full((3, 3 + cheeks), sign))
        assert not _all_of(model, beyond)[2].allclose(_all_of(model, usual)[2])
    free = conditioner(mouth_shapes=3)
    torch.testing.assert_close(free.coefficients(beyond, torch.zeros(3, 3))[:, 4:8], 20 * beyond.upper_face[:, :4])


def _all_of(model: Conditioner, given: Driving) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, what is heard, and weights of the bases."""
    tokens = model(given)
    mouth = model.heard(tokens, given)
    return tokens, mouth, model.coefficients(given, mouth)


def test_positional_code_is_sines_and_cosines_of_doubling_frequency() -> None:
    model = PositionalMLP(2, 3, 5)
    x = torch.randn(4, 2)
    code = torch.cat([x, x.sin(), x.cos(), (2 * x).sin(), (2 * x).cos(), (4 * x).sin(), (4 * x).cos()], -1)
    hidden = model.in_layer(code)
    for layer in model.mlp_layers:
        hidden = layer(hidden.clamp(min=0))
    torch.testing.assert_close(model(x), hidden)


def test_audio_attention_is_a_convex_combination_of_its_windows() -> None:
    model, x = AudioAttention(6), torch.randn(3, 8, 6)
    found = model(x)
    assert (found <= x.amax(1) + 1e-6).all() and (found >= x.amin(1) - 1e-6).all()
    same = torch.randn(3, 1, 6).expand(-1, 8, -1)
    torch.testing.assert_close(model(same), same[:, 0])


CHILDREN = ("audio_net", "audio_att_net", "blink_encoder", "camera_encoder")


def test_names_and_shapes_are_the_released_ones(shared) -> None:
    published = json.loads((shared / "fixtures" / "state_dict_keys.json").read_text())
    found = {name: list(value.shape) for name, value in Conditioner(RELEASED).state_dict().items()}
    expected = {f"{child}.{name}": shape for child in CHILDREN for name, shape in published[f"talk3d_{child}"].items()}
    assert found == expected | {"null_vector": published["talk3d_null_vector"]}


def test_the_released_encoders_are_reproduced(shared) -> None:
    arrays = {name: torch.from_numpy(value) for name, value in np.load(shared / "fixtures" / "talk3d_parity.npz").items()}
    model = Conditioner(RELEASED)
    weights = {name.replace("/weights/", "."): value for name, value in arrays.items() if name.startswith(CHILDREN) and "/weights/" in name}
    model.load_state_dict(weights | {"null_vector": model.null_vector})
    bounds = {"atol": 1e-5, "rtol": 1e-5}
    with torch.no_grad():
        windows = arrays["audio_net/in"]
        torch.testing.assert_close(model.audio_net(windows), arrays["audio_net/out"], **bounds)
        torch.testing.assert_close(model.audio_att_net(arrays["audio_net/out"][None]), arrays["audio_att_net/out"], **bounds)
        torch.testing.assert_close(model.audio_token(windows.transpose(1, 2)[None]), arrays["audio_att_net/out"], **bounds)
        torch.testing.assert_close(model.blink_encoder(arrays["blink_encoder/in"]), arrays["blink_encoder/out"][:, 0], **bounds)
        rotation, landmarks = model.camera_encoder(arrays["camera_encoder/angle"], arrays["camera_encoder/landmark"])
        torch.testing.assert_close(rotation, arrays["camera_encoder/angle_out"][:, 0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(landmarks, arrays["camera_encoder/landmark_out"][:, 0], **bounds)


def test_without_mouth_shapes_there_is_no_head_for_them() -> None:
    model, given = conditioner(mouth_shapes=0), driving()
    assert model.mouth_head is None and model.heard_coefficients(model(given), given).shape == (3, 10)
