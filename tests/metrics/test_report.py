import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from talk3d.errors import ConfigError, MediaError
from talk3d.metrics.report import SHEET_LABEL_PX, Report, contact_sheet, measure


def report() -> Report:
    sheet = contact_sheet([[("real", np.full((8, 6, 3), 200, np.uint8)), ("ours", np.full((8, 6, 3), 90, np.uint8))]])
    return Report(
        measures=(
            measure("psnr", np.array([20.0, np.nan, 30.0]), "dB", "mean over frames", num_missed=1),
            measure("novel_psnr", [], "dB", "mean over frames", needs="the truth of a synthetic clip"),
        ),
        facts={"fps": np.float32(25), "where": Path("a/b"), "bad": float("nan"), "list": (1, 2)},
        sheet=sheet,
    )


def test_a_measure_is_the_mean_of_what_was_seen() -> None:
    found = report()
    assert found.value("psnr") == 25.0
    assert found.rows() == [
        ("psnr", "25 dB", "2 frames, 1 missed"),
        ("novel_psnr", "not measured (needs the truth of a synthetic clip)", "-"),
    ]


def test_what_is_not_measured_is_no_number() -> None:
    assert report().value("novel_psnr") is None
    with pytest.raises(ConfigError, match="psnr"):
        report().value("lpips")


def test_saving_writes_json_and_sheet(tmp_path: Path) -> None:
    report().save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["measures"]["psnr"] == {
        "value": 25.0,
        "unit": "dB",
        "definition": "mean over frames",
        "num_frames": 2,
        "num_missed": 1,
        "needs": "",
    }
    assert content["measures"]["novel_psnr"]["value"] is None
    assert content["facts"] == {"fps": 25.0, "where": "a/b", "bad": None, "list": [1, 2]}
    with Image.open(tmp_path / "report.png") as sheet:
        assert sheet.size == (12, 8 + SHEET_LABEL_PX)
        assert sheet.getpixel((2, SHEET_LABEL_PX + 2)) == (200, 200, 200)
        assert sheet.getpixel((8, SHEET_LABEL_PX + 2)) == (90, 90, 90)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.png"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="cannot write"):
        report().save(tmp_path / "missing" / "report.json")
    with pytest.raises(MediaError, match=r"ends in \.json"):
        report().save(tmp_path / "report.png")
