"""Errors a user can cause, one family, so that callers and the command line can tell them from our own slips.

Every message says what was given, what was expected and what to do next, in one line. Imports nothing from talk3d.
"""


class Talk3DError(Exception):
    """Base of every error that a user can cause and mend."""


class MediaError(Talk3DError):
    """A video or audio file cannot be read, lacks what is needed, or cannot be written."""


class TrackingError(Talk3DError):
    """No face, several faces, or too little of one was found in a video."""


class WeightsError(Talk3DError):
    """A file of weights is missing, damaged, unsafe, or does not fit the model."""


class ShapeError(Talk3DError):
    """Two things that must have the same size or order do not."""


class ConfigError(Talk3DError):
    """A setting is out of range, or settings contradict each other."""
