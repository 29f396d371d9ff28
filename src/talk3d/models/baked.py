"""An avatar baked for animation: all that is fixed for one person is folded into constants, and samples lie only where its surface is.

`Avatar.render` is the plain twin: differentiable, and what `BakedAvatar.render` must look like. What is folded: style, demodulation and gains into
super-resolution's kernels, the U-Net's prefix and roll-outs, batch norm, the decoder's scales. Tensors are channels-last throughout.
"""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from talk3d.models.avatar import Avatar
from talk3d.models.deltaplane import DeltaplanePredictor, PlaneTransformer, Stage
from talk3d.models.layers import EqualLinear, SynthesisLayer, ToImage
from talk3d.models.renderer import PointDecoder, TriplaneRenderer
from talk3d.models.stylegan2 import SynthesisBlock, resize_to
from talk3d.models.superresolution import Superresolution
from talk3d.ops.guided import EMPTY, Cells, RowLookup, guided_bins, guided_weights
from talk3d.ops.planes import RolledOutKernels, RollOut, convolve_split, split_rolled_out
from talk3d.ops.rays import camera_rays
from talk3d.ops.resample import fir_filter, upsample2
from talk3d.ops.volume import segment_weights
from talk3d.types import Camera, Driving, Rays, Rendering, Triplane

logger = logging.getLogger(__name__)
_LAST = torch.channels_last


def _kernel(weight: Float[Tensor, "o i h w"], dtype: torch.dtype) -> Float[Tensor, "o i h w"]:
    return weight.detach().to(dtype).contiguous(memory_format=_LAST)


