"""The attention U-Net: zero at the start, its prefix exact in values and gradients, its geometry that of the planes."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from talk3d.models import deltaplane
from talk3d.models.deltaplane import (
    ROLL,
    BatchNorm,
    DeltaplaneConfig,
    DeltaplanePredictor,
    DeltaplanePrefix,
    DeltaplaneTensors,
    bases_reach,
    face_window,
    positions,
)
from talk3d.ops.planes import project_points, roll_out, sample_planes
from talk3d.ops.resample import downsample2, upsample2
from talk3d.types import PlaneAxes, Triplane

SIZES = DeltaplaneConfig(plane_channels=4, plane_resolution=16, widths=(8, 8, 16), head_width=8, token_width=6, num_bases=3)


def test_it_starts_at_exactly_zero(identity: Triplane) -> None:
    predictor = DeltaplanePredictor(SIZES)
    delta = predictor(identity, torch.randn(2, 5, 6), torch.randn(2, 3))
    assert delta.planes.shape == (2, 3, 4, 16, 16) and delta.axes == "fixed"
    assert delta.planes.eq(0).all()


def test_it_learns_from_the_first_step(identity: Triplane) -> None:
    predictor = DeltaplanePredictor(SIZES)
    predictor(identity, torch.randn(2, 5, 6), torch.randn(2, 3)).planes.sum().backward()
    fresh = [*predictor.out.parameters(), predictor.bases]
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in fresh)


def test_output_can_be_of_either_sign(make_predictor, identity: Triplane) -> None:
    planes = make_predictor()(identity, torch.randn(2, 5, 6), torch.randn(2, 3)).planes
    assert planes.min() < -0.1 and planes.max() > 0.1


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_shared_prefix_equals_one_pass_per_sample(make_predictor, identity: Triplane, num_blocks: int) -> None:
    predictor = make_predictor(num_blocks=num_blocks)
    tokens, coefficients = torch.randn(3, 5, 6), torch.randn(3, 3)
    together = predictor.predict(predictor.prepare(identity), tokens, coefficients)
    for i in range(3):
        torch.testing.assert_close(
            together.planes[i : i + 1], predictor(identity, tokens[i : i + 1], coefficients[i : i + 1]).planes, atol=1e-5, rtol=1e-4
        )


def test_shared_prefix_has_the_gradients_of_single_passes(make_predictor, identity: Triplane) -> None:
    predictor = make_predictor().double()
    identity = Triplane(planes=identity.planes.double(), axes="fixed")
    tokens, coefficients, towards = (torch.randn(*shape).double() for shape in ((3, 5, 6), (3, 3), (3, 3, 4, 16, 16)))

    def gradients(shared: bool) -> dict[str, torch.Tensor]:
        predictor.zero_grad()
        if shared:
            loss = (predictor.predict(predictor.prepare(identity), tokens, coefficients).planes * towards).sum()
        else:
            loss = torch.stack([(predictor(identity, tokens[i : i + 1], coefficients[i : i + 1]).planes * towards[i]).sum() for i in range(3)]).sum()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in predictor.named_parameters() if parameter.grad is not None}

    one, many = gradients(True), gradients(False)
    assert one.keys() == many.keys() == dict(predictor.named_parameters()).keys()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, many[name], msg=lambda text, name=name: f"{name}: {text}")
        assert gradient.abs().sum() > 0, name


def test_every_token_matters(make_predictor, identity: Triplane) -> None:
    predictor = make_predictor()
    tokens = torch.randn(1, 5, 6, requires_grad=True)
    predictor(identity, tokens, torch.zeros(1, 3)).planes.square().sum().backward()
    assert tokens.grad is not None and (tokens.grad.abs().sum(-1) > 0).all()


def test_the_bases_are_linear_and_work_in_units_of_the_identity(make_predictor, identity: Triplane) -> None:
    predictor, tokens = make_predictor(), torch.randn(1, 5, 6)

    def shape(*weights: float) -> torch.Tensor:
        return predictor(identity, tokens, torch.tensor([weights], dtype=torch.float32)).planes

    for scale in (1.0, 2.5):
        predictor.scale.fill_(scale)
        rest, coarse = shape(0, 0, 0), upsample2(predictor.bases[1])
        torch.testing.assert_close(shape(0, 2, 0) - rest, 2 * scale * coarse[None], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(shape(1, 2, 3) - rest, sum(shape(*w) - rest for w in ((1, 0, 0), (0, 2, 0), (0, 0, 3))), atol=1e-4, rtol=1e-4)


def test_near_bases_lie_at_full_resolution_over_the_face(make_predictor, identity: Triplane) -> None:
    predictor, tokens = make_predictor(num_near=2, num_bases=1), torch.randn(1, 5, 6)
    planes = [predictor(identity, tokens, torch.tensor([weights])).planes for weights in ([0.0, 3.0, 0.0], [0.0, 0.0, 0.0])]
    changed = (planes[0] - planes[1])[0]
    for plane, (rows, columns) in enumerate(face_window("fixed", 16)):
        torch.testing.assert_close(changed[plane, :, rows, columns], 3 * predictor.near[1, plane], atol=1e-4, rtol=1e-4)
        changed[plane, :, rows, columns] = 0
    assert not changed.any()


def test_near_bases_blended_alone_are_what_they_add(make_predictor, identity: Triplane) -> None:
    predictor, tokens, weights = make_predictor(num_near=2, num_bases=1), torch.randn(2, 5, 6), torch.randn(2, 3)
    predictor.scale.fill_(2.5)
    far = torch.cat([torch.zeros(2, 2), weights[:, 2:]], 1)
    whole, rest = (predictor(identity, tokens, coefficients).planes for coefficients in (weights, far))
    torch.testing.assert_close(predictor.blend_near(weights).planes, whole - rest, atol=1e-4, rtol=1e-4)
    alone = make_predictor(num_near=0, num_bases=3).blend_near(weights).planes
    assert alone.shape == identity.planes.expand(2, -1, -1, -1, -1).shape and not alone.any()


@pytest.mark.parametrize("axes", ["fixed", "released"])
def test_the_window_is_where_the_face_is_looked_up(axes: PlaneAxes) -> None:
    middle = project_points(torch.tensor([[[0.0, -0.05, 0.15]]]), axes, 1.0)[0, :, 0]  # 3 2
    for (rows, columns), (column, row) in zip(face_window(axes, 128), ((middle + 1) * 64 - 0.5).tolist(), strict=True):
        assert abs((columns.start + columns.stop - 1) / 2 - column) <= 0.5 and abs((rows.start + rows.stop - 1) / 2 - row) <= 0.5


@pytest.mark.parametrize(("axes", "silent"), [("fixed", 0), ("released", 2)])
def test_bases_move_only_their_parts_of_the_face(axes: PlaneAxes, silent: int) -> None:
    """Painted planes of what may be learnt: what is looked up at a point counts the planes that may change there.

    `silent` of them do not say how high the point is, and bases in the window may learn everywhere in them.
    """
    side, told = 128, 3 - max(silent, 1)
    near, others = bases_reach(DeltaplaneConfig(plane_resolution=side, plane_axes=axes, num_near=3, num_bases=4), 1)
    assert near.shape == (3, 3, 1, 64, 64) and others.shape == (4, 3, 1, 64, 64)
    brow, bridge, mouth, neck = (torch.tensor([[[0.0, height, 0.15]]]) for height in (0.12, 0.06, -0.09, -0.26))

    def looked_up(planes: Tensor) -> list[float]:
        return [float(3 * sample_planes(planes[None], project_points(point, axes, 1.0))) for point in (brow, bridge, mouth, neck)]

    def in_window(base: Tensor) -> Tensor:
        planes = torch.zeros(3, 1, side, side)
        for plane, (rows, columns) in enumerate(face_window(axes, side)):
            planes[plane, :, rows, columns] = base[plane]
        return planes

    all_of_them = told + silent
    assert looked_up(in_window(near[0])) == pytest.approx([silent, silent, all_of_them, all_of_them], abs=1e-5)
    assert looked_up(in_window(near[2])) == pytest.approx([all_of_them, all_of_them, silent, all_of_them], abs=1e-5)
    everywhere = 3 - told
    assert looked_up(others[ROLL]) == pytest.approx([everywhere, everywhere, everywhere, 3], abs=1e-5)
    assert near[1].equal(near[2]) and others[[0, 1, 3]].eq(1).all()
    assert ((near[0] > 0) & (near[0] < 1)).any() and ((near[2] > 0) & (near[2] < 1)).any()


def test_scaled_planes_give_scaled_deltaplanes(make_predictor, identity: Triplane) -> None:
    predictor, tokens, coefficients = make_predictor(), torch.randn(1, 5, 6), torch.randn(1, 3)
    before = predictor(identity, tokens, coefficients).planes
    predictor.scale.fill_(3.0)
    larger = Triplane(planes=3 * identity.planes, axes="fixed")
    torch.testing.assert_close(predictor(larger, tokens, coefficients).planes, 3 * before, atol=1e-4, rtol=1e-4)


def test_one_person_at_a_time(make_predictor, identity: Triplane) -> None:
    with pytest.raises(AssertionError, match="one person"):
        make_predictor().prepare(Triplane(planes=identity.planes.repeat(2, 1, 1, 1, 1), axes="fixed"))


def test_positions_are_codes_of_x_y_and_z_with_the_collapsed_axis_in_the_middle() -> None:
    """With the width a multiple of 6 the code is [e(x) | e(y) | e(z)], each a third wide."""
    width, side = 24, 4
    codes = positions(width, side).view(side, side, 3, 3, 8).permute(2, 0, 1, 3, 4)  # plane row column axis code
    angle = torch.arange(4) * 1.0
    expected = torch.stack([f(angle) for f in (torch.sin, torch.cos)], -1)  # first frequency is 1
    torch.testing.assert_close(codes[0, 2, :, 0, :2], expected)  # plane A: x along columns
    torch.testing.assert_close(codes[0, :, 1, 1, :2], expected)  # y along rows
    torch.testing.assert_close(codes[1, 0, :, 0, :2], expected)  # plane B: x along columns
    torch.testing.assert_close(codes[1, :, 3, 2, :2], expected)  # z along rows
    torch.testing.assert_close(codes[2, 0, :, 2, :2], expected)  # plane C: z along columns
    torch.testing.assert_close(codes[2, :, 0, 1, :2], expected)  # y along rows
    for plane, collapsed in enumerate((2, 1, 0)):
        torch.testing.assert_close(codes[plane, ..., collapsed, :2], ((expected[1] + expected[2]) / 2).expand(side, side, 2))


def test_released_positions_put_x_y_and_z_where_they_were_trained() -> None:
    width, side = 24, 4
    codes = positions(width, side, "released").view(side, side, 3, 3, 8)  # row column plane axis code
    angle = torch.arange(4) * 1.0
    expected = torch.stack([angle.sin(), angle.cos()], -1)
    for plane, (row, column) in enumerate(((0, 1), (1, 2), (0, 2))):
        torch.testing.assert_close(codes[:, 1, plane, row, :2], expected)
        torch.testing.assert_close(codes[3, :, plane, column, :2], expected)
        torch.testing.assert_close(codes[2, 2, plane, 3 - row - column, :2], (expected[1] + expected[2]) / 2)
    assert positions(256, 32, "released").shape == (1, 1024, 768)  # 258 numbers cut to 256


@pytest.fixture(scope="module")
def released(shared: Path) -> tuple[DeltaplanePredictor, dict[str, torch.Tensor]]:
    arrays = {name: torch.from_numpy(value) for name, value in np.load(shared / "fixtures" / "talk3d_parity.npz").items()}
    predictor = DeltaplanePredictor(DeltaplaneConfig(plane_channels=8, widths=(16, 32, 64), released=True)).eval()
    predictor.load_state_dict({name.removeprefix("weights/"): value for name, value in arrays.items() if name.startswith("weights/")}, strict=True)
    return predictor, arrays


def test_the_released_network_is_reproduced_with_its_score_maps(released) -> None:
    predictor, arrays = released
    identity = Triplane(planes=arrays["plane_f16"].float().unflatten(1, (3, -1)), axes="fixed")
    with torch.no_grad():
        prefix = predictor.prepare(identity)
        delta = predictor.predict(prefix, arrays["tokens"]).planes.flatten(1, 2)
        scores = predictor.score_maps(prefix, arrays["tokens"])
    torch.testing.assert_close(delta, arrays["deltaplane_f16"].float(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(scores.mean(2), arrays["score_map_mean_over_heads"].float(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(scores.sum(-1), torch.ones(scores.shape[:-1]))


def test_positions_of_the_released_network_are_its_stored_ones(released) -> None:
    stored = released[1]["weights/transformer.0.pos_emb"]
    torch.testing.assert_close(positions(64, 32, "released"), stored, atol=1e-5, rtol=0)


def test_names_and_shapes_are_the_released_ones(shared: Path) -> None:
    published = json.loads((shared / "fixtures" / "state_dict_keys.json").read_text())["talk3d_deltaplane_predictor"]
    with torch.device("meta"):
        predictor = DeltaplanePredictor(DeltaplaneConfig(released=True))
    assert {name: list(value.shape) for name, value in predictor.state_dict().items()} == published
    assert sum(parameter.numel() for parameter in predictor.parameters()) == 16_725_568 + 786_432  # with the positions


def test_the_released_network_starts_at_exactly_zero_too(identity: Triplane) -> None:
    predictor = DeltaplanePredictor(replace(SIZES, released=True, num_bases=0)).train()
    assert predictor(identity, torch.randn(2, 5, 6)).planes.eq(0).all()


def plain_convolution(planes: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], order) -> list[torch.Tensor]:
    return [F.conv2d(x, weight, bias, padding=1) for x, weight, bias in zip(roll_out(planes, order).unbind(1), weights, biases, strict=True)]


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_split_roll_out_equals_the_plain_one(released: bool, training: bool, make_predictor, identity: Triplane, monkeypatch) -> None:
    """Outputs, gradients and running statistics of the whole network, in float64."""
    predictor = make_predictor(released=released).double().train(training)
    tokens, coefficients, towards = (torch.randn(*shape).double() for shape in ((2, 5, 6), (2, 3), (2, 3, 4, 16, 16)))

    def run() -> dict[str, torch.Tensor]:
        one = copy.deepcopy(predictor)
        planes = identity.planes.double().requires_grad_()
        delta = one(Triplane(planes=planes, axes="fixed"), tokens, coefficients).planes
        (delta * towards).sum().backward()
        gradients = {f"gradient {name}": parameter.grad for name, parameter in one.named_parameters()}
        return {"delta": delta, "planes": planes.grad, **gradients, **dict(one.named_buffers())}

    split = run()
    monkeypatch.setattr(deltaplane, "convolve_rolled_out", plain_convolution)
    for name, value in run().items():
        torch.testing.assert_close(split[name], value, atol=1e-9, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_batch_norm_of_one_stands_for_copies_of_it() -> None:
    single, x = BatchNorm(3).double().train(), torch.randn(1, 3, 2, 3, dtype=torch.float64)
    several = copy.deepcopy(single)
    for step in range(3):
        y = x * (1 + step)
        single.copies = 5
        torch.testing.assert_close(single(y).expand(5, -1, -1, -1), several(y.expand(5, -1, -1, -1)))
        for name, buffer in single.named_buffers():
            torch.testing.assert_close(buffer, dict(several.named_buffers())[name], atol=1e-14, rtol=1e-12)
    before = single.running_var.clone()
    assert single.eval()(x).shape == x.shape and single.running_var.equal(before)


def test_one_pass_in_training_equals_a_batch_of_copies(make_predictor, identity: Triplane) -> None:
    """The released network with batch statistics: outputs, gradients and running statistics as if the identity went through once a sample."""
    predictor = make_predictor(released=True, num_bases=0).double().train()
    planes, tokens, towards = identity.planes.double(), torch.randn(3, 5, 6).double(), torch.randn(3, 3, 4, 16, 16).double()
    shared, repeated = copy.deepcopy(predictor), copy.deepcopy(predictor)
    one = shared(Triplane(planes=planes, axes="fixed"), tokens).planes

    x, skips = planes.expand(3, -1, -1, -1, -1), []
    for number in (1, 2, 3):
        x = downsample2(repeated.Downnet.apply_stage(number, x).flatten(0, 1)).unflatten(0, (3, 3))
        skips.append(x)
    hidden, query = repeated.transformer[0].prepare(x)
    prefix = DeltaplanePrefix(skips=(skips[0], skips[1]), bottom=x, hidden=hidden, query=query)
    many = repeated.predict(prefix, tokens).planes

    torch.testing.assert_close(one, many, atol=1e-9, rtol=1e-8)
    (one * towards).sum().backward()
    (many * towards).sum().backward()
    found = {name: parameter.grad for name, parameter in shared.named_parameters()} | dict(shared.named_buffers())
    expected = {name: parameter.grad for name, parameter in repeated.named_parameters()} | dict(repeated.named_buffers())
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-8, rtol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_between_tensors_it_is_the_same_network(make_predictor, identity: Triplane) -> None:
    predictor = make_predictor()
    tokens = torch.randn(2, 5, predictor.config.token_width)
    weights = torch.randn(2, predictor.config.num_bases)
    assert DeltaplaneTensors(predictor)(identity.planes, tokens, weights).equal(predictor(identity, tokens, weights).planes)
