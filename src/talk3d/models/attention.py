"""Attention between the cells of planes and condition tokens, with weights of their own for each plane where the planes do not meet.

Attribute names are those of the published weights. Reference: Talk3D (arXiv 2403.20153), section 3.3.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SLOTS = ("xy", "yz", "zx")
"""The three planes, in the published names of their weights."""


class Attention(nn.Module):
    """Multi-head attention; queries, keys and values without bias."""

    def __init__(self, width: int, context_width: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = width // head_width
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def _split(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n e"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # b h n e

    def weights(self, query: Float[Tensor, "#b n d"], context: Float[Tensor, "b m e"]) -> Float[Tensor, "b h n m"]:
        """Return how much each of n ready queries looks at each of m tokens: sums to 1 over the tokens."""
        q, k = self._split(query), self._split(self.to_k(context))
        return torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), -1)

    def attend(self, query: Float[Tensor, "#b n d"], context: Float[Tensor, "b m e"]) -> Float[Tensor, "b n d"]:
        """Attend with ready queries, which may have batch 1 for any number of contexts."""
        batch = context.shape[0]
        q, k, v = (self._split(x) for x in (query, self.to_k(context), self.to_v(context)))
        out = F.scaled_dot_product_attention(q.expand(batch, -1, -1, -1), k, v)
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def forward(self, x: Float[Tensor, "b n d"], context: Float[Tensor, "b m e"]) -> Float[Tensor, "b n d"]:
        """Attend from x to context."""
        return self.attend(self.to_q(x), context)


class GatedFeedForward(nn.Module):
    """Linear, gated GELU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"0": nn.Sequential(OrderedDict(proj=nn.Linear(width, 8 * width))), "2": nn.Linear(4 * width, width)})

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Apply it to every token."""
        value, gate = self.net["0"](x).chunk(2, -1)
        return self.net["2"](value * F.gelu(gate))


def per_slot(prefix: str, make: type[nn.Module], *arguments: int) -> nn.ModuleDict:
    """Three modules of one kind, named as published: prefix_xy, prefix_yz, prefix_zx."""
    return nn.ModuleDict({f"{prefix}_{slot}": make(*arguments) for slot in SLOTS})


def apply_per_slot(modules: nn.Module, x: Float[Tensor, "b 3 *rest"], *contexts: Float[Tensor, "b 3 *more"]) -> Float[Tensor, "b 3 *out"]:
    """Apply the slots' modules (made by `per_slot`) to the slots of x (and of further inputs)."""
    assert isinstance(modules, nn.ModuleDict)
    inputs = zip(x.unbind(1), *(c.unbind(1) for c in contexts), strict=True)
    return torch.stack([module(*parts) for module, parts in zip(modules.values(), inputs, strict=True)], 1)


class TransformerBlock(nn.Module):
    """Self-attention inside each plane, cross-attention of all planes to the condition tokens, feed-forward."""

    def __init__(self, width: int, token_width: int, head_width: int) -> None:
        super().__init__()
        self.attn1 = per_slot("att", Attention, width, width, head_width)
        self.attn2 = Attention(width, token_width, head_width)
        self.ff = per_slot("ff", GatedFeedForward, width)
        self.norm1, self.norm2, self.norm3 = (per_slot("norm", nn.LayerNorm, width) for _ in range(3))

    def look_at_self(self, x: Float[Tensor, "b 3 n d"]) -> tuple[Float[Tensor, "b 3 n d"], Float[Tensor, "b m d"]]:
        """First half, blind to the condition: self-attention, and the queries for the tokens (m = 3 n)."""
        normed = apply_per_slot(self.norm1, x)
        x = x + apply_per_slot(self.attn1, normed, normed)
        return x, self.attn2.to_q(apply_per_slot(self.norm2, x).flatten(1, 2))

    def look_at_tokens(
        self, x: Float[Tensor, "#b 3 n d"], query: Float[Tensor, "#b m d"], tokens: Float[Tensor, "b k e"]
    ) -> Float[Tensor, "b 3 n d"]:
        """Second half; x and its queries may have batch 1 for any number of token sets."""
        x = x + self.attn2.attend(query, tokens).unflatten(1, (3, -1))
        return x + apply_per_slot(self.ff, apply_per_slot(self.norm3, x))