@dataclass(frozen=True)
class BakedConv:
    """A convolution with leaky ReLU and a clamp if there is one; `fir`, a filter for each channel, if it doubles the sides."""

    weight: Float[Tensor, "_ _ k k"]
    bias: Float[Tensor, " o"]
    slope: float
    clamp: float | None = None
    fir: Float[Tensor, "o 1 4 4"] | None = None

    @classmethod
    def of_layer(cls, layer: SynthesisLayer, w: Float[Tensor, "1 d"], dtype: torch.dtype) -> "BakedConv":
        """Fold style, demodulation and the gain of the leaky ReLU, which is homogeneous."""
        style = layer.affine(w)[0]
        weight = layer.weight * style[:, None, None]
        weight = weight * torch.rsqrt(weight.square().sum((1, 2, 3), keepdim=True) + 1e-8) * math.sqrt(2)
        bias = (layer.bias * math.sqrt(2)).detach().to(dtype)
        if not layer.up:
            return cls(_kernel(weight, dtype), bias, 0.2, layer.clamp)
        taps = 4 * fir_filter().to(weight.device).expand(len(bias), 1, 4, 4)
        return cls(_kernel(weight.transpose(0, 1), dtype), bias, 0.2, layer.clamp, _kernel(taps, dtype))

    def __call__(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o p q"]:
        """Apply it."""
        if self.fir is None:
            x = F.conv2d(x, self.weight, self.bias, padding=1)
        else:
            x = F.conv2d(F.conv_transpose2d(x, self.weight, stride=2), self.fir, self.bias, padding=1, groups=len(self.bias))
        x = F.leaky_relu_(x, self.slope)
        return x if self.clamp is None else x.clamp_(-self.clamp, self.clamp)


@dataclass(frozen=True)
class BakedToImage:
    """A 1×1 convolution without activation."""

    weight: Float[Tensor, "k i 1 1"]
    bias: Float[Tensor, " k"]
    clamp: float | None

    @classmethod
    def of_layer(cls, layer: ToImage, w: Float[Tensor, "1 d"], dtype: torch.dtype) -> "BakedToImage":
        """Fold the style."""
        style = layer.affine(w)[0] / math.sqrt(layer.weight.shape[1])
        return cls(_kernel(layer.weight * style[:, None, None], dtype), layer.bias.detach().to(dtype), layer.clamp)

    def __call__(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b k h w"]:
        """Apply it."""
        x = F.conv2d(x, self.weight, self.bias)
        return (x if self.clamp is None else x.clamp_(-self.clamp, self.clamp)).float()


class BakedSuperresolution:
    """Super-resolution of one person: plain convolutions."""

    def __init__(self, module: Superresolution, w: Float[Tensor, "1 d"], dtype: torch.dtype) -> None:
        self.config, self.dtype = module.config, dtype
        self.blocks: list[tuple[bool, BakedConv, BakedConv, BakedToImage]] = []
        for block in (module.get_submodule("block0"), module.get_submodule("block1")):
            assert isinstance(block, SynthesisBlock)
            first, second = (BakedConv.of_layer(layer, w, dtype) for layer in (block.conv0, block.conv1))
            self.blocks.append((block.up, first, second, BakedToImage.of_layer(block.torgb, w, dtype)))

    def __call__(
        self, features: Float[Tensor, "b c h w"], alpha: Float[Tensor, "b 1 h w"]
    ) -> tuple[Float[Tensor, "b 3 H W"], Float[Tensor, "b 1 H W"]]:
        """Do what `Superresolution.forward` does."""
        config, image = self.config, features[:, :3]
        if config.matte:
            image = torch.cat([image, 2 * alpha - 1], 1)
        x = features
        if config.shrink or features.shape[-1] < config.input_side:
            x, image = (resize_to(y, config.input_side, antialias=config.antialias) for y in (x, image))
        x = x.to(self.dtype, memory_format=_LAST)
        for up, first, second, to_image in self.blocks:
            x = second(first(x))
            image = (upsample2(image) if up else image) + to_image(x)
        if config.matte:
            return image[:, :3], (image[:, 3:] + 1) / 2
        return image, resize_to(alpha, image.shape[-1])


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
        seconds = [(_kernel(second[0], dtype), second[1].to(dtype)) for _, second in folded]
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


class BakedDeltaplane:
    """The U-Net of one person: tokens to planes, identity and delta together."""

    def __init__(self, predictor: DeltaplanePredictor, identity: Triplane, dtype: torch.dtype) -> None:
        prefix, scale = predictor.prepare(identity), predictor.scale
        transformer = predictor.transformer[0]
        assert isinstance(transformer, PlaneTransformer)
        self.dtype, self.transformer = dtype, copy.deepcopy(transformer).to(dtype)
        self.hidden, self.query = prefix.hidden.to(dtype), prefix.query.to(dtype)
        self.bottom, *self.skips = ([_kernel(plane, dtype) for plane in planes.unbind(1)] for planes in (prefix.bottom, *reversed(prefix.skips)))
        self.stages = [BakedStage.of_slots(predictor.Upnet.slots(number), predictor.Upnet.order, dtype) for number in (1, 2, 3)]
        self.identity = [_kernel(plane, torch.float32) for plane in identity.planes.unbind(1)]
        self.scale = float(scale)
        self.last: list[tuple[Tensor, Tensor]] = []
        if not predictor.config.released:
            convs = [conv for conv in predictor.out.values() if isinstance(conv, nn.Conv2d) and conv.bias is not None]
            self.last = [(_kernel(conv.weight * scale, dtype), (conv.bias * scale).detach().to(dtype)) for conv in convs if conv.bias is not None]
        bases = predictor.bases
        self.bases = None if bases is None else (bases * scale).detach().permute(0, 1, 3, 4, 2).to(dtype).contiguous()  # k 3 h w c

    def __call__(self, tokens: Float[Tensor, "b k e"], coefficients: Float[Tensor, "b m"]) -> list[Float[Tensor, "b c h w"]]:
        """Return the three planes of each set of tokens."""
        tokens, coefficients = tokens.to(self.dtype), coefficients.to(self.dtype)
        hidden, _ = self.transformer.attend(self.hidden, self.query, tokens)
        side = self.bottom[0].shape[-1]
        cells = hidden.unflatten(2, (side, side)).permute(0, 1, 4, 2, 3).unbind(1)  # b d h w, channels-last
        planes = [cell + bottom for cell, bottom in zip(cells, self.bottom, strict=True)]
        for stage, skips in zip(self.stages, self.skips, strict=False):
            planes = [upsample2(plane) + skip for plane, skip in zip(stage(planes), skips, strict=True)]
        planes = self.stages[2](planes)
        if self.last:
            planes = [F.conv2d(plane, weight, bias) for plane, (weight, bias) in zip(planes, self.last, strict=True)]
        else:
            planes = [plane * self.scale for plane in planes]
        if self.bases is not None:
            blended = (coefficients @ self.bases.flatten(1)).unflatten(1, self.bases.shape[1:]).permute(0, 1, 4, 2, 3)  # b 3 c h w
            planes = [plane + blend for plane, blend in zip(planes, blended.unbind(1), strict=True)]
        return [upsample2(plane).float() + whole for plane, whole in zip(planes, self.identity, strict=True)]


class BakedRenderer:
    """Volume rendering of one person: a coarse look at a quarter of the rays, and few samples where it found something."""

    def __init__(self, renderer: TriplaneRenderer, occupied: Tensor, dtype: torch.dtype) -> None:
        config = renderer.renderer_config
        self.config, self.dtype = config, dtype
        self.lookup = RowLookup.of(config.plane_axes, config.plane_resolution, config.box_warp, occupied.device)
        self.cells = Cells.of(occupied if bool(occupied.any()) else torch.ones_like(occupied), config.box_warp)
        hidden, out = _linear(renderer.decoder, 0), _linear(renderer.decoder, 2)
        self.hidden = hidden[0].div(3).to(dtype), hidden[1].to(dtype)  # the look-up sums where the plain one takes the mean
        self.density = out[0][:1].to(dtype), out[1][:1].to(dtype)
        self.colour = out[0][1:].to(dtype), out[1][1:].to(dtype)
        self.num_coarse = max(24, config.depth_resolution)
        self.num_fine = max(12, config.depth_resolution_importance // 2)
        self.compact = occupied.device.type == "cpu"  # elsewhere, counting what is left would make the host wait

    def __call__(
        self, planes: list[Float[Tensor, "b c s s"]], camera: Camera
    ) -> tuple[Float[Tensor, "b f h w"], Float[Tensor, "b 1 h w"], Float[Tensor, "b 1 h w"]]:
        """Return features in [-1, 1], opacity and distance of each ray."""
        config, side, batch = self.config, self.config.neural_rendering_resolution, len(camera)
        rows = self.lookup.rows([plane.to(self.dtype) for plane in planes])
        near, far = self._span(camera)
        step = (far - near) / (self.num_coarse - 1)
        weights = self._coarse_weights(rows, camera, near, step)  # b m h w
        weights = F.interpolate(weights, size=(side, side), mode="bilinear").permute(0, 2, 3, 1).flatten(0, 2)  # r m
        kept = (weights.amax(1) > 1e-3).nonzero()[:, 0] if self.compact else torch.arange(len(weights), device=weights.device)
        volume = kept // side**2
        distances = near[volume, None] + guided_bins(weights[kept], self.num_fine) * step[volume, None]
        rays = camera_rays(camera, side, 0.0, 1.0)
        origins, directions = (x.flatten(0, 1)[kept, None] for x in (rays.origins, rays.directions))
        shown = self._shade(rows, origins + distances[..., None] * directions, distances, volume)
        empty = far.repeat_interleave(side**2)[:, None]
        background = [torch.full_like(shown[0][:1], float(config.white_back)).expand(batch * side**2, -1), torch.zeros_like(empty), empty]
        pictures = [x.index_copy(0, kept, y) for x, y in zip(background, shown, strict=True)] if self.compact else shown
        features, alpha, depth = (x.view(batch, side, side, -1).permute(0, 3, 1, 2) for x in pictures)  # b c h w
        return 2 * features - 1, alpha, depth

    def _span(self, camera: Camera) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        near, far = self.cells.span(camera.cam2world[:, :3, 3])
        if not isinstance(self.config.ray_start, str) and not isinstance(self.config.ray_end, str):
            near, far = near.clamp(min=self.config.ray_start), far.clamp(max=self.config.ray_end)
        return near, far

    def _coarse_weights(
        self, rows: Float[Tensor, "m c"], camera: Camera, near: Float[Tensor, " b"], step: Float[Tensor, " b"]
    ) -> Float[Tensor, "b q h w"]:
        side, samples = self.config.neural_rendering_resolution // 2, self.num_coarse
        rays: Rays = camera_rays(camera, side, 0.0, 1.0)
        distances = near[:, None] + step[:, None] * torch.arange(samples, device=near.device)  # b s
        distances = distances[:, None].expand(-1, side**2, -1)
        points = (rays.origins.unsqueeze(2) + distances.unsqueeze(3) * rays.directions.unsqueeze(2)).flatten(0, 2)
        full = self.cells.occupied(points)
        if self.compact:
            index = full.nonzero()[:, 0]
            found = self._density(self._hidden(rows, points[index], index // (side**2 * samples)))
            density = torch.full_like(points[:, 0], EMPTY).index_copy_(0, index, found)
        else:
            volume = torch.arange(len(camera), device=near.device).repeat_interleave(side**2 * samples)
            density = torch.where(full, self._density(self._hidden(rows, points, volume)), EMPTY)
        weights = segment_weights(density.view(distances.shape), distances)
        return weights.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # b q h w

    def _shade(
        self, rows: Float[Tensor, "m c"], points: Float[Tensor, "r s 3"], distances: Float[Tensor, "r s"], volume: Int[Tensor, " r"]
    ) -> list[Float[Tensor, "r _"]]:
        """Return features, opacity and distance of rays."""
        rays, samples, _ = points.shape
        flat = points.flatten(0, 1)
        hidden = self._hidden(rows, flat, volume.repeat_interleave(samples))
        density = torch.where(self.cells.occupied(flat), self._density(hidden), EMPTY).view(rays, samples)
        shares = guided_weights(density, distances)
        colours = torch.sigmoid_(F.linear(hidden, *self.colour))
        index = torch.arange(rays * samples, device=flat.device, dtype=torch.int32).view(rays, samples)
        mixed = F.embedding_bag(index, colours, per_sample_weights=shares.to(colours.dtype), mode="sum").float()
        opacity = shares.sum(1, keepdim=True)
        features = 1.002 * mixed - 0.001 * opacity  # the decoder's stretched sigmoid
        if self.config.white_back:
            features = features + 1 - opacity
        depth = (shares * distances).sum(1, keepdim=True) / opacity.clamp(min=1e-6)
        return [features, opacity, depth.maximum(distances[:, :1]).minimum(distances[:, -1:])]

    def _hidden(self, rows: Float[Tensor, "m c"], points: Float[Tensor, "n 3"], volume: Int[Tensor, " n"] | None) -> Float[Tensor, "n d"]:
        return F.softplus(F.linear(self.lookup(rows, points, volume), *self.hidden))

    def _density(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return F.linear(hidden, *self.density)[:, 0].float()


def _linear(decoder: PointDecoder, number: int) -> tuple[Tensor, Tensor]:
    layer = decoder.net[number]
    assert isinstance(layer, EqualLinear)
    return (layer.weight * (layer.lr / math.sqrt(layer.weight.shape[1]))).detach(), (layer.bias * layer.lr).detach()


class BakedAvatar:
    """An avatar ready to animate, fast and without gradients; a snapshot, so bake again when weights change."""

    def __init__(self, avatar: Avatar, *, compiled: bool = False, graphs: bool = True) -> None:
        """Bake an avatar for the device it is on: in float16, or in float32 on a CPU, with bfloat16 in super-resolution if it computes in that.

        Args:
            avatar: who is animated.
            compiled: also compile with `torch.compile`, which needs a compiler on this machine and a minute at the first frame.
            graphs: on CUDA, record the work of a batch once and replay it.
        """
        person = avatar.personalized
        self.conditioner, self.device = avatar.conditioner, person.identity.device
        dtype = torch.float32 if self.device.type == "cpu" else torch.float16
        pictures = torch.bfloat16 if self.device.type == "cpu" and _has_bfloat16() else dtype
        with torch.no_grad():
            self.deltaplane = BakedDeltaplane(avatar.predictor, person.triplane, dtype)
            self.renderer = BakedRenderer(person.renderer, person.occupied, dtype)
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
                if batch not in self._graphs:
                    self._graphs[batch] = _Recorded(self._compiled or self._compute, inputs)
                return self._graphs[batch](inputs)
            except RuntimeError as error:
                logger.warning("no CUDA graph: %s", str(error).partition("\n")[0])
                self._graphs = None
        if self._compiled is not None:
            try:
                return self._compiled(*inputs)
            except RuntimeError as error:
                logger.warning("not compiled: %s", str(error).partition("\n")[0])
                self._compiled = None
        return self._compute(*inputs)

    def _compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *parts, cam2world, intrinsics = inputs
        driving = Driving(**dict(zip((field.name for field in fields(Driving)), parts, strict=True)))
        tokens = self.conditioner(driving)
        planes = self.deltaplane(tokens, self.conditioner.coefficients(driving, tokens))
        features, alpha, depth = self.renderer(planes, Camera(cam2world=cam2world, intrinsics=intrinsics))
        return (*self.superresolution(features, alpha), features, alpha, depth)


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
