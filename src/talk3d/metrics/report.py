"""What was measured, how it is defined and what could not be measured: one report as JSON, table rows and a page.

`MEASURES` is the one table of definitions; docs/measures.md is made from it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from talk3d.errors import ConfigError, MediaError
from talk3d.io.writing import whole
from talk3d.types import Waveform

SHEET_LABEL_PX = 14
"""Height of the line of text over each picture of a sheet."""
Better = Literal["higher", "lower", "as real", ""]
"""Which way is better; "as real" is better the nearer it is to the truth's column, "" says nothing of quality."""
ARROWS: dict[str, str] = {"higher": "↑", "lower": "↓", "as real": "≈", "": ""}
Row = Sequence[tuple[str, UInt8[np.ndarray, "h w 3"]]]
"""Labelled pictures of one size, side by side."""


@dataclass(frozen=True)
class Definition:
    """What a measure means."""

    unit: str
    better: Better
    meaning: str
    """One sentence that lets somebody else compute it."""


REGIONS = {
    "": "of the whole crop, rendered over the clip's background plate",
    "_face": "inside the box round the tracked face points, widened by face_margin of its larger side",
    "_person": "inside the person's soft matte",
    "_mask": "inside the outline of the face (tracked points of the real film)",
    "_mouth": "inside the box round the tracked lips, widened by a quarter of its larger side",
}
"""Where pictures are compared, by the ending of a measure's name."""
_SHIFT = "after a similarity fitted on rigid points, over the real inter-ocular distance; one detector on both films"
_HEADS = "tracked and true cameras of the held-out frames, one constant similarity of the head spaces fitted on training frames"
_OPENING = "(inner lips over outer eye corners)"
MEASURES: dict[str, Definition] = {
    **{
        f"psnr{end}": Definition("dB", "higher", f"mean over frames of 10 log10(1/MSE) {where}; MSE over its pixels only")
        for end, where in REGIONS.items()
    },
    **{
        f"ssim{end}": Definition("", "higher", f"mean over frames of the SSIM map, 11 by 11 Gaussian window of deviation 1.5, range 1, {where}")
        for end, where in REGIONS.items()
    },
    "ms_ssim": Definition("", "higher", "mean over frames of multi-scale SSIM of the whole crop, 5 scales with the published weights (torchmetrics)"),
    "lpips_alex": Definition("", "lower", "mean over frames of LPIPS 0.1 on AlexNet, RGB in [-1, 1], whole crop"),
    "lpips_vgg": Definition("", "lower", "the same on VGG16"),
    "fid": Definition(
        "", "lower", "Fréchet distance of Inception features, rendered against real held-out crops, no codec between; biased upward by few frames"
    ),
    "kid": Definition(
        "", "lower", "kernel distance of the same features, polynomial kernel of degree 3, mean over 50 draws of half the frames; unbiased"
    ),
    "lmd_lips": Definition("", "lower", f"mean distance of 40 lip points {_SHIFT}"),
    "lmd_face": Definition("", "lower", f"mean distance of all 468 face points {_SHIFT}"),
    "aue_lower": Definition("", "lower", "mean absolute difference of the 28 blendshapes of jaw, mouth and cheeks, rendered against real"),
    "aue_upper": Definition("", "lower", "mean absolute difference of the 23 blendshapes of brows, eyes, squints and nose, rendered against real"),
    "lse_d": Definition("", "lower", "SyncNet: least mean distance of lips and sound over shifts of ±15 frames"),
    "lse_c": Definition("", "higher", "SyncNet: median minus least of those mean distances"),
    "sync_offset": Definition("frames", "as real", "SyncNet: the shift of that least distance; positive: the sound comes late"),
    "csim": Definition("", "higher", "mean cosine of ArcFace embeddings of frame i, rendered against real, faces aligned by five points"),
    "likeness": Definition(
        "", "higher", "mean cosine of offline descriptors of the face (colours and places of face points) of frame i, rendered against real"
    ),
    "mouth_correlation": Definition("", "higher", f"Pearson's r of mouth opening {_OPENING}, rendered against real, one detector on both films"),
    "mouth_correlation_truth": Definition("", "higher", f"Pearson's r of mouth opening, detector on this film against the known truth {_OPENING}"),
    "mouth_gain": Definition("", "as real", "standard deviation of mouth opening over that of the real film; below 1: the mouth moves too little"),
    "mouth_lag": Definition(
        "ms",
        "as real",
        "shift within 0.4 s at which mouth opening (1 to 8 Hz) correlates best with the real film's; positive: late; nonsense where it hardly moves",
    ),
    "blink_correlation": Definition("", "higher", "Pearson's r of the lids' distance over the eye's width, mean of both eyes, rendered against real"),
    "pose_error": Definition(
        "deg", "lower", "mean angle between head rotations, rendered against real, from rigid face points by scaled orthography"
    ),
    "position_error": Definition("px", "lower", "mean distance of rigid face points, rendered against real, nothing aligned"),
    "jitter": Definition("px", "as real", "RMS second difference of rigid face points"),
    "flicker": Definition(
        "levels", "lower", "RMS over the face's pixels of how much the change from frame to frame differs from the real film's, 0…255"
    ),
    "flicker_background": Definition("levels", "as real", "RMS change from frame to frame of pixels that are never the person's, 0…255"),
    "silence_motion": Definition(
        "px", "as real", "RMS motion of lip points about their mean in spans of silence of 0.4 s or more, ends cut, head motion taken out"
    ),
    "silence_motion_made": Definition(
        "px", "lower", "RMS motion of lip points in 1 s of silence after speech, blink and pose held still, only the sound given"
    ),
    "render_time": Definition("ms", "lower", "mean time to render a frame in batches of batch_size on the named device, the first batch left out"),
    "memory": Definition("MiB", "lower", "largest memory: of the GPU's tensors on CUDA, else of the whole process until then"),
    "camera_rotation": Definition("deg", "lower", f"mean angle between {_HEADS}"),
    "camera_reprojection": Definition("px", "lower", f"RMS distance in the crop of points round the head between {_HEADS}"),
    "novel_psnr": Definition(
        "dB", "higher", "mean over unseen cameras and frames of PSNR inside the union of rendered and true matte, before the film's own background"
    ),
    "novel_psnr_*": Definition("dB", "higher", "the same at one camera, yaw and pitch in degrees"),
    "novel_psnr_crop_*": Definition("dB", "higher", "PSNR of the whole crop at one unseen camera"),
    "novel_ssim": Definition("", "higher", "SSIM inside the same union, all unseen cameras"),
    "orbit_likeness": Definition(
        "", "higher", "least over ±15° and ±30° of yaw of the mean cosine of `likeness` descriptors, turned against frontal render of one moment"
    ),
    "orbit_likeness_*": Definition("", "higher", "the same at one yaw in degrees"),
    "orbit_csim": Definition("", "higher", "the same with ArcFace"),
    "orbit_found": Definition("", "higher", "share of the orbit's pictures in which the detector finds a face"),
    "orbit_pose_error": Definition("deg", "lower", "mean angle between the head's turn seen in those pictures and the camera's"),
}
"""Every measure by its name; a star stands for what a camera is called."""


