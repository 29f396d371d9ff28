from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from talk3d.errors import ShapeError
from talk3d.ops.geometry import head_camera, project
from talk3d.types import WIDER, AudioFeatures, Camera, Clip, FaceMasks, FaceTrack, Progress, Waveform, WideViews, silent, spread_evenly

T = 4


def make_clip(**changes: Any) -> Clip:
    track = FaceTrack(
        cameras=Camera.from_label(torch.zeros(T, 25)),
        head_pose=torch.arange(3.0 * T).reshape(T, 3),
        landmarks=torch.zeros(T, 478, 2),
        anchors=torch.arange(6.0 * T).reshape(T, 6),
        blink=torch.arange(float(T))[:, None],
        upper_face=torch.arange(5.0 * T).reshape(T, 5),
        confidence=torch.ones(T, 1),
        crop=np.zeros((T, 2, 3)),
    )
    fields: dict[str, Any] = {
        "frames": np.arange(T * 8 * 8 * 3).reshape(T, 8, 8, 3).astype(np.uint8),
        "fps": 25.0,
        "waveform": Waveform(samples=torch.zeros(T * 640), sample_rate_hz=16000),
        "audio": AudioFeatures(values=torch.zeros(T, 2, 5), fps=25.0, source="test"),
        "track": track,
        "masks": FaceMasks(person=np.full((T, 8, 8), 255, np.uint8), source="test"),
        "source": "me.mp4",
        "source_sha256": "0" * 64,
        "num_training_frames": 3,
    }
    return Clip(**fields | changes)


def test_every_array_has_as_many_frames() -> None:
    assert make_clip().num_frames == T
    with pytest.raises(ShapeError, match="'audio': 5"):
        make_clip(audio=AudioFeatures(values=torch.zeros(5, 2, 5), fps=25.0, source="test"))


def test_driving_picks_the_same_frames_everywhere() -> None:
    clip = make_clip()
    driving = clip.driving(torch.tensor([2, 0]))
    assert driving.blink[:, 0].tolist() == [2, 0]
    assert torch.equal(driving.head_pose, clip.track.head_pose[[2, 0]])
    assert torch.equal(driving.anchors, clip.track.anchors[[2, 0]])
    assert torch.equal(driving.upper_face, clip.track.upper_face[[2, 0]])
    assert driving.audio.shape == (2, 8, 2, 5)
    halved = replace(driving, blink=driving.blink.half()).to("cpu")
    assert halved.blink.dtype == torch.float32 and torch.equal(halved.blink, driving.blink) and torch.equal(halved.audio, driving.audio)


def test_images_are_in_minus_one_to_one_channels_first() -> None:
    frames = np.zeros((T, 8, 8, 3), np.uint8)
    frames[1, 2, 3] = (255, 0, 51)
    images, matte = make_clip(frames=frames).images(torch.tensor([1]))
    assert images[0, :, 2, 3].tolist() == pytest.approx([1.0, -1.0, -0.6])
    assert images.min() == -1 and images.shape == (1, 3, 8, 8)
    assert torch.equal(matte, torch.ones(1, 1, 8, 8))


def test_wide_cameras_show_a_point_nearer_to_the_middle() -> None:
    front = head_camera(torch.tensor([[0.3, 0.1, 0.0]]).expand(T, -1))
    cameras = replace(front, intrinsics=front.intrinsics.clone())
    cameras.intrinsics[:, 0, 2] = 0.4
    empty = np.zeros((2, 8, 8), np.uint8)
    wide = WideViews(frames=torch.tensor([0, 2]), pictures=np.zeros((2, 8, 8, 3), np.uint8), mattes=empty, beyond=empty > 0)
    clip = make_clip(wide=wide, track=replace(make_clip().track, cameras=cameras))
    points = torch.tensor([[0.1, -0.2, 0.05]]).expand(2, 1, 3)
    near, far = project(points, cameras[wide.frames]), project(points, clip.wide_cameras())
    torch.testing.assert_close(far, 0.5 + (near - 0.5) / WIDER)
    assert cameras.intrinsics[0, 0, 2] == 0.4, "the crops' cameras were changed"
    assert len(make_clip().wide_cameras()) == 0


def test_silence_is_a_progress() -> None:
    listener: Progress = silent
    listener("train", 1, 2, {"image": 0.5})
    assert isinstance(silent, Progress)


@pytest.mark.parametrize(("total", "most", "expected"), [(11, 3, [0, 5, 10]), (4, 9, [0, 1, 2, 3]), (7, 1, [0]), (1, 5, [0]), (0, 5, [])])
def test_frames_are_spread_over_all_of_them(total, most, expected):
    assert spread_evenly(total, most).tolist() == expected


def test_no_frame_is_looked_at_twice():
    for total in range(1, 400):
        for most in (2, 3, 60, 97, 200):
            assert (spread_evenly(total, most).diff() > 0).all()
