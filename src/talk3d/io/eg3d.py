"""Generators of EG3D, out of the pickles in which they are published, without running anything in them.

Such a file carries the source text of its classes, which nobody here reads; modules are inert nodes with their attributes. Sizes come from the
tensors themselves, settings from the live attributes, and from the arguments of construction where those are missing.

Reference: EG3D (arXiv 2112.07945).
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from talk3d.errors import ConfigError, WeightsError
from talk3d.io.pickles import Global, Node, read_pickle, shown
from talk3d.io.torch_files import TENSOR_GLOBALS, VALUE_GLOBALS, Values, described, items_of, map_file, naming, size_of
from talk3d.io.weights import build, check_fit, load_strictly
from talk3d.models.generator import GeneratorConfig, TriplaneGenerator
from talk3d.models.renderer import RendererConfig
from talk3d.models.superresolution import PUBLISHED, SuperresolutionConfig
from talk3d.types import PlaneAxes

_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_ALLOWED = re.compile(
    rf"{TENSOR_GLOBALS}|{VALUE_GLOBALS}|{re.escape(_PERSISTENT)}|torch\.storage\._load_from_bytes|dnnlib\.util\.EasyDict"
    r"|training(\.\w+)+|torch\.nn\.modules(\.\w+)+|torch\.nn\.parameter\.Parameter|_imported_module_[0-9a-f]{32}\.\w+",
    re.ASCII,
)
_CLASSES = {
    "TriPlaneGenerator",
    "Generator",
    "MappingNetwork",
    "SynthesisNetwork",
    "SynthesisBlock",
    "SynthesisBlockNoUp",
    "SynthesisLayer",
    "ToRGBLayer",
    "FullyConnectedLayer",
    "OSGDecoder",
    "ImportanceRenderer",
    "MipRayMarcher2",
    "RaySampler",
    "Sequential",
    "Softplus",
    *PUBLISHED,
}
_PLANE_AXES = {
    "fixed": [[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 1], [0, 1, 0]], [[0, 0, 1], [0, 1, 0], [1, 0, 0]]],
    "released": [[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 1], [0, 1, 0]], [[0, 0, 1], [1, 0, 0], [0, 1, 0]]],
}
_MOST_SAMPLES = 1024


def import_eg3d(path: str | Path, *, plane_axes: PlaneAxes | None = None) -> TriplaneGenerator:
    """Read a generator of EG3D (its average over training, `G_ema`) or one that was tuned to a person, for inference in float32.

    Args:
        path: the pickle.
        plane_axes: the order of the planes' axes; None takes what the file says, and "released" if it says nothing.

    Raises:
        WeightsError: no such file, damaged, unsafe, or no generator of a kind that is known; the message says which.
        ConfigError: there are no such axes.
    """
    if plane_axes not in (None, "fixed", "released"):
        raise ConfigError(f"plane_axes is {plane_axes!r}, it may be 'fixed', 'released' or None: leave it out to take what the file says")
    with naming(path):
        data = map_file(Path(path))
        root = read_pickle(data, _ALLOWED).value
        network = _Network(_find_generator(root), Values(2 * len(data) + 2**20))
        config = network.config(plane_axes)
        numbers = sum(network.values.count(node) for node in network.tensors.values())
        generator = build(lambda: TriplaneGenerator(config), numbers, "the generator")
        wanted = {name: tuple(value.shape) for name, value in generator.state_dict().items()}
        constants = {name: value for name, value in generator.named_buffers() if name.endswith("resample_filter")}
        found = {name: size_of(node) for name, node in network.tensors.items() if name != "dataset_label_std"}
        check_fit(wanted, {name: wanted[name] for name in constants} | found, "the generator")
        tensors = constants | {name: network.values.tensor(network.tensors[name]) for name in found}
        if not all(torch.allclose(tensors[name].float(), constants[name]) for name in constants):
            raise WeightsError("it has another resampling filter than EG3D's [1, 3, 3, 1]: this generator cannot be used")
        load_strictly(generator, tensors, "the generator")
        return generator.eval()


def _find_generator(root: Any) -> Node:
    """Return the generator of a file: the object itself, or the average in a dict of networks."""
    alone = isinstance(root, Node) and (root.name == _PERSISTENT or root.state is not None)
    generator = root if alone else items_of(root).get("G_ema")
    name = _attributes(generator)[0] if isinstance(generator, Node) else described(generator)
    if not isinstance(generator, Node) or name != "TriPlaneGenerator":
        raise WeightsError(f"{shown(name)} is where a TriPlaneGenerator is expected (as G_ema, or alone): give the pickle of an EG3D generator")
    return generator


def _attributes(node: Any) -> tuple[str, dict[Any, Any]]:
    """Return the class name and the attributes of an object in a file."""
    if isinstance(node, Node) and node.name == _PERSISTENT:
        (content,) = node.arguments
        name = content["class_name"]
        if content["type"] != "class" or not isinstance(name, str):
            raise WeightsError(f"a persistent {shown(content['type'])} stands where a module is expected")
        return name, items_of(content["state"])
    if isinstance(node, Node) and node.state is not None and (made := _class_of(node)):
        return made.rpartition(".")[2], items_of(node.state)
    raise WeightsError(f"{described(node)} stands where a module is expected")


def _class_of(node: Node) -> str:
    if node.name in ("copyreg._reconstructor", "copy_reg._reconstructor"):
        return node.arguments[0].name if isinstance(node.arguments[0], Global) else ""
    return node.name


class _Network:
    """A generator's tensors by name, and the attributes of its modules by path."""

    def __init__(self, node: Node, values: Values) -> None:
        self.values = values
        self.tensors: dict[str, Node] = {}
        self.modules: dict[str, dict[Any, Any]] = {}
        self.classes: dict[str, str] = {}
        self._walk(node, "")
        self.settings = self.plain("", "rendering_kwargs") or self.made_with("rendering_kwargs", {})

    def _walk(self, node: Any, path: str) -> None:
        name, attributes = _attributes(node)
        if name not in _CLASSES:
            raise WeightsError(f"the generator holds a {shown(name)}, which is none of EG3D's modules: it cannot be used")
        self.classes[path.rstrip(".")], self.modules[path.rstrip(".")] = name, attributes
        passing = self.values.plain(attributes.get("_non_persistent_buffers_set")) or ()
        for kind in ("_parameters", "_buffers", "_modules"):
            for key, part in items_of(attributes.get(kind, {})).items():
                if not re.fullmatch(r"\w{1,64}", str(key), re.ASCII):
                    raise WeightsError(f"{shown(key)} is no name of a module or tensor, so the file is damaged")
                if part is not None and kind == "_modules":
                    self._walk(part, f"{path}{key}.")
                elif part is not None and key not in passing:
                    self.tensors[f"{path}{key}"] = part

    def plain(self, path: str, name: str, default: Any = None) -> Any:
        """Return an attribute of a module, or the default if it has none."""
        attributes = self.modules.get(path, {})
        return self.values.plain(attributes[name]) if name in attributes else default

    def made_with(self, name: str, default: Any) -> Any:
        """Return an argument of the generator's construction, or the default if it is not known."""
        return self.values.plain(items_of(self.modules[""].get("_init_kwargs", {})).get(name, default))

    def size(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Return the size of a tensor that every generator has."""
        size = size_of(self.tensors[name]) if name in self.tensors else ()
        if len(size) != dimensions or any(type(number) is not int or number < 1 for number in size):
            raise WeightsError(f"the generator's {name} is missing or has another number of dimensions than {dimensions}, so it is none of EG3D's")
        return size

    def number(self, name: str, default: Any = None, *, most: float = 1000.0) -> Any:
        """Return a number of the rendering settings, of the default's type."""
        value = self.settings.get(name, default)
        most = 1 if isinstance(default, bool) else most
        if not isinstance(value, int | float) or not 0 <= value <= most:
            raise WeightsError(
                f"rendering_kwargs has {name}={shown(value)}, expected {type(default).__name__} from 0 to {most:g}: the file is damaged"
            )
        return type(default)(value)

    def config(self, plane_axes: PlaneAxes | None) -> GeneratorConfig:
        """Return the configuration that rebuilds the generator."""
        w_dim = self.size("backbone.mapping.w_avg", 1)[0]
        c_dim = self.size("backbone.mapping.embed.weight", 2)[1] if "backbone.mapping.embed.weight" in self.tensors else 0
        layers = [name for name in self.modules if re.fullmatch(r"backbone\.mapping\.fc\d+", name)]
        sides = sorted(int(name[20:]) for name in self.modules if re.fullmatch(r"backbone\.synthesis\.b\d{1,4}", name))
        channels = {side: self.size(f"backbone.synthesis.b{side}.conv1.weight", 4)[0] for side in sides}
        if not sides or any(self.plain(name, "bias_gain", 0.01) != 0.01 for name in layers):
            raise WeightsError("the backbone is none of EG3D's (no synthesis blocks, or another learning rate in mapping): it cannot be used")
        half_precision = self.made_with("num_fp16_res", 0)
        clamp = self.plain(f"backbone.synthesis.b{sides[-1]}.conv1", "conv_clamp", self.made_with("conv_clamp", 256 if half_precision else None))
        return GeneratorConfig(
            z_dim=self.size("backbone.mapping.fc0.weight", 2)[1] - (w_dim if c_dim else 0),
            c_dim=c_dim,
            c_scale=self.number("c_scale", 0.0),
            c_gen_conditioning_zero=self.number("c_gen_conditioning_zero", False),
            mapping_layers=len(layers),
            channel_base=max(side * count for side, count in channels.items()),
            channel_max=max(channels.values()),
            conv_clamp=None if clamp is None else float(clamp),
            renderer=self._renderer(w_dim, sides[-1], plane_axes),
        )

    def _renderer(self, w_dim: int, plane_resolution: int, plane_axes: PlaneAxes | None) -> RendererConfig:
        hidden, plane_channels = self.size("decoder.net.0.weight", 2)
        missing = {"ray_start", "ray_end", "depth_resolution", "box_warp"} - self.settings.keys()
        if missing or self.settings.get("clamp_mode", "softplus") != "softplus":
            what = f"lacks {', '.join(sorted(missing))}" if missing else f"has clamp_mode={shown(self.settings['clamp_mode'])}, expected softplus"
            raise WeightsError(f"rendering_kwargs {what}: this generator cannot be used")
        automatic = self.settings["ray_start"] == self.settings["ray_end"] == "auto"
        resolution = self.plain("", "neural_rendering_resolution", 64)
        if type(resolution) is not int or not 1 <= resolution <= _MOST_SAMPLES:
            raise WeightsError(f"neural_rendering_resolution is {shown(resolution)}, expected 1 to {_MOST_SAMPLES}: the file is damaged")
        return RendererConfig(
            w_dim=w_dim,
            plane_channels=plane_channels,
            plane_resolution=plane_resolution,
            plane_axes=plane_axes or self._plane_axes(),
            box_warp=self.number("box_warp", 1.0),
            decoder_hidden=hidden,
            decoder_lr_mul=self.number("decoder_lr_mul", 1.0),
            feature_channels=self.size("decoder.net.2.weight", 2)[0] - 1,
            neural_rendering_resolution=resolution,
            ray_start="auto" if automatic else self.number("ray_start", 2.25),
            ray_end="auto" if automatic else self.number("ray_end", 3.3),
            disparity_space_sampling=self.number("disparity_space_sampling", False),
            depth_resolution=self.number("depth_resolution", 48, most=_MOST_SAMPLES),
            depth_resolution_importance=self.number("depth_resolution_importance", 0, most=_MOST_SAMPLES),
            white_back=self.number("white_back", False),
            density_noise=self.number("density_noise", 0.0),
            superresolution=self._superresolution(),
        )

    def _superresolution(self) -> SuperresolutionConfig:
        name = self.classes.get("superresolution", "none")
        if name not in PUBLISHED:
            raise WeightsError(f"the super-resolution is {shown(name)}, expected one of {', '.join(PUBLISHED)}: this generator cannot be used")
        config = PUBLISHED[name]
        clamp = self.plain("superresolution.block1.conv1", "conv_clamp", 256 if self.made_with("sr_num_fp16_res", 0) else None)
        antialias = self.plain("superresolution", "sr_antialias", self.number("sr_antialias", True)) if config.antialias else False
        return replace(config, antialias=bool(antialias), conv_clamp=None if clamp is None else float(clamp))

    def _plane_axes(self) -> PlaneAxes:
        node = self.modules.get("renderer", {}).get("plane_axes")
        if node is None:
            return "released"
        axes = self.values.tensor(node).tolist()
        for name in ("fixed", "released"):
            if axes == _PLANE_AXES[name]:
                return name
        raise WeightsError("its plane_axes are neither EG3D's released nor its fixed ones: give plane_axes")
