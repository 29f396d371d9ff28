import math
import tracemalloc
import wave
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from talk3d.errors import ConfigError, MediaError
from talk3d.io.media import read_audio, scan_video
from talk3d.io.writing import VideoWriter
from talk3d.ops.geometry import head_camera, project, view_angles
from talk3d.perception.listening import count_frames
from talk3d.perception.speech import speech_features
from talk3d.stages import animate as animating
from talk3d.stages.animate import AnimateConfig, animate, composite, write_animation
from talk3d.stages.viewpoints import ping_pong
from talk3d.types import AudioFeatures, Rendering, Waveform

PERFORMED = 5


def sound(duration_s: float, rate_hz: int = 16000) -> Waveform:
    time = torch.arange(round(duration_s * rate_hz)) / rate_hz
    return Waveform(samples=0.5 * torch.sin(2 * math.pi * 220 * time) * torch.sin(7 * time), sample_rate_hz=rate_hz)


def test_ping_pong_shows_the_ends_once() -> None:
    assert ping_pong(torch.arange(10), 4).tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3]
    assert ping_pong(torch.arange(4), 2).tolist() == [0, 1, 0, 1]
    assert ping_pong(torch.arange(3), 1).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("duration_s", "expected"), [(1.0, 25), (0.1, 2), (0.001, 1), (2.03, 51)])
def test_there_are_as_many_frames_as_fit_the_sound(make_avatar, duration_s: float, expected: int) -> None:
    frames = list(animate(make_avatar(), sound(duration_s)))
    assert len(frames) == expected == count_frames(len(sound(duration_s).samples), 25.0)
    assert frames[0].shape == (8, 8, 3) and frames[0].dtype == np.uint8


def test_sound_longer_than_the_performance_goes_back_and_forth(make_avatar) -> None:
    avatar = make_avatar()
    list(animate(avatar, sound(1.0)))
    order = ping_pong(torch.arange(25), PERFORMED)
    torch.testing.assert_close(avatar.driven.blink, avatar.performance.blink[order])
    torch.testing.assert_close(avatar.driven.head_pose, avatar.performance.head_pose[order])
    torch.testing.assert_close(avatar.driven.anchors, avatar.performance.anchors[order])
    torch.testing.assert_close(avatar.filmed, avatar.performance.cameras.cam2world[order])


def test_a_fixed_camera_keeps_the_head_calm_but_lets_it_blink(make_avatar) -> None:
    avatar = make_avatar()
    list(animate(avatar, sound(1.0), config=AnimateConfig(camera="fixed", yaw_deg=20.0, pitch_deg=-5.0, head_motion=0.0, blinks="performed")))
    expected = head_camera(torch.tensor([[math.radians(20), math.radians(-5), 0]])).cam2world.expand(25, 4, 4)
    torch.testing.assert_close(avatar.filmed, expected)
    torch.testing.assert_close(avatar.driven.head_pose, torch.full((25, 3), 2.0))
    torch.testing.assert_close(avatar.driven.anchors, torch.full((25, 6), 2.0))
    torch.testing.assert_close(avatar.driven.blink, avatar.performance.blink[ping_pong(torch.arange(25), PERFORMED)])


def test_the_orbit_swings_to_its_largest_angle_and_repeats(make_avatar) -> None:
    avatar = make_avatar()
    list(animate(avatar, sound(3.0), config=AnimateConfig(camera="orbit", orbit_yaw_deg=25.0, orbit_period_s=0.8, head_motion=0.0)))
    centre = avatar.filmed[:, :3, 3]
    yaw = torch.atan2(centre[:, 0], centre[:, 2] - 0.2).rad2deg()
    assert yaw[0].item() == pytest.approx(0, abs=1e-3)
    assert yaw[5].item() == pytest.approx(25, abs=1e-3) and yaw[15].item() == pytest.approx(-25, abs=1e-3)
    torch.testing.assert_close(avatar.filmed[20:40], avatar.filmed[:20])


def test_given_cameras_go_back_and_forth(make_avatar) -> None:
    avatar = make_avatar()
    cameras = head_camera(torch.linspace(-0.3, 0.3, 3)[:, None] * torch.tensor([1.0, 0.0, 0.0]))
    list(animate(avatar, sound(0.24), cameras, AnimateConfig(head_motion=0.0)))
    torch.testing.assert_close(avatar.filmed, cameras.cam2world[[0, 1, 2, 1, 0, 1]])
    for unfit in (cameras[:0], cameras[0]):
        with pytest.raises(ConfigError, match="no camera"):
            animate(avatar, sound(0.24), unfit)


