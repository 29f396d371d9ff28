"""The commands: each exposes its stage's settings, checks paths before long work starts, and shows progress.

A command is a function inside a function, so that only the stage that is asked for is imported.
"""

import contextlib
import functools
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, Literal

import torch
import tyro
from tyro.conf import Positional, arg

from talk3d.apps.terminal import Display, in_one_line
from talk3d.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
Input = Annotated[Path, Positional]
VideoInput = Annotated[Input, arg(metavar="VIDEO")]
ClipInput = Annotated[Input, arg(metavar="CLIP")]
PersonInput = Annotated[Input, arg(metavar="PERSON")]
AvatarInput = Annotated[Input, arg(metavar="AVATAR")]
AudioInput = Annotated[Input, arg(metavar="AUDIO")]
Output = Annotated[Path, arg(aliases=["-o"])]
PriorName = Annotated[str, arg(metavar="builtin|PATH")]
ModelFile = Annotated[Path | None, arg(metavar="FILE")]


def run(name: str, arguments: list[str], examples: str) -> None:
    """Parse the arguments of a command and run it.

    Args:
        name: one of `COMMANDS`.
        arguments: what follows it on the command line.
        examples: shown with the help.

    Raises:
        Talk3DError: what the user gave is unfit; the message says what to do.
        SystemExit: the arguments cannot be parsed, or help was asked for.
    """
    command = COMMANDS[name]()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if isinstance(command, dict):
                parts = {part: _later(one) for part, one in command.items()}
                start = tyro.extras.subcommand_cli_from_dict(parts, prog=f"talk3d {name}", description=f"examples:\n  {examples}", args=arguments)
            else:
                description = f"{(inspect.getdoc(command) or '').partition('Args:')[0].strip()}\n\nexamples:\n  {examples}"
                start = tyro.cli(_later(command), prog=f"talk3d {name}", description=description, args=arguments)
    except SystemExit as leaving:
        if leaving.code in (None, 0):
            raise
        raise ConfigError(in_one_line(said.getvalue(), name)) from None
    start()


def _later(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Return what parses like the command and gives back the call to it, so that what parsing says is known from what the command says."""

    @functools.wraps(command)
    def parsed(*given: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(command, *given, **named)

    return parsed


def resolve_device(device: str) -> str:
    """Turn `auto` into what is there.

    Raises:
        ConfigError: CUDA is asked for and is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this torch sees no CUDA GPU; give --device cpu, or see `talk3d doctor`")
    return device


def check_input(path: Path, what: str, *, folder: bool = False) -> None:
    """Refuse an input path that does not exist, or that is a folder where a file is wanted.

    Raises:
        ConfigError: there is nothing at the path, or a folder.
    """
    if not path.exists() or (path.is_dir() and not folder):
        raise ConfigError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: give the path of {what}")


def check_prior(prior: str) -> None:
    """Refuse a prior that does not exist; the word builtin is the shipped one.

    Raises:
        ConfigError: there is nothing at the path.
    """
    if prior != "builtin":
        check_input(Path(prior), "a prior, made by `talk3d pretrain`")


def check_output(path: Path, *inputs: Path, folder_with: str | None = None, kind: str | None = None) -> None:
    """Refuse, before any long work, a path where nothing can be written or something else would be lost.

    Args:
        path: where the result will go.
        inputs: what it is made from, which must outlive it.
        folder_with: if the result is a folder, a file by which an earlier result, which may be replaced, is known.
        kind: if the result is a saved model, which: no other file may be replaced.

    Raises:
        ConfigError: its folder is missing or cannot be written, or an input or something of another kind is there.
    """
    if path.exists() and any(one.exists() and path.samefile(one) for one in inputs):
        raise ConfigError(f"{path} is what the result is made from: give another -o, so that it is not lost")
    try:
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror}): give a path in a folder that exists and can be written") from error
    replaceable = path.is_file() and (kind is None or _holds(path, kind)) if folder_with is None else (path / folder_with).is_file()
    if path.exists() and not replaceable:
        raise ConfigError(f"{path} is there already and is something else: give another -o, so that nothing of yours is overwritten")


def _holds(path: Path, kind: str) -> bool:
    from talk3d.io.weights import saved_kind

    return saved_kind(path) == kind


