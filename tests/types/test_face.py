import numpy as np
import pytest
import torch

from talk3d.types import Camera, FaceMasks, FaceTrack


def track(num_blinks: int) -> FaceTrack:
    return FaceTrack(
        cameras=Camera.from_label(torch.zeros(3, 25)),
        head_pose=torch.zeros(3, 3),
        landmarks=torch.zeros(3, 478, 2),
        anchors=torch.zeros(3, 6),
        blink=torch.zeros(num_blinks, 1),
        upper_face=torch.zeros(3, 5),
        confidence=torch.ones(3, 1),
        crop=np.zeros((3, 2, 3)),
    )


def test_a_track_holds_the_same_number_of_frames_everywhere() -> None:
    assert len(track(3).cameras) == len(track(3).blink) == 3
    with pytest.raises(TypeError):
        track(2)


def test_masks_are_bytes() -> None:
    assert FaceMasks(person=np.zeros((3, 8, 8), np.uint8), source="test").person.dtype == np.uint8
    with pytest.raises(TypeError):
        FaceMasks(person=np.zeros((3, 8, 8), np.float32), source="test")
