"""talk3d: a short video of one person talking in, a talking 3D avatar out.

Public names are found on first use, so that importing the package, and `talk3d --help`, cost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from talk3d.errors import ConfigError as ConfigError
    from talk3d.errors import MediaError as MediaError
    from talk3d.errors import ShapeError as ShapeError
    from talk3d.errors import Talk3DError as Talk3DError
    from talk3d.errors import TrackingError as TrackingError
    from talk3d.errors import WeightsError as WeightsError
    from talk3d.io.clips import load_clip as load_clip
    from talk3d.io.eg3d import import_eg3d as import_eg3d
    from talk3d.io.weights import load_avatar as load_avatar
    from talk3d.io.weights import load_person as load_person
    from talk3d.io.weights import load_prior as load_prior
    from talk3d.ops.geometry import orbit as orbit
    from talk3d.stages.animate import animate as animate
    from talk3d.stages.check import check as check
    from talk3d.stages.compare import compare as compare
    from talk3d.stages.evaluate import evaluate as evaluate
    from talk3d.stages.personalize import personalize as personalize
    from talk3d.stages.pretrain import pretrain as pretrain
    from talk3d.stages.track import track as track
    from talk3d.stages.train import train as train
    from talk3d.types import Camera as Camera

__version__ = "0.1.0"

_HOMES = {
    "Camera": "talk3d.types",
    "ConfigError": "talk3d.errors",
    "MediaError": "talk3d.errors",
    "ShapeError": "talk3d.errors",
    "Talk3DError": "talk3d.errors",
    "TrackingError": "talk3d.errors",
    "WeightsError": "talk3d.errors",
    "animate": "talk3d.stages.animate",
    "check": "talk3d.stages.check",
    "compare": "talk3d.stages.compare",
    "evaluate": "talk3d.stages.evaluate",
    "import_eg3d": "talk3d.io.eg3d",
    "load_avatar": "talk3d.io.weights",
    "load_clip": "talk3d.io.clips",
    "load_person": "talk3d.io.weights",
    "load_prior": "talk3d.io.weights",
    "orbit": "talk3d.ops.geometry",
    "personalize": "talk3d.stages.personalize",
    "pretrain": "talk3d.stages.pretrain",
    "track": "talk3d.stages.track",
    "train": "talk3d.stages.train",
}

__all__ = [
    "Camera",
    "ConfigError",
    "MediaError",
    "ShapeError",
    "Talk3DError",
    "TrackingError",
    "WeightsError",
    "__version__",
    "animate",
    "check",
    "compare",
    "evaluate",
    "import_eg3d",
    "load_avatar",
    "load_clip",
    "load_person",
    "load_prior",
    "orbit",
    "personalize",
    "pretrain",
    "track",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'talk3d' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported yet or not."""
    return sorted({*globals(), *_HOMES})
