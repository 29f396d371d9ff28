"""The capture check's judgements: from what was measured of a video to a table that says what is wrong and what to do.

Thresholds are at the top. Reads no file.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypedDict

Judgement = Literal["ok", "warning", "refuse"]

SHORT_S, TOO_SHORT_S = 20.0, 3.0
SLOW_FPS = 20.0
SMALL_PX, TOO_SMALL_PX = 200.0, 80.0
SILENT_DB, QUIET_DB = -60.0, -40.0
NOISY_DB = 15.0
CLIPPED_SHARE = 1e-3
LATE_MS = 60.0
STILL_YAW_DEG, WIDE_YAW_DEG = 10.0, 50.0
SHUT_MOUTH = 0.06
"""Least opening of the lips, in distances between the eyes."""
STRANGER, PERHAPS_STRANGER = 0.65, 0.75
"""Likeness of two shots' faces below which they are of two people, for certain and perhaps."""


class Line(TypedDict):
    """One row of the table."""

    what: str
    found: str
    judgement: Judgement
    advice: str
    """What to do; empty where nothing is wrong."""


def judge(report: Mapping[str, Any]) -> Iterator[Line]:
    """The table of a report, line by line, as far as there is something to judge."""
    yield from (_judge_rate(report), _judge_length(report), _judge_shots(report))
    if "crop_side_px" in report:
        yield from (_judge_face(report), _judge_person(report), _judge_motion(report), _judge_eyes(report))
    if "audio_rms_db" in report:
        yield _judge_sound(report)
    if "audio_offset_ms" in report:
        yield _judge_offset(report)


def _line(what: str, found: str, *problems: tuple[bool, Judgement, str]) -> Line:
    """A row with the first problem that holds, or ok."""
    for holds, judgement, advice in problems:
        if holds:
            return Line(what=what, found=found, judgement=judgement, advice=advice)
    return Line(what=what, found=found, judgement="ok", advice="")


def _judge_rate(report: Mapping[str, Any]) -> Line:
    found = f"{report['source_fps']:.4g} pictures a second"
    if report["duplicates"]:
        doubled = f"{report['duplicates']} of {report['frames_decoded']} frames are doubled and were left out"
        found = f"{doubled}: the video really has {report['true_fps']:.2f} frames a second, not {report['source_fps']:.4g}"
    return _line(
        "frame rate",
        found,
        (report["truncated"], "warning", "the file ends before it should: only its readable part was used; copy or export it again"),
        (report["true_fps"] < SLOW_FPS, "warning", "lips are blurred in time; film at 25 frames a second or more"),
        (report["duplicates"] > 0, "warning", "nothing to do; another time, export at the rate of the camera"),
    )


def _judge_length(report: Mapping[str, Any]) -> Line:
    found = f"{report['length_s']:.1f} s"
    whole = report["frames"] == report["video_frames"]
    if not whole:
        found = f"only {found} of the video show the face without a long gap, the rest was left out"
    return _line(
        "length",
        found,
        (report["length_s"] < TOO_SHORT_S, "refuse", "too short to learn from; record half a minute or more"),
        (report["length_s"] < SHORT_S, "warning", "the clip is short: some minutes are learnt best; record more"),
        (not whole, "warning", "cut the video to where the face is in view"),
    )


def _judge_shots(report: Mapping[str, Any]) -> Line:
    at = ", ".join(f"{second:g} s" for second in report["cuts_s"][:5]) + (" …" if len(report["cuts_s"]) > 5 else "")
    found = f"the shot changes {len(report['cuts_s'])} times, at {at}" if report["cuts_s"] else "one shot"
    return _line("shots", found, (bool(report["cuts_s"]), "warning", "one continuous shot is learnt best"))


def _judge_face(report: Mapping[str, Any]) -> Line:
    found = f"the head is {report['crop_side_px']:.0f} px, the eyes are {report['eye_distance_px']:.0f} px apart"
    if report["missed_frames"]:
        found += f"; the face was not found in {report['missed_frames']} of {report['looked_frames']} frames, which were bridged"
    if report["faces"] > 1:
        found += f"; {report['faces']} faces of similar size at once"
    return _line(
        "face",
        found,
        (report["crop_side_px"] < TOO_SMALL_PX, "refuse", "too small to learn from; film closer, or at a higher resolution"),
        (report["crop_side_px"] < SMALL_PX, "warning", "the head is small: film closer, or at a higher resolution"),
        (report["faces"] > 1, "warning", "the largest was followed; cut the video so that only the person to learn is in view"),
        (report["missed_frames"] > 0, "warning", "keep hands and microphone away from the face, and look towards the camera"),
    )


