"""What is done with a video: `check` and `track`, the report as a table and as one page of HTML, and a refusal that `--yes` overrides."""

import html
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import arg

from talk3d.apps.commands import ModelFile, Output, VideoInput, check_input, check_output
from talk3d.apps.terminal import Display, duration, note_findings
from talk3d.errors import ConfigError, MediaError, TrackingError
from talk3d.io.catalogue import sha256_of
from talk3d.io.writing import whole
from talk3d.metrics.page import STYLE, plot
from talk3d.stages.check import CheckConfig, check
from talk3d.stages.track import TrackConfig, track

DEFAULTS, TRACK_DEFAULTS = CheckConfig(), TrackConfig()
COLOURS = {"ok": "#2a7d46", "warning": "#b06a00", "refuse": "#b3261e"}
WORDS = {"ok": "ok", "warning": "warning", "refuse": "refused"}
PLOTS = (
    ("Head turns (°)", "time_s", (("yaw_deg", "yaw"), ("pitch_deg", "pitch")), "s"),
    ("Lips apart (distances between the eyes)", "time_s", (("mouth", "lips"),), "s"),
    ("Eyes shut", "time_s", (("blink", "blink"),), "s"),
    ("Loudness (dB)", "time_s", (("level_db", "sound"),), "s"),
    ("Sound against lips: correlation by shift", "lag_ms", (("lag_correlation", "correlation"),), "ms late"),
)
"""Title, across, up with names, unit across."""


def print_report(title: str, report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print verdict and table.

    Args:
        title: what was checked.
        report: a `metrics.capture.CaptureReport`.
        console: where to; the standard output if None.
    """
    table = Table(title=escape(f"{title}: {report['verdict']}"), title_justify="left", title_style="bold", show_lines=True)
    for column in ("", "found", "", "what to do"):
        table.add_column(column, overflow="fold")
    for line in report["lines"]:
        word = f"[{COLOURS[line['judgement']]}]{WORDS[line['judgement']]}"
        table.add_row(line["what"], escape(line["found"]), word, escape(line["advice"]))
    (console or Console()).print(table)


def write_report(title: str, report: Mapping[str, Any], path: Path) -> None:
    """Write the report as a page, or as JSON if the name ends so.

    Args:
        title: what was checked.
        report: a `metrics.capture.CaptureReport`.
        path: ends in .html or .json.

    Raises:
        MediaError: it cannot be written.
    """
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n" if path.suffix == ".json" else page(title, report)
    try:
        with whole(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MediaError(f"cannot write {path} ({error.strerror}): give a path in a folder that exists and that you may write to") from error


def page(title: str, report: Mapping[str, Any]) -> str:
    """The report as one page of HTML that needs nothing else.

    Args:
        title: what was checked.
        report: a `metrics.capture.CaptureReport`.
    """
    rows = "\n".join(
        f"<tr><th>{html.escape(line['what'])}</th><td>{html.escape(line['found'])}</td>"
        f'<td style="color:{COLOURS[line["judgement"]]}">{WORDS[line["judgement"]]}</td><td>{html.escape(line["advice"])}</td></tr>'
        for line in report["lines"]
    )
    series = report.get("series", {})
    plots = "\n".join(plot(heading, series[across], [(name, series[key]) for key, name in up], unit) for heading, across, up, unit in PLOTS if series)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>\n'
        f"<h1>{html.escape(title)}: {report['verdict']}</h1>\n"
        f"<table>\n<tr><th></th><th>found</th><th></th><th>what to do</th></tr>\n{rows}\n</table>\n{plots}\n</html>\n"
    )


def refusal(video: Path, report: Mapping[str, Any]) -> str:
    """One line about the first thing for which a video is refused; empty if it is not."""
    first = next((f"{line['found']}: {line['advice']}" for line in report["lines"] if line["judgement"] == "refuse"), "")
    return first if not first or first.startswith(str(video)) else f"{video}: {first}"


def reviewer(video: Path, *, yes: bool) -> Callable[[Mapping[str, Any]], None]:
    """What a command does with a report before the long work: say what was noticed, and stop if the video is refused.

    Args:
        video: that is checked.
        yes: go on all the same.
    """

    def review(report: Mapping[str, Any]) -> None:
        note_findings(report)
        refused = refusal(video, report)
        if refused and not yes:
            raise TrackingError(f"{refused}; --yes goes on all the same")

    return review


def check_command(
    video: VideoInput,
    /,
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    config: Annotated[CheckConfig, arg(name="")] = DEFAULTS,
    face_model: ModelFile = None,
) -> None:
    """Say what is wrong with a video, and what to do, before anything is learnt from it.

    Args:
        video: film of one person, with sound.
        out: the report, .html or .json; by default the video's name and .check.html, here.
        config: how closely it is looked at.
        face_model: MediaPipe's face_landmarker.task, if it is not in its usual place.
    """
    check_input(video, "a video")
    out = out or Path(f"{video.stem}.check.html")
    check_output(out, video)
    if out.suffix not in (".html", ".json"):
        raise ConfigError(f"{out} has the ending {out.suffix!r}, a report is .html or .json: give another -o")
    with Display() as display:
        report = check(video, config, face_model=face_model, progress=display)
    write_report(video.name, report, out)
    print_report(video.name, report)
    print(f"{out}: the same with plots")
    if refused := refusal(video, report):
        raise TrackingError(refused)


def refuse_other_clip(folder: Path, video: Path) -> None:
    """Do not replace a clip of another video.

    Args:
        folder: where the new clip will go.
        video: of which it will be.

    Raises:
        ConfigError: a clip of another video is there.
    """
    try:
        facts = json.loads((folder / "clip.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # nothing there, or nothing that could be used
    if isinstance(facts, dict) and facts.get("source_sha256") not in (None, sha256_of(video)):
        raise ConfigError(f"{folder} holds a clip of another video, {facts.get('source')}: give another -o, or remove it first")


def track_command(
    video: VideoInput, /, out: Output, config: Annotated[TrackConfig, arg(name="")] = TRACK_DEFAULTS, face_model: ModelFile = None, yes: bool = False
) -> None:
    """Turn a video of one talking person into a clip: a folder with everything known per frame.

    Args:
        video: film of one person, with sound.
        out: the clip, a new folder.
        config: what tracking does.
        face_model: MediaPipe's face_landmarker.task, if it is not in its usual place.
        yes: go on even if the capture check refuses the video.
    """
    check_input(video, "a video")
    check_output(out, video, folder_with="clip.json")
    refuse_other_clip(out, video)
    with Display() as display:
        clip = track(video, config, face_model=face_model, progress=display, review=reviewer(video, yes=yes))
        clip.save(out)
    held_out = clip.num_frames - clip.num_training_frames
    print(f"{out}: {clip.num_frames} frames ({duration(clip.num_frames / clip.fps)}) at {clip.fps:g} fps, the last {held_out} held out")
