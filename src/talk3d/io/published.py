"""Published checkpoints: torch files of any layout, and safetensors, read without running anything in them.

Objects that hold no weights (optimisers, schedulers) are read as inert nodes and dropped.
"""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from talk3d.errors import WeightsError
from talk3d.io.pickles import Node, read_pickle
from talk3d.io.torch_files import TENSOR_GLOBALS, VALUE_GLOBALS, Values, items_of, map_file, naming, read_archive, read_legacy

_ALLOWED = re.compile(rf"{TENSOR_GLOBALS}|{VALUE_GLOBALS}|torch\.storage\._load_from_bytes|torch\.optim\.\w+\.\w+")
_DROPPED = re.compile(r"torch\.optim\.\w+\.\w+")
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
        if bytes(data[8:9]) == b"{" and bytes(data[:1]) != b"\x80":
            return _read_safetensors(path)
        if bytes(data[:4]) == b"PK\3\4":
            root, values = read_archive(data, _ALLOWED)
        elif bytes(data[: len(_LEGACY_START)]) == _LEGACY_START:
            root, values = read_legacy(data, _ALLOWED)
        else:
            root, values = read_pickle(data, _ALLOWED).value, Values(2 * len(data) + 2**20)
        items = items_of(root)
        return {key: values.plain(value) for key, value in items.items() if not (isinstance(value, Node) and _DROPPED.fullmatch(value.name))}


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
