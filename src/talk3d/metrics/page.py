"""A report as one page of HTML that needs nothing else: tables, plots, pictures and a film inside it. Line plots for other pages too."""

import base64
import html
import io
import itertools
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from talk3d.io.writing import VideoWriter
from talk3d.metrics.report import ARROWS, Films, Report, Row, contact_sheet, definition_of, place_of

LINE_COLOURS = ("#1f5fa8", "#b06a00", "#2a7d46", "#8a3ab9", "#b3261e", "#5b6770")
WIDTH, HEIGHT, MARGIN = 420, 110, 30
WIDE = 900
"""Width of the plots over a film's frames."""
STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.35rem .6rem;border-bottom:1px solid #ddd}"
    "figure{display:inline-block;margin:1rem 1rem 0 0}figcaption{font-size:13px}svg text{font-size:10px;fill:#555}"
)
REPORT_STYLE = (
    "body{max-width:70rem}td.n{text-align:right;font-variant-numeric:tabular-nums}img,video{max-width:100%}"
    "td,th{padding:.2rem .6rem;font-size:14px}td.first{font-weight:600}pre{white-space:pre-wrap;font-size:12px}small{color:#666}"
)
NOTE = (
    "↑ higher is better, ↓ lower is better, ≈ better the nearer to the truth's column. The first column is what is measured; the others show what "
    "the measures can tell: the real film against itself, the same avatar with wrong sound, with sound that never changes, with nothing but sound."
)
COMPARED = (
    "↑ higher is better, ↓ lower is better, ≈ better the nearer to the truth's column. The best comes first; ranks are under Facts. The last columns "
    "show what the measures can tell: the real film against itself, coming late, and standing still."
)
JPEG_QUALITY = 88
FILM_CRF = 23


def page(report: Report) -> str:
    """The report as one page."""
    ranked = "ranking" in report.facts
    title = "Comparison" if ranked else "Evaluation of an avatar"
    parts = [
        f"<h1>{title}</h1>",
        _summary(report.facts),
        f"<h2>Measures</h2>\n<p>{COMPARED if ranked else NOTE}</p>",
        _measures(report),
        _gaps(report),
        _driven_by(report.facts.get("driven_by", {})),
        "<h2>Over the frames</h2>",
        *(_curve(heading, lines, report) for heading, lines in report.series.items()),
        "" if report.films is None else f"<h2>Side by side</h2>\n{_film(report.films)}",
        *(f"<h2>{html.escape(heading)}</h2>\n{_picture(heading, rows)}" for heading, rows in report.pictures.items()),
        _definitions(report),
        f"<h2>Facts</h2>\n<details><summary>versions, clip, avatar</summary><pre>{html.escape(_facts_text(report))}</pre></details>",
        f'<script type="application/json" id="report">{_embedded(report.to_json())}</script>',
    ]
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}{REPORT_STYLE}</style>\n{body}\n</html>\n'


def _summary(facts: Mapping[str, Any]) -> str:
    frames, clip = facts.get("measured_frames", {}), facts.get("clip", {})
    if not frames:
        return ""
    count = frames["last"] - frames["first"] + 1
    ranks = facts.get("ranking", {})
    ranking = ", ".join(f"{place_of(name, ranks)}. {html.escape(str(name))}" for name in ranks)
    return (
        f"<p>Clip {html.escape(str(clip.get('source')))}: {count} frames that no training saw ({frames['first']} to {frames['last']}), "
        f"{clip.get('fps', 0):g} a second. Measured on {html.escape(str(facts.get('device')))} in {facts.get('seconds', 0):g} s.</p>"
        + (f"<p><strong>{ranking}</strong>, by the mean rank in {html.escape(', '.join(facts.get('ranked_by', [])))}.</p>" if ranking else "")
    )


def _measures(report: Report) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("measure", "", *report.columns, "frames"))
    rows = []
    for name, arrow, *values, count in report.rows():
        meaning = html.escape(definition_of(name.split(" ")[0]).meaning)
        cells = "".join(f'<td class="n{" first" if k == 0 else ""}">{value}</td>' for k, value in enumerate(values))
        rows.append(f'<tr title="{meaning}"><td>{html.escape(name)}</td><td>{arrow}</td>{cells}<td><small>{count}</small></td></tr>')
    return f"<table>\n<tr>{head}</tr>\n" + "\n".join(rows) + "\n</table>"


