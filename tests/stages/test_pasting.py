from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from talk3d.errors import ConfigError, MediaError
from talk3d.io.catalogue import sha256_of
from talk3d.io.media import read_audio, read_frames, read_video, scan_video
from talk3d.io.writing import VideoWriter, encoding_for
from talk3d.stages.animate import AnimateConfig, animate, write_animation
from talk3d.stages.pasting import Film, _ahead
from talk3d.types import Clip, Waveform

COUNT, SIDE = 16, 64


@pytest.fixture
def filmed(clip: Clip, tmp_path: Path) -> tuple[Path, Path]:
    """A film of noise in which the person of the clip stands, two frames later than in the clip, and the clip of it."""
    noise = np.random.default_rng(1)
    with VideoWriter(tmp_path / "film.mp4", 160, 120, encoding=encoding_for(tmp_path / "film.mp4", lossless=True)) as writer:
        for number in range(COUNT + 2):
            picture = noise.integers(0, 256, (120, 160, 3), np.uint8)
            picture[30:94, 50:114] = clip.frames[max(number - 2, 0)]
            writer.write(picture)
    crop = np.tile(np.array([[1.0, 0, -50], [0, 1, -30]]), (COUNT, 1, 1))
    moved = replace(
        clip,
        track=replace(clip.track, crop=crop),
        source=str(tmp_path / "film.mp4"),
        source_sha256=sha256_of(tmp_path / "film.mp4"),
        check={"first_frame": 2},
    )
    moved.save(tmp_path / "clip")
    return tmp_path / "film.mp4", tmp_path / "clip"


def speech(num_frames: int) -> Waveform:
    return Waveform(samples=torch.sin(torch.arange(num_frames * 640) * 0.1), sample_rate_hz=16000)


def test_frames_come_in_any_order(filmed: tuple[Path, Path]) -> None:
    scan = scan_video(filmed[0])
    frames = list(read_video(filmed[0]))
    order = [0, 1, 17, 16, 5, 4, 3, 3, 0, 9]
    for number, frame in zip(order, read_frames(scan, order), strict=True):
        assert np.array_equal(frame, frames[number])


def test_long_films_are_read_backwards_in_pieces(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "long.mp4", 32, 32) as writer:
        for number in range(150):
            writer.write(np.full((32, 32, 3), number, np.uint8))
    scan = scan_video(tmp_path / "long.mp4")
    order = [*range(150), *range(148, -1, -1), 120, 10]
    shown = [frame.mean() for frame in read_frames(scan, order)]
    np.testing.assert_allclose(shown, order, atol=2.5)


def test_only_the_head_is_another_and_the_film_goes_back_and_forth(make_avatar, filmed: tuple[Path, Path]) -> None:
    avatar = make_avatar(side=SIDE)
    pasted = list(animate(avatar, speech(30), config=AnimateConfig(paste_into=filmed[1])))
    film = list(read_video(filmed[0]))
    order = [*range(16), *range(14, -1, -1)][:30]
    assert len(pasted) == 30
    for frame, number in zip(pasted, order, strict=True):
        other = frame != film[number + 2]
        assert not other[:30].any() and not other[94:].any() and not other[:, :50].any() and not other[:, 114:].any()
        assert other[50:74, 70:94].any()
    clip_pose = Film(filmed[1], None, 25.0, SIDE).clip.track.head_pose
    torch.testing.assert_close(avatar.driven.head_pose, clip_pose[order].float())
    late = list(animate(make_avatar(side=SIDE), speech(30), config=AnimateConfig(paste_into=filmed[1]), first=20))
    assert all(np.array_equal(one, other) for one, other in zip(pasted[20:], late, strict=True))


def test_a_head_put_into_the_film_of_another_is_told(make_avatar, filmed: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    for origin, told in ((Film(filmed[1], None, 25.0, SIDE).clip.source_sha256, False), ("0" * 64, True)):
        avatar = make_avatar(side=SIDE)
        avatar.provenance = {"source_sha256": origin}
        caplog.clear()
        list(animate(avatar, speech(2), config=AnimateConfig(paste_into=filmed[1])))
        assert ("another film" in caplog.text) == told


def test_a_transparent_head_leaves_the_film_as_it_is(make_avatar, filmed: tuple[Path, Path]) -> None:
    film = list(read_video(filmed[0]))
    for number, frame in enumerate(animate(make_avatar(side=SIDE, alpha=0.0), speech(6), config=AnimateConfig(paste_into=filmed[1]))):
        assert np.array_equal(frame, film[number + 2])


def test_a_written_film_keeps_every_pixel_outside_and_its_sound_is_in_time(make_avatar, filmed: tuple[Path, Path], tmp_path: Path) -> None:
    said = speech(20)
    said.samples[:6400] = 0
    write_animation(make_avatar(side=SIDE), said, tmp_path / "out.mp4", AnimateConfig(paste_into=filmed[1], lossless=True))
    film = list(read_video(filmed[0]))
    written = list(read_video(tmp_path / "out.mp4"))
    assert len(written) == 20
    for number in range(16):
        assert np.array_equal(written[number][:, :50], film[number + 2][:, :50]) and np.array_equal(written[number][94:], film[number + 2][94:])
    heard = read_audio(tmp_path / "out.mp4").samples.abs()
    assert float((heard > 0.3).float().argmax()) / 16000 == pytest.approx(0.4, abs=0.04)


def test_another_film_is_refused(filmed: tuple[Path, Path], make_avatar, tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "other.mp4", 64, 64) as writer:
        writer.write(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ConfigError, match="is not the film"):
        Film(filmed[1], tmp_path / "other.mp4", 25.0, SIDE)
    moved = filmed[0].rename(tmp_path / "moved.mp4")
    with pytest.raises(ConfigError, match="--source"):
        Film(filmed[1], None, 25.0, SIDE)
    assert Film(filmed[1], moved, 25.0, SIDE).scan.num_frames == 18
    with pytest.raises(ConfigError, match="film's camera"):
        AnimateConfig(paste_into=filmed[1], camera="orbit")


def test_what_is_made_ahead_comes_in_order_and_its_error_too() -> None:
    made: list[int] = []

    def items():
        for number in range(20):
            made.append(number)
            yield np.array(number)
        raise MediaError("the film ends here")

    found: list[int] = []
    with pytest.raises(MediaError, match="ends here"):
        for item in _ahead(items(), 3):
            found.append(int(item))
            assert len(made) <= len(found) + 3
    assert found == made == list(range(20))
