"""Files of priors, persons and avatars: safetensors with their config and provenance in the header, weights as float16."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import talk3d
from talk3d.io.weights import config_from_json, config_to_json, load_strictly, load_tensors, save_tensors
from talk3d.models.avatar import Avatar, AvatarConfig, Performance, PersonalizedGenerator, Prior
from talk3d.models.generator import GeneratorConfig, TriplaneGenerator
from talk3d.models.renderer import RendererConfig
from talk3d.types import Camera

ASSETS = Path(__file__).parent.parent / "assets"
BUILTIN_PRIOR = ASSETS / "prior.safetensors"
SAMPLE_AVATAR = ASSETS / "sample_avatar.safetensors"


def _halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}


def _header(kind: str, **content: Any) -> dict[str, Any]:
    return {"kind": kind, "talk3d": talk3d.__version__, **content}


def save_prior(prior: Prior, path: Path) -> None:
    """Write a prior as one file.

    Raises:
        WeightsError: the place cannot be written.
    """
    header = _header("prior", config=config_to_json(prior.generator.config), w_std=prior.w_std, provenance=prior.provenance)
    save_tensors(path, _halved(prior.generator.state_dict()), header)


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
    header = _header("person", config=config_to_json(person.renderer.renderer_config), provenance=person.provenance)
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
    header = _header(
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