def _track() -> Callable[..., None]:
    from talk3d.apps.check import track_command

    return track_command


def _check() -> Callable[..., None]:
    from talk3d.apps.check import check_command

    return check_command


def _personalize() -> Callable[..., None]:
    from talk3d.apps.build import checkpoint_beside, placed_prior, remove_checkpoints
    from talk3d.io.clips import load_clip
    from talk3d.io.weights import prior_file
    from talk3d.stages.personalize import PersonalizeConfig, personalize

    defaults = PersonalizeConfig()

    def command(
        clip: ClipInput,
        /,
        out: Output,
        config: Annotated[PersonalizeConfig, arg(name="")] = defaults,
        prior: PriorName = "builtin",
        device: Device = "auto",
        seed: int = 0,
    ) -> None:
        """Find one person's head in the prior, and fit the prior to it.

        Args:
            clip: the person's clip, from `talk3d track`.
            out: the person, a new file.
            config: how it is fitted.
            prior: what to start from.
            device: where to compute.
            seed: of all randomness.
        """
        check_input(clip, "a clip, made by `talk3d track`", folder=True)
        check_prior(prior)
        check_output(out, clip, Path(prior), kind="person")
        checkpoint = checkpoint_beside(out, clip, config, prior_file(prior), seed)
        used_device = resolve_device(device)
        with Display() as display:
            known = placed_prior(prior, used_device)
            person = personalize(load_clip(clip), known, config, device=used_device, seed=seed, progress=display, checkpoint=checkpoint)
            person.save(out)
        remove_checkpoints(out)
        print(f"{out}: next, talk3d train {out} {clip} -o AVATAR")

    return command


def _train() -> Callable[..., None]:
    from talk3d.apps.build import checkpoint_beside, remove_checkpoints
    from talk3d.io.clips import load_clip
    from talk3d.io.weights import load_person
    from talk3d.stages.train import TrainConfig, train

    defaults = TrainConfig()

    def command(
        person: PersonInput,
        clip: ClipInput,
        /,
        out: Output,
        config: Annotated[TrainConfig, arg(name="")] = defaults,
        device: Device = "auto",
        seed: int = 0,
    ) -> None:
        """Teach a person's head to talk like the person in the clip.

        Args:
            person: from `talk3d personalize`.
            clip: of the same person, from `talk3d track`.
            out: the avatar, a new file.
            config: how long and how hard to train.
            device: where to compute.
            seed: of all randomness.
        """
        check_input(person, "a person, made by `talk3d personalize`")
        check_input(clip, "a clip, made by `talk3d track`", folder=True)
        check_output(out, person, clip, kind="avatar")
        checkpoint = checkpoint_beside(out, person, clip, config, seed)
        with Display() as display:
            avatar = train(
                load_person(person), load_clip(clip), config, device=resolve_device(device), seed=seed, progress=display, checkpoint=checkpoint
            )
            avatar.save(out)
        remove_checkpoints(out)
        print(f"{out}: next, talk3d animate {out} SPEECH -o talking.mp4")

    return command


def _build() -> Callable[..., None]:
    from talk3d.apps.build import BuildConfig, build

    defaults = BuildConfig()

    def command(
        video: VideoInput,
        /,
        out: Output,
        config: Annotated[BuildConfig, arg(name="")] = defaults,
        device: Device = "auto",
        seed: int = 0,
        fresh: bool = False,
        yes: bool = False,
    ) -> None:
        """Make an avatar from a video: track, personalize and train in one.

        What is made on the way stays in a folder beside the avatar, so a second call goes on where the first one stopped.

        Args:
            video: film of one person talking, with sound; half a minute or more.
            out: the avatar, a new file.
            config: settings of the stages.
            device: where to compute.
            seed: of all randomness.
            fresh: throw away what earlier calls made for this avatar.
            yes: go on even if the capture check refuses the video.
        """
        check_input(video, "a video")
        check_prior(config.prior)
        check_output(out, video, kind="avatar")
        with Display() as display:
            ran = build(video, out, config, device=resolve_device(device), seed=seed, fresh=fresh, yes=yes, progress=display)
        kept = ", ".join(stage for stage in ("track", "personalize", "train") if stage not in ran)
        print(f"{out} is ready{f' (kept from before: {kept})' if kept else ''}\nnext: talk3d animate {out} SPEECH -o talking.mp4")

    return command


