"""The ablation table: what each choice of the defaults is worth. One row, one command.

    python benchmarks/ablations.py list
    python benchmarks/ablations.py run ROW CLIP OUT [--set train.steps=300] [--device cuda] [--truth FOLDER]
    python benchmarks/ablations.py table OUT

`run` makes the avatar of one row from a tracked clip, evaluates it on its held-out part and writes OUT/ROW.json. Rows that personalise alike share
OUT/person_*.t3d. `--set` changes a setting of every row, so that a reduced table costs little; it is written down with the results.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from talk3d.io.clips import load_clip
from talk3d.io.weights import load_person, load_prior
from talk3d.models.avatar import AvatarConfig, PersonalizedGenerator, Prior
from talk3d.models.generator import TriplaneGenerator
from talk3d.presets import BUILTIN256
from talk3d.stages import train as training
from talk3d.stages.evaluate import EvaluateConfig, evaluate
from talk3d.stages.personalize import PersonalizeConfig, personalize
from talk3d.stages.train import TrainConfig, train
from talk3d.types import Clip

MEASURES = (
    *("psnr_mask", "ssim_mask", "psnr_mouth", "lmd_lips", "mouth_correlation", "mouth_gain", "likeness", "pose_error", "flicker"),
    *("orbit_likeness", "novel_psnr", "silence_motion_made", "render_time"),
)
"""Columns of the table."""
STAGES = ("personalize", "train", "evaluate")
"""What `--set` may change."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One change from the defaults."""

    question: str
    personalize: Mapping[str, Any] = field(default_factory=dict)
    """Settings of personalisation; a dot leads into a config inside it."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Settings of training."""
    deltaplane: Mapping[str, Any] = field(default_factory=dict)
    """Sizes of the deltaplane network."""
    conditioning: Mapping[str, Any] = field(default_factory=dict)
    """Sizes of the tokens."""
    still: tuple[str, ...] = ()
    """Tracks that are put at their mean of the training part, in training and in evaluation: those tokens then say nothing."""
    blank_prior: bool = False
    """Start from a generator that never saw a head."""
    seed: int = 0
    """Of training."""


ROWS = {
    "default": Row(question="everything as shipped"),
    "no-bases": Row(question="topology: the attention U-Net alone", deltaplane={"num_bases": 0, "num_near": 0}),
    "one-block": Row(question="topology: one transformer block", deltaplane={"num_blocks": 1}),
    "four-blocks": Row(question="topology: four transformer blocks", deltaplane={"num_blocks": 4}),
    "no-blink": Row(question="tokens: without the blink", still=("blink",)),
    "no-pose": Row(question="tokens: without the head pose", still=("head_pose",)),
    "no-upper-face": Row(question="bases and ear: without brows, gaze and cheeks", still=("upper_face",)),
    "no-cheeks": Row(question="ear: without cheeks", conditioning={"cheeks": False}),
    "no-place": Row(question="tokens: without the place in the picture", still=("anchors",)),
    "sound-alone": Row(question="tokens: nothing but the sound", still=("blink", "upper_face", "head_pose", "anchors")),
    "no-dropping": Row(question="tokens: none is ever dropped in training", conditioning={"drop_rate": 0.0}),
    "no-structure": Row(question="losses: without the structural (SSIM) term", train={"weights.structure": 0.0}),
    "no-sides": Row(question="losses: nothing holds the sides that are not filmed", train={"weights.sides": 0.0}),
    "lips": Row(question="losses: with the lip reader's term", train={"weights.lips": 0.3}),
    "perceptual": Row(question="losses: with LPIPS (needs lpips-alex)", train={"weights.perceptual": 0.1}),
    "no-mouth-emphasis": Row(question="losses: the mouth counts like the face", train={"mouth_emphasis": 3.0}),
    "usual-frames": Row(question="draws: all frames alike", train={"unusual_frames": 0.0}),
    "heard-mouth": Row(question="draws: the bases see what is heard alone", train={"tracked_mouth": 0.0}),
    "two-frames": Row(question="draws: two frames a step, half the work", train={"frames_per_step": 2}),
    "fewer-rays": Row(question="rays: 96 a side", train={"rays": 96}),
    "no-prior": Row(question="prior: a generator that never saw a head", blank_prior=True),
    "no-tuning": Row(question="tuning: the code alone, no pivotal tuning", personalize={"tuning_steps": 1}),
    "no-locality": Row(question="tuning: without the locality term", personalize={"locality_weight": 0.0}),
    "fixed-renderer": Row(question="tuning: decoder and planes stay as personalised", train={"renderer_rate": 0.0, "identity_rate": 0.0}),
    "chance": Row(question="everything as shipped, another seed", seed=1),
}


def changed(config: Any, settings: Mapping[str, Any]) -> Any:
    """A frozen config with some settings changed; a dot in a name leads into a config inside it."""
    for name, value in settings.items():
        head, _, rest = name.partition(".")
        if head not in {entry.name for entry in dataclasses.fields(config)}:
            raise SystemExit(f"{type(config).__name__} has no setting {head!r}: this row needs another version of talk3d")
        config = dataclasses.replace(config, **{head: changed(getattr(config, head), {rest: value}) if rest else value})
    return config


