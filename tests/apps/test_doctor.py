import pytest

from talk3d.apps import doctor
from talk3d.apps.cli import main


def test_everything_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for what in ("talk3d", "torch", "device", "ai-edge-litert", "libx264 yes", "face landmarks"):
        assert what in shown


def test_missing_packages_are_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no-such-package"))
    assert "no-such-package missing" in dict(doctor.examine())["packages"]


def test_unwanted_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "UNWANTED", ("numpy",))
    assert "never uses it" in dict(doctor.examine())["numpy"]
