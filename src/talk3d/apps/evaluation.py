"""The commands `evaluate` and `compare`: how good avatars are, as a table, as JSON and as a page."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from talk3d.apps.commands import AvatarInput, ClipInput, Device, ModelFile, Output, check_input, check_output, resolve_device
from talk3d.apps.terminal import Display, duration, print_table
from talk3d.errors import ConfigError
from talk3d.io.clips import load_clip
from talk3d.io.weights import load_avatar
from talk3d.metrics.report import Report, place_of
from talk3d.models.avatar import Avatar
from talk3d.stages.compare import CompareConfig, compare
from talk3d.stages.evaluate import EvaluateConfig, evaluate

DEFAULTS, COMPARE_DEFAULTS = EvaluateConfig(), CompareConfig()
FILMS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"}
"""Endings of films; anything else is an avatar."""
WIDTH = 120
"""Characters in a line where nobody watches."""
ENDINGS = (".json", ".html", ".htm")


def evaluate_command(
    avatar: AvatarInput,
    clip: ClipInput,
    /,
    out: Output,
    config: Annotated[EvaluateConfig, arg(name="")] = DEFAULTS,
    truth: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    face_model: ModelFile = None,
    device: Device = "auto",
) -> None:
    """Measure an avatar on the end of a clip, which its training never saw.

    Args:
        avatar: from `talk3d build` or `talk3d train`, or the word sample for the shipped one.
        clip: of the same person; `talk3d build` keeps it in its .build folder.
        out: the report: .html for one page with plots and pictures, .json for numbers with a sheet of pictures beside it.
        config: what is measured.
        truth: folder of an invented person with truth.npz and the same moments seen from other cameras.
        face_model: MediaPipe's face_landmarker.task, if it is not in its usual place.
        device: where to render.
    """
    if str(avatar) != "sample":
        check_input(avatar, "an avatar, made by `talk3d build`")
    check_input(clip, "a clip, made by `talk3d track`", folder=True)
    check_report(out, Path(avatar), clip)
    with Display() as display:
        report = evaluate(
            load_avatar(avatar), load_clip(clip), config, truth=truth, face_model=face_model, device=resolve_device(device), progress=display
        )
    report.save(out)
    print_report(str(out), report)


def compare_command(
    competitors: Annotated[tuple[Path, ...], Positional],
    /,
    clip: Annotated[Path, arg(metavar="CLIP")],
    out: Output,
    config: Annotated[CompareConfig, arg(name="")] = COMPARE_DEFAULTS,
    face_model: ModelFile = None,
    device: Device = "auto",
) -> None:
    """Rank avatars, and films that other systems made of the same frames, on the held-out part of one clip.

    Args:
        competitors: avatars, and films of the clip's video: all of its frames or the held-out ones, of the source's size.
        clip: of the same person, from `talk3d track`.
        out: the report, .html or .json.
        config: what is compared.
        face_model: MediaPipe's face_landmarker.task, if it is not in its usual place.
        device: where to render.
    """
    for path in competitors:
        if str(path) != "sample":
            check_input(path, "an avatar or a film")
    check_input(clip, "a clip, made by `talk3d track`", folder=True)
    check_report(out, clip, *competitors)
    with Display() as display:
        report = compare(_named(competitors), load_clip(clip), config, face_model=face_model, device=resolve_device(device), progress=display)
    report.save(out)
    print_report(str(out), report)


def check_report(out: Path, *inputs: Path) -> None:
    """Refuse a place for a report where it cannot go, or that it cannot be.

    Raises:
        ConfigError: see `check_output`; or the name has another ending.
    """
    check_output(out, *inputs)
    if out.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{out} has the ending {out.suffix!r}, a report is .html or .json: give another -o")


def _named(paths: tuple[Path, ...]) -> dict[str, Avatar | Path]:
    """Competitors by their shortest names that differ."""
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise ConfigError(f"the same competitor is given twice among {', '.join(names)}: give each once")
    return {name: path if path.suffix.lower() in FILMS else load_avatar(path) for name, path in zip(names, paths, strict=True)}


def print_report(title: str, report: Report, console: Console | None = None) -> None:
    """Print the table of a report, then what was not measured and why, then where the driving tokens came from.

    Args:
        title: of the table.
        report: with one or more columns.
        console: where to; the standard output if None.
    """
    if console is None:
        console = Console()
        console = console if console.is_terminal else Console(width=WIDTH)
    print_table(title, ("measure", "", *report.columns, "frames"), report.rows(), console)
    for needs, names in report.gaps().items():
        console.print(f"{', '.join(names)}: not measured (needs {needs})", highlight=False, markup=False)
    for token, source in report.facts.get("driven_by", {}).items():
        console.print(f"driven by  {token}: {source}", highlight=False, markup=False)
    ranking = report.facts.get("ranking", {})
    for name, mean in ranking.items():
        place = place_of(name, ranking)
        console.print(f"{place}. {name} (mean rank {mean:.2f})", highlight=False, markup=False)
    if report.facts.get("ranked_by"):
        console.print(f"ranked by  {', '.join(report.facts['ranked_by'])}", highlight=False, markup=False)
    console.print(
        f"↑ higher is better, ↓ lower, ≈ the nearer to the truth's column; took {duration(report.facts.get('seconds', 0))}", highlight=False
    )
