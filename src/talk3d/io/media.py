"""Video and sound in: constant-rate frames by time stamp, mono sound in step with them. Out is `io.writing`.

Everything streams: memory does not grow with the length of a video. Knows nothing of faces or models.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.video.reformatter import Colorspace
from jaxtyping import Float, Int64, UInt8

from talk3d.errors import MediaError
from talk3d.io.timeline import constant_rate, find_cuts, find_duplicates, find_jumps, largest_since, retime
from talk3d.types import Waveform

logger = logging.getLogger(__name__)

READ_ERRORS = (FFmpegError, OSError, ValueError)
HELD = 32
"""Pictures that are held while a video is read backwards."""
UNTAGGED = 2
"""FFmpeg's number for a matrix that the file does not name."""


@dataclass(frozen=True, kw_only=True)
class VideoScan:
    """What one look through a video found, and which of its pictures become the frames at a constant rate."""

    path: Path
    width_px: int
    """After the rotation flag has been applied."""
    height_px: int
    fps: float
    """The constant rate asked for."""
    source_fps: float
    """The rate that the time stamps say."""
    true_fps: float
    """The rate of different pictures, duplicates of a regular pattern left out."""
    num_decoded: int
    num_duplicates: int
    """Pictures left out because a regular pattern of doubled frames was found."""
    rotation_deg: int
    start_s: float
    """Time stamp of the first picture; sound is counted from here."""
    source_index: Int64[np.ndarray, " t"]
    """For each frame at the constant rate, the number of the decoded picture that it shows."""
    cuts: tuple[int, ...]
    """Frames that begin a new shot, as far as the whole picture tells."""
    jumps: Float[np.ndarray, " t"]
    """For each frame, how many times more it differs from the one before than its neighbours do; see `timeline.find_jumps`."""
    truncated: bool
    """The file ended before its own header said it would, or broke off with an error."""
    times_s: Float[np.ndarray, " d"] = field(default_factory=lambda: np.zeros(0))
    """Time stamps of the decoded pictures."""

    @property
    def num_frames(self) -> int:
        """Frames at the constant rate."""
        return len(self.source_index)

    @property
    def num_repeated(self) -> int:
        """Frames that show the same picture as the one before."""
        return int((np.diff(self.source_index) == 0).sum())

    @property
    def num_dropped(self) -> int:
        """Pictures, beside the duplicates, that no frame shows."""
        return self.num_decoded - self.num_duplicates - len(np.unique(self.source_index))


def scan_video(path: str | Path, fps: float = 25.0) -> VideoScan:
    """Look through a video once and decide which decoded picture each frame at a constant rate shows.

    A regular pattern of doubled pictures (25 pictures a second in a file of 30) is taken out, and what is left is spread evenly over the same time.

    Args:
        path: any file with a video stream.
        fps: the constant rate wanted.

    Raises:
        MediaError: no such file, not a video, or nothing in it can be decoded.
    """
    path = Path(path)
    times: list[float] = []
    differences: list[float] = []
    previous: np.ndarray | None = None
    first: av.VideoFrame | None = None
    with _open_video(path) as container:
        stream = container.streams.video[0]
        rate = float(stream.guessed_rate or stream.average_rate or fps)
        promised = stream.frames
        broken = False
        try:
            for number, picture in enumerate(container.decode(stream)):
                first = first or picture
                times.append(picture.time if picture.time is not None else number / rate)
                luma = _coarse_luma(picture)
                same_shape = previous is not None and previous.shape == luma.shape
                differences.append(float(np.abs(luma - previous).mean()) if previous is not None and same_shape else 255.0)
                previous = luma
        except READ_ERRORS as error:
            logger.warning("%s breaks off after %d frames (%s)", path, len(times), error)
            broken = True
    if first is None:
        raise MediaError(f"{path} has a video stream but no picture in it can be decoded: give a whole mp4, mov, mkv or webm file")
    stamps, change = np.asarray(times), np.asarray(differences)
    length_s = float(stamps[-1] - stamps[0])
    source_fps = (len(stamps) - 1) / length_s if length_s > 0 else rate
    duplicate = find_duplicates(change)
    kept = np.flatnonzero(~duplicate)
    source_index = kept[constant_rate(retime(stamps, duplicate, 1 / source_fps), fps, 1 / source_fps)]
    upright = first.rotation % 180 == 0
    return VideoScan(
        path=path,
        width_px=first.width if upright else first.height,
        height_px=first.height if upright else first.width,
        fps=fps,
        source_fps=float(source_fps),
        true_fps=float(source_fps * len(kept) / len(stamps)),
        num_decoded=len(stamps),
        num_duplicates=int(duplicate.sum()),
        rotation_deg=first.rotation % 360,
        start_s=float(stamps[0]),
        source_index=source_index,
        cuts=tuple(int(np.searchsorted(source_index, cut)) for cut in find_cuts(change) if cut <= source_index[-1]),
        jumps=largest_since(find_jumps(change), source_index),
        truncated=broken or len(stamps) < 0.9 * promised,
        times_s=stamps,
    )