def _judge_person(report: Mapping[str, Any]) -> Line:
    alike = report["shot_likeness"]
    least = min(alike, default=1.0)
    others = [f"{begin:g} s" for begin, value in zip(report["shot_likeness_s"], alike, strict=True) if value < PERHAPS_STRANGER]
    sure = "another person" if least < STRANGER else "perhaps another person"
    found = f"{sure} from {', '.join(others[:5])}{' …' if len(others) > 5 else ''} on" if others else "one person throughout"
    return _line(
        "person",
        found,
        (least < STRANGER, "refuse", "cut the video so that only the person to learn is in it"),
        (bool(others), "warning", "look at these shots; cut the video so that only the person to learn is in it"),
    )


def _judge_motion(report: Mapping[str, Any]) -> Line:
    yaw, pitch = report["yaw_deg"], report["pitch_deg"]
    return _line(
        "head turns",
        f"yaw {yaw[0]:z.0f}° to {yaw[1]:z.0f}°, pitch {pitch[0]:z.0f}° to {pitch[1]:z.0f}°",
        (yaw[1] - yaw[0] < STILL_YAW_DEG, "warning", "the head hardly turns, so side views are guesses; turn it slowly to both sides for a while"),
        (max(abs(yaw[0]), abs(yaw[1])) > WIDE_YAW_DEG, "warning", "the head turns far away, where face points are unsure; stay within 45°"),
    )


def _judge_eyes(report: Mapping[str, Any]) -> Line:
    opened, wide = report["mouth_open"], report["mouth_wide"]
    shapes = f"lips open {opened[0]:.2f} to {opened[1]:.2f} and {wide[0]:.2f} to {wide[1]:.2f} wide, in distances between the eyes"
    blinks = f"{report['blinks']} blinks ({report['blinks_per_min']:.0f} a minute)"
    return _line(
        "mouth and eyes",
        f"{shapes}; {blinks}; gaze is too uncertain to be judged",
        (opened[1] - opened[0] < SHUT_MOUTH, "warning", "the mouth hardly opens; speak clearly, facing the camera"),
        (report["blinks"] == 0 and report["length_s"] >= 10, "warning", "no blink was seen, so the avatar's eyelids are guesses; record longer"),
    )


def _judge_sound(report: Mapping[str, Any]) -> Line:
    distance = report["speech_db"] - report["noise_db"]
    return _line(
        "sound",
        f"{report['audio_rms_db']:.0f} dB, noise {distance:.0f} dB below speech, {report['clipped_share']:.2%} clipped",
        (report["audio_rms_db"] < SILENT_DB, "refuse", "the sound is silent: lips cannot be learnt from it; record with a microphone"),
        (report["audio_rms_db"] < QUIET_DB, "warning", "the sound is quiet: record closer to the microphone"),
        (report["clipped_share"] > CLIPPED_SHARE, "warning", "the sound is too loud and clipped: turn the microphone down"),
        (distance < NOISY_DB, "warning", "noise or music is nearly as loud as speech: record in a quiet room, close to the microphone"),
    )


def _judge_offset(report: Mapping[str, Any]) -> Line:
    late, guess = report["audio_offset_ms"], report["audio_offset_guess_ms"]
    if guess is None:
        return _line("sound and lips", "cannot be compared: sound or lips do not move")
    applied = report["audio_offset_applied_ms"]
    moved = f"moved {'forward' if applied > 0 else 'back'} by {abs(applied):.0f} ms, " if applied else ""
    comes = f"the sound comes {abs(guess):.0f} ms {'late' if guess > 0 else 'early'}" if abs(guess) >= 0.5 else "the sound comes in step"
    if late is None:
        unfit = "sound and lips hardly fit together; see that the person in view is the one who is heard"
        return _line("sound and lips", f"{moved}not sure; perhaps {comes}", (report["length_s"] >= SHORT_S, "warning", unfit))
    alone = "" if applied else "left to themselves, track and build move it; or "
    mend = f"{alone}mend it with --audio-offset-ms {late + applied:.0f} (build: --track.audio-offset-ms)"
    found = f"{moved}{comes} (± {max(report['audio_offset_spread_ms'], 10):.0f} ms)"
    return _line("sound and lips", found, (abs(late) > LATE_MS, "warning", mend))