def test_the_batch_size_changes_no_frame(make_avatar) -> None:
    frames = [np.stack(list(animate(make_avatar(), sound(1.0), config=AnimateConfig(batch_size=size)))) for size in (1, 4, 7)]
    assert (frames[0] == frames[1]).all() and (frames[0] == frames[2]).all()


def test_long_sound_is_heard_in_pieces_as_if_it_were_whole(make_avatar) -> None:
    avatar, speech = make_avatar(), sound(64.0)
    list(animate(avatar, speech, config=AnimateConfig(batch_size=32, voice_activity=False)))
    whole = speech_features(speech, 1600, 25.0).around(torch.arange(1600))
    torch.testing.assert_close(avatar.driven.audio, whole, atol=1e-4, rtol=0)


def test_the_avatars_own_encoder_is_used(make_avatar, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int | None]] = []

    class Ramp:
        source = "hubert:0123456789ab"

        def __call__(self, waveform: Waveform, num_frames: int, fps: float, start: int = 0, stop: int | None = None) -> AudioFeatures:
            asked.append((start, stop))
            ramp = torch.arange(start, stop or num_frames, dtype=torch.float32)
            return AudioFeatures(values=ramp[:, None, None].expand(-1, 16, 3), fps=fps, source=self.source)

    monkeypatch.setattr(animating, "load_speech_of", lambda source, device: Ramp())
    avatar = make_avatar(audio_source=Ramp.source)
    list(animate(avatar, sound(62.0), config=AnimateConfig(batch_size=32)))
    whole = Ramp()(sound(62.0), 1550, 25.0).around(torch.arange(1550))
    assert torch.equal(avatar.driven.audio, whole)
    assert asked[:3] == [(0, 53), (46, 103), (96, 153)] and asked[-2] == (1496, 1550)


def test_frames_are_a_stream(make_avatar) -> None:
    avatar = make_avatar(side=128)
    speech = sound(40.0)
    tracemalloc.start()
    for _ in animate(avatar, speech):
        avatar.seen.clear()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 128 * 128 * 3 * 4


def test_the_callers_tensors_stay_ordinary(make_avatar) -> None:
    frames = animate(make_avatar(), sound(0.5))
    next(frames)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("background", "expected"), [("plate", 0.75), ("white", 1.0), ("grey", 0.5), ("black", 0.0)])
def test_what_lies_behind_shows_where_nobody_is(make_avatar, background: str, expected: float) -> None:
    frame = next(iter(animate(make_avatar(alpha=0.0), sound(0.1), config=AnimateConfig(background=background))))  # pyright: ignore[reportArgumentType]
    assert np.abs(frame.astype(float) - 255 * expected).max() <= 0.5


def test_compositing_half_transparent_pictures() -> None:
    colour, alpha, behind = torch.tensor(0.8), torch.full((1, 1, 2, 2), 0.25), torch.full((1, 3, 2, 2), 0.4)
    image = (2 * 0.25 * colour - 1).expand(1, 3, 2, 2)
    rendering = Rendering(image=image, alpha=alpha, raw=image, raw_alpha=alpha, features=image, depth=alpha)
    torch.testing.assert_close(composite(rendering, behind), torch.full((1, 3, 2, 2), 0.25 * 0.8 + 0.75 * 0.4))


