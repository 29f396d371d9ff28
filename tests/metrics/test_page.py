import base64
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch

from talk3d.io.media import scan_video
from talk3d.metrics.page import page, plot
from talk3d.metrics.report import Films, Report, measure
from talk3d.types import Waveform


def a_report(**changes: object) -> Report:
    picture = np.full((16, 16, 3), 120, np.uint8)
    values: dict[str, object] = {
        "columns": {"avatar": [measure("psnr", 30.0), measure("csim", [], needs="arcface <here>")], "truth": [measure("psnr", 100.0)]},
        "facts": {
            "clip": {"source": "a <film>.mp4", "fps": 25.0},
            "measured_frames": {"first": 3, "last": 7},
            "driven_by": {"audio": "the clip & sound"},
        },
        "pictures": {"Worst frames": [[("real", picture)]]},
        "series": {"PSNR": {"avatar": np.array([20.0, 21.0, np.nan, 23.0])}},
        "films": Films(
            pictures={"real": np.stack([picture] * 5), "avatar": np.stack([picture] * 5)},
            fps=25.0,
            waveform=Waveform(samples=torch.zeros(3200), sample_rate_hz=16000),
        ),
    }
    return Report(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def test_the_page_is_whole_in_itself() -> None:
    text = page(a_report())
    assert "a &lt;film&gt;.mp4: 5 frames" in text and "the clip &amp; sound" in text
    assert "csim: not measured (needs arcface &lt;here&gt;)" in text
    assert not re.search(r"https?:|href=", text)
    assert set(re.findall(r'src="(data:[a-z0-9/]+)', text)) == {"data:image/jpeg", "data:video/mp4"}


def test_the_film_inside_plays_both_side_by_side(tmp_path: Path) -> None:
    found = re.search(r'src="data:video/mp4;base64,([^"]+)"', page(a_report()))
    assert found is not None
    (tmp_path / "film.mp4").write_bytes(base64.b64decode(found.group(1)))
    scan = scan_video(tmp_path / "film.mp4")
    assert (scan.num_frames, scan.width_px, scan.height_px) == (5, 32, 16)


def test_the_numbers_are_inside_for_programs() -> None:
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', page(a_report()))
    assert found is not None
    assert json.loads(found.group(1)) == json.loads(json.dumps(a_report().to_json()))


def test_a_comparison_names_the_best_first() -> None:
    ranked = {**a_report().facts, "ranking": {"new": 1.2, "old": 1.8}, "ranked_by": ["psnr_mask", "jitter"]}
    found = page(a_report(facts=ranked, films=None, pictures={}, series={}))
    tied = page(a_report(facts={**ranked, "ranking": {"a": 1.5, "b": 1.5, "c": 3.0}}, films=None, pictures={}, series={}))
    assert "1. a, 1. b, 3. c" in tied
    assert "1. new, 2. old" in found and "by the mean rank in psnr_mask, jitter." in found


def test_a_plot_breaks_where_nothing_is_known() -> None:
    figure = ElementTree.fromstring(plot("a", [0.0, 1.0, 2.0, 3.0, 4.0], [("x", [0.0, 10.0, float("nan"), 5.0, 5.0])], "s"))
    assert len(figure.findall(".//polyline")) == 2
    assert plot("nothing", [0.0, 1.0], [("x", [float("nan")] * 2)], "s") == ""
