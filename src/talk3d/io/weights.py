"""Weights and training states as safetensors with a JSON header: atomic, strict, free of pickle."""

import dataclasses
import json
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from talk3d.errors import WeightsError

C = TypeVar("C")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header as one safetensors file, under a temporary name until it is whole.

    Raises:
        WeightsError: the place cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, partial, metadata={"talk3d": json.dumps(header)})
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
