"""Random command lines and damaged run directories: each works, or is refused in one line that names what is wrong.

The suite tries fixed seeds (`test_fuzz_commands.py`).  By hand, any number of them from any seed on:

    python tests/fuzz_commands.py commands 1000 [FIRST]
    python tests/fuzz_commands.py folders 1000 [FIRST]
"""

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from robustkern.cli import demo as demo_module
from robustkern.cli.app import app
from robustkern.cli.errors import FAILED, WRONG_USE
from robustkern.evaluation import report as evaluation_report
from robustkern.study import figures as study_figures
from robustkern.study import study as study_module
from robustkern.training import Interrupted
from robustkern.training import figures as training_figures
from robustkern.training.run_folder import RunFolder

STARTED = 75  # the exit status of a study that would begin to train here


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a command: its name in Python, how it is written ("" for an argument), and its type."""

    name: str
    flags: tuple[str, ...]
    kind: type
    parser: Callable[[str], object] | None


@functools.cache
def commands() -> dict[str, tuple[Parameter, ...]]:
    """The commands of the typer app, with all of their parameters."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        # Typer's wrapper of the function keeps its annotations.
        hints = typing.get_type_hints(command.callback, include_extras=True)
        parameters = []
        for parameter in command.params:
            if parameter.name not in hints:  # --help
                continue
            annotation = hints[parameter.name]
            while typing.get_origin(annotation) is not typing.Annotated:
                annotation = typing.get_args(annotation)[0]
            kind, info = typing.get_args(annotation)[0], annotation.__metadata__[0]
            while not isinstance(kind, type) or typing.get_origin(kind):
                kind = typing.get_args(kind)[0]
            flags = (*parameter.opts, *parameter.secondary_opts) if parameter.param_type_name == "option" else ()
            parameters.append(Parameter(parameter.name, flags, kind, info.parser))
        found[name] = tuple(parameters)
    return found


TINY = ["--data", "digits", "--train-samples", "24", "--batch-size", "12", "--epochs", "1", "--eval-samples", "4",
        "--pgd-steps", "1", "--threads", "1"]  # fmt: skip
EVALUATE = ["--attacks", "pgd", "--samples", "4", "--pgd-steps", "1", "--restarts", "1", "--check-samples", "2",
            "--threads", "1"]  # fmt: skip


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Inside, nothing is drawn, no step is timed, and a study stops where it would begin to train."""

    def stop(*args: object, **options: object) -> None:
        raise Interrupted("a study would begin here")

    nothing = mock.Mock(return_value=None)
    with contextlib.ExitStack() as stack:
        for module, name, replacement in (
            (RunFolder, "draw", nothing),
            (evaluation_report, "figure", nothing),
            (training_figures, "gradients", nothing),
            (training_figures, "curves", nothing),
            (study_figures, "save_png", nothing),
            (study_module, "in_parallel", stop),
        ):
            stack.enter_context(mock.patch.object(module, name, replacement))
        short = functools.partial(demo_module.step_cost.measure, seconds=0.0)
        stack.enter_context(mock.patch.object(demo_module.step_cost, "measure", short))
        yield


def invoke(*arguments: object) -> typing.Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@functools.cache
def world() -> Path:
    """A folder with a run that was trained and evaluated, images, settings and other things that a path may name."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-commands-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    run = folder / "run"
    with quick():
        for arguments in (["train", *TINY, "--method", "standard", "--out", run], ["evaluate", run, *EVALUATE]):
            result = invoke(*arguments)
            assert result.exit_code == 0, result.output
    shutil.copy(run / "model.safetensors", folder / "weights.safetensors")
    (folder / "settings.yaml").write_text("method: pgd\nepochs: 1\noptions: {steps: 1}\n")
    (folder / "broken.yaml").write_text("epochs: [1\n")
    (folder / "wrong.yaml").write_text("epochs: many\n")
    (folder / "file").write_text("some text\n")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("my work\n")
    (folder / "empty").mkdir()
    for split in ("train", "test"):
        for label, shade in (("cat", 40), ("dog", 200)):
            images = folder / "pets" / split / label
            images.mkdir(parents=True)
            for number in range(4):
                Image.new("L", (8, 8), shade + number).save(images / f"{number}.png")
    return folder


