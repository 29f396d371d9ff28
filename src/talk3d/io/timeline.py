"""Which picture of a video each frame at a constant rate shows: doubled pictures, shot changes, time stamps. Numbers in, numbers out."""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int
from scipy.ndimage import binary_closing, maximum_filter1d, minimum_filter1d, percentile_filter, uniform_filter1d

DUPLICATE_CEILING = 0.1
"""Mean grey-level difference (0..255) below which two frames may be the same picture."""
HELD_CEILING = 0.3
"""The same where every picture is repeated, so that pictures can be compared with their neighbours."""
CUT_JUMP = 3.0
"""How many times more the picture changes at a cut than around it."""
CUT_FLOOR = 6.0
"""Mean grey-level difference of a cut that is believed without a look at the face; key frames of coarse codecs reach 3."""


def find_duplicates(change: Float[np.ndarray, " t"]) -> np.ndarray:
    """Mark pictures that only repeat the one before, where this happens in a regular pattern; a still scene is no pattern.

    Args:
        change: mean grey-level difference of each picture from the one before.
    """
    duplicate = np.zeros(len(change), bool)
    if len(change) < 24:
        return duplicate
    usual = percentile_filter(change, 85, size=13, mode="nearest")
    found = np.flatnonzero((change < DUPLICATE_CEILING) & (change < 0.15 * usual))
    if len(found) < 6:
        return duplicate
    period = float(np.median(np.diff(found)))
    if period <= 2:
        return _held(change)
    runs = np.split(found, np.flatnonzero(np.diff(found) > 3 * period + 1) + 1)
    for run in runs:
        steps = np.diff(run)
        multiple = np.maximum(np.round(steps / period), 1)
        if len(run) < 6 or np.mean(np.abs(steps - multiple * period) <= 1) < 0.9:
            continue
        duplicate[run] = True
        for start, step, times in zip(run, steps, multiple, strict=False):
            for missed in range(1, int(times)):  # a key frame can hide a duplicate: its place in the pattern gives it away
                duplicate[start + round(step * missed / times)] = True
    return duplicate


def _held(change: np.ndarray) -> np.ndarray:
    """Repeats where each picture is shown for 2, 3 or 4 places, even to one place, over at least a second; a still scene is none."""
    duplicate = np.zeros(len(change), bool)
    beside = maximum_filter1d(change, 3, mode="nearest")
    repeats = (change < HELD_CEILING) & (change < 0.6 * beside) & (beside > DUPLICATE_CEILING)
    shown = np.flatnonzero(~repeats)
    lengths = np.diff(shown, append=len(change))
    if not len(lengths):
        return duplicate
    low, high = minimum_filter1d(lengths, 6, mode="nearest"), maximum_filter1d(lengths, 6, mode="nearest")
    mean = uniform_filter1d(lengths.astype(float), 6, mode="nearest")
    even = binary_closing(np.pad((high <= 4) & (high - low <= 1) & (mean >= 1.5), 12, mode="edge"), np.ones(13))[12:-12]
    for run in np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(even.astype(int))) + 1):
        if len(run) >= 12 and even[run[0]]:
            duplicate[shown[run[0]] : shown[run[-1]] + lengths[run[-1]]] = True
    return duplicate & repeats