def read_video(path: str | Path, fps: float = 25.0, scan: VideoScan | None = None) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Yield upright RGB frames at a constant rate, one at a time.

    Args:
        path: any file with a video stream.
        fps: the constant rate; ignored where `scan` is given.
        scan: what `scan_video` found, to save looking through the file again.

    Raises:
        MediaError: no such file, not a video, or nothing in it can be decoded.
    """
    scan = scan or scan_video(path, fps)
    wanted = scan.source_index
    position = 0
    upright = scan.rotation_deg % 180 == 0
    size = (scan.width_px, scan.height_px) if upright else (scan.height_px, scan.width_px)
    with _open_video(Path(path)) as container:
        try:
            for number, picture in enumerate(container.decode(container.streams.video[0])):
                if number != wanted[position]:
                    continue
                frame = np.ascontiguousarray(np.rot90(_to_rgb(picture, size), scan.rotation_deg // 90))
                while position < len(wanted) and wanted[position] == number:
                    yield frame
                    position += 1
                if position == len(wanted):
                    return
        except READ_ERRORS as error:
            raise MediaError(f"{path} changed while it was read ({error}): try again with a file that nothing else writes to") from error


def read_frames(scan: VideoScan, order: Iterable[int]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Yield upright RGB frames at the constant rate in any order; steps forward and back are cheap, and few frames are held at once.

    Args:
        scan: what `scan_video` found.
        order: numbers of frames.

    Raises:
        MediaError: the file cannot be read any more.
    """
    held: dict[int, UInt8[np.ndarray, "h w 3"]] = {}
    ahead: Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]] = iter(())
    for wanted in (int(scan.source_index[number]) for number in order):
        if wanted not in held and held and wanted < min(held):
            ahead = _pictures_from(scan, max(wanted - HELD + 1, 0))
            held = {}
        elif wanted not in held and (not held or wanted > max(held) + 2 * HELD):
            ahead, held = _pictures_from(scan, wanted), {}
        while wanted not in held:
            number, frame = next(ahead, (-1, None))
            if frame is None:
                raise MediaError(f"{scan.path} changed while it was read: try again with a file that nothing else writes to")
            held[number] = frame
            if len(held) > HELD:
                del held[min(held)]
        yield held[wanted]


