"""Files of priors, persons and avatars: safetensors with their config and provenance in the header."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import talk3d
from talk3d.io.weights import config_from_json, config_to_json, load_strictly, load_tensors, save_tensors
from talk3d.models.avatar import Prior
from talk3d.models.generator import GeneratorConfig, TriplaneGenerator


def _halved(tensors: Mapping[str, Tensor], half: bool) -> dict[str, Tensor]:
    return {k: v.half() if half and v.is_floating_point() else v for k, v in tensors.items()}


def _header(kind: str, **content: Any) -> dict[str, Any]:
    return {"kind": kind, "talk3d": talk3d.__version__, **content}


def save_prior(prior: Prior, path: Path, *, half: bool = True) -> None:
    """Write a prior as one file.

    Raises:
        WeightsError: the place cannot be written.
    """
    tensors = _halved({f"generator.{k}": v for k, v in prior.generator.state_dict().items()}, half)
    if prior.face_template is not None:
        tensors["face_template"] = prior.face_template.float()
    header = _header("prior", config=config_to_json(prior.generator.config), w_std=prior.w_std, provenance=prior.provenance)
    save_tensors(path, tensors, header)


def load_prior(path: str | Path) -> Prior:
    """Read a prior; weights become float32.

    Raises:
        WeightsError: no such file, damaged, or no prior.
    """
    tensors, header = load_tensors(Path(path), "prior")
    generator = TriplaneGenerator(config_from_json(GeneratorConfig, header["config"], path))
    load_strictly(generator, {k.removeprefix("generator."): v for k, v in tensors.items() if k.startswith("generator.")}, path)
    generator.eval()
    return Prior(generator=generator, w_std=header["w_std"], face_template=tensors.get("face_template"), provenance=header["provenance"])
