"""Weights as safetensors with a JSON header: priors, persons, avatars and training states; atomic, strict, free of pickle."""

import dataclasses
import json
import math
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import talk3d
from talk3d.errors import ConfigError, Talk3DError, WeightsError
from talk3d.io.pickles import shown
from talk3d.io.writing import whole
from talk3d.models.avatar import Avatar, AvatarConfig, Performance, PersonalizedGenerator, Prior
from talk3d.models.encoder import Encoder, EncoderConfig
from talk3d.models.generator import GeneratorConfig, TriplaneGenerator
from talk3d.models.renderer import RendererConfig
from talk3d.types import Camera
from talk3d.types.face import with_cheeks

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)

_NUMBER = (int, float)
HEADER_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "prior": {"config": dict, "w_std": _NUMBER, "provenance": dict},
    "person": {"config": dict, "provenance": dict},
    "avatar": {"renderer": dict, "config": dict, "audio_source": str, "fps": _NUMBER, "person": dict, "provenance": dict},
    "published": {"config": dict, "provenance": dict},
    "checkpoint": {"step": int, "skeleton": dict},
}
"""What the header of each kind of file must hold."""
_LARGEST_SETTING = 2**20
_UNREADABLE = (SafetensorError, OSError, ValueError, RecursionError)
_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header as one safetensors file, under a temporary name until it is whole.

    Raises:
        WeightsError: the place cannot be written.
    """
    try:
        with whole(path) as partial:
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, partial, metadata={"talk3d": json.dumps(header)})
            partial.chmod(0o644)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot write {path} ({error}): give a path in a folder that exists and can be written") from error


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_tensors` wrote.

    Args:
        path: the file.
        kind: what the header's "kind" must be, such as "avatar".

    Raises:
        WeightsError: no such file, damaged, or of another kind.
    """
    try:
        if not path.is_file():
            raise WeightsError(f"{path} is not a file: give the path of a saved {kind}")
        with safe_open(path, framework="pt") as file:
            header = _header(file)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except _UNREADABLE as error:
        raise WeightsError(f"{path} is no saved {kind}, or a damaged one ({error}): give the path of one, or save or fetch it again") from error
    if header.get("kind") != kind:
        raise WeightsError(f"{path} holds {header.get('kind') or 'something else'}, expected a talk3d {kind}: give the path of a saved {kind}")
    fields = HEADER_FIELDS.get(kind, {})
    missing = sorted(fields.keys() - header.keys()) or sorted(name for name in fields if not isinstance(header[name], fields[name]))
    if missing:
        raise WeightsError(f"the header of {path} lacks {', '.join(missing)}: it was written by another program or version, make the {kind} again")
    return tensors, header


def saved_kind(path: Path) -> str | None:
    """Return the kind of file that `save_tensors` wrote there, such as "avatar"; None for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return _header(file).get("kind")
    except _UNREADABLE:
        return None


def _header(file: Any) -> dict[str, Any]:
    """The header of an open file; empty if it has none."""
    header = json.loads((file.metadata() or {}).get("talk3d", "null"))
    return header if isinstance(header, dict) else {}


class _Allowance(TorchFunctionMode):
    """Refuses to make more numbers than it was given; small tensors count as a thousand, so that there cannot be many either."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.left = numbers

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in _FACTORIES:
            sizes = args[0] if isinstance(args[0], list | tuple) else args
            self.left -= max(1000, math.prod(number for number in sizes if isinstance(number, int)))
            if self.left < 0:
                raise WeightsError("its settings want a model far larger than its tensors: make or get the file again")
        return func(*args, **(kwargs or {}))