def _pictures_from(scan: VideoScan, first: int) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
    """Pictures of a file from one of them on, with their numbers."""
    upright = scan.rotation_deg % 180 == 0
    size = (scan.width_px, scan.height_px) if upright else (scan.height_px, scan.width_px)
    with _open_video(scan.path) as container:
        stream = container.streams.video[0]
        try:
            if first and stream.time_base:
                container.seek(int((scan.times_s[first] - 1e-4) / stream.time_base), stream=stream)
            for picture in container.decode(stream):
                number = int(np.abs(scan.times_s - (scan.times_s[0] if picture.time is None else picture.time)).argmin())
                if number >= first:
                    yield number, np.ascontiguousarray(np.rot90(_to_rgb(picture, size), scan.rotation_deg // 90))
        except READ_ERRORS as error:
            raise MediaError(f"{scan.path} changed while it was read ({error}): try again with a file that nothing else writes to") from error


def read_audio(path: str | Path, sample_rate_hz: int = 16000) -> Waveform:
    """Mono sound of an audio file, or of a video from its first picture on: all of `stream_audio` in one.

    Args:
        path: wav, mp3, m4a, flac, ogg or any video with a sound track.
        sample_rate_hz: rate wanted.

    Raises:
        MediaError: no such file, no sound track, or an empty one.
    """
    return Waveform(samples=torch.cat([piece.samples for piece in stream_audio(path, sample_rate_hz)]), sample_rate_hz=sample_rate_hz)


def stream_audio(path: str | Path, sample_rate_hz: int = 16000) -> Iterator[Waveform]:
    """Yield the mono sound of a file piece by piece, of a video from its first picture on.

    Values that are no numbers become silence, channels are averaged, gaps in the time stamps are filled with silence.

    Args:
        path: wav, mp3, m4a, flac, ogg or any video with a sound track.
        sample_rate_hz: rate wanted.

    Raises:
        MediaError: no such file, no sound track, or an empty one.
    """
    path = Path(path)
    origin_s = _first_picture_s(path)
    silenced, count = _Silenced(), 0
    with _open(path, "sound or video file") as container:
        if not container.streams.audio:
            raise MediaError(f"{path} has no sound track: give a file with sound, such as wav, mp3, m4a, flac or a video with speech")
        try:
            for piece in _decode_audio(container, sample_rate_hz, origin_s, silenced):
                count += piece.size
                if piece.size:
                    yield Waveform(samples=torch.from_numpy(np.clip(piece, -1, 1)), sample_rate_hz=sample_rate_hz)
        except READ_ERRORS as error:
            raise MediaError(f"the sound of {path} cannot be decoded ({error}): convert it to wav and give that") from error
    if count == 0:
        raise MediaError(f"{path} has a sound track without a single sample: give a file that is not empty")
    if silenced.bad and silenced.bad == silenced.total:
        raise MediaError(f"not one of the {silenced.total} samples of {path} is a number: record or convert the sound again")
    if silenced.bad:
        logger.warning("%d of %d samples of the sound are not numbers and become silence", silenced.bad, silenced.total)


def sound_length_s(path: str | Path) -> float:
    """How long the sound of a file is by its header, without decoding; 0 where the header does not say.

    Raises:
        MediaError: no such file, or none that can be read.
    """
    with _open(Path(path), "sound or video file") as container:
        streams = container.streams.audio
        if streams and streams[0].duration is not None:
            return float(streams[0].duration * streams[0].time_base)
        return (container.duration or 0) / av.time_base


def _open(path: Path, expected: str) -> Any:
    """Open a file for reading, or say in one line what is wrong with it."""
    if not path.is_file():
        raise MediaError(f"there is no file {path}: give the path of a {expected}")
    try:
        return av.open(str(path))
    except READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"{path} is not a {expected} that can be read ({reason}): give a whole {expected}") from error


def _open_video(path: Path) -> Any:
    """Open a file that has a video stream."""
    container = _open(path, "video file")
    streams = container.streams.video
    if not streams or streams[0].disposition.name == "attached_pic":
        container.close()
        raise MediaError(f"{path} has no video track: give a video file, such as mp4, mov, mkv or webm")
    streams[0].thread_type = "AUTO"
    return container


def _first_picture_s(path: Path) -> float | None:
    """Time stamp of the first picture, or None for pure sound."""
    with _open(path, "sound or video file") as container:
        streams = [stream for stream in container.streams.video if stream.disposition.name != "attached_pic"]
        if not streams:
            return None
        try:
            return next((picture.time for picture in container.decode(streams[0])), None)
        except READ_ERRORS:
            return None


def _coarse_luma(picture: Any) -> np.ndarray:
    """Brightness of every few pixels, enough to tell pictures apart, as int16."""
    step = max(1, min(picture.width, picture.height) // 256)
    if picture.format.name in {"yuv420p", "yuvj420p", "yuv422p", "yuv444p", "nv12"}:
        plane = picture.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        return rows[: picture.height : step, : picture.width : step].astype(np.int16)
    return picture.to_ndarray(format="gray")[::step, ::step].astype(np.int16)


def _to_rgb(picture: Any, size: tuple[int, int]) -> np.ndarray:
    """RGB of a picture at `size` (width, height); untagged colours are BT.709 from 720 lines up and BT.601 below, as players take them."""
    tagged = picture.colorspace != UNTAGGED
    source = picture.colorspace if tagged else (Colorspace.ITU709 if picture.height >= 720 else Colorspace.ITU601)
    return picture.to_ndarray(format="rgb24", width=size[0], height=size[1], src_colorspace=source)


@dataclass(kw_only=True)
class _Silenced:
    """How many samples of a file were looked at, and how many were no numbers."""

    bad: int = 0
    total: int = 0


def _decode_audio(container: Any, sample_rate_hz: int, origin_s: float | None, silenced: _Silenced) -> Iterator[np.ndarray]:
    """Yield mono float pieces; what comes before `origin_s` is cut off, what is missing is silence."""
    resampler = av.AudioResampler(format="fltp", rate=sample_rate_hz)
    clock_s: float | None = origin_s
    skip = 0
    for frame in container.decode(container.streams.audio[0]):
        start_s: float = frame.time if frame.time is not None else clock_s or 0.0
        gap_s = start_s - (start_s if clock_s is None else clock_s)
        if gap_s > 0.05 or (gap_s > 0 and clock_s == origin_s):
            yield from (piece.to_ndarray().mean(0) for piece in resampler.resample(None))
            resampler = av.AudioResampler(format="fltp", rate=sample_rate_hz)
            yield np.zeros(round(gap_s * sample_rate_hz), np.float32)
            clock_s = start_s
        elif gap_s < 0 and clock_s == origin_s:
            skip, origin_s = round(-gap_s * sample_rate_hz), None
            clock_s = start_s
        clock_s = (start_s if clock_s is None else clock_s) + frame.samples / frame.sample_rate
        for piece in resampler.resample(_finite(frame, silenced)):
            samples = piece.to_ndarray().mean(0)
            yield samples[skip:]
            skip = max(skip - len(samples), 0)
    for piece in resampler.resample(None):
        yield piece.to_ndarray().mean(0)[skip:]


def _finite(frame: Any, silenced: _Silenced) -> Any:
    """The same piece of sound with silence where a float file holds no number."""
    if not frame.format.name.startswith(("flt", "dbl")):
        return frame
    values = frame.to_ndarray()
    bad = ~np.isfinite(values)
    silenced.bad, silenced.total = silenced.bad + int(bad.sum()), silenced.total + bad.size
    if not bad.any():
        return frame
    clean = av.AudioFrame.from_ndarray(np.where(bad, 0, values).clip(-8, 8).astype(values.dtype), format=frame.format.name, layout=frame.layout.name)
    clean.sample_rate, clean.time_base, clean.pts = frame.sample_rate, frame.time_base, frame.pts
    return clean
