"""The attention U-Net: zero at the start, its prefix exact in values and gradients, its geometry that of the planes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from talk3d.models.deltaplane import (
    SLOTS,
    Attention,
    DeltaplaneConfig,
    DeltaplanePredictor,
    GatedFeedForward,
    TransformerBlock,
    _positions,
    apply_per_slot,
    per_slot,
)
from talk3d.ops.resample import upsample2
from talk3d.types import Triplane

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
    codes = _positions(width, side).view(3, side, side, 3, 8)  # plane row column axis code
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


def slow_attention(layer: Attention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    query, key, value = x @ layer.to_q.weight.T, context @ layer.to_k.weight.T, context @ layer.to_v.weight.T
    heads = []
    for q, k, v in zip(*(part.chunk(layer.num_heads, -1) for part in (query, key, value)), strict=True):
        heads.append(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1) @ v)
    return layer.to_out[0](torch.cat(heads, -1))


@pytest.mark.parametrize("head_width", [4, 12])
def test_attention_equals_explicit_heads(head_width: int) -> None:
    layer = Attention(12, 5, head_width)
    x, context = torch.randn(2, 7, 12), torch.randn(2, 3, 5)
    torch.testing.assert_close(layer(x, context), slow_attention(layer, x, context), atol=1e-6, rtol=1e-5)
    assert layer.to_q.bias is None and layer.to_k.bias is None and layer.to_v.bias is None


def test_one_set_of_queries_serves_many_contexts() -> None:
    layer = Attention(12, 5, 4)
    x, context = torch.randn(1, 7, 12), torch.randn(3, 2, 5)
    found = layer.attend(layer.to_q(x), context)
    assert found.shape == (3, 7, 12)
    torch.testing.assert_close(found, layer(x.expand(3, -1, -1), context))


def test_feed_forward_gates_with_gelu() -> None:
    layer = GatedFeedForward(6)
    first, last = layer.net["0"], layer.net["2"]
    assert isinstance(first, nn.Sequential) and isinstance(last, nn.Linear)
    x = torch.randn(2, 3, 6)
    wide = first(x)
    torch.testing.assert_close(layer(x), last(wide[..., :24] * F.gelu(wide[..., 24:])))
    assert sorted(layer.state_dict()) == ["net.0.proj.bias", "net.0.proj.weight", "net.2.bias", "net.2.weight"]


def test_slots_have_their_own_weights() -> None:
    layers = per_slot("lin", nn.Linear, 4, 2)
    assert list(layers) == [f"lin_{slot}" for slot in SLOTS]
    x = torch.randn(2, 3, 5, 4)
    found = apply_per_slot(layers, x)
    for i, layer in enumerate(layers.values()):
        torch.testing.assert_close(found[:, i], layer(x[:, i]))
    assert not torch.allclose(layers["lin_xy"](x[:, 0]), layers["lin_yz"](x[:, 0]))


def test_block_is_the_sum_of_its_parts() -> None:
    block = TransformerBlock(8, 5, 4)
    x, tokens = torch.randn(2, 3, 6, 8), torch.randn(2, 4, 5)
    h, query = block.look_at_self(x)
    found = block.look_at_tokens(h, query, tokens)

    expected = x + torch.stack([block.attn1[f"att_{s}"](y, y) for s, y in zip(SLOTS, apply_per_slot(block.norm1, x).unbind(1), strict=True)], 1)
    torch.testing.assert_close(h, expected)
    together = apply_per_slot(block.norm2, expected).reshape(2, 18, 8)
    expected = expected + slow_attention(block.attn2, together, tokens).reshape(2, 3, 6, 8)
    expected = expected + apply_per_slot(block.ff, apply_per_slot(block.norm3, expected))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_first_half_cannot_see_the_tokens_and_serves_any_number_of_them() -> None:
    block = TransformerBlock(8, 5, 4)
    x, tokens = torch.randn(1, 3, 6, 8), torch.randn(3, 4, 5)
    h, query = block.look_at_self(x)
    together = block.look_at_tokens(h, query, tokens)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], block.look_at_tokens(h, query, tokens[i : i + 1]))