def build(make: Callable[[], M], numbers: int, path: Path | str) -> M:
    """Make a module with settings from a file, if that makes no model much larger than what the file holds.

    Args:
        make: makes it.
        numbers: how many numbers the file holds for it.
        path: named in errors.

    Raises:
        WeightsError: the settings make no model, or one that is far too large.
    """
    try:
        with warnings.catch_warnings(), _Allowance(4 * numbers + 2**22):
            warnings.simplefilter("ignore")  # what torch thinks of odd sizes
            return make()
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except (Talk3DError, ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{path} has settings that make no model ({type(error).__name__} {reason}): make or get the file again") from error


def check_fit(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], path: Path | str) -> None:
    """Compare the names and sizes of tensors with those that a model wants.

    Raises:
        WeightsError: names are missing or unexpected, or a size differs.
    """
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(shown(name) for name in found.keys() - wanted.keys())
    shapes = [f"{name} {found[name]} instead of {size}" for name, size in wanted.items() if name in found and found[name] != size]
    if missing or unexpected or shapes:
        raise WeightsError(f"{path} does not fit the model: missing {missing[:5]}, unexpected {unexpected[:5]}, wrong shape {shapes[:5]}")


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Copy tensors into a module; every name and shape must fit.

    Raises:
        WeightsError: names are missing or unexpected, or a shape differs.
    """
    wanted = module.state_dict()
    check_fit({k: tuple(v.shape) for k, v in wanted.items()}, {k: tuple(v.shape) for k, v in tensors.items()}, path)
    if any(tensors[k].is_complex() for k in wanted):
        raise WeightsError(f"{path} holds complex numbers, which no model here has: make or get the file again")
    module.load_state_dict({k: tensors[k].to(v.dtype) for k, v in wanted.items()})


def count_numbers(tensors: Mapping[str, Tensor]) -> int:
    """Return how many numbers the tensors hold together."""
    return sum(tensor.numel() for tensor in tensors.values())


def config_to_json(config: Any) -> dict[str, Any]:
    """Turn a config dataclass into plain JSON values."""
    return dataclasses.asdict(config)


def config_from_json(cls: type[C], values: Mapping[str, Any], path: Path | str) -> C:
    """Rebuild a config dataclass from JSON values.

    Raises:
        WeightsError: fields are missing, unknown or of the wrong kind.
    """
    try:
        return _rebuild(cls, values)
    except (TypeError, KeyError, ValueError, AttributeError, StopIteration, RecursionError, ConfigError) as error:
        raise WeightsError(f"{path} was saved by an incompatible version ({error}): make it again with this version") from error


def _rebuild(kind: Any, value: Any) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        kinds = typing.get_type_hints(kind)
        return kind(**{name: _rebuild(kinds[name], part) for name, part in value.items()})
    if origin is tuple:
        return tuple(_rebuild(part_kind, part) for part_kind, part in zip(inner, value, strict=True))
    if origin is typing.Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in inner)
    elif inner:  # one kind or another
        return next(_rebuild(choice, value) for choice in inner if _fits(choice, value))
    else:
        fits = _fits(kind, value)
    if not fits:
        raise TypeError(f"{shown(value)} stands where {getattr(kind, '__name__', kind)} is expected")
    return value


def _fits(kind: Any, value: Any) -> bool:
    """Whether a JSON value is of a plain kind, one of the literals, or may be a tuple."""
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list)
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind and (kind is not int or abs(value) <= _LARGEST_SETTING)


def pack_state(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts and lists with tensors in them (optimiser states) into flat tensors and a JSON skeleton."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, Mapping):
            return {"dict": [[key, walk(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {"list": [walk(item) for item in value]}
        return {"value": value}

    skeleton = walk(state)
    return tensors, skeleton


def unpack_state(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Undo `pack_state` (tuples come back as lists).

    Raises:
        WeightsError: the skeleton is damaged.
    """
    try:
        return _unpack(tensors, skeleton)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise WeightsError("the skeleton of a saved state is damaged: delete the file to start anew") from error


def _unpack(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    (kind, content), *_ = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(tensors, item) for key, item in content}
    if kind == "list":
        return [_unpack(tensors, item) for item in content]
    return content


ASSETS = Path(__file__).parent.parent / "assets"
BUILTIN_PRIOR = ASSETS / "prior.safetensors"
SAMPLE_AVATAR = ASSETS / "sample_avatar.safetensors"


def _halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}


def make_header(kind: str, **content: Any) -> dict[str, Any]:
    """Return the header of a file of this kind, with the package's version."""
    return {"kind": kind, "talk3d": talk3d.__version__, **content}


def save_prior(prior: Prior, path: Path, *, exact: bool = False) -> None:
    """Write a prior as one file, weights as float16 unless they must stay exact.

    Raises:
        WeightsError: the place cannot be written.
    """
    header = make_header("prior", config=config_to_json(prior.generator.config), w_std=prior.w_std, provenance=prior.provenance)
    tensors = prior.generator.state_dict()
    if prior.encoder is not None:
        header["encoder"] = config_to_json(prior.encoder.config)
        tensors |= {f"encoder.{name}": value for name, value in prior.encoder.state_dict().items()}
    save_tensors(path, tensors if exact else _halved(tensors), header)


def prior_file(prior: str | Path) -> Path:
    """Return where a prior lies: the word builtin is the one that comes with the package."""
    return BUILTIN_PRIOR if str(prior) == "builtin" else Path(prior)


