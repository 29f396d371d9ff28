"""How long work reports where it is, without knowing who listens (a terminal, a log, a test)."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """A listener that long-running stages call after every step."""

    def __call__(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        """Hear that `step` of `total` (0: unknown) of `stage` is done; `values` are current losses or counts."""
        ...


def silent(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
    """Listen to nothing: the default `Progress`."""
