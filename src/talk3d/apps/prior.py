"""The commands round models: `talk3d pretrain` makes a prior, `prior show` lets it be looked at, `export` hands an avatar to other programs."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
from tyro.conf import Positional, arg

from talk3d import presets
from talk3d.apps.build import checkpoint_beside, place_and_save, remove_checkpoints
from talk3d.apps.commands import AvatarInput, Device, Input, Output, check_input, check_output, check_prior, resolve_device
from talk3d.apps.terminal import Display
from talk3d.errors import ConfigError
from talk3d.io.weights import load_avatar, load_prior
from talk3d.stages.export import CARD, export_mesh, export_onnx
from talk3d.stages.pretrain import PretrainConfig, pretrain
from talk3d.stages.show import ShowConfig, show_prior
from talk3d.types import Progress

ALL_SIZES = {"tiny": presets.TINY, "builtin256": presets.BUILTIN256, "ffhq512": presets.FFHQ512}
Folder = Annotated[Path | None, arg(metavar="FOLDER")]
File = Annotated[Path | None, arg(metavar="FILE")]
_PRETRAIN_DEFAULTS, _SHOW_DEFAULTS = PretrainConfig(), ShowConfig()


@contextlib.contextmanager
def recorded(progress: Progress, folder: Path | None) -> Iterator[Progress]:
    """Hand on what progress hears, and write its values to TensorBoard's event files if there is a folder for them.

    Raises:
        ConfigError: a folder is given and the extra `tensorboard` is not installed.
    """
    if folder is None:
        yield progress
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("--tensorboard needs tensorboard: pip install 'talk3d[tensorboard]', or leave it out") from error
    with SummaryWriter(str(folder)) as writer:

        def both(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(f"{stage}/{name}", value, step)
            progress(stage, step, total, values)

        yield both


@contextlib.contextmanager
def together(device: str) -> Iterator[bool]:
    """Join the other processes that torchrun started, if there are any, and say whether this is the first, which writes and reports."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield True
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def pretrain_prior(
    dataset: Annotated[Input, arg(metavar="DATASET")],
    /,
    out: Output,
    config: Annotated[PretrainConfig, arg(name="")] = _PRETRAIN_DEFAULTS,
    start: Annotated[str, arg(metavar="tiny|builtin256|ffhq512|builtin|PATH")] = "builtin256",
    sheets: Folder = None,
    tensorboard: Folder = None,
    device: Device = "auto",
    seed: int = 0,
) -> None:
    """Train a prior over heads on pictures of many people with known cameras.

    On several GPUs of one machine: torchrun --nproc-per-node 2 --no-python -- talk3d pretrain …

    Args:
        dataset: folder or zip in EG3D's layout: pictures (alpha is the foreground) and dataset.json with camera labels.
            Besides, where there are any: samples.npz (which pictures show one moment, one person), depth.npy (distances along their rays).
        out: the prior, a new file.
        config: in which way, how long and how hard to train.
        start: a preset, which the networks of a new prior follow; or a prior to go on from: a file, or the word builtin for the shipped one.
        sheets: pictures of heads, their depth and normals are written here while training goes on.
        tensorboard: losses are written here for TensorBoard.
        device: where to compute.
        seed: of all randomness.
    """
    check_input(dataset, "a data set folder or zip with dataset.json", folder=True)
    check_output(out, dataset, kind="prior")
    checkpoint = checkpoint_beside(out, dataset, config, start, seed, os.environ.get("WORLD_SIZE", "1"))
    used_device = resolve_device(device)
    with together(used_device) as first, Display() as display, recorded(display, tensorboard if first else None) as progress:
        prior = pretrain(
            dataset,
            config,
            start=ALL_SIZES[start] if start in ALL_SIZES else load_prior(start),
            device=used_device,
            seed=seed,
            progress=progress,
            checkpoint=checkpoint,
            sheets=sheets,
        )
        if not first:
            return
        place_and_save(prior, out, used_device)
    remove_checkpoints(out)
    print(f"{out}: next, talk3d prior show {out} -o FOLDER, or talk3d personalize CLIP -o PERSON --prior {out}")


def show(
    prior: Annotated[str, Positional, arg(metavar="builtin|PATH")],
    /,
    out: Output,
    config: Annotated[ShowConfig, arg(name="")] = _SHOW_DEFAULTS,
    device: Device = "auto",
    seed: int = 0,
) -> None:
    """Show what a prior knows: random people, one from all sides with depth and normals, an orbit, and a mesh.

    Args:
        prior: a prior's file, or the word builtin for the shipped one.
        out: a folder for grid.png, person.png, orbit.mp4 and mesh.glb.
        config: how much is shown.
        device: where to render.
        seed: which people.
    """
    check_prior(prior)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: give a folder as -o")
    check_output(out / "grid.png") if out.is_dir() else check_output(out)
    with Display() as display:
        written = show_prior(load_prior(prior), out, config, device=resolve_device(device), seed=seed, progress=display)
    print("\n".join(map(str, written)))


def export_avatar(avatar: AvatarInput, /, mesh: File = None, onnx: Folder = None, mesh_side: int = 256) -> None:
    """Hand an avatar to other programs: its head at rest as a mesh, or what renders a frame as ONNX graphs.

    Args:
        avatar: from `talk3d build` or `talk3d train`, or the word sample for the shipped one.
        mesh: the head with colours, .glb, .obj, .ply or .stl; needs talk3d[mesh].
        onnx: a folder for talker.onnx, renderer.onnx and avatar.json, which says what goes in and out; needs talk3d[onnx].
        mesh_side: cells a side of the cube in which the surface is looked for.
    """
    if mesh is None and onnx is None:
        raise ConfigError("nothing to export: give --mesh head.glb, --onnx FOLDER, or both")
    if str(avatar) != "sample":
        check_input(avatar, "an avatar, made by `talk3d build`")
    for out, marker in ((mesh, None), (onnx, CARD)):
        if out is not None:
            check_output(out, avatar, folder_with=marker)
    loaded = load_avatar(avatar)
    if mesh is not None:
        export_mesh(loaded, mesh, side=mesh_side)
        print(mesh)
    if onnx is not None:
        print("\n".join(map(str, export_onnx(loaded, onnx))))


COMMANDS: dict[str, Callable[..., None]] = {"show": show}
"""What follows `talk3d prior`."""
