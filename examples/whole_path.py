"""From a video to an avatar and its report, step by step: whole_path.py VIDEO FOLDER."""

import sys
from pathlib import Path

import talk3d


def main(video: str, folder: str) -> None:
    out = Path(folder)
    out.mkdir(exist_ok=True)
    clip = talk3d.track(video)
    clip.save(out / "clip")
    person = talk3d.personalize(clip)
    person.save(out / "person.t3d")
    avatar = talk3d.train(person, clip, checkpoint=out / "train.checkpoint")
    avatar.save(out / "avatar.t3d")
    talk3d.evaluate(avatar, clip).save(out / "report.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
