"""Weights as safetensors with a JSON header: priors, persons, avatars and training states; atomic, strict, free of pickle."""

import dataclasses
import json
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import talk3d
from talk3d.errors import WeightsError
from talk3d.models.avatar import Avatar, AvatarConfig, Performance, PersonalizedGenerator, Prior
from talk3d.models.generator import GeneratorConfig, TriplaneGenerator
from talk3d.models.renderer import RendererConfig
from talk3d.types import Camera

C = TypeVar("C")

HEADER_FIELDS = {
    "prior": {"config", "w_std", "provenance"},
    "person": {"config", "provenance"},
    "avatar": {"renderer", "config", "audio_source", "fps", "person", "provenance"},
    "published": {"config", "provenance"},
    "checkpoint": {"step", "skeleton"},
}
"""What the header of each kind of file must hold."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header as one safetensors file, under a temporary name until it is whole.

    Raises:
        WeightsError: the place cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, partial, metadata={"talk3d": json.dumps(header)})
        partial.chmod(0o644)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise WeightsError(f"cannot write {path} ({error}): give a path in a folder that exists and can be written") from error


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_tensors` wrote.

    Args:
        path: the file.
        kind: what the header's "kind" must be, such as "avatar".

    Raises:
        WeightsError: no such file, damaged, or of another kind.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is not a file: give the path of a saved {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("talk3d", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is damaged or no safetensors file ({error}): save or fetch the {kind} again") from error
    if not isinstance(header, dict) or header.get("kind") != kind:
        found = header.get("kind") if isinstance(header, dict) else None
        raise WeightsError(f"{path} holds {found or 'something else'}, expected a talk3d {kind}: give the file that makes a {kind}")
    missing = sorted(HEADER_FIELDS.get(kind, set()) - header.keys())
    if missing:
        raise WeightsError(f"the header of {path} lacks {', '.join(missing)}: it was written by another program or version, make the {kind} again")
    return tensors, header


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Copy tensors into a module; every name and shape must fit.

    Raises:
        WeightsError: names are missing or unexpected, or a shape differs.
    """
    wanted = module.state_dict()
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    shapes = [f"{k} {tuple(tensors[k].shape)} instead of {tuple(v.shape)}" for k, v in wanted.items() if k in tensors and tensors[k].shape != v.shape]
    if missing or unexpected or shapes:
        raise WeightsError(f"{path} does not fit the model: missing {missing[:5]}, unexpected {unexpected[:5]}, wrong shape {shapes[:5]}")
    module.load_state_dict({k: tensors[k].to(v.dtype) for k, v in wanted.items()})


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
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise WeightsError(f"{path} was saved by an incompatible version ({error}): make it again with this version") from error


def _rebuild(cls: Any, values: Any) -> Any:
    if dataclasses.is_dataclass(cls) and isinstance(cls, type):
        kinds = typing.get_type_hints(cls)
        return cls(**{name: _rebuild(kinds[name], value) for name, value in values.items()})
    if typing.get_origin(cls) is tuple:
        return tuple(values)
    return values


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
    """Undo `pack_state` (tuples come back as lists)."""
    (kind, content), *_ = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack_state(tensors, item) for key, item in content}
    if kind == "list":
        return [unpack_state(tensors, item) for item in content]
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
    save_tensors(path, tensors if exact else _halved(tensors), header)


def load_prior(path: str | Path = "builtin") -> Prior:
    """Read a prior, or the one that comes with the package ("builtin"); weights become float32.

    Raises:
        WeightsError: no such file, damaged, or no prior.
    """
    place = BUILTIN_PRIOR if str(path) == "builtin" else Path(path)
    tensors, header = load_tensors(place, "prior")
    generator = TriplaneGenerator(config_from_json(GeneratorConfig, header["config"], place))
    load_strictly(generator, tensors, place)
    return Prior(generator=generator.eval(), w_std=header["w_std"], provenance=header["provenance"]).eval()


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
    person = PersonalizedGenerator(config_from_json(RendererConfig, header["config"], path), header["provenance"])
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


def load_avatar(path: str | Path = "sample") -> Avatar:
    """Read an avatar, or the one that comes with the package ("sample"); weights become float32.

    Raises:
        WeightsError: no such file, damaged, or no avatar.
    """
    place = SAMPLE_AVATAR if str(path) == "sample" else Path(path)
    tensors, header = load_tensors(place, "avatar")
    moves = {k.removeprefix("performance."): tensors.pop(k) for k in list(tensors) if k.startswith("performance.")}
    avatar = Avatar(
        personalized=PersonalizedGenerator(config_from_json(RendererConfig, header["renderer"], place), header["person"]),
        config=config_from_json(AvatarConfig, header["config"], place),
        performance=Performance(
            cameras=Camera.from_label(moves["cameras"].float()), blink=moves["blink"], head_pose=moves["head_pose"], anchors=moves["anchors"]
        ),
        background=torch.zeros_like(tensors["background"], dtype=torch.float32),
        audio_source=header["audio_source"],
        fps=header["fps"],
        provenance=header["provenance"],
    )
    load_strictly(avatar, tensors, place)
    return avatar.eval()
