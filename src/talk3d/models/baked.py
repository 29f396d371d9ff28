"""An avatar baked for animation: all that is fixed for one person is folded into constants, and samples lie only where its surface is.

`Avatar.render` is the plain twin: differentiable, and what `BakedAvatar.render` must look like. What is folded: style, demodulation and gains into
super-resolution's kernels, the U-Net's prefix and roll-outs, batch norm, the decoder's scales. Tensors are channels-last throughout.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.models.attention import TransformerBlock
from talk3d.models.avatar import Avatar
from talk3d.models.deltaplane import DeltaplanePredictor, PlaneTransformer, Stage, face_window
from talk3d.models.renderer import GuidedRenderer
from talk3d.models.superresolution import BakedSuperresolution, baked_kernel
from talk3d.ops.planes import RolledOutKernels, RollOut, convolve_split, split_rolled_out
from talk3d.ops.resample import upsample2
from talk3d.types import Camera, Driving, Rendering, Triplane

logger = logging.getLogger(__name__)
NO_DIFFERENCE = 1e-3
"""Of the U-Net's output between moments, in standard deviations of the identity planes; what moves a face is a thousand times that."""


@dataclass(frozen=True)
class BakedStage:
    """One stage of the U-Net for its three planes: kernels, norms that are left, second convolutions."""

    kernels: RolledOutKernels
    biases: Sequence[Tensor]
    norms: Sequence[tuple[nn.Module, nn.Module]]
    seconds: Sequence[tuple[Tensor, Tensor]]

    @classmethod
    def of_slots(cls, stages: Sequence[Stage], order: RollOut, dtype: torch.dtype) -> "BakedStage":
        """Fold batch norm, which in evaluation is an affine map; group norm stays."""
        folded = [[_fold(conv, norm) for conv, norm in ((stage.conv0, stage.bn0), (stage.conv1, stage.bn1))] for stage in stages]
        kernels = split_rolled_out([first[0] for first, _ in folded], order).to(dtype)
        norms = [(_left(stage.bn0, dtype), _left(stage.bn1, dtype)) for stage in stages]
        seconds = [(baked_kernel(second[0], dtype), second[1].to(dtype)) for _, second in folded]
        return cls(kernels, [first[1].to(dtype) for first, _ in folded], norms, seconds)

    def __call__(self, planes: Sequence[Float[Tensor, "b i h w"]]) -> list[Float[Tensor, "b o h w"]]:
        """Apply it to three planes."""
        out = []
        for x, (early, late), (weight, bias) in zip(convolve_split(planes, self.kernels, self.biases), self.norms, self.seconds, strict=True):
            x = F.conv2d(F.leaky_relu_(early(x), 0.01), weight, bias, padding=1)
            out.append(F.leaky_relu_(late(x), 0.01))
        return out


def _fold(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    weight, bias = conv.weight.detach(), conv.bias
    assert bias is not None
    if not isinstance(norm, nn.BatchNorm2d):
        return weight, bias.detach()
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.weight * torch.rsqrt(norm.running_var + norm.eps)).detach()
    return weight * scale[:, None, None, None], (bias.detach() - norm.running_mean) * scale + norm.bias.detach()


