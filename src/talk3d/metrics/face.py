"""Measures of faces, of their motion, and of lips against sound: pure functions on landmarks, curves and embeddings."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.signal import butter, sosfiltfilt
from torch import Tensor

from talk3d.errors import ShapeError
from talk3d.metrics.image import box_around
from talk3d.metrics.offset import SYLLABLES_HZ
from talk3d.ops.geometry import fit_similarity
from talk3d.perception.headpose import RIGID_POINTS as HEAD_POINTS
from talk3d.types import Waveform

OUTER_EYE_CORNERS = (33, 263)
"""MediaPipe's numbers; their distance is the inter-ocular distance everywhere in talk3d."""
RIGID_POINTS = (33, 133, 362, 263, 168, 6, 197, 195, 5, 4, 8, 9, 151, 10)
"""Eye corners, nose bridge, nose tip and the middle of the forehead: what speech and blinks hardly move."""
LIP_POINTS = (
    *(61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185),
    *(78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191),
)
"""The outer and the inner contour of the lips, 20 points each."""
NUM_FACE_POINTS = 468
"""MediaPipe's face mesh; ten more belong to the irises and are left out of whole-face measures."""
UPPER_BLENDSHAPES = (*range(1, 6), *range(7, 23), 50, 51)
"""ARKit's blendshapes of brows, eyes, squints and nose in MediaPipe's order, in which 0 is the neutral face."""
LOWER_BLENDSHAPES = (6, *range(23, 50))
"""Those of puffed cheeks, jaw and mouth."""
LAG_FRAMES = 10
"""Largest shift at which mouth openings are compared."""
LAG_CORRELATION = 0.3
"""Mouths that never correlate more than this have no lag."""
SYNC_FRAMES = 15
"""Largest shift at which lips and sound are compared by SyncNet."""
SILENT_DB = 30.0
"""What is quieter than the loud frames by more than this is silence."""
SILENCE_S, SETTLE_S = 0.4, 0.12
"""Shortest span of silence that counts, and what is cut from both of its ends, where lips still shut or open already."""


def landmark_distance(landmarks: Float[Tensor, "t n 2"], truth: Float[Tensor, "t n 2"], points: tuple[int, ...] = LIP_POINTS) -> Float[Tensor, " t"]:
    """LMD of each frame: the mean distance of `points` from the truth in inter-ocular distances of the truth, head motion taken out.

    |S(p) - g| / |g₃₃ - g₂₆₃|, S being the similarity that brings `RIGID_POINTS` of the first onto those of the second, frame by frame.

    Args:
        landmarks: of the rendered face, MediaPipe's order, pixels.
        truth: of the real face.
        points: which to average over.

    Raises:
        ShapeError: fewer points than MediaPipe's 468.
    """
    if landmarks.shape[1] < NUM_FACE_POINTS:
        raise ShapeError(f"landmark distance needs MediaPipe's {NUM_FACE_POINTS} face points, got {landmarks.shape[1]}: use the face mesh detector")
    landmarks, truth = landmarks.double(), truth.double()
    rigid = list(RIGID_POINTS)
    scale, rotation, shift = fit_similarity(landmarks[:, rigid], truth[:, rigid])
    moved = scale[:, None, None] * landmarks[:, list(points)] @ rotation.mT + shift[:, None]
    left, right = OUTER_EYE_CORNERS
    interocular = (truth[:, left] - truth[:, right]).norm(dim=-1)
    return ((moved - truth[:, list(points)]).norm(dim=-1).mean(-1) / interocular).float()


def face_distance(landmarks: Float[Tensor, "t n 2"], truth: Float[Tensor, "t n 2"]) -> Float[Tensor, " t"]:
    """LMD over all 468 points of the face, see `landmark_distance`."""
    return landmark_distance(landmarks, truth, tuple(range(NUM_FACE_POINTS)))


