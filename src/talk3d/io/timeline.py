"""Which picture of a video each frame at a constant rate shows: doubled pictures, shot changes, time stamps. Numbers in, numbers out."""

import numpy as np
from jaxtyping import Float
from scipy.ndimage import percentile_filter

DUPLICATE_CEILING = 0.1
"""Mean grey-level difference (0..255) below which two frames may be the same picture."""


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
    if period < 2:  # repeats in a row: a still scene, or a rate so high that dropping pictures by time mends it
        return duplicate
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


def find_cuts(change: Float[np.ndarray, " t"]) -> list[int]:
    """Pictures that differ from the one before far more than their neighbours do: the first of each new shot.

    Args:
        change: mean grey-level difference of each picture from the one before.
    """
    cuts = []
    for index in np.flatnonzero(change > 3.0):
        around = np.concatenate([change[max(index - 5, 1) : index], change[index + 1 : index + 6]])
        if index > 0 and len(around) and change[index] > 3.0 * around.max():
            cuts.append(int(index))
    return cuts


def retime(stamps: np.ndarray, duplicate: np.ndarray, step_s: float) -> np.ndarray:
    """Times of the pictures that are no duplicates, spread evenly over each stretch where duplicates were taken out."""
    kept = np.flatnonzero(~duplicate)
    times = stamps[kept].copy()
    places = np.flatnonzero(duplicate)
    if not len(places):
        return times
    reach = int(np.median(np.diff(places)))
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
