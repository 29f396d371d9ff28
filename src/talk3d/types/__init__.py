"""The nouns that travel between stages: cameras, planes, tracks, sound, clips. No computation beyond what they are, no IO."""

from talk3d.types.audio import AudioFeatures, Waveform
from talk3d.types.camera import Camera, Rays
from talk3d.types.clip import Clip, Driving, Progress, Rendering, silent
from talk3d.types.face import FaceMasks, FaceTrack
from talk3d.types.triplane import PlaneAxes, Triplane

__all__ = [
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
    "silent",
]
