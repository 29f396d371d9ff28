"""Published checkpoints: torch files of any layout, and safetensors, read without running anything in them; and their conversion to our files.

Objects that hold no weights (optimisers, schedulers) are read as inert nodes and dropped.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from talk3d.errors import WeightsError
from talk3d.io.eg3d import import_eg3d
from talk3d.io.pickles import Node, read_pickle
from talk3d.io.torch_files import TENSOR_GLOBALS, VALUE_GLOBALS, Values, items_of, map_file, naming, read_archive, read_legacy
from talk3d.io.weights import config_to_json, load_strictly, load_tensors, make_header, save_prior, save_tensors
from talk3d.models.avatar import RELEASED, Prior
from talk3d.models.conditioning import Conditioner
from talk3d.models.deltaplane import DeltaplanePredictor
from talk3d.models.generator import TriplaneGenerator
from talk3d.ops.geometry import intrinsics_matrix, look_at
from talk3d.types import Camera, PlaneAxes

_ALLOWED = re.compile(rf"{TENSOR_GLOBALS}|{VALUE_GLOBALS}|torch\.storage\._load_from_bytes|torch\.optim\.(adam\.Adam|lr_scheduler\.StepLR)")
_DROPPED = {"torch.optim.adam.Adam", "torch.optim.lr_scheduler.StepLR"}
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file of weights as plain containers: torch archives and older torch files, plain pickles of tensors, safetensors.

    Optimisers and schedulers that were saved as whole objects are dropped.

    Raises:
        WeightsError: no such file, damaged, or it wants anything but tensors and plain containers; the message names it.
    """
    path = Path(path)
    with naming(path):
        data = map_file(path)
        if bytes(data[8:9]) == b"{" and int.from_bytes(data[:8], "little") <= len(data):
            return _read_safetensors(path)
        if bytes(data[:4]) == b"PK\3\4":
            root, values = read_archive(data, _ALLOWED)
        elif bytes(data[: len(_LEGACY_START)]) == _LEGACY_START:
            root, values = read_legacy(data, _ALLOWED)
        else:
            root, values = read_pickle(data, _ALLOWED).value, Values(2 * len(data) + 2**20)
        items = items_of(root)
        return {key: values.plain(value) for key, value in items.items() if not (isinstance(value, Node) and value.name in _DROPPED)}


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a file that holds tensors by name and nothing else; for nested files see `read_checkpoint`.

    Raises:
        WeightsError: no such file, damaged, unsafe, or it holds other things than tensors.
    """
    checkpoint = read_checkpoint(path)
    others = [str(key) for key, value in checkpoint.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise WeightsError(f"{path} holds {', '.join(sorted(others)[:5])} beside tensors: give a file that holds the tensors of one network by name")
    return checkpoint


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"is damaged or no safetensors file ({error}): get it again") from error


@dataclass(frozen=True, kw_only=True)
class Talk3DParts:
    """What a checkpoint of Talk3D holds for any person: how condition tokens are made, and how they move the planes."""

    conditioner: Conditioner
    predictor: DeltaplanePredictor
    superresolution: Mapping[str, Tensor]
    """Of the generator, tuned with the rest, without prefix (`block0...`); empty where the checkpoint has none."""
    restoration: Mapping[str, Tensor]
    """GFPGAN, tuned with the rest; empty where the checkpoint has none."""
    provenance: Mapping[str, Any]


def import_talk3d(path: str | Path) -> Talk3DParts:
    """Read a checkpoint of Talk3D.

    Raises:
        WeightsError: no such file, damaged, unsafe, or none of Talk3D's.
    """
    checkpoint = read_checkpoint(path)
    with naming(path):
        tensors = {f"predictor.{name}": tensor for name, tensor in _part(checkpoint, "deltaplane_predictor").items()}
        for part in ("audio_net", "audio_att_net", "blink_encoder", "camera_encoder"):
            tensors |= {f"conditioner.{part}.{name}": tensor for name, tensor in _part(checkpoint, part).items()}
        tensors["conditioner.null_vector"] = checkpoint["null_vector"]
        pictures = _part(checkpoint, "superresolution") if "superresolution" in checkpoint else {}
        if pictures:
            kind = "restoration" if any(name.startswith("stylegan_decoder.") for name in pictures) else "superresolution"
            if kind == "superresolution" and not any(name.startswith("block0.") for name in pictures):
                raise WeightsError("its superresolution is neither EG3D's nor GFPGAN: this checkpoint cannot be used")
            tensors |= {f"{kind}.{name}": tensor for name, tensor in pictures.items()}
        provenance = {name: checkpoint[name] for name in ("epoch", "iter") if isinstance(checkpoint.get(name), int)}
        return _assemble(tensors, provenance)


def load_talk3d(path: str | Path) -> Talk3DParts:
    """Read the file that `import_checkpoint` made of a checkpoint of Talk3D.

    Raises:
        WeightsError: no such file, damaged, or of another kind.
    """
    tensors, header = load_tensors(Path(path), "published")
    with naming(path):
        return _assemble(tensors, header["provenance"])


def import_checkpoint(path: str | Path, out: str | Path, *, plane_axes: PlaneAxes | None = None) -> dict[str, Any]:
    """Convert a published file to one of ours, exactly: a generator of EG3D to a prior, a checkpoint of Talk3D to a file that `load_talk3d` reads.

    Args:
        path: the published file.
        out: the new one.
        plane_axes: the order of the planes' axes of a generator; None takes what the file says, and "released" if it says nothing.

    Returns:
        What was found, as plain values: kind, source, its sha256, the number of parameters, and sizes.

    Raises:
        WeightsError: the file is missing, damaged, unsafe, or of neither kind; or `out` cannot be written.
    """
    path = Path(path)
    with naming(path):
        data = map_file(path)
        is_pickle = bytes(data[:1]) == b"\x80" and bytes(data[: len(_LEGACY_START)]) != _LEGACY_START
    found = import_eg3d(path, plane_axes=plane_axes) if is_pickle else import_talk3d(path)
    source = {"source": path.name, "source_sha256": hashlib.sha256(data).hexdigest()}
    if isinstance(found, Talk3DParts):
        parts = found
        tensors = _flat(parts)
        header = make_header("published", config=config_to_json(RELEASED), provenance={**parts.provenance, **source})
        save_tensors(Path(out), tensors, header)
        held = [name for name in ("superresolution", "restoration") if getattr(parts, name)]
        return {"kind": "Talk3D", **source, "parameters": sum(tensor.numel() for tensor in tensors.values()), "also": held}
    generator, renderer = found, found.config.renderer
    prior = Prior(generator=generator, w_std=spread_of(generator), provenance={**source, "plane_axes": renderer.plane_axes})
    save_prior(prior, Path(out), exact=True)
    count = sum(parameter.numel() for parameter in generator.parameters())
    side = renderer.superresolution.output_side
    return {"kind": "prior", **source, "parameters": count, "plane_axes": renderer.plane_axes, "pixels": side, "w_std": prior.w_std}


def spread_of(generator: TriplaneGenerator, count: int = 10_000) -> float:
    """Return the root mean square of one component of w's distance from the mean, over random latents seen from the front."""
    latents = torch.from_numpy(np.random.RandomState(123).randn(count, generator.config.z_dim)).float()
    front = Camera(cam2world=look_at(torch.zeros(1, 3), 2.5, (0.0, 0.0, 0.2)), intrinsics=intrinsics_matrix(3.5)[None]).to_label()
    label = front if generator.config.c_dim else None
    with torch.no_grad():
        mapped = [generator.mapping(z, None if label is None else label.expand(len(z), -1))[:, 0] for z in latents.split(500)]
    return float(torch.cat(mapped).std(0, correction=0).square().mean().sqrt())


