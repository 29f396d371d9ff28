"""Export: an avatar for other programs, as a mesh of the head or as ONNX graphs."""

import importlib
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.errors import ConfigError
from talk3d.io.writing import whole
from talk3d.models.avatar import Avatar
from talk3d.models.baked import BakedDeltaplane
from talk3d.models.renderer import GuidedRenderer
from talk3d.models.superresolution import BakedSuperresolution
from talk3d.stages.show import extract_mesh, write_mesh
from talk3d.types import Camera, Driving

MESH_FORMATS = (".glb", ".obj", ".ply", ".stl")
OPSET = 18
"""Of the ONNX graphs."""
TALKER, RENDERER, CARD = "talker.onnx", "renderer.onnx", "avatar.json"
"""The files of an exported avatar."""


class _Talker(nn.Module):
    """What is heard and done in a moment, to planes."""

    def __init__(self, avatar: Avatar) -> None:
        super().__init__()
        self.conditioner = avatar.conditioner
        self.deltaplane = BakedDeltaplane(avatar.predictor, avatar.personalized.triplane, torch.float32)

    def forward(
        self,
        audio: Float[Tensor, "1 n f w"],
        blink: Float[Tensor, "1 1"],
        head_pose: Float[Tensor, "1 3"],
        anchors: Float[Tensor, "1 6"],
        upper_face: Float[Tensor, "1 5"],
    ) -> Float[Tensor, "1 3 c s s"]:
        driving = Driving(audio=audio, blink=blink, head_pose=head_pose, anchors=anchors, upper_face=upper_face)
        tokens = self.conditioner(driving)
        return torch.stack(self.deltaplane(tokens, self.conditioner.heard_coefficients(tokens, driving)), 1)


class _Renderer(nn.Module):
    """Planes and a camera, to the picture over black with its opacity: RGBA in [0, 1]."""

    def __init__(self, avatar: Avatar) -> None:
        super().__init__()
        person = avatar.personalized
        self.render = GuidedRenderer(person.renderer, person.occupied, torch.float32)
        self.render.compact = False
        self.enlarge = BakedSuperresolution(person.renderer.superresolution, person.w, torch.float32)

    def forward(
        self,
        planes: Float[Tensor, "1 3 c s s"],
        cam2world: Float[Tensor, "1 4 4"],
        intrinsics: Float[Tensor, "1 3 3"],
        head_pose: Float[Tensor, "1 3"] | None = None,
    ) -> Tensor:
        features, alpha, _ = self.render(list(planes.unbind(1)), Camera(cam2world=cam2world, intrinsics=intrinsics), head_pose)
        image, opacity = self.enlarge(features, alpha)
        return torch.cat([(image + 1) / 2, opacity], 1).clamp(0, 1)


def export_mesh(avatar: Avatar, path: Path, *, side: int = 256) -> None:
    """Write the surface of the avatar's head at rest, with vertex colours, y up, the face along +z: in scene units, .glb in metres.

    Args:
        avatar: whose head.
        path: ends in .glb, .obj, .ply or .stl.
        side: cells a side of the cube in which the surface is looked for.

    Raises:
        ConfigError: the path has another ending, or the extra `mesh` is not installed.
    """
    if path.suffix.lower() not in MESH_FORMATS:
        raise ConfigError(f"{path} is no mesh: give a path that ends in {', '.join(MESH_FORMATS)}")
    person = avatar.personalized
    with torch.no_grad():
        mesh = extract_mesh(person.renderer, person.triplane, side)
    write_mesh(mesh, path)


def export_onnx(avatar: Avatar, folder: Path) -> list[Path]:
    """Write two ONNX graphs of one frame each, and a card that says what goes in and out, and return their paths.

    `talker.onnx`: speech features around a frame, blink, head pose, place, brows and gaze to planes. `renderer.onnx`: planes, a camera and, where
    necks bend, the head pose to a picture over black with its opacity. All shapes are fixed. They do what the baked avatar does on the CPU in
    float32.

    Args:
        avatar: is moved to the CPU.
        folder: made if it is not there.

    Raises:
        ConfigError: the extra `onnx` is not installed.
    """
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"ONNX graphs need {name}: pip install 'talk3d[onnx]'") from error
    avatar = avatar.to("cpu").eval()
    folder.mkdir(parents=True, exist_ok=True)
    channels, config = avatar.config.conditioning.audio_channels, avatar.personalized.renderer.renderer_config
    done = {name: torch.zeros(1, width) for name, width in (("blink", 1), ("head_pose", 3), ("anchors", 6), ("upper_face", 5))}
    heard = {"audio": torch.zeros(1, 8, 16, channels), **done}
    camera = avatar.performance.cameras.to("cpu")[:1]
    with torch.no_grad():
        talker, renderer = _Talker(avatar).eval(), _Renderer(avatar).eval()
        seen = {"planes": talker(**heard), "cam2world": camera.cam2world, "intrinsics": camera.intrinsics}
        seen |= {} if config.rest_pose is None else {"head_pose": done["head_pose"]}
        _write_graph(talker, heard, "planes", folder / TALKER)
        _write_graph(renderer, seen, "rgba", folder / RENDERER)
    card = {
        "opset": OPSET,
        "fps": avatar.fps,
        "audio_source": avatar.audio_source,
        "box_warp": config.box_warp,
        TALKER: {"inputs": {name: list(x.shape) for name, x in heard.items()}, "outputs": {"planes": list(seen["planes"].shape)}},
        RENDERER: {
            "inputs": {name: list(x.shape) for name, x in seen.items()},
            "outputs": {"rgba": [1, 4, avatar.resolution, avatar.resolution]},
            "over": "rgb + (1 - alpha) * background, all in [0, 1]",
        },
    }
    with whole(folder / CARD) as partial:
        partial.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return [folder / name for name in (TALKER, RENDERER, CARD)]


def _write_graph(module: nn.Module, inputs: dict[str, Tensor], output: str, path: Path) -> None:
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # which speak of themselves
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=[output],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            optimize=False,  # runtimes do that when they load
            custom_translation_table=_translations(),
        )
    assert program is not None
    with whole(path) as partial:
        program.save(partial)


def _translations() -> dict[Any, Any]:
    """Return what the exporter does not know, in operators of the standard: bags, sorted search, running products."""
    op: Any = importlib.import_module("onnxscript").opset18
    aten = torch.ops.aten

    def bag(weight: Any, indices: Any, offsets: Any, *rest: Any) -> Any:
        """Sum weighted rows, in bags of one size."""
        bags = int(offsets.shape[0])
        size = int(indices.shape[0]) // bags
        rows = op.Gather(weight, op.Reshape(indices, op.Constant(value_ints=[bags, size])))
        shares = op.Reshape(rest[3], op.Constant(value_ints=[bags, size, 1]))
        return op.ReduceSum(op.Mul(rows, shares), op.Constant(value_ints=[1]), keepdims=0), offsets, offsets, offsets

    def search(edges: Any, values: Any, **_: Any) -> Any:
        """Count the edges that are not above each value."""
        below = op.LessOrEqual(op.Unsqueeze(edges, [-2]), op.Unsqueeze(values, [-1]))
        return op.ReduceSum(op.Cast(below, to=7), op.Constant(value_ints=[-1]), keepdims=0)

    def product(x: Any, dim: Any, **_: Any) -> Any:
        """Multiply positive numbers up."""
        return op.Exp(op.CumSum(op.Log(x), dim))

    return {aten.embedding_bag.padding_idx: bag, aten.searchsorted.Tensor: search, aten.cumprod.default: product}
