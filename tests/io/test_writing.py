from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from talk3d.errors import ConfigError, MediaError
from talk3d.io.media import read_audio, read_video, scan_video
from talk3d.io.writing import FilmWriter, encoding_for, whole
from talk3d.types import Waveform

COUNT, LENGTH = 41, 16
BASE = np.random.default_rng(3).integers(0, 256, (48, 64, 3), np.uint8)


def test_a_file_has_its_name_once_it_is_whole_and_is_gone_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for text in ("first", "second"):
        with whole(path) as partial:
            partial.write_text(text)
            assert partial.suffix == ".txt" and (not path.exists() or path.read_text() == "first")
    with pytest.raises(ValueError, match="no"), whole(path) as partial:
        partial.write_text("third")
        raise ValueError("no")
    assert path.read_text() == "second" and list(tmp_path.iterdir()) == [path]


def picture(number: int) -> np.ndarray:
    return np.roll(BASE, number, 1)


def cut_out(number: int) -> np.ndarray:
    """Straight alpha from 0 on the left to 252 on the right, over one colour."""
    alpha = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (48, 64, 1))
    return np.concatenate([np.full((48, 64, 3), 40 + number, np.uint8), alpha], -1)


def sound(duration_s: float = COUNT / 25) -> Iterator[Waveform]:
    samples = 0.3 * torch.sin(torch.arange(round(duration_s * 44100)) * 0.05)
    return (Waveform(samples=piece, sample_rate_hz=44100) for piece in samples.split(1000))


def write(path: Path, *, stop: int | None = None, resume: bool = False, key: str = "k", **kinds: bool) -> int:
    """Write a film, or break off; returns where it began."""
    encoding = encoding_for(path, **kinds) if path.suffix else None
    with FilmWriter(path, fps=25.0, encoding=encoding, key=key, segment_frames=LENGTH, resume=resume) as film:
        start = film.num_frames
        for number in range(start, COUNT):
            if number == stop:
                raise InterruptedError
            film.write(cut_out(number) if kinds.get("transparent") else picture(number))
        film.finish(sound())
    return start


FILMS = [
    ("a.mp4", {}),
    ("a.mkv", {}),
    ("l.mp4", {"lossless": True}),
    ("a.webm", {}),
    ("t.webm", {"transparent": True}),
    ("t.mov", {"transparent": True}),
]


@pytest.mark.parametrize(("name", "kinds"), FILMS)
def test_an_interrupted_film_ends_up_the_same_byte_by_byte(tmp_path: Path, name: str, kinds: dict[str, bool]) -> None:
    (tmp_path / "once").mkdir()
    write(tmp_path / "once" / name, **kinds)
    with pytest.raises(InterruptedError):
        write(tmp_path / name, stop=35, **kinds)
    assert [path.name for path in tmp_path.iterdir() if path.name != "once"] == [f"{name}.unfinished"]
    assert write(tmp_path / name, resume=True, **kinds) == 32
    assert (tmp_path / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "once"])
    with av.open(str(tmp_path / name)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(COUNT) / 25, atol=1e-3)
    assert read_audio(tmp_path / name).duration_s == pytest.approx(COUNT / 25, abs=0.04)


def test_a_film_can_be_gone_on_with_when_only_the_end_was_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write(path)
    whole = path.read_bytes()
    with pytest.raises(RuntimeError), FilmWriter(path, fps=25.0, encoding=encoding_for(path), key="k", segment_frames=LENGTH) as film:
        for number in range(COUNT):
            film.write(picture(number))
        film.finish(broken())
    assert write(path, resume=True) == COUNT
    assert path.read_bytes() == whole


def broken() -> Iterator[Waveform]:
    yield Waveform(samples=torch.zeros(100), sample_rate_hz=44100)
    raise RuntimeError


def test_lossless_films_give_every_pixel_back(tmp_path: Path) -> None:
    write(tmp_path / "l.mp4", lossless=True)
    for number, frame in enumerate(read_video(tmp_path / "l.mp4")):
        assert np.array_equal(frame, picture(number))


@pytest.mark.parametrize(("name", "decoder"), [("t.mov", "prores"), ("t.webm", "libvpx-vp9")])
def test_transparent_films_keep_their_opacity(tmp_path: Path, name: str, decoder: str) -> None:
    write(tmp_path / name, transparent=True)
    with av.open(str(tmp_path / name)) as container:
        stream = container.streams.video[0]
        reader = av.CodecContext.create(decoder, "r")
        reader.extradata = stream.codec_context.extradata
        frames = [frame for packet in container.demux(stream) for frame in reader.decode(packet)]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(frames) == COUNT
    shown = frames[20].to_ndarray(format="rgba").astype(int)
    assert np.abs(shown - cut_out(20))[..., 3].max() <= 6
    assert np.abs(shown - cut_out(20))[..., :3].mean() <= 3


def test_pictures_go_to_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        write(tmp_path / "shots", stop=35)
    assert write(tmp_path / "shots", resume=True) == 35
    assert sorted(path.name for path in (tmp_path / "shots").iterdir()) == [f"{number:06}.png" for number in range(COUNT)]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "shots" / "000007.png")), picture(7))


@pytest.mark.parametrize("name", ["album", "film.mp4"])
def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir()
    (path / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(ConfigError, match="something else"):
        FilmWriter(path, fps=25.0, encoding=encoding_for(path) if path.suffix else None, key="k", segment_frames=LENGTH)
    assert [one.name for one in tmp_path.rglob("*")] == [name, "letter.txt"]


def test_other_films_are_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(InterruptedError):
        write(path, stop=20)
    with pytest.raises(ConfigError, match="other settings"):
        write(path, resume=True, key="other")
    assert write(path, key="other") == 0
    (tmp_path / "b.mp4.unfinished").mkdir()
    with pytest.raises(ConfigError, match="no unfinished film"):
        write(tmp_path / "b.mp4")
    with pytest.raises(InterruptedError):
        write(tmp_path / "c.mp4", stop=5)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.mp4", "b.mp4.unfinished"]


def test_a_click_is_heard_when_it_is_seen(tmp_path: Path) -> None:
    samples = torch.zeros(2 * 44100)
    samples[round(1.2 * 44100) : round(1.21 * 44100)] = 0.8
    path = tmp_path / "click.mp4"
    with FilmWriter(path, fps=25.0, encoding=encoding_for(path), key="k", segment_frames=LENGTH) as film:
        for number in range(50):
            film.write(np.full((48, 64, 3), 255 if number == 30 else 0, np.uint8))
        film.finish([Waveform(samples=samples, sample_rate_hz=44100)])
    seen = int(np.argmax([frame.mean() for frame in read_video(path)])) / 25
    heard = float(read_audio(path, 44100).samples.abs().argmax()) / 44100
    assert seen == pytest.approx(1.2, abs=1e-6) and heard == pytest.approx(1.205, abs=0.02)
    assert scan_video(path).num_frames == 50


@pytest.mark.parametrize(
    ("name", "kinds"), [("a.gif", {}), ("a.mp4", {"transparent": True}), ("a.webm", {"lossless": True}), ("a.mkv", {"transparent": True})]
)
def test_what_a_film_cannot_hold_is_refused(name: str, kinds: dict[str, bool]) -> None:
    with pytest.raises(MediaError, match="give a name"):
        encoding_for(Path(name), **kinds)
