"""Every tenth frame of a swing round a speaking avatar, as pictures: look_around.py AVATAR SPEECH FOLDER."""

import sys
from itertools import islice
from pathlib import Path

from PIL import Image

import talk3d


def main(avatar_path: str, speech_path: str, folder: str) -> None:
    avatar = talk3d.load_avatar(avatar_path)
    Path(folder).mkdir(exist_ok=True)
    frames = talk3d.animate(avatar, speech_path, cameras=talk3d.orbit(100))
    for number, frame in enumerate(islice(frames, 0, None, 10)):
        Image.fromarray(frame).save(Path(folder) / f"{number:03}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
