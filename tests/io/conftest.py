"""Writes files as the published ones are: EG3D pickles with stand-ins for the classes that they name, so that real pickle streams come out."""

import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from talk3d.models.generator import GeneratorConfig, TriplaneGenerator
from talk3d.models.renderer import RendererConfig
from talk3d.models.superresolution import PUBLISHED

PARAMETERS = ("weight", "bias", "const", "noise_strength")
PLANE_AXES = {
    "fixed": [[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 1], [0, 1, 0]], [[0, 0, 1], [0, 1, 0], [1, 0, 0]]],
    "released": [[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 1], [0, 1, 0]], [[0, 0, 1], [1, 0, 0], [0, 1, 0]]],
}


class Called:
    """Pickled as the call of a global."""

    def __init__(self, what: Any, *arguments: Any) -> None:
        self.parts = (what, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.parts


class Names:
    """Modules that do not exist, for as long as a file that names what is in them is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def add(self, module: str, name: str, thing: Any) -> Any:
        thing.__module__, thing.__qualname__, thing.__name__ = module, name, name
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            if parent not in sys.modules:
                self.monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        self.monkeypatch.setattr(sys.modules[module], name, thing, raising=False)
        return thing

    def function(self, module: str, name: str) -> Any:
        return self.add(module, name, lambda *_: None)

    def plain_class(self, module: str, name: str, base: type = object) -> Any:
        return self.add(module, name, type(name, (base,), {}))


@dataclass(frozen=True, kw_only=True)
class Way:
    """One of the ways in which such files were written."""

    protocol: int = 4
    tuned: bool = False
    old_numpy: bool = False
    decoder_module: str = "training.triplane"
    easy: bool = False


class Eg3dWriter:
    """Writes a generator as an EG3D pickle."""

    def __init__(self, names: Names, way: Way) -> None:
        self.persistent = names.function("torch_utils.persistence", "_reconstruct_persistent_obj")
        self.scalar = names.function("numpy.core.multiarray", "scalar") if way.old_numpy else None
        self.easy_dict = names.plain_class("dnnlib.util", "EasyDict", dict) if way.easy else dict
        self.inert = {
            "OSGDecoder": names.plain_class(way.decoder_module, "OSGDecoder"),
            "ImportanceRenderer": names.plain_class("training.volumetric_rendering.renderer", "ImportanceRenderer"),
            "MipRayMarcher2": names.plain_class("training.volumetric_rendering.ray_marcher", "MipRayMarcher2"),
            "RaySampler": names.plain_class("training.volumetric_rendering.ray_sampler", "RaySampler"),
            "Sequential": nn.Sequential,
            "Softplus": nn.Softplus,
        }

    def module(self, class_name: str, tensors: dict[str, Tensor], modules: dict[str, Any], **attributes: Any) -> Any:
        state = {
            "training": False,
            "_parameters": OrderedDict(
                (k, nn.Parameter(v, requires_grad=False)) for k, v in tensors.items() if k in ("weight", "bias", "const", "noise_strength")
            ),
            "_buffers": OrderedDict((k, v) for k, v in tensors.items() if k not in ("weight", "bias", "const", "noise_strength")),
            "_non_persistent_buffers_set": set(),
            "_forward_hooks": OrderedDict(),
            "_modules": OrderedDict(modules),
            **attributes,
        }
        if class_name not in self.inert:
            source = "import os; os.system('echo never run')\n" * 200
            meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
            return Called(self.persistent, meta)
        made = object.__new__(self.inert[class_name])
        made.__dict__.update(state)
        return made

    def network(self, tensors: dict[str, Tensor], path: str, attributes: dict[str, dict[str, Any]], superresolution: str) -> Any:
        """Build the objects of all tensors below a path."""
        own = {name: tensor for name, tensor in tensors.items() if "." not in name}
        children: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                children.setdefault(first, {})[rest] = tensor
        modules = {name: self.network(part, f"{path}.{name}".strip("."), attributes, superresolution) for name, part in children.items()}
        extra = dict(attributes.get(path, {}))
        name = class_of(path, superresolution, plain_block0="up" not in attributes.get("superresolution.block0", {"up": 1}))
        if path == "decoder.net":
            modules = {"0": modules["0"], "1": self.module("Softplus", {}, {}, beta=1, threshold=20), "2": modules["2"]}
        if path == "":
            marcher = self.module("MipRayMarcher2", {}, {})
            renderer = self.module("ImportanceRenderer", {}, {"ray_marcher": marcher}, **attributes["renderer"])
            modules = {"renderer": renderer, "ray_sampler": self.module("RaySampler", {}, {}, depths=None), **modules}
        if name == "FullyConnectedLayer":
            number = np.float64(0.25)
            extra["weight_gain"] = Called(self.scalar, number.dtype, number.tobytes()) if self.scalar else number
            extra["bias_gain"] = 0.01 if ".fc" in path else 1
        return self.module(name, own, modules, **extra)


def class_of(path: str, superresolution: str, *, plain_block0: bool = False) -> str:
    last = path.rpartition(".")[2]
    fixed = {
        "": "TriPlaneGenerator",
        "backbone": "Generator",
        "backbone.mapping": "MappingNetwork",
        "backbone.synthesis": "SynthesisNetwork",
        "superresolution": superresolution,
        "superresolution.block0": "SynthesisBlockNoUp" if plain_block0 else "SynthesisBlock",
        "superresolution.block1": "SynthesisBlock",
        "decoder": "OSGDecoder",
        "decoder.net": "Sequential",
    }
    kinds = {"conv0": "SynthesisLayer", "conv1": "SynthesisLayer", "torgb": "ToRGBLayer"}
    return fixed.get(path) or kinds.get(last) or ("SynthesisBlock" if last[1:].isdigit() and last[0] == "b" else "FullyConnectedLayer")


def rendering_kwargs(config: RendererConfig, superresolution: str) -> dict[str, Any]:
    return {
        "image_resolution": config.superresolution.output_side,
        "disparity_space_sampling": config.disparity_space_sampling,
        "clamp_mode": "softplus",
        "superresolution_module": f"training.superresolution.{superresolution}",
        "c_gen_conditioning_zero": False,
        "gpc_reg_prob": 0.5,
        "superresolution_noise_mode": "none",
        "reg_type": "l1",
        "decoder_lr_mul": config.decoder_lr_mul,
        "sr_antialias": config.superresolution.antialias,
        "depth_resolution": config.depth_resolution,
        "depth_resolution_importance": config.depth_resolution_importance,
        "ray_start": config.ray_start,
        "ray_end": config.ray_end,
        "box_warp": config.box_warp,
        "white_back": config.white_back,
        "avg_camera_radius": 2.7,
        "avg_camera_pivot": [0, 0, 0.2],
    }


def small_config(superresolution: str = "SuperresolutionHybrid2X", **changes: Any) -> GeneratorConfig:
    """A generator of a few planes' pixels with one of the published super-resolutions."""
    renderer = RendererConfig(
        w_dim=32,
        plane_resolution=32,
        neural_rendering_resolution=16,
        depth_resolution=7,
        depth_resolution_importance=5,
        ray_start=2.0,
        ray_end=3.5,
        box_warp=1.25,
        superresolution=PUBLISHED[superresolution],
    )
    of_renderer = {name: changes.pop(name) for name in list(changes) if hasattr(renderer, name)}
    config = GeneratorConfig(z_dim=24, channel_base=512, channel_max=32, renderer=replace(renderer, **of_renderer))
    return replace(config, **changes)


@pytest.fixture
def make_way() -> type[Way]:
    """The ways of writing for `write_eg3d`."""
    return Way


@pytest.fixture
def write_eg3d(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, TriplaneGenerator]]:
    """Make a random generator, write it as an EG3D pickle in one of the ways that exist, and return both."""

    def write(
        superresolution: str = "SuperresolutionHybrid2X",
        *,
        way: Way = Way(),
        axes: str | None = "fixed",
        change: Callable[[dict[str, Tensor], dict[str, dict[str, Any]]], None] = lambda tensors, attributes: None,
        beside: Callable[[Names], dict[str, Any]] = lambda names: {},
        **config: Any,
    ) -> tuple[Path, TriplaneGenerator]:
        generator = TriplaneGenerator(small_config(superresolution, plane_axes=axes or "released", **config)).eval()
        for name, value in generator.named_parameters():
            if name.endswith(("bias", "noise_strength")):
                nn.init.normal_(value, std=0.3)
        generator.get_buffer("backbone.mapping.w_avg").normal_()
        names = Names(monkeypatch)
        writer = Eg3dWriter(names, way)
        c, settings = generator.config, writer.easy_dict(rendering_kwargs(generator.config.renderer, superresolution))
        settings["c_scale"] = c.c_scale
        settings["c_gen_conditioning_zero"] = c.c_gen_conditioning_zero
        sr_clamp = c.renderer.superresolution.conv_clamp
        arguments = {"z_dim": c.z_dim, "mapping_kwargs": writer.easy_dict(num_layers=c.mapping_layers), "channel_base": c.channel_base}
        arguments |= {"conv_clamp": c.conv_clamp, "sr_num_fp16_res": 4 if sr_clamp else 0, "num_fp16_res": 0, "rendering_kwargs": settings}
        attributes: dict[str, dict[str, Any]] = {
            "": {
                "z_dim": c.z_dim,
                "neural_rendering_resolution": c.renderer.neural_rendering_resolution,
                "rendering_kwargs": settings,
                "_last_planes": None,
                "_init_args": (),
                "_init_kwargs": writer.easy_dict(arguments),
            },
            "renderer": {"plane_axes": torch.tensor(PLANE_AXES[axes], dtype=torch.float32)} if axes else {},
            "superresolution": {"sr_antialias": c.renderer.superresolution.antialias, "input_resolution": 128},
            "superresolution.block0": {"up": 1} if c.renderer.superresolution.up[0] else {},
        }
        tensors = {name: value.clone() for name, value in generator.state_dict().items()} | {"dataset_label_std": torch.rand(25)}
        change(tensors, attributes)
        made = writer.network(tensors, "", attributes, superresolution)
        networks = {"G": made, "D": None, "G_ema": made, "training_set_kwargs": writer.easy_dict(path="x.zip"), "augment_pipe": None}
        path = tmp_path / "network.pkl"
        path.write_bytes(pickle.dumps(made if way.tuned else networks | beside(names), protocol=way.protocol))
        monkeypatch.undo()
        return path, generator

    return write
