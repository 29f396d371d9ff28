"""Whole files, and films out: frames and sound to one file, or pictures to a folder; long ones in segments, so that they can be gone on with.

Everything streams, and whatever has a name is whole: work in progress has another one. Knows nothing of faces or models.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace
from jaxtyping import UInt8
from PIL import Image

from talk3d.errors import ConfigError, MediaError
from talk3d.types import Waveform

WRITE_ERRORS = (FFmpegError, OSError)
BT709 = 1
"""FFmpeg's number for BT.709 primaries, transfer and matrix."""
SEGMENT_FRAMES = 120
"""About how many frames of a long film are lost when it is interrupted."""


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give the block another name, with the same ending, to write a file under: it gets its own once the block is left, or is removed on an error."""
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How pictures become a stream."""

    codec: str
    pix_fmt: str
    segment: str
    """Ending of the files that hold segments."""
    options: dict[str, str] = field(default_factory=dict)


def encoding_for(path: Path, *, transparent: bool = False, lossless: bool = False, crf: int = 16) -> Encoding:
    """Choose the encoding that goes with a film's name: H.264 in .mp4, .m4v, .mov and .mkv, VP9 in .webm, ProRes 4444 in a transparent .mov.

    Args:
        path: of the film.
        transparent: the frames have an alpha channel.
        lossless: every pixel comes back as it was; H.264 of RGB, which not every player shows.
        crf: x264's constant rate factor, smaller is better.

    Raises:
        MediaError: the ending is not a film's, or it cannot hold what is wanted.
    """
    ending = path.suffix.lower()
    if ending not in {".mp4", ".m4v", ".mov", ".mkv", ".webm"}:
        raise MediaError(f"cannot write a video to {path}: give a name that ends in .mp4, .m4v, .mov, .mkv or .webm")
    if transparent:
        if ending == ".mov":
            return Encoding(codec="prores_ks", pix_fmt="yuva444p10le", segment=".mov", options={"profile": "4444", "vendor": "apl0"})
        if ending == ".webm":
            return Encoding(codec="libvpx-vp9", pix_fmt="yuva420p", segment=".webm", options=_vp9(crf) | {"auto-alt-ref": "0"})
        raise MediaError(f"{ending} films cannot be transparent: give a name that ends in .mov (ProRes) or .webm (VP9), or a folder for PNG pictures")
    if lossless:
        if ending not in {".mp4", ".mkv", ".mov"}:
            raise MediaError(f"{ending} films cannot be lossless here: give a name that ends in .mp4, .mov or .mkv, or a folder for PNG pictures")
        return Encoding(codec="libx264rgb", pix_fmt="rgb24", segment=".mp4", options={"qp": "0", "preset": "veryfast", "threads": "2"})
    if ending == ".webm":
        return Encoding(codec="libvpx-vp9", pix_fmt="yuv420p", segment=".webm", options=_vp9(crf))
    return Encoding(codec="libx264", pix_fmt="yuv420p", segment=".mp4", options={"crf": str(crf), "preset": "veryfast", "threads": "2"})


def _vp9(crf: int) -> dict[str, str]:
    return {"crf": str(crf + 8), "b": "0", "deadline": "realtime", "cpu-used": "6", "row-mt": "1", "threads": "2"}


class VideoWriter:
    """Writes RGB or RGBA frames and sound to a file that appears under its name only when it is whole.

    Use it in a `with` block and call `write` for every frame. If the block raises, nothing is left behind. Sound beyond the last frame is cut.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        *,
        fps: float = 25.0,
        audio: Waveform | None = None,
        crf: int = 16,
        encoding: Encoding | None = None,
    ) -> None:
        """Prepare to write.

        Args:
            path: ends in .mp4, .m4v, .mov, .mkv or .webm; an existing file is replaced.
            width: of the frames, px; an odd one gets one repeated column.
            height: of the frames, px; an odd one gets one repeated row.
            fps: frames a second.
            audio: sound that starts with the first frame.
            crf: constant rate factor, smaller is better.
            encoding: in place of the one that goes with the name.

        Raises:
            MediaError: the ending is not a video's, or nothing can be written there.
        """
        self.path = Path(path)
        self._encoding = encoding or encoding_for(self.path, crf=crf)
        self._partial = _partial(self.path)
        self._fps, self._num_frames = fps, 0
        self._container = _create(self._partial, self.path)
        self._video = _add_video_stream(self._container, (width + width % 2, height + height % 2), fps, self._encoding)
        self._sound = None if audio is None else _Sound(self._container, iter([audio]), audio.sample_rate_hz)

    def __enter__(self) -> "VideoWriter":
        """Return the writer."""
        return self

    def write(self, frame: UInt8[np.ndarray, "h w c"]) -> None:
        """Append one frame.

        Raises:
            MediaError: the disk is full or the file cannot be written any more.
        """
        picture = _picture(frame, self._encoding)
        picture.pts = self._num_frames
        self._num_frames += 1
        try:
            self._container.mux(self._video.encode(picture))
            if self._sound:
                self._sound.write_until(self._num_frames / self._fps)
        except WRITE_ERRORS as error:
            raise MediaError(f"cannot go on writing {self.path} ({error}): see that the disk has room") from error

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Finish the file and give it its name, or remove it if something went wrong."""
        try:
            if kind is None and self._num_frames:
                self._container.mux(self._video.encode(None))
                if self._sound:
                    self._sound.finish()
                self._container.close()
                self._partial.replace(self.path)
            else:
                self._container.close()
        except WRITE_ERRORS as error:
            if kind is None:
                raise MediaError(f"cannot finish {self.path} ({error}): see that the disk has room") from error
        finally:
            self._partial.unlink(missing_ok=True)