@contextlib.contextmanager
def copy_of_the_world() -> Iterator[Path]:
    """A copy that may be damaged, as the working directory."""
    before, threads = os.getcwd(), torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="fuzz-commands-") as name:
        place = Path(name) / "world"
        shutil.copytree(world(), place)
        os.chdir(place)
        try:
            yield place
        finally:
            os.chdir(before)
            torch.set_num_threads(threads)


# --- command lines ----------------------------------------------------------------------------------------------------


BAD = ["", " ", "x", "nan", "-1", "-0.5", "1e999", "1/0", "９" * 3 + "x", str(2**63), str(-(2**64)), "9" * 5000,
       "\0", "1,2", "--", "[red]x[/red]", "$\\frac", "\udcff", "0x10", "1_"]  # fmt: skip
PATHS = ["run", "run/config.yaml", "weights.safetensors", "file", "file/below", "foreign", "empty", "pets", "nothing",
         "new/folder", "settings.yaml", "broken.yaml", "wrong.yaml", ".", "/dev/null", "", "\0", "a" * 300]  # fmt: skip
METHODS = ["standard", "pgd", "gradient-penalty", "jacobian", "vat", "gradalign", "distillation", "magic"]
# Whatever is valid here runs quickly.
GOOD: dict[str, list[str]] = {
    "data": ["digits", "digits", "pets", "mnist", "nothing"],
    "method": METHODS,
    "methods": ["none", "standard,pgd", "standard,,pgd", "magic"],
    "model": ["small-cnn", "small-cnn", "preact-resnet18", "vgg"],
    "optimizer": ["sgd", "adamw", "lion"],
    "schedule": ["one-cycle", "cosine", "triangular", "step", "constant", "linear"],
    "milestones": ["1", "1,2", "2,1", "1,", "x"],
    "impl": ["auto", "kernel", "reference", "fast"],
    "device": ["cpu", "cuda", "tpu"],
    "law": ["sphere", "gaussian", "rademacher", "orthonormal", "uniform"],
    "watch": ["warn", "stop", "off", "loudly"],
    "attacks": ["pgd", "apgd", "pgd,pgd", "magic", ",", "pgd,"],
    "norm": ["1", "2", "inf", "3", "0.5", "linf", "l2", "l3"],
    "eps": ["0.1", "8/255", "1", "0", "8", "255/8"],
    "sweep": ["none", "1", "1,2", "0", "x", "1,,2"],
    "checkpoint": ["a=run", "a=weights.safetensors", "a=nothing", "=run", "a=", "a=os:getcwd", "a=x:y", "a/b=run", "a"],
    "set_": ["steps=1", "steps=0", "weight=nan", "teacher=run", "teacher=nothing", "every=2", "awp=0.01", "noise=1e400",
             "step_size=1/0", "step-size=0.1", "estimator=finite-difference", "h=0", "x=1", "steps", "=1", "steps=",
             "projections=1e30", "temperature=inf", "label_smoothing=1"],
    "timeout": ["1", "600", "0"],
}  # fmt: skip
INTEGERS = ["0", "1", "2", "3"]
NUMBERS = ["0", "1", "0.5", "1e-3", "2", "1/2"]