def write_sound(path: Path, samples: np.ndarray, rate_hz: int) -> Path:
    """A wav file of 16 bits; values beyond ±1 are clipped."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return path


@pytest.mark.parametrize(("rate_hz", "channels", "gain"), [(8000, 1, 1.0), (96000, 1, 1.0), (44100, 2, 1.0), (16000, 1, 6.0)])
def test_sound_of_any_rate_channels_and_loudness_is_heard_alike(make_avatar, tmp_path: Path, rate_hz: int, channels: int, gain: float) -> None:
    heard = []
    for rate, count, factor in ((16000, 1, 1.0), (rate_hz, channels, gain)):
        avatar = make_avatar()
        said = sound(2.0, rate).samples.numpy()[:, None].repeat(count, 1) * factor
        assert len(list(animate(avatar, write_sound(tmp_path / "said.wav", said, rate)))) == 50
        heard.append(avatar.driven.audio)
    voiced = heard[0] > 0.0  # the bands that the tone fills; below, clipping and resampling leave their own traces
    assert (heard[1] - heard[0])[voiced].abs().mean() < 0.1


def test_silence_and_clicks_leave_the_mouth_at_rest(make_avatar, tmp_path: Path) -> None:
    clicks = np.zeros((32000, 1))
    clicks[[8000, 20000]] = 1.0
    for name, samples in (("silence", np.zeros((32000, 1))), ("clicks", clicks)):
        avatar = make_avatar()
        list(animate(avatar, write_sound(tmp_path / f"{name}.wav", samples, 16000)))
        assert (avatar.driven.audio == -1).all()


def test_the_shortest_sounds(make_avatar, tmp_path: Path) -> None:
    assert len(list(animate(make_avatar(), write_sound(tmp_path / "short.wav", np.full((1600, 1), 0.1), 16000)))) == 2
    assert write_animation(make_avatar(side=32), write_sound(tmp_path / "one.wav", np.zeros((320, 1)), 16000), tmp_path / "one.mp4") == 1
    with pytest.raises(MediaError, match=r"without a single sample|cannot be"):
        animate(make_avatar(), write_sound(tmp_path / "empty.wav", np.zeros((0, 1)), 16000))


@pytest.mark.parametrize("background", ["blurred", "#ff8000", "image"])
def test_chosen_backgrounds(make_avatar, tmp_path: Path, background: str) -> None:
    Image.new("RGB", (30, 20), (10, 200, 60)).save(tmp_path / "wall.png")
    chosen = str(tmp_path / "wall.png") if background == "image" else background
    frame = next(iter(animate(make_avatar(alpha=0.0), sound(0.1), config=AnimateConfig(background=chosen))))
    expected = {"blurred": (191, 191, 191), "#ff8000": (255, 128, 0), "image": (10, 200, 60)}[background]
    assert np.abs(frame.astype(int) - np.array(expected)).max() <= 1
    for unfit in ("#12345", "#gg0000", "nowhere.png"):
        with pytest.raises(ConfigError, match=r"colour|picture"):
            animate(make_avatar(), sound(0.1), config=AnimateConfig(background=unfit))


def test_a_transparent_background_is_straight_alpha(make_avatar, tmp_path: Path) -> None:
    whole, half = (
        next(iter(animate(make_avatar(alpha=alpha), sound(0.1), config=AnimateConfig(background="transparent")))).astype(int) for alpha in (1.0, 0.5)
    )
    assert whole.shape == (8, 8, 4) and (whole[..., 3] == 255).all() and np.abs(half[..., 3] - 128).max() <= 1
    assert np.abs(whole[..., :3] - half[..., :3]).max() <= 1
    with pytest.raises(MediaError, match="transparent"):
        write_animation(make_avatar(side=32), sound(0.2), tmp_path / "a.mp4", AnimateConfig(background="transparent"))
    assert write_animation(make_avatar(side=32), sound(0.2), tmp_path / "a.mov", AnimateConfig(background="transparent")) == 5


def test_expression_goes_from_rest_beyond_what_was_learnt(tiny_avatar) -> None:
    speech, quiet = sound(0.2), Waveform(samples=torch.zeros(3200), sample_rate_hz=16000)

    def shown(said: Waveform, expression: float) -> np.ndarray:
        config = AnimateConfig(camera="fixed", background="grey", expression=expression)
        return np.stack(list(animate(tiny_avatar, said, config=config))).astype(int)

    learnt, calm = shown(speech, 1.0), shown(quiet, 1.0)
    assert np.abs(shown(speech, 0.0) - calm).max() <= 1
    assert np.abs(shown(speech, 0.999) - learnt).max() <= 2
    assert np.abs(shown(speech, 2.0) - calm).mean() > np.abs(learnt - calm).mean()


def test_compiling_is_for_gpus(make_avatar) -> None:
    with pytest.raises(ConfigError, match="GPU alone"):
        animate(make_avatar(), sound(0.1), config=AnimateConfig(compile=True))


@pytest.mark.parametrize("settings", [{"yaw_deg": 30.0, "pitch_deg": 10.0}, {"yaw_deg": 60.0}, {"yaw_deg": 60.0, "view_limit": False}], ids=str)
def test_a_still_head_is_in_the_middle_wherever_the_camera_stands(make_avatar, settings: Mapping[str, float]) -> None:
    avatar = make_avatar()
    list(animate(avatar, sound(0.1), config=AnimateConfig(camera="fixed", head_motion=0.0, **settings)))  # pyright: ignore[reportArgumentType]
    _, camera = avatar.seen[0]
    torch.testing.assert_close(project(torch.zeros(len(camera), 1, 3), camera), torch.full((len(camera), 1, 2), 0.5), atol=1e-5, rtol=0)


def test_a_moving_head_moves_in_the_picture_and_listed_cameras_stay_as_they_are(make_avatar) -> None:
    moving, listed = make_avatar(), make_avatar()
    list(animate(moving, sound(2.0), config=AnimateConfig(camera="fixed", yaw_deg=20.0, head_motion=1.0)))
    intrinsics = torch.cat([camera.intrinsics for _, camera in moving.seen])
    assert moving.filmed.std(0).max() > 1e-4 and torch.equal(intrinsics, intrinsics[:1].expand_as(intrinsics))
    given = head_camera(torch.tensor([[0.5, 0.0, 0.0]]))
    list(animate(listed, sound(0.1), cameras=given))
    torch.testing.assert_close(listed.seen[0][1].intrinsics[:1], given.intrinsics)


@pytest.mark.parametrize(("yaw_deg", "said"), [(-35.0, False), (35.0, False), (40.0, True)])
def test_moving_heads_do_not_make_a_view_one_beyond_the_range(make_avatar, caplog: pytest.LogCaptureFixture, yaw_deg: float, said: bool) -> None:
    list(animate(make_avatar(), sound(2.0), config=AnimateConfig(camera="fixed", yaw_deg=yaw_deg, head_motion=2.0)))
    assert ("views beyond fade" in caplog.text) == said


def test_a_film_to_paste_into_needs_its_clip(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --paste-into CLIP too"):
        AnimateConfig(source=tmp_path / "film.mp4")


def test_views_beyond_the_range_fade_unless_they_are_wanted(make_avatar) -> None:
    for limited, low, high in ((True, 35.0, 40.0), (False, 59.9, 60.1)):
        avatar = make_avatar()
        list(animate(avatar, sound(0.1), config=AnimateConfig(camera="fixed", yaw_deg=60.0, head_motion=0.0, view_limit=limited)))
        assert low <= math.degrees(float(view_angles(avatar.filmed[:1, :3, :3])[0, 0])) <= high


def test_silence_works(make_avatar) -> None:
    frames = list(animate(make_avatar(), Waveform(samples=torch.zeros(8000), sample_rate_hz=16000)))
    assert len(frames) == 12


def test_unfit_sound_is_refused_at_once(make_avatar, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="empty"):
        animate(make_avatar(), Waveform(samples=torch.zeros(0), sample_rate_hz=16000))
    with pytest.raises(MediaError, match="not numbers"):
        animate(make_avatar(), Waveform(samples=torch.full((800,), float("nan")), sample_rate_hz=16000))
    with pytest.raises(MediaError, match="no file"):
        animate(make_avatar(), tmp_path / "missing.wav")
    with pytest.raises(ConfigError, match="16000 Hz"):
        animate(make_avatar(), sound(0.2, 8000))
    with pytest.raises(ConfigError, match="listens to 'hubert'"):
        animate(make_avatar(audio_source="hubert"), sound(0.2))


@pytest.mark.parametrize(
    "settings",
    [{"orbit_period_s": 0.0}, {"batch_size": 0}, {"level_db": 50.0}, {"level_db": float("nan")}, {"camera": "fixed", "yaw_deg": float("nan")}],
)
def test_unfit_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        AnimateConfig(**settings)  # pyright: ignore[reportArgumentType]


def test_a_written_video_has_all_frames_and_the_sound(make_avatar, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    path = tmp_path / "talking.mp4"
    total = write_animation(make_avatar(side=32), sound(1.2), path, progress=lambda stage, step, of, values: heard.append((stage, step, of)))
    assert total == 30 and heard[0] == ("animate", 1, 30) and heard[-1] == ("animate", 30, 30)
    scan = scan_video(path)
    assert (scan.num_frames, scan.width_px, scan.height_px) == (30, 32, 32)
    assert read_audio(path).duration_s == pytest.approx(1.2, abs=0.07)
    assert [p.name for p in tmp_path.iterdir()] == ["talking.mp4"]


def chunked(waveform: Waveform, *lengths: int) -> Iterator[Waveform]:
    start = 0
    while start < len(waveform.samples):
        for length in lengths:
            yield Waveform(samples=waveform.samples[start : start + length], sample_rate_hz=16000)
            start += length


@pytest.mark.parametrize("level_db", [None, -30.0])
def test_the_frames_are_the_same_however_the_sound_is_cut(tiny_avatar, level_db: float | None) -> None:
    config = AnimateConfig(level_db=level_db, camera="fixed", background="grey")
    speech = sound(0.8)
    whole = np.stack(list(animate(tiny_avatar, speech, config=config)))
    assert len(whole) == 20
    for lengths in ((1000,), (16000,), (7, 0, 12345)):
        assert np.array_equal(np.stack(list(animate(tiny_avatar, chunked(speech, *lengths), config=config))), whole)


def test_frames_can_begin_anywhere(make_avatar) -> None:
    whole = np.stack(list(animate(make_avatar(), sound(5.0))))
    for first in (4, 60, 124):
        assert np.array_equal(np.stack(list(animate(make_avatar(), sound(5.0), first=first))), whole[first:])


@pytest.mark.parametrize(("level_db", "ahead_s"), [(None, 13.2), (-30.0, 1.0)])
def test_a_frame_comes_when_the_sound_ahead_is_there_and_not_later(make_avatar, level_db: float | None, ahead_s: float) -> None:
    given = 0.0

    def chunks() -> Iterator[Waveform]:
        nonlocal given
        for piece in chunked(sound(20.0), 800):
            given += 0.05
            yield piece

    frames = animate(make_avatar(), chunks(), config=AnimateConfig(level_db=level_db))
    next(frames)
    assert given <= ahead_s
    for number, _ in enumerate(frames, 1):
        assert given <= number / 25 + ahead_s + 2.0


class Prompt(ThreadPoolExecutor):
    """Does everything at once."""

    def submit(self, fn, /, *args, **kwargs):
        done = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def test_many_cores_do_not_hold_back_frames_that_are_ready(make_avatar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(animating, "ThreadPoolExecutor", Prompt)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    given = 0.0

    def chunks() -> Iterator[Waveform]:
        nonlocal given
        for piece in chunked(sound(5.0), 800):
            given += 0.05
            yield piece

    next(animate(make_avatar(), chunks(), config=AnimateConfig(level_db=-30.0)))
    assert given <= 1.0


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", ["talking.mp4", "talking.mkv", "pictures"])
def test_a_film_that_was_interrupted_and_gone_on_with_is_the_same(make_avatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(animating, "SEGMENT_FRAMES", 10)
    write_animation(make_avatar(side=32), sound(2.4), tmp_path / f"whole_{name}")
    path = tmp_path / name

    def kill(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        if step == 33:
            raise Killed

    with pytest.raises(Killed):
        write_animation(make_avatar(side=32), sound(2.4), path, progress=kill)
    assert not path.exists() and (tmp_path / f"{name}.unfinished").is_dir()
    with pytest.raises(ConfigError, match="other settings"):
        write_animation(make_avatar(side=32), sound(2.3), path, resume=True)
    heard: list[int] = []
    assert write_animation(make_avatar(side=32), sound(2.4), path, resume=True, progress=lambda stage, step, of, values: heard.append(step)) == 60
    assert heard[0] in (31, 34) and heard[-1] == 60
    assert not (tmp_path / f"{name}.unfinished").exists()
    for one in sorted(path.iterdir()) if path.is_dir() else [path]:
        twin = tmp_path / f"whole_{name}" / one.name if path.is_dir() else tmp_path / f"whole_{name}"
        assert one.read_bytes() == twin.read_bytes()


def test_the_sound_of_a_file_keeps_its_quality(make_avatar, tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "said.mp4", 32, 32, audio=sound(1.0, 44100)) as writer:
        for _ in range(25):
            writer.write(np.zeros((32, 32, 3), np.uint8))
    write_animation(make_avatar(side=32), tmp_path / "said.mp4", tmp_path / "talking.mp4")
    with av.open(str(tmp_path / "talking.mp4")) as container:
        assert container.streams.audio[0].rate == 44100


def test_nothing_is_left_where_writing_fails(make_avatar, tmp_path: Path) -> None:
    with pytest.raises(MediaError):
        write_animation(make_avatar(side=32), sound(0.2), tmp_path / "missing" / "talking.mp4")
    avatar = make_avatar(side=32)
    avatar.render = None
    with pytest.raises(TypeError):
        write_animation(avatar, sound(0.2), tmp_path / "talking.mp4")
    assert list(tmp_path.iterdir()) == []


def test_the_real_networks_speak_the_same_in_any_batch(tiny_avatar) -> None:
    side = tiny_avatar.resolution
    one, four = (np.stack(list(animate(tiny_avatar, sound(0.4), config=AnimateConfig(batch_size=size)))).astype(int) for size in (1, 4))
    assert one.shape == (10, side, side, 3)
    assert np.abs(one - four).max() <= 1
    assert np.abs(one[1:] - one[:-1]).max() > 2
    assert not any(parameter.grad is not None for parameter in tiny_avatar.parameters())


def test_the_real_networks_listen(tiny_avatar) -> None:
    speech, silence = sound(0.4), Waveform(samples=torch.zeros(6400), sample_rate_hz=16000)
    heard, unheard = (np.stack(list(animate(tiny_avatar, said, config=AnimateConfig(camera="fixed")))).astype(int) for said in (speech, silence))
    assert np.abs(heard - unheard).max() > 0