def _pretrain() -> Callable[..., None]:
    from talk3d.apps.prior import pretrain_prior

    return pretrain_prior


def _prior() -> dict[str, Callable[..., None]]:
    from talk3d.apps.prior import COMMANDS

    return COMMANDS


def _animate() -> Callable[..., None]:
    from talk3d.io.weights import load_avatar
    from talk3d.stages.animate import AnimateConfig, write_animation

    defaults = AnimateConfig()

    def command(
        avatar: AvatarInput,
        audio: AudioInput,
        /,
        out: Output,
        config: Annotated[AnimateConfig, arg(name="")] = defaults,
        device: Device = "auto",
        resume: bool = False,
    ) -> None:
        """Let an avatar speak a recording.

        The recording may be of any length, rate and number of channels: memory does not grow with it. There are as many frames as fit the sound, at
        least one. Silence, hum and clicks leave the mouth at rest; clipped sound is taken as it is; a file without a sample is refused.

        Args:
            avatar: from `talk3d build` or `talk3d train`, or the word sample for the shipped one.
            audio: wav, mp3, m4a, flac …, or a video whose sound is used.
            out: the film, .mp4, .m4v, .mov, .mkv or .webm; without an ending, a folder of PNG pictures.
            config: from where the avatar is seen, before what, and what it does.
            device: where to render.
            resume: go on with an interrupted film, which lies in OUT.unfinished; the result is the same as without the interruption.
        """
        if str(avatar) != "sample":
            check_input(avatar, "an avatar, made by `talk3d build`")
        check_input(audio, "a recording")
        check_output(out, Path(avatar), audio, folder_with=None if out.suffix else "000000.png")
        with Display() as display:
            num_frames = write_animation(load_avatar(avatar), audio, out, config, device=resolve_device(device), progress=display, resume=resume)
        print(f"{out}: {num_frames} frame{'s' if num_frames != 1 else ''}")

    return command


def _export() -> Callable[..., None]:
    from talk3d.apps.prior import export_avatar

    return export_avatar


def _evaluate() -> Callable[..., None]:
    from talk3d.apps.evaluation import evaluate_command

    return evaluate_command


def _compare() -> Callable[..., None]:
    from talk3d.apps.evaluation import compare_command

    return compare_command


def _demo() -> Callable[..., None]:
    from talk3d.apps.terminal import asset
    from talk3d.io.weights import load_avatar
    from talk3d.stages.animate import AnimateConfig, write_animation

    def command(out: Output = Path("demo.mp4"), device: Device = "auto") -> None:
        """Let the shipped avatar, a person who does not exist, speak the shipped sentence.

        Args:
            out: the film.
            device: where to render.
        """
        check_output(out)
        avatar = load_avatar("sample")
        with Display() as display:
            write_animation(
                avatar, asset("sample_sentence.flac"), out, AnimateConfig(camera="orbit"), device=resolve_device(device), progress=display
            )
        print(f"\n{out} is ready: look at it. Then try\n")
        print("  talk3d build YOUR_VIDEO.mp4 -o me.t3d                               an avatar of your own")
        print("  talk3d animate me.t3d SPEECH.wav -o talking.mp4 --camera orbit      let it speak any recording")
        print("  talk3d animate --help                                               other cameras and backgrounds")

    return command


def _doctor() -> Callable[..., None]:
    from talk3d.apps.terminal import examine

    def command() -> None:
        """Say what is installed, which device will be used, which models are there, and what is missing."""
        for what, found in examine():
            print(f"{what:36}{found}")

    return command


def _weights() -> dict[str, Callable[..., None]]:
    from talk3d.apps.weights import COMMANDS

    return COMMANDS


COMMANDS: dict[str, Callable[[], Callable[..., None] | dict[str, Callable[..., None]]]] = {
    "animate": _animate,
    "build": _build,
    "check": _check,
    "compare": _compare,
    "demo": _demo,
    "doctor": _doctor,
    "evaluate": _evaluate,
    "export": _export,
    "personalize": _personalize,
    "pretrain": _pretrain,
    "prior": _prior,
    "track": _track,
    "train": _train,
    "weights": _weights,
}
"""Every command by its name: calling the entry imports its stage and returns the function, or the functions by their names, that tyro reads."""