def value(parameter: Parameter, rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(BAD)
    if parameter.name in GOOD:
        return rng.choice(GOOD[parameter.name])
    return rng.choice({int: INTEGERS, float: NUMBERS, Path: PATHS}.get(parameter.kind, BAD))


def command_line(seed: int) -> list[str]:
    """Arguments of the program; if they are valid, it takes a second at most."""
    rng = random.Random(seed)
    name = rng.choices(["train", "evaluate", "study", "demo", "info", "x"], [50, 30, 12, 4, 2, 2])[0]
    parameters = commands().get(name, ())
    words = {
        "train": [*TINY, "--out", "new"],
        "evaluate": [rng.choice(PATHS) if rng.random() < 0.3 else "run", *EVALUATE],
        "study": ["--data", "digits", "--jobs", "1", "--epochs", "1", "--out", "new"],
        "demo": ["--data", "digits", "--epochs", "1", "--threads", "1", "--out", "new"],
    }.get(name, [])
    for parameter in rng.sample(parameters, k=min(len(parameters), rng.choice([0, 1, 1, 1, 2, 2, 3]))):
        flag = rng.choice(parameter.flags) if parameter.flags else ""
        if parameter.kind is bool:
            words.append(flag)
        elif flag:
            given = value(parameter, rng)
            words += [f"{flag}={given}"] if rng.random() < 0.2 and flag.startswith("--") else [flag, given]
    if rng.random() < 0.05:
        words.insert(rng.randrange(len(words) + 1), rng.choice(["--colour", "more", "--epochs", "-p", "--help"]))
    return [name, *words]


# --- the judgement ----------------------------------------------------------------------------------------------------

DONE = {"train": "results.json", "evaluate": "evaluation.json", "demo": "results.json"}


def fault_of(result: typing.Any, words: list[str], place: Path, before: dict[str, bytes]) -> str | None:
    """What a command line did wrong; None if nothing."""
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        return "".join(traceback.format_exception(error)[-3:])
    left = [path for path in place.rglob(".tmp-*") if str(path.relative_to(place)) not in before]
    if left:
        return f"temporary files are left: {left[0].name}"
    if result.exit_code == 0:
        return _undone(result, words, place, before)
    if result.exit_code == STARTED and words[0] == "study":
        return None
    if result.exit_code not in (FAILED, WRONG_USE):
        return f"exit code {result.exit_code}"
    sentence = result.stderr.strip("\n")
    lines = [line for line in sentence.split("\n") if line.startswith("robustkern: ")]
    if len(lines) != 1 or sentence.split("\n")[-1] != lines[0]:
        return f"not one line: {sentence[:500]!r}"
    if len(lines[0]) > 1100:
        return f"{len(lines[0])} characters: {lines[0][:300]!r}"
    return None if _names_something(lines[0], words) else f"names no argument: {lines[0]!r}"


def _undone(result: typing.Any, words: list[str], place: Path, before: dict[str, bytes]) -> str | None:
    if "--help" in words or words[0] not in DONE:
        return None if result.stdout.strip() else "nothing was printed"
    again = "--resume" in words  # what is done already stays as it is
    found = [path for path in place.rglob(DONE[words[0]]) if path.is_file()]
    made = [path for path in found if again or before.get(str(path.relative_to(place))) != path.read_bytes()]
    if not made:
        return f"exit code 0 without {DONE[words[0]]}"
    for path in made:
        json.loads(path.read_text())
    return None


def _names_something(line: str, words: list[str]) -> bool:
    """Whether a message has the name of a command, an option, a file, or a value that was given."""
    plain = re.sub(r"[-_]", " ", line.lower())
    known = {parameter.name.strip("_") for parameters in commands().values() for parameter in parameters}
    known |= {"run", "model", "batch", "command", "argument", "option", "teacher", "learnt", "config.yaml"}
    if any(re.search(rf"\b{re.escape(name.replace('_', ' '))}\b", plain) for name in known):
        return True
    given = [part for word in words for part in (word, word.partition("=")[2])]
    return any(len(word) > 2 and word.strip("-") in line for word in given)


def snapshot(place: Path) -> dict[str, bytes]:
    """Every file but locks, by its path."""
    files = {}
    for path in sorted(place.rglob("*")):
        if path.name != ".lock" and (path.is_file() or path.is_symlink()):
            content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
            files[str(path.relative_to(place))] = content
    return files


def try_command(seed: int) -> str | None:
    """The fault of one random command line, if it has one."""
    words = command_line(seed)
    with copy_of_the_world() as place, quick():
        before = snapshot(place)
        fault = fault_of(invoke(*words), words, place, before)
    return fault and f"seed {seed}, {words}: {fault}"


# --- damaged run directories ------------------------------------------------------------------------------------------


def damage(path: Path, rng: random.Random) -> str:
    """Damages a file as disks, editors and programs do; returns what it did."""
    content = path.read_bytes()
    structured = path.suffix in (".json", ".jsonl", ".yaml")
    way = rng.choice(
        ["cut", "flip", "noise", "empty", "gone", "folder", "dangling", "doubled", *["edit"] * 4 * structured]
    )
    if way == "cut":
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif way == "flip":
        spoilt = bytearray(content)
        for _ in range(rng.choice([1, 1, 5])):
            if spoilt:
                spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
        path.write_bytes(spoilt)
    elif way == "noise":
        path.write_bytes(rng.randbytes(rng.choice([1, 100, 5000])))
    elif way == "empty":
        path.write_bytes(b"")
    elif way == "doubled":
        path.write_bytes(content + content)
    else:
        path.unlink()
        if way == "folder":
            path.mkdir()
        elif way == "dangling":
            path.symlink_to("nowhere")
        elif way == "edit":
            path.write_bytes(edited(content.decode("latin1"), rng).encode("latin1"))
    return f"{path.name}: {way}"


def edited(text: str, rng: random.Random) -> str:
    """One value or line of a text with structure replaced by another."""
    odd = [
        "null",
        "-1",
        "1e400",
        "NaN",
        "[]",
        "{}",
        '"x"',
        "true",
        str(2**70),
        '"\\u0000"',
        "0.5",
        "~",
        '[["a"]]',
        "!!x y",
    ]
    values = list(re.finditer(r'"[^"\n]*"|-?\d[\d.e+-]*|null|true|false|(?<=: )\w+', text))
    if values and rng.random() < 0.8:
        chosen = rng.choice(values)
        return text[: chosen.start()] + rng.choice(odd) + text[chosen.end() :]
    lines = text.split("\n")
    lines[rng.randrange(len(lines))] = rng.choice(
        ["", "\t", "x", rng.choice(lines), "{" * 2000, "a: &a [*a]", "\x1b[2J"]
    )
    return "\n".join(lines)


def folder_command(rng: random.Random) -> list[str]:
    return rng.choice([
        ["train", "--resume", "--out", "run"],
        ["train", "--resume", *TINY, "--method", "standard", "--out", "run"],
        ["train", *TINY, "--method", "distillation", "--set", "teacher=run", "--out", "new"],
        ["train", *TINY, "--config", "run/config.yaml", "--out", "new"],
        ["evaluate", "run", *EVALUATE],
        ["evaluate", "run/model.safetensors", *EVALUATE, "--out", "run/evaluation"],
        ["study", "--data", "digits", "--methods", "none", "--sweep", "none", "--no-two-by-two", "--jobs", "1",
         "--epochs", "1", "--checkpoint", "a=run", "--out", "new"],
    ])  # fmt: skip


def try_folder(seed: int) -> str | None:
    """The fault of one command on a damaged run directory, if it has one; a refused command must change nothing."""
    rng = random.Random(seed)
    with copy_of_the_world() as place, quick():
        files = sorted(p for p in (place / "run").rglob("*") if p.is_file() and p.name != ".lock")
        done = [damage(path, rng) for path in rng.sample(files, k=rng.choice([1, 1, 1, 2, 3]))]
        words = folder_command(rng)
        before = snapshot(place)
        result = invoke(*words)
        fault = fault_of(result, words, place, before)
        # A training that fails in the end may have written weights.
        refused = result.exit_code == WRONG_USE or (result.exit_code == FAILED and words[0] != "train")
        if fault is None and refused and before != (after := snapshot(place)):
            changed = sorted(name for name in before if before[name] != after.get(name)) or sorted(
                set(after) - set(before)
            )
            fault = f"refused ({result.stderr.strip()}), and yet {changed[0]} was written"
    return fault and f"seed {seed}, {done}, {words}: {fault}"


TRIALS = {"commands": try_command, "folders": try_folder}

if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, number, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    found = 0
    for seed in range(first, first + number):
        if fault := TRIALS[kind](seed):
            found += 1
            print(fault, flush=True)
    print(f"{number} {kind} from seed {first} on: {found} faults")
    sys.exit(found > 0)
