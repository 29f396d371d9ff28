from talk3d.types import Progress, silent


def test_silence_is_a_progress() -> None:
    listener: Progress = silent
    listener("train", 1, 2, {"image": 0.5})
    assert isinstance(silent, Progress)