def correlation(values: Float[np.ndarray, " t"], truth: Float[np.ndarray, " t"]) -> float:
    """Pearson's correlation of two series over the frames where both are finite; nan where one of them does not move."""
    both = np.isfinite(values) & np.isfinite(truth)
    if both.sum() < 2:
        return float("nan")
    a = values[both].astype(np.float64) - values[both].mean(dtype=np.float64)
    b = truth[both].astype(np.float64) - truth[both].mean(dtype=np.float64)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms > 1e-12 else float("nan")


def jitter(landmarks: Float[Tensor, "t n 2"], seen: Bool[np.ndarray, " t"] | None = None) -> float:
    """Root mean square second difference of `RIGID_POINTS` in pixels, over every three frames in a row that were all seen.

    Straight motion scores 0; white noise of σ pixels on both axes scores σ √12. nan where no three frames in a row were seen.

    Args:
        landmarks: MediaPipe's order, pixels.
        seen: False where the detector missed the face; everything if left out.
    """
    points = landmarks[:, list(RIGID_POINTS)].double()
    bend = points[2:] - 2 * points[1:-1] + points[:-2]
    if seen is not None:
        bend = bend[torch.from_numpy(seen[2:] & seen[1:-1] & seen[:-2])]
    return float(bend.square().sum(-1).mean().sqrt()) if len(bend) else float("nan")


def face_box(landmarks: Float[Tensor, "t n 2"], margin: float = 0.1) -> Float[Tensor, "t 4"]:
    """Left, top, right, bottom of the face points' bounding box, widened on each side by `margin` of its larger side."""
    return box_around(landmarks[:, :NUM_FACE_POINTS], margin)


def mouth_lag(opening: Float[np.ndarray, " t"], reference: Float[np.ndarray, " t"], fps: float) -> float:
    """By how many frames one mouth follows another at the pace of syllables: where their correlation is highest, between shifts by a parabola.

    nan where one of them does not move, where they never move together, and for films of less than half a second.

    Args:
        opening: of the mouth that may be late; nan where unknown, which is filled from both sides.
        reference: of the other.
        fps: frames a second.
    """
    reach = min(LAG_FRAMES, len(opening) // 3)
    if len(opening) < max(0.5 * fps, 12) or not (np.isfinite(opening).any() and np.isfinite(reference).any()):
        return float("nan")
    pace = butter(1, (SYLLABLES_HZ[0], min(SYLLABLES_HZ[1], 0.4 * fps)), "bandpass", fs=fps, output="sos")
    ours, theirs = (sosfiltfilt(pace, _whole(curve), padlen=3) for curve in (opening, reference))
    shifts, count = range(-reach, reach + 1), len(opening)
    curve = [correlation(ours[max(k, 0) : count + min(k, 0)], theirs[max(-k, 0) : count - max(k, 0)]) for k in shifts]
    if not np.isfinite(curve).all() or max(curve) < LAG_CORRELATION or min(np.std(ours), np.std(theirs)) < 1e-6:
        return float("nan")
    top = int(np.argmax(curve))
    if not 0 < top < len(curve) - 1:
        return float(shifts[top])
    before, at, after = curve[top - 1 : top + 2]
    return shifts[top] + 0.5 * (before - after) / (before - 2 * at + after)


def _whole(curve: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """A curve with its gaps filled by straight lines."""
    known = np.flatnonzero(np.isfinite(curve))
    return np.interp(np.arange(len(curve)), known, curve[known])


def head_rotations(landmarks: Float[Tensor, "t n 2"], shape: Float[Tensor, "p 3"]) -> Float[Tensor, "t 3 3"]:
    """Turn of the head in every frame, head to picture (x right, y down, z away), by least squares under scaled orthography.

    Only differences between turns are to be trusted: what perspective and the mean head get wrong is the same in both.

    Args:
        landmarks: MediaPipe's order, pixels.
        shape: where all these points lie on a head, head space (x to the picture's right, y up, z to the camera).
    """
    index = list(HEAD_POINTS)
    points, place = landmarks[:, index].double(), shape[index].double()
    place = (place - place.mean(0)) * place.new_tensor([1, -1, -1])
    linear = (points - points.mean(1, keepdim=True)).mT @ torch.linalg.pinv(place).mT  # t 2 3
    u, _, vt = torch.linalg.svd(linear, full_matrices=False)
    two = u @ vt
    return torch.cat([two, torch.linalg.cross(two[:, 0], two[:, 1])[:, None]], 1).float()


def turn_between(first: Float[Tensor, "t 3 3"], second: Float[Tensor, "t 3 3"]) -> Float[Tensor, " t"]:
    """Angle between rotations, degrees."""
    cosine = 0.5 * ((first.double().mT @ second.double()).diagonal(dim1=-2, dim2=-1).sum(-1) - 1)
    return cosine.clamp(-1, 1).acos().rad2deg().float()


def rigid_distance(landmarks: Float[Tensor, "t n 2"], truth: Float[Tensor, "t n 2"]) -> Float[Tensor, " t"]:
    """Mean distance of `RIGID_POINTS` in pixels, nothing aligned."""
    rigid = list(RIGID_POINTS)
    return (landmarks[:, rigid] - truth[:, rigid]).norm(dim=-1).mean(-1)


def silent_spans(waveform: Waveform, num_frames: int, fps: float) -> list[tuple[int, int]]:
    """First frame and end of every span of silence, its ends cut off.

    A frame is silent if its sound is more than `SILENT_DB` below the loud frames (95 % are quieter), or none.

    Args:
        waveform: sample 0 is the start of frame 0.
        num_frames: in which to look.
        fps: frames a second.
    """
    per_frame = round(waveform.sample_rate_hz / fps)
    samples = waveform.samples[: num_frames * per_frame].double()
    level = samples[: len(samples) // per_frame * per_frame].unflatten(0, (-1, per_frame)).square().mean(-1).numpy()
    if not len(level):
        return []
    silent = level <= max(np.quantile(level, 0.95) * 10 ** (-SILENT_DB / 10), 1e-10)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], silent.astype(np.int8), [0]])))
    cut = round(SETTLE_S * fps)
    return [(int(a) + cut, int(b) - cut) for a, b in edges.reshape(-1, 2) if b - a >= SILENCE_S * fps]


