"""An avatar speaks a recording, seen from a camera that stands to its left: speak.py AVATAR SPEECH OUT.mp4."""

import sys

import talk3d
from talk3d.stages.animate import AnimateConfig, write_animation


def main(avatar_path: str, speech_path: str, out_path: str) -> None:
    avatar = talk3d.load_avatar(avatar_path)
    config = AnimateConfig(camera="fixed", yaw_deg=20.0, background="grey")
    count = write_animation(avatar, speech_path, out_path, config)
    print(f"{out_path}: {count} frames")


if __name__ == "__main__":
    main(*sys.argv[1:])
