"""Which unfinished work a command may go on with: checkpoints are named by a fingerprint of everything they depend on."""

import dataclasses
import glob
import hashlib
import json
from pathlib import Path
from typing import Any

from talk3d import __version__


def fingerprint(*parts: Any) -> str:
    """Return a short hash of settings and inputs: equal parts, equal fingerprint.

    Args:
        parts: config dataclasses, plain values, and paths, which count with their content (a folder with its files' names, sizes and times).
    """
    digest = hashlib.sha256(__version__.encode())
    for part in parts:
        digest.update(b"\0")
        if isinstance(part, Path) and part.is_dir():
            states = [(str(file.relative_to(part)), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(part.rglob("*"))]
            digest.update(json.dumps(states).encode())
        elif isinstance(part, Path):
            digest.update(sha256_of(part).encode())
        elif dataclasses.is_dataclass(part) and not isinstance(part, type):
            digest.update(json.dumps([type(part).__name__, dataclasses.asdict(part)], default=str).encode())
        else:
            digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_beside(out: Path, *parts: Any) -> Path:
    """Return where work on `out` keeps its checkpoint; other inputs or settings get another place.

    Args:
        out: the file being made.
        parts: all that its content depends on, see `fingerprint`.
    """
    return out.with_name(f"{out.name}.{fingerprint(*parts)}.checkpoint")


def remove_checkpoints(out: Path) -> None:
    """Remove every checkpoint of `out`, once it is whole."""
    for checkpoint in out.parent.glob(f"{glob.escape(out.name)}.*.checkpoint"):
        checkpoint.unlink()
