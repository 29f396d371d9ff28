"""Files written and read back: rates, colours, sound in step, and one-line errors."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from talk3d.errors import MediaError
from talk3d.io.media import read_audio, read_video, scan_video
from talk3d.io.writing import VideoWriter
from talk3d.types import Waveform


def flat(value: int, width: int = 64, height: int = 48) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def textured(shift: int) -> np.ndarray:
    columns = (np.arange(64) * 4 + shift * 9) % 256
    return np.broadcast_to(columns[None, :, None], (48, 64, 3)).astype(np.uint8)


def click(at_s: float, length_s: float, rate: int = 16000) -> Waveform:
    samples = torch.zeros(round(length_s * rate))
    samples[round(at_s * rate) : round(at_s * rate) + 8] = 0.9
    return Waveform(samples=samples, sample_rate_hz=rate)


def write_stamped(path: Path, stamps_ms: list[int], video_start_ms: int = 0, audio: Waveform | None = None, audio_start_ms: int = 0) -> None:
    """A video whose pictures have these time stamps, made without the code under test."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if audio is not None:
            sound = container.add_stream("pcm_s16le", rate=audio.sample_rate_hz, layout="mono")
            piece = av.AudioFrame.from_ndarray((audio.samples.numpy()[None] * 32767).astype(np.int16), format="s16", layout="mono")
            piece.sample_rate, piece.time_base = audio.sample_rate_hz, Fraction(1, audio.sample_rate_hz)
            piece.pts = round(audio_start_ms / 1000 * audio.sample_rate_hz)
            container.mux(sound.encode(piece))
            container.mux(sound.encode(None))
        for index, stamp in enumerate(stamps_ms):
            picture = av.VideoFrame.from_ndarray(textured(index), format="rgb24")
            picture.pts, picture.time_base = stamp + video_start_ms, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def test_frames_and_colours_come_back_and_the_flash_meets_the_click(tmp_path: Path):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[8:40, 8:28], picture[8:40, 36:56] = (240, 30, 20), (20, 60, 220)
    with VideoWriter(tmp_path / "out.mp4", 64, 48, audio=click(1.0, 2.0)) as writer:
        for index in range(50):
            writer.write(flat(255) if index == 25 else picture)
    frames = list(read_video(tmp_path / "out.mp4"))
    assert len(frames) == 50
    for row, column in ((24, 16), (24, 46), (2, 2)):
        assert np.abs(frames[3][row, column].astype(int) - picture[row, column]).max() <= 6
    assert int(np.argmax([frame.mean() for frame in frames])) == 25
    heard = int(read_audio(tmp_path / "out.mp4").samples.abs().argmax())
    assert abs(heard - 16000) < 320  # half a frame
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_written_colours_are_tagged_and_sound_is_cut_to_the_pictures(tmp_path: Path):
    with VideoWriter(tmp_path / "out.mp4", 64, 48, audio=click(0.1, 10.0)) as writer:
        for _ in range(25):
            writer.write(flat(90))
    with av.open(str(tmp_path / "out.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (int(frame.colorspace), int(frame.color_range)) == (1, 1)
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.audio[0].codec_context.name == "aac"
    assert read_audio(tmp_path / "out.mp4").duration_s == pytest.approx(1.0, abs=0.07)


def test_odd_sizes_are_written_and_read(tmp_path: Path):
    with VideoWriter(tmp_path / "odd.mp4", 63, 47) as writer:
        for _ in range(5):
            writer.write(flat(120, 63, 47))
    assert next(read_video(tmp_path / "odd.mp4")).shape == (48, 64, 3)


def test_nothing_is_left_when_writing_fails(tmp_path: Path):
    with pytest.raises(RuntimeError, match="stop"), VideoWriter(tmp_path / "out.mp4", 64, 48) as writer:
        writer.write(flat(0))
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MediaError, match="folder that exists"):
        VideoWriter(tmp_path / "no" / "out.mp4", 64, 48)
    with pytest.raises(MediaError, match="mp4"):
        VideoWriter(tmp_path / "out.txt", 64, 48)


def test_variable_rate_becomes_constant(tmp_path: Path):
    stamps = [0, 40, 80, 200, 240, 280, 320]
    write_stamped(tmp_path / "vfr.mkv", stamps)
    scan = scan_video(tmp_path / "vfr.mkv")
    assert scan.source_index.tolist() == [0, 1, 2, 2, 2, 3, 4, 5, 6]
    assert (scan.num_repeated, scan.num_dropped) == (2, 0)


def test_doubled_frames_are_taken_out(tmp_path: Path):
    with av.open(str(tmp_path / "thirty.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(120):
            picture = av.VideoFrame.from_ndarray(textured(index * 5 // 6), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    scan = scan_video(tmp_path / "thirty.mp4")
    assert scan.num_duplicates in (19, 20)
    assert scan.num_frames == pytest.approx(100, abs=1)
    assert scan.true_fps == pytest.approx(25, abs=0.3)
    assert scan.num_repeated + scan.num_dropped <= 1


@pytest.mark.parametrize(("video_start_ms", "audio_start_ms"), [(80, 0), (0, 120), (200, 40)])
def test_sound_is_counted_from_the_first_picture(tmp_path: Path, video_start_ms: int, audio_start_ms: int):
    path = tmp_path / "late.mkv"
    write_stamped(path, [40 * index for index in range(50)], video_start_ms, click(1.0, 2.0), audio_start_ms)
    heard = int(read_audio(path).samples.abs().argmax()) / 16000
    assert heard == pytest.approx(1.0 + (audio_start_ms - video_start_ms) / 1000, abs=0.003)


def write_wav(path: Path, samples: np.ndarray, rate: int = 22050, codec: str = "pcm_f32le") -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono" if len(samples) == 1 else "stereo")
        piece = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T.reshape(1, -1)), format="flt", layout=stream.layout.name)
        piece.sample_rate = rate
        container.mux(stream.encode(piece))
        container.mux(stream.encode(None))


def test_sound_is_mixed_down_resampled_and_freed_of_what_is_no_number(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(22050) / 22050, dtype=np.float32)
    write_wav(tmp_path / "tone.wav", np.stack([tone, np.zeros_like(tone)]))
    samples = read_audio(tmp_path / "tone.wav").samples
    assert len(samples) == pytest.approx(16000, abs=20)
    expected = 0.25 * torch.sin(2 * torch.pi * 440 * torch.arange(len(samples)) / 16000)
    assert (samples - expected)[200:-200].abs().max() < 0.01
    tone[1000], tone[2000] = np.nan, np.inf
    write_wav(tmp_path / "holes.wav", tone[None])
    holes = read_audio(tmp_path / "holes.wav").samples
    assert torch.isfinite(holes).all()
    assert caplog.text.count("2 of 22050 samples of the sound are not numbers") == 1


def test_short_and_empty_sound(tmp_path: Path):
    write_wav(tmp_path / "short.wav", np.full((1, 2205), 0.1, np.float32))
    assert read_audio(tmp_path / "short.wav").duration_s == pytest.approx(0.1, abs=0.005)
    with av.open(str(tmp_path / "empty.wav"), "w") as container:
        container.add_stream("pcm_s16le", rate=16000, layout="mono")
        container.start_encoding()
    with pytest.raises(MediaError):
        read_audio(tmp_path / "empty.wav")


def test_the_rotation_flag_turns_the_frames(tmp_path: Path):
    lying = tmp_path / "lying.mp4"
    picture = flat(0)
    picture[:, :16] = 255
    with VideoWriter(lying, 64, 48) as writer:
        for _ in range(5):
            writer.write(picture)
    turned = tmp_path / "turned.mp4"
    _with_rotation(lying, turned)
    scan = scan_video(turned)
    assert (scan.width_px, scan.height_px) == (48, 64)
    frame = next(read_video(turned))
    assert frame.shape == (64, 48, 3)
    bright = [frame[:16].mean(), frame[-16:].mean()]
    assert max(bright) > 200 > 50 > min(bright)


def _with_rotation(source: Path, target: Path) -> None:
    """Set the display matrix in the track header to a quarter turn."""
    data = bytearray(source.read_bytes())
    identity = b"".join(value.to_bytes(4, "big", signed=True) for value in (65536, 0, 0, 0, 65536, 0, 0, 0, 1073741824))
    quarter = b"".join(value.to_bytes(4, "big", signed=True) for value in (0, 65536, 0, -65536, 0, 0, 48 * 65536, 0, 1073741824))
    place = data.index(identity, data.index(b"tkhd"))
    data[place : place + len(identity)] = quarter
    target.write_bytes(data)


def test_errors_are_one_line_and_say_what_to_do(tmp_path: Path):
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    whole = tmp_path / "whole.mp4"
    with VideoWriter(whole, 64, 48) as writer:
        for index in range(60):
            writer.write(textured(index))
    stump = tmp_path / "stump.mp4"
    stump.write_bytes(whole.read_bytes()[:500])
    for path in (tmp_path / "missing.mp4", tmp_path, text, stump):
        with pytest.raises(MediaError, match="give") as caught:
            scan_video(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(MediaError, match="no sound track"):
        read_audio(whole)
    write_wav(tmp_path / "sound.wav", np.zeros((1, 8000), np.float32))
    with pytest.raises(MediaError, match="no video track"):
        scan_video(tmp_path / "sound.wav")


def test_a_truncated_file_gives_what_it_has(tmp_path: Path):
    whole = tmp_path / "whole.mp4"
    noise = np.random.default_rng(0)
    with VideoWriter(whole, 64, 48) as writer:
        for _ in range(100):
            writer.write(noise.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    data = whole.read_bytes()
    half = tmp_path / "half.mp4"
    half.write_bytes(data[: len(data) // 2])
    scan = scan_video(half)
    assert scan.truncated
    assert 25 <= scan.num_frames < 75
    assert len(list(read_video(half, scan=scan))) == scan.num_frames
    assert not scan_video(whole).truncated


def test_sound_without_a_single_number_is_refused(tmp_path: Path):
    write_wav(tmp_path / "nothing.wav", np.full((1, 4410), np.nan, np.float32))
    with pytest.raises(MediaError, match="not one of the 4410 samples"):
        read_audio(tmp_path / "nothing.wav")
