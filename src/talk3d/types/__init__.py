"""The nouns that travel between stages: cameras, planes, tracks, sound, clips. No computation beyond what they are, no IO."""

from talk3d.types.audio import AudioFeatures, Waveform
from talk3d.types.camera import Camera, Rays
from talk3d.types.clip import WIDER, Clip, Driving, Progress, Rendering, WideViews, silent, spread_evenly
from talk3d.types.face import FaceMasks, FaceTrack
from talk3d.types.triplane import PlaneAxes, Triplane

__all__ = [
    "WIDER",
    "AudioFeatures",
    "Camera",
    "Clip",
    "Driving",
    "FaceMasks",
    "FaceTrack",
    "PlaneAxes",
    "Progress",
    "Rays",
    "Rendering",
    "Triplane",
    "Waveform",
    "WideViews",
    "silent",
    "spread_evenly",
]
