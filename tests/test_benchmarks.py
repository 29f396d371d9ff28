"""The benchmarks run, agree with themselves, and need little."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from talk3d.presets import BUILTIN256

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "model.py"
ANIMATE = BENCHMARK.with_name("animate.py")
NOT_NEEDED = ("av", "ai_edge_litert", "mediapipe", "safetensors", "scipy", "torchmetrics", "tyro", "rich", "PIL")


def test_it_measures_every_part(tmp_path: Path, capsys) -> None:
    spec = importlib.util.spec_from_file_location("benchmark", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module
    spec.loader.exec_module(module)
    out = tmp_path / "result.json"
    module.main(["--size", "TINY", "--device", "cpu", "--batches", "1", "2", "--repeats", "1", "--no-compile", "--threads", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["hardware"] and result["torch"] and result["commit"]
    for rows in result["seconds"].values():
        assert list(rows) == ["mapping", "backbone", "U-Net prefix", "U-Net rest", "volume rendering", "super-resolution"]
        assert all(row["plain_s"] > 0 for row in rows.values())
        assert all(row.get("difference", 0) < 1e-4 for row in rows.values())
    assert "| 2 | **frame** |" in capsys.readouterr().out


def test_it_needs_only_the_networks() -> None:
    without = f"import sys; sys.modules.update(dict.fromkeys({NOT_NEEDED!r})); sys.argv = ['model.py', '--help']"
    code = f"{without}; import runpy; runpy.run_path({str(BENCHMARK)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--tf32" in done.stdout, done.stderr


def test_every_ablation_changes_a_setting_that_exists_and_the_table_shows_what_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    spec = importlib.util.spec_from_file_location("ablations", BENCHMARK.with_name("ablations.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ablations", module)
    spec.loader.exec_module(module)
    plain = module.training.avatar_sizes
    for name, row in module.ROWS.items():
        same = (
            module.changed(module.PersonalizeConfig(), row.personalize) == module.PersonalizeConfig(),
            module.changed(module.TrainConfig(), row.train) == module.TrainConfig(),
            module.sizes(row, plain)(BUILTIN256.renderer) == plain(BUILTIN256.renderer),
            not (row.still or row.blank_prior or row.seed),
        )
        assert all(same) == (name == "default"), name
    assert module.changed(module.TrainConfig(), {"steps": 7}).steps == 7
    with pytest.raises(SystemExit, match="no setting 'steeps'"):
        module.changed(module.TrainConfig(), {"steeps": 7})
    with pytest.raises(SystemExit, match=r"no stage for trian\.steps"):
        module.main(["run", "default", "a.clip", str(tmp_path), "--set", "trian.steps=7"])
    found = {"row": "no-blink", "question": "q", "settings": {"train.steps": 5}, "measures": {"psnr_mask": {"value": 26.54321}}}
    (tmp_path / "no-blink.json").write_text(json.dumps(found))
    module.main(["table", str(tmp_path)])
    assert "| no-blink | q | 26.54 | - |" in capsys.readouterr().out
    module.main(["list"])
    assert len(capsys.readouterr().out.splitlines()) == len(module.ROWS)


def test_the_profile_of_an_animated_frame(tmp_path: Path, capsys) -> None:
    spec = importlib.util.spec_from_file_location("animate_benchmark", ANIMATE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path / "result.json"
    module.main(["--size", "TINY", "--device", "cpu", "--batches", "1", "2", "--repeats", "1", "--threads", "1", "--out", str(out)])
    rows = json.loads(out.read_text())["batches"]
    for row in rows.values():
        assert list(row["parts"]) == ["tokens", "deltaplane", "volume rendering", "super-resolution"]
        assert row["psnr_db"] > 40 and row["limit"]["flop"] > 0 and row["plain_s"] > 0
    assert rows["2"]["limit"]["flop"] > 1.5 * rows["1"]["limit"]["flop"]
    assert "| 2 | **frame** |" in capsys.readouterr().out
