"""Attention against explicit heads, and what is shared between planes and frames."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from talk3d.models.attention import SLOTS, Attention, GatedFeedForward, TransformerBlock, apply_per_slot, per_slot


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
