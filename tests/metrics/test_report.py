import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from talk3d.errors import ConfigError, MediaError
from talk3d.metrics.report import MEASURES, SHEET_LABEL_PX, Report, contact_sheet, definition_of, measure

DOCS = Path(__file__).resolve().parents[2] / "docs" / "measures.md"


def report() -> Report:
    rows = [[("real", np.full((8, 6, 3), 200, np.uint8)), ("ours", np.full((8, 6, 3), 90, np.uint8))]]
    return Report(
        columns={
            "avatar": (
                measure("psnr", np.array([20.0, np.nan, 30.0]), num_missed=1),
                measure("novel_psnr", [], needs="the truth of a synthetic clip"),
                measure("render_time", 12.0),
            ),
            "truth": (measure("psnr", 100.0), measure("novel_psnr", [])),
        },
        facts={"fps": np.float32(25), "where": Path("a/b"), "bad": float("nan"), "list": (1, 2)},
        pictures={"Moments": rows},
        series={"PSNR": {"avatar": np.array([20.0, np.nan, 30.0])}},
    )


def test_a_measure_is_the_mean_of_what_was_seen() -> None:
    found = report()
    assert found.value("psnr") == 25.0 and found.value("psnr", "truth") == 100.0
    assert found.rows() == [("psnr (dB)", "↑", "25", "100", "2 (1 missed)"), ("render_time (ms)", "↓", "12", "", "1")]
    assert str(found.measures[0]) == "25 dB"


def test_what_is_not_measured_is_no_number() -> None:
    assert report().value("novel_psnr") is None
    assert report().gaps() == {"the truth of a synthetic clip": ["novel_psnr"]}
    assert str(report().find("novel_psnr")) == "not measured (needs the truth of a synthetic clip)"
    with pytest.raises(ConfigError, match="psnr"):
        report().value("lpips")


def test_every_camera_has_the_definition_of_its_kind() -> None:
    assert definition_of("novel_psnr_+35_+0") is MEASURES["novel_psnr_*"]
    assert definition_of("novel_psnr_crop_+35_+0") is MEASURES["novel_psnr_crop_*"]
    assert definition_of("novel_psnr") is MEASURES["novel_psnr"]
    with pytest.raises(KeyError):
        definition_of("beauty")


def test_the_page_of_documentation_has_the_same_table() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (.*?) \| (.*?) \| (.*?) \|$", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert rows == [(name, entry.unit, entry.better, entry.meaning) for name, entry in MEASURES.items()]


def test_saving_writes_json_and_sheet(tmp_path: Path) -> None:
    report().save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    psnr = MEASURES["psnr"]
    assert content["measures"]["psnr"] == {
        "value": 25.0,
        "unit": "dB",
        "better": "higher",
        "definition": psnr.meaning,
        "num_frames": 2,
        "num_missed": 1,
        "needs": "",
    }
    assert content["columns"] == {"avatar": {"psnr": 25.0, "novel_psnr": None, "render_time": 12.0}, "truth": {"psnr": 100.0, "novel_psnr": None}}
    assert content["series"] == {"PSNR": {"avatar": [20.0, None, 30.0]}}
    assert content["facts"] == {"fps": 25.0, "where": "a/b", "bad": None, "list": [1, 2]}
    with Image.open(tmp_path / "report.png") as sheet:
        assert sheet.size == (12, 8 + SHEET_LABEL_PX)
        assert sheet.getpixel((2, SHEET_LABEL_PX + 2)) == (200, 200, 200)
        assert sheet.getpixel((8, SHEET_LABEL_PX + 2)) == (90, 90, 90)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.png"]


def test_a_name_that_ends_in_html_becomes_one_page(tmp_path: Path) -> None:
    report().save(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    for name in ("report.json", "report.html"):
        with pytest.raises(MediaError, match="cannot write"):
            report().save(tmp_path / "missing" / name)
    with pytest.raises(MediaError, match=r"ends in \.json"):
        report().save(tmp_path / "report.png")


def test_a_sheet_lays_rows_out() -> None:
    black = np.zeros((4, 5, 3), np.uint8)
    assert contact_sheet([[("a", black)], [("b", black), ("c", black)]]).shape == (2 * (4 + SHEET_LABEL_PX), 10, 3)
