"""Published checkpoints of other people's networks: tensors out, nothing of the file run."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from talk3d.errors import WeightsError


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a PyTorch checkpoint (.pth, .pt, .model): a dict of tensors, perhaps nested.

    Raises:
        WeightsError: the file is missing, damaged, or wants more than tensors and plain containers.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols that it may not know; it says so itself if it does not
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0][:120]
        raise WeightsError(f"{path} is no checkpoint that can be read safely ({reason}): fetch it again from its authors") from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path} holds a {type(state).__name__}, expected a dict of tensors: fetch it again from its authors")
    return state