def with_still_tokens(clip: Clip, names: tuple[str, ...]) -> Clip:
    """The clip with some tracks at their mean of the training part."""
    used = slice(0, clip.num_training_frames)
    means = {name: getattr(clip.track, name)[used].mean(0, keepdim=True).expand_as(getattr(clip.track, name)).clone() for name in names}
    return dataclasses.replace(clip, track=dataclasses.replace(clip.track, **means))


def blank_prior() -> Prior:
    """The builtin prior's sizes and spread, with weights that learnt nothing."""
    prior = load_prior("builtin")
    torch.manual_seed(0)
    prior = copy.copy(prior)
    prior.generator = TriplaneGenerator(BUILTIN256)
    return prior


def person_of(row: Row, clip: Clip, out: Path, config: PersonalizeConfig, device: str) -> PersonalizedGenerator:
    """The person, made once for all rows that personalise alike."""
    key = hashlib.sha256(repr((config, row.blank_prior, clip.source_sha256)).encode()).hexdigest()[:10]
    path = out / f"person_{key}.t3d"
    if not path.is_file():
        personalize(clip, blank_prior() if row.blank_prior else load_prior("builtin"), config, device=device, progress=say).save(path)
    return load_person(path)


def say(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
    """A line now and then."""
    if step == total or step % 50 == 0:
        print(f"{stage} {step}/{total}", flush=True)


def sizes(row: Row, plain: Callable[..., AvatarConfig]) -> Callable[..., AvatarConfig]:
    """The sizes of an avatar, changed as the row wants."""

    def change(*given: Any, **named: Any) -> AvatarConfig:
        found = plain(*given, **named)
        return changed(
            found, {"deltaplane": changed(found.deltaplane, row.deltaplane), "conditioning": changed(found.conditioning, row.conditioning)}
        )

    return change


def run(name: str, clip_path: Path, out: Path, settings: Mapping[str, Any], *, truth: Path | None, device: str) -> None:
    """Make and measure the avatar of one row."""
    if unknown := [key for key in settings if key.partition(".")[0] not in STAGES]:
        raise SystemExit(f"there is no stage for {', '.join(unknown)}: settings begin with {', '.join(f'{stage}.' for stage in STAGES)}")
    row, clip = ROWS[name], load_clip(clip_path)
    given = {stage: {key.partition(".")[2]: value for key, value in settings.items() if key.startswith(f"{stage}.")} for stage in STAGES}
    personalizing = changed(PersonalizeConfig(), given["personalize"] | dict(row.personalize))
    learning = changed(TrainConfig(), given["train"] | dict(row.train))
    begun = time.perf_counter()
    person = person_of(row, clip, out, personalizing, device)
    heard = with_still_tokens(clip, row.still)
    plain = training.avatar_sizes
    training.avatar_sizes = sizes(row, plain)
    try:
        avatar = train(person, heard, learning, device=device, seed=row.seed, progress=say)
    finally:
        training.avatar_sizes = plain
    seconds = time.perf_counter() - begun
    report = evaluate(avatar, heard, changed(EvaluateConfig(controls=False), given["evaluate"]), truth=truth, device=device, progress=say)
    facts = {"row": name, "question": row.question, "settings": dict(settings), "training_s": round(seconds, 1)}
    (out / f"{name}.json").write_text(json.dumps(facts | report.to_json(), indent=1, ensure_ascii=False), encoding="utf-8")
    print(table(out))


def table(out: Path) -> str:
    """All rows that were run, in the order of `ROWS`, as Markdown, each with the settings that it was run with."""
    lines = ["| row | question | " + " | ".join(MEASURES) + " | settings |", "| --- " * (len(MEASURES) + 3) + "|"]
    for name in ROWS:
        if (out / f"{name}.json").is_file():
            found = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
            values = [found["measures"].get(measure, {}).get("value") for measure in MEASURES]
            cells = ["-" if value is None else f"{value:.4g}" for value in values]
            changes = ", ".join(f"{key}={value}" for key, value in found["settings"].items())
            lines.append(f"| {name} | {found['question']} | " + " | ".join(cells) + f" | {changes} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """List, run or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    running = commands.add_parser("run")
    running.add_argument("row", choices=list(ROWS))
    running.add_argument("clip", type=Path)
    running.add_argument("out", type=Path)
    running.add_argument("--set", action="append", default=[], help="a setting of every row, such as train.steps=300")
    running.add_argument("--truth", type=Path)
    running.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    commands.add_parser("table").add_argument("out", type=Path)
    given = parser.parse_args(argv)
    if given.command == "list":
        print("\n".join(f"{name:18} {row.question}" for name, row in ROWS.items()))
    elif given.command == "table":
        print(table(given.out))
    else:
        given.out.mkdir(exist_ok=True)
        settings = {name: json.loads(value) for name, _, value in (setting.partition("=") for setting in given.set)}
        run(given.row, given.clip, given.out, settings, truth=given.truth, device=given.device)


if __name__ == "__main__":
    main()