def _part(checkpoint: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return one network's tensors by name."""
    part = checkpoint.get(name)
    if not isinstance(part, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in part.items()):
        raise WeightsError(f"it lacks the tensors of {name}: give a checkpoint of Talk3D, or the pickle of an EG3D generator")
    return part


def _assemble(tensors: dict[str, Tensor], provenance: Mapping[str, Any]) -> Talk3DParts:
    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    conditioner, predictor = Conditioner(RELEASED.conditioning), DeltaplanePredictor(RELEASED.deltaplane)
    load_strictly(conditioner, below("conditioner."), "its conditioning")
    load_strictly(predictor, below("predictor."), "its deltaplane predictor")
    pictures, restoration = below("superresolution."), below("restoration.")
    return Talk3DParts(
        conditioner=conditioner.eval(), predictor=predictor.eval(), superresolution=pictures, restoration=restoration, provenance=provenance
    )


def _flat(parts: Talk3DParts) -> dict[str, Tensor]:
    flat = {f"conditioner.{name}": tensor for name, tensor in parts.conditioner.state_dict().items()}
    flat |= {f"predictor.{name}": tensor for name, tensor in parts.predictor.state_dict().items()}
    flat |= {f"superresolution.{name}": tensor for name, tensor in parts.superresolution.items()}
    return flat | {f"restoration.{name}": tensor for name, tensor in parts.restoration.items()}