def definition_of(name: str) -> Definition:
    """Return the definition of a measure, found by its longest pattern."""
    stars = sorted((key for key in MEASURES if key.endswith("*") and name.startswith(key[:-1])), key=len)
    return MEASURES[name if name in MEASURES or not stars else stars[-1]]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number with its meaning, or the reason why there is none."""

    name: str
    value: float | None
    """None where it was not measured."""
    unit: str
    better: Better
    definition: str
    num_frames: int
    """How many frames, or other single values, it stands on."""
    num_missed: int = 0
    """Frames left out because the face was not found."""
    needs: str = ""
    """What is missing, where there is no value."""

    @property
    def number(self) -> str:
        """The value without its unit, a dash where there is none."""
        if self.value is None:
            return "-"
        return "0" if abs(self.value) < 1e-6 else f"{self.value:.4g}" if abs(self.value) < 1000 else f"{self.value:.0f}"

    def __str__(self) -> str:
        """Write the value with its unit, or why there is none."""
        return f"not measured (needs {self.needs})" if self.value is None else f"{self.number} {self.unit}".rstrip()


def measure(name: str, values: Sequence[float] | np.ndarray | float, *, num_missed: int = 0, needs: str = "") -> Measure:
    """Make a measure: the mean of per-frame values that are numbers, or one value.

    Args:
        name: one of `MEASURES`.
        values: one number per frame (nan: nothing to measure there), or a number already taken over frames.
        num_missed: frames without a face.
        needs: what is missing if no value is finite.
    """
    meaning = definition_of(name)
    numbers = np.atleast_1d(np.asarray(values, np.float64))
    finite = numbers[np.isfinite(numbers)]
    return Measure(
        name=name,
        value=float(finite.mean()) if len(finite) else None,
        unit=meaning.unit,
        better=meaning.better,
        definition=meaning.meaning,
        num_frames=len(finite),
        num_missed=num_missed,
        needs="" if len(finite) else needs or "frames where it is defined",
    )


@dataclass(frozen=True, kw_only=True)
class Films:
    """Films of the same moments, to be shown side by side."""

    pictures: Mapping[str, UInt8[np.ndarray, "t h w 3"]]
    """The real one first."""
    fps: float
    waveform: Waveform


@dataclass(frozen=True, kw_only=True)
class Report:
    """All measures of one or several films of the same moments; columns share their rows."""

    columns: Mapping[str, Sequence[Measure]]
    """The avatar first, then its controls; or, in a comparison, the competitors, the best one first."""
    facts: Mapping[str, Any]
    """What was compared: versions, frames, where the driving tokens came from, what the clip's check found."""
    pictures: Mapping[str, Sequence[Row]] = field(default_factory=dict, repr=False)
    """Pictures worth a look, by heading: rows of one size."""
    series: Mapping[str, Mapping[str, Float[np.ndarray, " t"]]] = field(default_factory=dict, repr=False)
    """Curves over the frames by heading and name; nan where nothing is known."""
    films: Films | None = field(default=None, repr=False)

    @property
    def measures(self) -> Sequence[Measure]:
        """Of the first column."""
        return next(iter(self.columns.values()))

    def find(self, name: str, column: str | None = None) -> Measure | None:
        """Return the measure of a column, by default the first one, or None if it has no such measure."""
        chosen = self.measures if column is None else self.columns[column]
        return next((entry for entry in chosen if entry.name == name), None)

    def value(self, name: str, column: str | None = None) -> float | None:
        """Return a measure's value, None where it was not measured.

        Args:
            name: of the measure.
            column: the first one by default.

        Raises:
            ConfigError: there is no measure of this name.
        """
        entry = self.find(name, column)
        if entry is None:
            raise ConfigError(f"the report has no measure {name!r}: choose one of {', '.join(entry.name for entry in self.measures)}")
        return entry.value

    @property
    def names(self) -> list[str]:
        """Of all measures of all columns, in order."""
        return list(dict.fromkeys(entry.name for column in self.columns.values() for entry in column))

    def rows(self) -> list[tuple[str, ...]]:
        """Return rows for a table in a terminal: name, better, each column's value, how many values it stands on; unmeasured rows are left out."""
        found = []
        for name in self.names:
            entries = [self.find(name, column) for column in self.columns]
            if any(entry is not None and entry.value is not None for entry in entries):
                first = next(entry for entry in entries if entry is not None)
                unit = f" ({first.unit})" if first.unit else ""
                found.append((name + unit, ARROWS[first.better], *("" if one is None else one.number for one in entries), _frames(first)))
        return found

    def gaps(self) -> dict[str, list[str]]:
        """Return what is missing, and the measures that the first column lacks for it."""
        found: dict[str, list[str]] = {}
        for entry in self.measures:
            if entry.value is None:
                found.setdefault(entry.needs, []).append(entry.name)
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values: facts, the first column's measures in full, all columns' values, and the curves."""
        measures = {entry.name: {key: value for key, value in asdict(entry).items() if key != "name"} for entry in self.measures}
        columns = {label: {entry.name: entry.value for entry in column} for label, column in self.columns.items()}
        return {"facts": _plain(self.facts), "measures": measures, "columns": columns, "series": _plain(self.series)}

    def save(self, path: str | Path) -> None:
        """Write the report: a page if the name ends in .html, else JSON and, beside it, its pictures with the ending .png.

        Each file appears only when it is whole.

        Raises:
            MediaError: the place cannot be written, or its name ends in .png.
        """
        path = Path(path)
        if path.suffix.lower() == ".png":
            raise MediaError(f"the report cannot be called {path}, which is the name of its pictures: give a name that ends in .json or .html")
        try:
            if path.suffix.lower() in (".html", ".htm"):
                from talk3d.metrics.page import page

                _write(path, page(self))
                return
            rows = [row for rows in self.pictures.values() for row in rows]
            if rows:
                picture = Image.fromarray(np.ascontiguousarray(contact_sheet(rows)))
                with whole(path.with_suffix(".png")) as partial:
                    picture.save(partial)
            _write(path, json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise MediaError(f"cannot write {path} ({error}): give a path in a folder that exists and can be written") from error


def place_of(name: str, ranking: Mapping[str, float]) -> int:
    """Return a competitor's place by its mean rank; equal ones share a place."""
    return 1 + sum(mean < ranking[name] for mean in ranking.values())


def _write(path: Path, text: str) -> None:
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _frames(entry: Measure) -> str:
    if entry.value is None:
        return "-"
    return f"{entry.num_frames}" + (f" ({entry.num_missed} missed)" if entry.num_missed else "")


def _plain(value: Any) -> Any:
    """Turn what a mapping of facts may hold into what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(round(item, 5)) for item in value.tolist()]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def contact_sheet(rows: Sequence[Row]) -> UInt8[np.ndarray, "H W 3"]:
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