class FilmWriter:
    """Writes a film of any length in segments that lie in a folder beside it until the film is whole, so that it can be gone on with.

    The segments are joined packet by packet, without encoding anew, and the sound is added at the end: a film that was interrupted and gone on with
    is the same, byte by byte, as one that was not. Where the path has no ending, the film is a folder of PNG pictures without sound.

    Use it in a `with` block: `write` the frames from `num_frames` on, then `finish`.
    """

    def __init__(self, path: str | Path, *, fps: float, encoding: Encoding | None, key: str, segment_frames: int, resume: bool = False) -> None:
        """Begin a film, or go on with one.

        Args:
            path: of the film.
            fps: frames a second.
            encoding: of the film; None writes pictures.
            key: of all that the film is made from; only a film of the same key is gone on with.
            segment_frames: frames in a segment.
            resume: go on with what is there; else it is thrown away.

        Raises:
            ConfigError: what is there belongs to another film, or a folder of other things has the name that the pictures' folder would take.
            MediaError: nothing can be written there.
        """
        self.path, self._fps, self._encoding, self._length = Path(path), fps, encoding, segment_frames
        self.folder = self.path.with_name(f"{self.path.name}.unfinished")
        if self.path.is_dir() and not (encoding is None and (self.path / "000000.png").is_file()):
            raise ConfigError(f"{self.path} is a folder of something else: give another name, so that nothing of yours is overwritten")
        facts = {"key": key, "segment_frames": segment_frames}
        if resume and self.folder.exists() and self._facts() != facts:
            raise ConfigError(f"{self.folder} belongs to other settings or another version: leave --resume out to start over")
        if self.folder.exists() and not resume:
            self._facts()
            shutil.rmtree(self.folder)
        try:
            self.folder.mkdir(exist_ok=True)
            for torn in self.folder.glob(".*"):  # left by a run that was killed
                torn.unlink()
            (self.folder / "film.json").write_text(json.dumps(facts), encoding="utf-8")
        except OSError as error:
            raise MediaError(f"cannot write {self.path} ({error}): give a path in a folder that exists and that you may write to") from error
        self.num_frames = self._count()
        self._writer: VideoWriter | None = None

    def _facts(self) -> Any:
        """What is known of the unfinished film that is there."""
        try:
            return json.loads((self.folder / "film.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.folder} is there but is no unfinished film of talk3d: move it away, or give another -o") from error

    def _segments(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*"))

    def _count(self) -> int:
        """Frames that are whole already; those of a segment that is shorter than the others, because the film ended there, count too."""
        found = self._segments()
        return len(found) if self._encoding is None else sum(int(one.stem.partition("-")[2] or self._length) for one in found)

    def __enter__(self) -> "FilmWriter":
        """Return the writer."""
        return self

    def write(self, frame: UInt8[np.ndarray, "h w c"]) -> None:
        """Append one frame.

        Raises:
            MediaError: the disk is full or the file cannot be written any more.
        """
        if self._encoding is None:
            self._write_picture(frame)
        else:
            if self._writer is None:
                place = self.folder / f"{self.num_frames:08}{self._encoding.segment}"
                self._writer = VideoWriter(place, frame.shape[1], frame.shape[0], fps=self._fps, encoding=self._encoding)
            self._writer.write(frame)
        self.num_frames += 1
        if self._writer and self.num_frames % self._length == 0:
            self._close()

    def _write_picture(self, frame: UInt8[np.ndarray, "h w c"]) -> None:
        place = self.folder / f"{self.num_frames:06}.png"
        try:
            with whole(place) as partial:
                Image.fromarray(frame).save(partial, format="PNG", compress_level=3)
        except OSError as error:
            raise MediaError(f"cannot go on writing {self.path} ({error}): see that the disk has room") from error

    def _close(self) -> None:
        if self._writer:
            self._writer.__exit__(None, None, None)
            self._writer = None

    def finish(self, sound: Iterable[Waveform] | None = None, sample_rate_hz: int = 44100) -> None:
        """Join the segments, add the sound and give the film its name.

        Args:
            sound: pieces of it, the first at the time of the first frame; what is beyond the last frame is cut.
            sample_rate_hz: of the sound.

        Raises:
            MediaError: the disk is full, or the sound cannot be read.
        """
        if self._encoding is None:
            (self.folder / "film.json").unlink()
            if self.path.is_dir():
                shutil.rmtree(self.path)
            self.folder.replace(self.path)
            return
        left, writer = self.num_frames % self._length, self._writer
        if writer and left:
            writer.path = writer.path.with_name(f"{self.num_frames - left:08}-{left}{writer.path.suffix}")
        self._close()
        try:
            with whole(self.path) as partial, _create(partial, self.path) as container:
                self._join(container, None if sound is None else iter(sound), sample_rate_hz)
        except WRITE_ERRORS as error:
            raise MediaError(f"cannot finish {self.path} ({error}): see that the disk has room") from error
        shutil.rmtree(self.folder)

    def _join(self, container: Any, sound: Iterator[Waveform] | None, sample_rate_hz: int) -> None:
        """Copy the segments' packets one after the other, the sound beside them."""
        video: Any = None
        track: _Sound | None = None
        for number, segment in enumerate(self._segments()):
            with av.open(str(segment)) as source:
                stream: Any = source.streams.video[0]
                if video is None:
                    video = container.add_stream_from_template(stream)
                    track = None if sound is None else _Sound(container, sound, sample_rate_hz)
                shift = round(Fraction(number * self._length) / Fraction(self._fps).limit_denominator(1001) / stream.time_base)
                for packet in source.demux(stream):
                    if packet.pts is None or packet.dts is None:  # the flushing packet
                        continue
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, video
                    seconds = float(packet.pts * stream.time_base)
                    container.mux(packet)
                    if track:
                        track.write_until(min(seconds + 1 / self._fps, self.num_frames / self._fps))
        if track:
            track.write_until(self.num_frames / self._fps)
            track.finish()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Leave only whole segments behind, and no folder without any."""
        if self._writer:
            self._writer.__exit__(kind or GeneratorExit, value, trace)
        if self.folder.is_dir() and not self._segments():
            shutil.rmtree(self.folder)


class _Sound:
    """Encodes sound beside the pictures: AAC, or Opus in WebM."""

    def __init__(self, container: Any, pieces: Iterator[Waveform], rate: int) -> None:
        opus = container.format.name == "webm"
        self.rate, self.pieces, self.container, self.written = rate, pieces, container, 0
        self.stream = container.add_stream("libopus" if opus else "aac", rate=48000 if opus else rate, layout="mono")
        self.stream.bit_rate = 128_000
        self.waiting = np.zeros(0, np.float32)
        self.ended = False

    def write_until(self, end_s: float) -> None:
        """Encode the sound up to this time, so that both streams grow side by side."""
        wanted = round(end_s * self.rate) - self.written
        while len(self.waiting) < wanted and not self.ended:
            piece = next(self.pieces, None)
            self.ended = piece is None
            if piece is not None:
                self.waiting = np.concatenate([self.waiting, piece.samples.cpu().float().clamp(-1, 1).numpy()])
        samples, self.waiting = np.split(self.waiting, [max(wanted, 0)])
        if samples.size:
            piece = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None]), format="fltp", layout="mono")
            piece.sample_rate, piece.time_base, piece.pts = self.rate, Fraction(1, self.rate), self.written
            self.written += samples.size
            self.container.mux(self.stream.encode(piece))

    def finish(self) -> None:
        """Encode what the encoder still holds back."""
        self.container.mux(self.stream.encode(None))


def _partial(path: Path) -> Path:
    """Where a file is while it is not whole."""
    return path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")


def _create(partial: Path, path: Path) -> Any:
    """Open a file for writing; nothing random goes into it."""
    seekable = {"movflags": "+faststart"} if path.suffix.lower() in {".mp4", ".m4v", ".mov"} else {}
    try:
        partial.touch()
        return av.open(str(partial), "w", options=seekable | {"fflags": "+bitexact"})
    except WRITE_ERRORS as error:
        raise MediaError(f"cannot write {path} ({error}): give a path in a folder that exists and that you may write to") from error


def _add_video_stream(container: Any, size: tuple[int, int], fps: float, encoding: Encoding) -> Any:
    """A stream of BT.709 colours in video range, so that players show what was rendered; that of RGB has neither."""
    stream = container.add_stream(encoding.codec, rate=Fraction(fps).limit_denominator(1001), options=encoding.options)
    stream.width, stream.height = size
    stream.pix_fmt = encoding.pix_fmt
    if encoding.pix_fmt != "rgb24":
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = BT709, BT709, BT709, int(ColorRange.MPEG)
    return stream


def _picture(frame: UInt8[np.ndarray, "h w c"], encoding: Encoding) -> Any:
    """A frame as the encoder wants it."""
    height, width = frame.shape[:2]
    if height % 2 or width % 2:
        frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgba" if frame.shape[-1] == 4 else "rgb24")
    if encoding.pix_fmt == "rgb24":
        return picture
    return picture.reformat(format=encoding.pix_fmt, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
