"""What was measured, how it is defined and what could not be measured: one report as JSON, table rows and a sheet of pictures."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from talk3d.errors import ConfigError, MediaError

SHEET_LABEL_PX = 14
"""Height of the line of text over each picture of a sheet."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number with its meaning, or the reason why there is none."""

    name: str
    value: float | None
    """None where it was not measured."""
    unit: str
    definition: str
    num_frames: int
    """How many frames the value stands on."""
    num_missed: int = 0
    """Frames left out because the face was not found."""
    needs: str = ""
    """What is missing, where there is no value."""

    def __str__(self) -> str:
        """Write the value with its unit, or why there is none."""
        if self.value is None:
            return f"not measured (needs {self.needs})"
        return f"{self.value:.4g} {self.unit}".rstrip() if abs(self.value) < 1000 else f"{self.value:.0f} {self.unit}".rstrip()


def measure(name: str, values: Sequence[float] | np.ndarray | float, unit: str, definition: str, *, num_missed: int = 0, needs: str = "") -> Measure:
    """Make a measure: the mean of per-frame values that are numbers, or one value.

    Args:
        name: short, lower case, with underscores.
        values: one number per frame (nan: nothing to measure there), or a number already taken over frames.
        unit: "dB", "px" or the like; empty for ratios.
        definition: one sentence that lets somebody else compute it.
        num_missed: frames without a face.
        needs: what is missing if no value is finite.
    """
    numbers = np.atleast_1d(np.asarray(values, np.float64))
    finite = numbers[np.isfinite(numbers)]
    if not len(finite):
        missing = needs or "frames where it is defined"
        return Measure(name=name, value=None, unit=unit, definition=definition, num_frames=0, num_missed=num_missed, needs=missing)
    return Measure(name=name, value=float(finite.mean()), unit=unit, definition=definition, num_frames=len(finite), num_missed=num_missed)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All measures of one avatar on one clip."""

    measures: tuple[Measure, ...]
    facts: Mapping[str, Any]
    """What was compared: versions, frames, where the driving tokens came from, what the clip's check found."""
    sheet: UInt8[np.ndarray, "h w 3"] | None = field(default=None, repr=False)
    """Pictures worth a look: real and rendered side by side."""

    def value(self, name: str) -> float | None:
        """Return a measure's value, None where it was not measured.

        Raises:
            ConfigError: there is no measure of this name.
        """
        for entry in self.measures:
            if entry.name == name:
                return entry.value
        raise ConfigError(f"the report has no measure {name!r}: choose one of {', '.join(entry.name for entry in self.measures)}")

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (name, value, frames) for a table in a terminal."""
        return [(entry.name, str(entry), _frames(entry)) for entry in self.measures]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values: facts, and measures by name."""
        measures = {entry.name: {key: value for key, value in asdict(entry).items() if key != "name"} for entry in self.measures}
        return {"facts": _plain(self.facts), "measures": measures}

    def save(self, path: str | Path) -> None:
        """Write the JSON to `path` and the sheet beside it with the ending .png; each appears only when it is whole.

        Raises:
            MediaError: the place cannot be written, or its name ends in .png.
        """
        path = Path(path)
        if path.suffix.lower() == ".png":
            raise MediaError(f"the report cannot be called {path}, which is the name of its pictures: give a name that ends in .json")
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            if self.sheet is not None:
                picture = Image.fromarray(np.ascontiguousarray(self.sheet))
                partial = path.with_name(f".{path.stem}.partial.png")
                picture.save(partial)
                os.replace(partial, path.with_suffix(".png"))
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            for partial in (path.with_name(f".{path.stem}.partial.png"), path.with_name(f".{path.name}.partial")):
                partial.unlink(missing_ok=True)
            raise MediaError(f"cannot write {path} ({error}): give a path in a folder that exists and can be written") from error


def _frames(entry: Measure) -> str:
    if entry.value is None:
        return "-"
    return f"{entry.num_frames} frames" + (f", {entry.num_missed} missed" if entry.num_missed else "")


def _plain(value: Any) -> Any:
    """Turn what a mapping of facts may hold into what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def contact_sheet(rows: Sequence[Sequence[tuple[str, UInt8[np.ndarray, "h w 3"]]]]) -> UInt8[np.ndarray, "H W 3"]:
    """Lay labelled pictures of one size out in rows, on dark grey.

    Args:
        rows: (label, picture) pairs; rows may differ in length.
    """
    side_h, side_w = rows[0][0][1].shape[:2]
    cell_h, cell_w = side_h + SHEET_LABEL_PX, side_w
    sheet = Image.new("RGB", (cell_w * max(len(row) for row in rows), cell_h * len(rows)), (32, 32, 32))
    draw = ImageDraw.Draw(sheet)
    for j, row in enumerate(rows):
        for i, (label, picture) in enumerate(row):
            draw.text((i * cell_w + 2, j * cell_h + 1), label, fill=(230, 230, 230))
            sheet.paste(Image.fromarray(np.ascontiguousarray(picture)), (i * cell_w, j * cell_h + SHEET_LABEL_PX))
    return np.asarray(sheet)