def _left(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    return nn.Identity() if isinstance(norm, nn.BatchNorm2d) else copy.deepcopy(norm).to(dtype)


@dataclass(frozen=True)
class BakedLinear:
    """Linear layers of the three slots in one product, with the affine part of the norm before them."""

    weight: Float[Tensor, "3 i o"]
    bias: Float[Tensor, "3 1 o"]

    @classmethod
    def of(cls, layers: Sequence[nn.Linear], norms: Sequence[nn.LayerNorm] | None, dtype: torch.dtype) -> "BakedLinear":
        """Stack the slots' layers."""
        weight = torch.stack([layer.weight.T for layer in layers])
        bias = torch.stack([torch.zeros_like(layer.weight[:, 0]) if layer.bias is None else layer.bias for layer in layers])[:, None]
        if norms is not None:
            bias = bias + torch.stack([norm.bias for norm in norms])[:, None] @ weight
            weight = torch.stack([norm.weight for norm in norms])[:, :, None] * weight
        return cls(weight.detach().to(dtype), bias.detach().to(dtype))

    def __call__(self, x: Float[Tensor, "3 b n i"]) -> Float[Tensor, "3 b n o"]:
        """Apply each slot's layer to its own."""
        return torch.baddbmm(self.bias, x.flatten(1, 2), self.weight).unflatten(1, x.shape[1:3])


class BakedBlock:
    """A transformer block: attention inside the planes, to the tokens, feed-forward."""

    def __init__(self, block: TransformerBlock, dtype: torch.dtype) -> None:
        norms = [[norm for norm in part.values() if isinstance(norm, nn.LayerNorm)] for part in (block.norm1, block.norm2, block.norm3)]
        inside, feeds = list(block.attn1.values()), list(block.ff.values())
        self.heads = block.attn2.num_heads
        self.qkv = [BakedLinear.of([getattr(a, name) for a in inside], norms[0], dtype) for name in ("to_q", "to_k", "to_v")]
        self.out = BakedLinear.of([a.get_submodule("to_out.0") for a in inside], None, dtype)  # pyright: ignore[reportArgumentType]
        self.query = BakedLinear.of([block.attn2.to_q] * 3, norms[1], dtype)
        self.key, self.value = (layer.weight.detach().to(dtype) for layer in (block.attn2.to_k, block.attn2.to_v))
        last = block.attn2.to_out[0]
        self.told = last.weight.detach().to(dtype), last.bias.detach().to(dtype)  # pyright: ignore[reportCallIssue]
        self.wide = BakedLinear.of([f.get_submodule("net.0.proj") for f in feeds], norms[2], dtype)  # pyright: ignore[reportArgumentType]
        self.narrow = BakedLinear.of([f.get_submodule("net.2") for f in feeds], None, dtype)  # pyright: ignore[reportArgumentType]

    def _split(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b h n e"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def look_at_self(self, x: Float[Tensor, "3 b n d"]) -> tuple[Float[Tensor, "3 b n d"], Float[Tensor, "b m d"]]:
        """Do what `TransformerBlock.look_at_self` does."""
        normed = F.layer_norm(x, x.shape[-1:])
        q, k, v = (self._split(layer(normed)).flatten(0, 1) for layer in self.qkv)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(seen.unflatten(0, x.shape[:2]))
        return x, self.query(F.layer_norm(x, x.shape[-1:])).transpose(0, 1).flatten(1, 2)

    def look_at_tokens(
        self, x: Float[Tensor, "3 #b n d"], query: Float[Tensor, "#b m d"], tokens: Float[Tensor, "b k e"]
    ) -> Float[Tensor, "3 b n d"]:
        """Do what `TransformerBlock.look_at_tokens` does."""
        k, v = (self._split(F.linear(tokens, weight)) for weight in (self.key, self.value))
        seen = F.scaled_dot_product_attention(self._split(query).expand(len(tokens), -1, -1, -1), k, v)
        told = F.linear(seen.transpose(1, 2).flatten(2), *self.told)
        x = x + told.unflatten(1, (3, -1)).transpose(0, 1)
        value, gate = self.wide(F.layer_norm(x, x.shape[-1:])).chunk(2, -1)
        return x + self.narrow(value * F.gelu(gate))


class BakedDeltaplane:
    """The U-Net of one person: tokens to planes, identity and delta together."""

    def __init__(self, predictor: DeltaplanePredictor, identity: Triplane, dtype: torch.dtype) -> None:
        prefix, scale = predictor.prepare(identity), predictor.scale
        transformer = predictor.transformer[0]
        assert isinstance(transformer, PlaneTransformer)
        self.dtype, self.blocks = dtype, [BakedBlock(block, dtype) for block in transformer.blocks]
        self.hidden, self.query = prefix.hidden.to(dtype).transpose(0, 1), prefix.query.to(dtype)  # 3 1 n d
        self.places = transformer.pos_emb.detach().to(dtype).unflatten(2, (3, -1)).permute(2, 0, 1, 3)  # 3 1 n d
        self.bottom, *self.skips = ([baked_kernel(plane, dtype) for plane in planes.unbind(1)] for planes in (prefix.bottom, *reversed(prefix.skips)))
        self.stages = [BakedStage.of_slots(predictor.Upnet.slots(number), predictor.Upnet.order, dtype) for number in (1, 2, 3)]
        self.identity = [baked_kernel(plane, torch.float32) for plane in identity.planes.unbind(1)]
        self.scale = float(scale)
        self.last: list[tuple[Tensor, Tensor]] = []
        if not predictor.config.released:
            convs = [conv for conv in predictor.out.values() if isinstance(conv, nn.Conv2d) and conv.bias is not None]
            self.last = [
                (baked_kernel(conv.weight * scale, dtype), (conv.bias * scale).detach().to(dtype)) for conv in convs if conv.bias is not None
            ]
        self.bases, self.near = (
            None if bases is None else (bases * scale).detach().permute(0, 1, 3, 4, 2).to(dtype).contiguous()  # k 3 h w c
            for bases in (predictor.bases, predictor.near)
        )
        self.num_near = predictor.config.num_near
        self.same: list[Tensor] | None = None
        self.window = face_window(predictor.config.plane_axes, predictor.config.plane_resolution)

    def __call__(self, tokens: Float[Tensor, "b k e"], coefficients: Float[Tensor, "b m"]) -> list[Float[Tensor, "b c h w"]]:
        """Return the three planes of each set of tokens."""
        coefficients = coefficients.to(self.dtype)
        planes = self._paint(tokens.to(self.dtype)) if self.same is None else [plane.expand(len(tokens), -1, -1, -1) for plane in self.same]
        if self.bases is not None:
            far = _blend(self.bases, coefficients[:, self.num_near : self.num_near + len(self.bases)])
            planes = [plane + blend for plane, blend in zip(planes, far, strict=True)]
        whole = [upsample2(plane).float().add_(identity) for plane, identity in zip(planes, self.identity, strict=True)]
        if self.near is not None:
            near = _blend(self.near, coefficients[:, : len(self.near)])
            for plane, blend, (rows, columns) in zip(whole, near, self.window, strict=True):
                plane[:, :, rows, columns] += blend
        return whole

    def fold(self, tokens: Float[Tensor, "b k e"]) -> None:
        """Paint once and for all if these sets of tokens, as different as can be, make no difference: then training left all to the linear bases."""
        planes = self._paint(tokens.to(self.dtype))
        if max(float((plane - plane[:1]).abs().max()) for plane in planes) < NO_DIFFERENCE * self.scale:
            self.same = [plane[:1] for plane in planes]

    def _paint(self, tokens: Float[Tensor, "b k e"]) -> list[Float[Tensor, "b c h w"]]:
        hidden = self.blocks[0].look_at_tokens(self.hidden, self.query, tokens)
        for block in self.blocks[1:]:
            hidden = block.look_at_tokens(*block.look_at_self(hidden + self.places), tokens)
        side = self.bottom[0].shape[-1]
        cells = hidden.unflatten(2, (side, side)).permute(0, 1, 4, 2, 3)  # 3 b d h w, channels-last
        planes = [cell + bottom for cell, bottom in zip(cells, self.bottom, strict=True)]
        for stage, skips in zip(self.stages, self.skips, strict=False):
            planes = [upsample2(plane) + skip for plane, skip in zip(stage(planes), skips, strict=True)]
        planes = self.stages[2](planes)
        if self.last:
            planes = [F.conv2d(plane, weight, bias) for plane, (weight, bias) in zip(planes, self.last, strict=True)]
        else:
            planes = [plane * self.scale for plane in planes]
        return planes


def _blend(bases: Float[Tensor, "k 3 h w c"], coefficients: Float[Tensor, "b k"]) -> tuple[Float[Tensor, "b c h w"], ...]:
    """Sum bases by their weights, for each plane."""
    return (coefficients @ bases.flatten(1)).unflatten(1, bases.shape[1:]).permute(0, 1, 4, 2, 3).unbind(1)


class BakedAvatar:
    """An avatar ready to animate, fast and without gradients; a snapshot, so bake again when weights change."""

    def __init__(
        self, avatar: Avatar, *, rest: Float[Tensor, "f w"] | None = None, expression: float = 1.0, compiled: bool = False, graphs: bool = True
    ) -> None:
        """Bake an avatar for the device it is on: in float16, or in float32 on a CPU, with bfloat16 in super-resolution if it computes in that.

        Args:
            avatar: who is animated.
            rest: speech features of silence, from which expressions are measured.
            expression: how far planes go from those of silence to those of what is heard, and beyond; without `rest`, 1.
            compiled: also compile with `torch.compile`, which needs a compiler on this machine and a minute at the first frame.
            graphs: on CUDA, record the work of a batch once and replay it.
        """
        person = avatar.personalized
        self.expression = expression
        self.rest = None if rest is None else rest.to(person.identity.device)
        self.conditioner, self.device = avatar.conditioner, person.identity.device
        dtype = torch.float32 if self.device.type == "cpu" else torch.float16
        pictures = torch.bfloat16 if self.device.type == "cpu" and _has_bfloat16() else dtype
        with torch.no_grad():
            self.deltaplane = BakedDeltaplane(avatar.predictor, person.triplane, dtype)
            self.deltaplane.fold(avatar.conditioner(_different_moments(avatar)))
            self.renderer = GuidedRenderer(person.renderer, person.occupied, dtype)
            self.superresolution = BakedSuperresolution(person.renderer.superresolution, person.w, pictures)
        if compiled:
            self.renderer.compact = False  # one compilation for all cameras
        self._compiled = torch.compile(self._compute, dynamic=False) if compiled else None
        self._graphs: dict[int, _Recorded] | None = {} if graphs and self.device.type == "cuda" else None

    def render(self, driving: Driving, camera: Camera) -> Rendering:
        """Render b frames as their cameras see them, deterministically."""
        inputs = (*(getattr(driving, field.name) for field in fields(driving)), camera.cam2world, camera.intrinsics)
        with torch.no_grad():
            image, full_alpha, features, alpha, depth = self._run(inputs)
        return Rendering(image=image, alpha=full_alpha, raw=features[:, :3], raw_alpha=alpha, features=features, depth=depth)

    def _run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Do the work in the fastest way that this machine has; a way that fails is given up, with a warning, for the next."""
        batch = len(inputs[0])
        if self._graphs is not None:
            try:
                size = min((known for known in self._graphs if known >= batch), default=batch)  # a short last batch is filled up
                filled = tuple(torch.cat([x, x[-1:].expand(size - batch, *x.shape[1:])]) for x in inputs) if size > batch else inputs
                if size not in self._graphs:
                    self._graphs[size] = _Recorded(self._compiled or self._compute, filled)
                return tuple(x[:batch] for x in self._graphs[size](filled))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                logger.warning("no CUDA graph: %s", str(error).partition("\n")[0])
                self._graphs = None
        if self._compiled is not None:
            try:
                return self._compiled(*inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                logger.warning("not compiled: %s", str(error).partition("\n")[0])
                self._compiled = None
        return self._compute(*inputs)

    def _compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *parts, cam2world, intrinsics = inputs
        driving = Driving(**dict(zip((field.name for field in fields(Driving)), parts, strict=True)))
        planes = self._planes(driving)
        if self.rest is not None:
            calm = self._planes(replace(driving, audio=self.rest.expand_as(driving.audio)))
            planes = [torch.lerp(still, moved, self.expression) for still, moved in zip(calm, planes, strict=True)]
        features, alpha, depth = self.renderer(planes, Camera(cam2world=cam2world, intrinsics=intrinsics), driving.head_pose)
        return (*self.superresolution(features, alpha), features, alpha, depth)

    def _planes(self, driving: Driving) -> list[Float[Tensor, "b c h w"]]:
        tokens = self.conditioner(driving)
        return self.deltaplane(tokens, self.conditioner.heard_coefficients(tokens, driving))


def _different_moments(avatar: Avatar, count: int = 4) -> Driving:
    """Return moments of the performance, far apart, each with a sound of its own that is noise."""
    performance = avatar.performance
    index = torch.linspace(0, len(performance.blink) - 1, count).round().long()
    noise = 2 * torch.rand(count, 8, 16, avatar.config.conditioning.audio_channels, generator=torch.Generator().manual_seed(0)) - 1
    moved = {name: getattr(performance, name)[index] for name in ("blink", "head_pose", "anchors", "upper_face")}
    return Driving(audio=noise, **moved).to(avatar.personalized.identity.device)


def _has_bfloat16() -> bool:
    """Say whether the CPU multiplies bfloat16; one that does not takes ten times as long."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class _Recorded:
    """A CUDA graph of some work with inputs of fixed shapes."""

    def __init__(self, work: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            with torch.cuda.stream(stream):  # kernels are chosen, and compiled, before recording
                for _ in range(3):
                    work(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph):
                self.outputs = work(*self.inputs)

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Do the work for other inputs."""
        for kept, new in zip(self.inputs, inputs, strict=True):
            kept.copy_(new)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)