def _gaps(report: Report) -> str:
    lines = [f"<li>{html.escape(', '.join(names))}: not measured (needs {html.escape(needs)})</li>" for needs, names in report.gaps().items()]
    return f"<h3>Not measured</h3>\n<ul>{''.join(lines)}</ul>" if lines else ""


def _driven_by(sources: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(source))}</td></tr>" for name, source in sources.items())
    return f"<h2>Driven by</h2>\n<table>{rows}</table>" if rows else ""


def _definitions(report: Report) -> str:
    rows = []
    for name in report.names:
        meaning = definition_of(name)
        rows.append(
            f"<tr><td>{html.escape(name)}</td><td>{meaning.unit}</td><td>{ARROWS[meaning.better]}</td><td>{html.escape(meaning.meaning)}</td></tr>"
        )
    return "<h2>Definitions</h2>\n<details><summary>what each number is</summary><table>" + "\n".join(rows) + "</table></details>"


def _facts_text(report: Report) -> str:
    return json.dumps(report.to_json()["facts"], indent=1, ensure_ascii=False)


def _embedded(values: dict[str, Any]) -> str:
    """JSON that cannot end the script that holds it."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _curve(heading: str, lines: Mapping[str, np.ndarray], report: Report) -> str:
    fps = float(report.facts.get("clip", {}).get("fps", 25.0))
    length = max(len(values) for values in lines.values())
    seconds = [k / fps for k in range(length)]
    return plot(heading, seconds, [(name, values.tolist()) for name, values in lines.items()], "s", width=WIDE)


def _picture(heading: str, rows: Sequence[Row]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(contact_sheet(rows))).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="{html.escape(heading)}">'


def _film(films: Films) -> str:
    """All films beside each other with the sound, and how each but the first differs from the first."""
    names = list(films.pictures)
    arrays = list(films.pictures.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        height, width = arrays[0].shape[1:3]
        with VideoWriter(path, width * len(arrays), height, fps=films.fps, audio=films.waveform, crf=FILM_CRF) as writer:
            for pictures in zip(*arrays, strict=True):
                writer.write(np.concatenate(pictures, 1))
        content = base64.b64encode(path.read_bytes()).decode()
    return f'<p>From the left: {html.escape(", ".join(names))}.</p>\n<video controls loop src="data:video/mp4;base64,{content}"></video>'


def plot(heading: str, across: Sequence[float], lines: Sequence[tuple[str, Sequence[float]]], unit: str, *, width: int = WIDTH) -> str:
    """A small line plot as an SVG figure; lines break where they are no numbers; empty where there are no values.

    Args:
        heading: its title.
        across: ascending values to the right.
        lines: name and values of each line.
        unit: of `across`.
        width: of the plot, px.
    """
    known = [value for _, values in lines for value in values if math.isfinite(value)]
    if len(across) < 2 or not known:
        return ""
    low, high = min(known), max(known)
    span, reach = (high - low) or 1.0, (across[-1] - across[0]) or 1.0
    shapes = []
    for (_, values), colour in zip(lines, itertools.cycle(LINE_COLOURS)):
        for known_there, run in itertools.groupby(zip(across, values, strict=True), key=lambda place: math.isfinite(place[1])):
            if known_there:
                places = " ".join(
                    f"{MARGIN + (x - across[0]) / reach * (width - MARGIN):.1f},{HEIGHT - (y - low) / span * (HEIGHT - 8):.1f}" for x, y in run
                )
                shapes.append(f'<polyline fill="none" stroke="{colour}" points="{places}"/>')
    pairs = zip(lines, itertools.cycle(LINE_COLOURS))
    names = ", ".join(f'<span style="color:{colour}">{html.escape(name)}</span>' for (name, _), colour in pairs)
    return (
        f'<figure><figcaption>{html.escape(heading)}: {names}</figcaption><svg width="{width}" height="{HEIGHT + 18}">{"".join(shapes)}'
        f'<text x="0" y="10">{high:.3g}</text><text x="0" y="{HEIGHT}">{low:.3g}</text>'
        f'<text x="{MARGIN}" y="{HEIGHT + 14}">{across[0]:.0f} {unit}</text>'
        f'<text x="{width}" y="{HEIGHT + 14}" text-anchor="end">{across[-1]:.0f} {unit}</text></svg></figure>'
    )