def load_prior(path: str | Path = "builtin") -> Prior:
    """Read a prior, or the one that comes with the package ("builtin"); weights become float32.

    Raises:
        WeightsError: no such file, damaged, or no prior.
    """
    place = prior_file(path)
    tensors, header = load_tensors(place, "prior")
    guessing = {name.removeprefix("encoder."): tensors.pop(name) for name in list(tensors) if name.startswith("encoder.")}
    config = config_from_json(GeneratorConfig, header["config"], place)
    generator = build(lambda: TriplaneGenerator(config), count_numbers(tensors), place)
    load_strictly(generator, tensors, place)
    encoder = None
    if "encoder" in header:
        sizes, w_dim = config_from_json(EncoderConfig, header["encoder"], place), config.renderer.w_dim
        encoder = build(lambda: Encoder(sizes, w_dim), count_numbers(guessing), place)
        load_strictly(encoder, guessing, place)
    return Prior(generator=generator, w_std=header["w_std"], provenance=header["provenance"], encoder=encoder).eval()


def save_person(person: PersonalizedGenerator, path: Path) -> None:
    """Write a person as one file.

    Raises:
        WeightsError: the place cannot be written.
    """
    header = make_header("person", config=config_to_json(person.renderer.renderer_config), provenance=person.provenance)
    save_tensors(path, _halved(person.state_dict()), header)


def load_person(path: str | Path) -> PersonalizedGenerator:
    """Read a person; weights become float32.

    Raises:
        WeightsError: no such file, damaged, or no person.
    """
    tensors, header = load_tensors(Path(path), "person")
    config = config_from_json(RendererConfig, header["config"], path)
    person = build(lambda: PersonalizedGenerator(config, header["provenance"]), count_numbers(tensors), path)
    load_strictly(person, tensors, path)
    return person.eval()


def save_avatar(avatar: Avatar, path: Path) -> None:
    """Write an avatar as one file.

    Raises:
        WeightsError: the place cannot be written.
    """
    performance = avatar.performance
    tensors = _halved(avatar.state_dict())
    tensors |= {
        "performance.cameras": performance.cameras.to_label().double(),
        "performance.blink": performance.blink,
        "performance.head_pose": performance.head_pose,
        "performance.anchors": performance.anchors,
        "performance.upper_face": performance.upper_face,
    }
    header = make_header(
        "avatar",
        renderer=config_to_json(avatar.personalized.renderer.renderer_config),
        config=config_to_json(avatar.config),
        audio_source=avatar.audio_source,
        fps=avatar.fps,
        person=avatar.personalized.provenance,
        provenance=avatar.provenance,
    )
    save_tensors(path, tensors, header)


def _check_talking(renderer: RendererConfig, config: AvatarConfig, moves: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse an avatar whose parts cannot belong to each other."""
    planes = config.deltaplane
    if (planes.plane_channels, planes.plane_resolution) != (renderer.plane_channels, renderer.plane_resolution):
        raise WeightsError(f"{path} moves other planes than its person has: make the avatar again")
    length = len(moves["blink"]) if "blink" in moves and moves["blink"].dim() else 0
    wanted = {"cameras": (length, 25), "blink": (length, 1), "head_pose": (length, 3), "anchors": (length, 6), "upper_face": (length, 5)}
    check_fit(wanted, {name: tuple(value.shape) for name, value in moves.items()}, f"the performance in {path}")
    if not length or tensors.get("background", torch.empty(0)).shape[:1] != (3,) or tensors["background"].dim() != 3:
        raise WeightsError(f"{path} lacks a performance or a background of three colours: make the avatar again")


def load_avatar(path: str | Path = "sample") -> Avatar:
    """Read an avatar, or the one that comes with the package ("sample"); weights become float32.

    Raises:
        WeightsError: no such file, damaged, or no avatar.
    """
    place = SAMPLE_AVATAR if str(path) == "sample" else Path(path)
    tensors, header = load_tensors(place, "avatar")
    renderer, config = config_from_json(RendererConfig, header["renderer"], place), config_from_json(AvatarConfig, header["config"], place)
    moves = {k.removeprefix("performance."): tensors.pop(k) for k in list(tensors) if k.startswith("performance.")}
    if "upper_face" in moves:
        moves["upper_face"] = with_cheeks(moves["upper_face"])
    _check_talking(renderer, config, moves, tensors, place)

    def make() -> Avatar:
        return Avatar(
            personalized=PersonalizedGenerator(renderer, header["person"]),
            config=config,
            performance=Performance(cameras=Camera.from_label(moves.pop("cameras").float()), **moves),
            background=torch.zeros_like(tensors["background"], dtype=torch.float32),
            audio_source=header["audio_source"],
            fps=header["fps"],
            provenance=header["provenance"],
        )

    avatar = build(make, count_numbers(tensors), place)
    load_strictly(avatar, tensors, place)
    return avatar.eval()