def lip_motion(landmarks: Float[Tensor, "t n 2"]) -> float:
    """RMS distance in pixels of the lip points from their mean over the frames, each frame brought onto the first by its rigid points."""
    points = landmarks.double()
    rigid, lips = list(RIGID_POINTS), list(LIP_POINTS)
    scale, rotation, shift = fit_similarity(points[:, rigid], points[:1, rigid].expand(len(points), -1, -1))
    moved = scale[:, None, None] * points[:, lips] @ rotation.mT + shift[:, None]
    return float((moved - moved.mean(0)).square().sum(-1).mean().sqrt())


def sync_distances(lips: Float[Tensor, "n d"], sound: Float[Tensor, "m d"]) -> Float[Tensor, " s"]:
    """Mean distance of lips from the sound that comes s = -15 … 15 frames later, over the runs of five frames that have both.

    Reference: Chung and Zisserman, Out of time (ACCV-W 2016), section 4.
    """
    count = min(len(lips), len(sound))
    found = []
    for shift in range(-SYNC_FRAMES, SYNC_FRAMES + 1):
        low, high = max(0, -shift), min(count, count - shift)
        found.append((lips[low:high] - sound[low + shift : high + shift]).norm(dim=-1).mean() if high > low else lips.new_tensor(torch.nan))
    return torch.stack(found)


def lse(distances: Float[Tensor, " s"]) -> tuple[float, float, int]:
    """Lip-sync error distance, confidence, and the offset: least distance, median minus least, by how many frames the sound comes late."""
    known = distances[distances.isfinite()]
    if len(known) < 3:
        return float("nan"), float("nan"), 0
    least = float(known.min())
    best = int(torch.where(distances.isfinite(), distances, torch.inf).argmin()) - SYNC_FRAMES
    return least, float(known.quantile(0.5)) - least, best