def find_jumps(change: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """How many times more each picture differs from the one before than the five different pictures on either side do, their largest left out.

    A cut stands out, also one that joins two moments of the same person; so does a key frame of a coarse codec.

    Args:
        change: mean grey-level difference of each picture from the one before.
    """
    jumps = np.zeros(len(change))
    live = np.flatnonzero(change > DUPLICATE_CEILING)
    live = live[live > 0]
    moved = change[live]
    for place, index in enumerate(live):
        around = np.concatenate([moved[max(place - 5, 0) : place], moved[place + 1 : place + 6]])
        usual = np.partition(around, -2)[-2] if len(around) > 1 else 0.0
        jumps[index] = moved[place] / max(usual, 0.3)
    return jumps


def find_cuts(change: Float[np.ndarray, " t"]) -> list[int]:
    """Pictures that differ from the one before far more than their neighbours do: the first of each new shot.

    Args:
        change: mean grey-level difference of each picture from the one before.
    """
    return np.flatnonzero((find_jumps(change) > CUT_JUMP) & (change > CUT_FLOOR)).tolist()


def shot_starts(
    cuts: Iterable[int], jumps: Float[np.ndarray, " t"], frames: Int[np.ndarray, " s"], points: Float[np.ndarray, "s n 2"]
) -> tuple[int, ...]:
    """Frames at which a new shot begins: cuts of the whole picture, and frames where picture and face both jump, as between two takes of one person.

    Args:
        cuts: frames that are known to be cuts.
        jumps: of all frames, see `find_jumps`.
        frames: those in which a face was seen, ascending.
        points: the face's points there, px.
    """
    starts = set(cuts)
    new = jumps[frames] > 0  # a repeated picture moves nothing
    frames, points = frames[new], points[new]
    if len(frames) < 4:
        return tuple(sorted(starts))
    steps = np.diff(points, axis=0) / np.median(np.ptp(points, axis=1))
    length = np.linalg.norm(steps, axis=-1).mean(-1)
    padded = np.pad(steps, ((1, 1), (0, 0), (0, 0)))
    strange = np.linalg.norm(steps - padded[:-2] - padded[2:], axis=-1).mean(-1)  # what two steps at once, as of a dropped picture, do not explain
    for place in np.flatnonzero((jumps[frames[1:]] > 1.8) & (length > 0.01)).tolist():
        around = np.concatenate([length[max(place - 5, 0) : place], length[place + 1 : place + 6]])
        jump = min(length[place], strange[place]) / max(np.partition(around, -2)[-2], 0.003)
        seen_through = frames[place + 1] - frames[place] <= 3
        if seen_through and jump > 1.6 and jump * jumps[frames[place + 1]] > 4.5:
            starts.add(int(frames[place + 1]))
    return tuple(sorted(starts))


def retime(stamps: np.ndarray, duplicate: np.ndarray, step_s: float) -> np.ndarray:
    """Times of the pictures that are no duplicates, spread evenly over each stretch where duplicates were taken out."""
    kept = np.flatnonzero(~duplicate)
    times = stamps[kept].copy()
    places = np.flatnonzero(duplicate)
    if not len(places):
        return times
    reach = int(np.median(np.diff(places)))
    if reach <= 2:  # every picture is held until the next is due, so the stamps are right
        return times
    for run in np.split(places, np.flatnonzero(np.diff(places) > 3 * reach + 1) + 1):
        low, high = max(run[0] - reach + 1, 0), min(run[-1] + reach - 1, len(stamps) - 1)
        inside = np.flatnonzero((kept >= low) & (kept <= high))
        end_s = stamps[high] + step_s
        times[inside] = stamps[low] + (end_s - stamps[low]) * np.arange(len(inside)) / len(inside)
    return times


def constant_rate(times: np.ndarray, fps: float, step_s: float) -> np.ndarray:
    """For each frame at a constant rate, the number of the latest picture that is due by then (FFmpeg's fps filter, round=near)."""
    due = np.floor((times - times[0]) * fps + 0.4999).astype(np.int64)  # halves fall to one side whatever the rounding of the stamps
    total = max(int(np.floor((times[-1] - times[0] + step_s) * fps + 0.4999)), int(due[-1]) + 1)
    return np.maximum(np.searchsorted(due, np.arange(total), side="right") - 1, 0)


def largest_since(values: np.ndarray, source_index: np.ndarray) -> np.ndarray:
    """For each frame, the largest value of the pictures after the one shown before, up to its own; 0 where a picture is repeated."""
    largest = np.zeros(len(source_index))
    for frame, (before, shown) in enumerate(pairwise([0, *source_index.tolist()])):
        largest[frame] = values[before + 1 : shown + 1].max(initial=0.0)
    return largest
