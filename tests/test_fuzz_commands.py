"""The fuzzer of command lines and run directories on fixed seeds, and every option of every command on wrong values."""

import re
from types import SimpleNamespace

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

import fuzz_commands
from fuzz_commands import Parameter, commands, invoke, try_command, try_folder
from robustkern.cli import train as train_module

OPTIONS = [(name, parameter) for name, parameters in commands().items() for parameter in parameters]
WITH_VALUES = [(name, parameter) for name, parameter in OPTIONS if parameter.kind is not bool]
NUMBERS = [(name, parameter) for name, parameter in WITH_VALUES if parameter.kind in (int, float)]


def label(value):
    return value.name if isinstance(value, Parameter) else value


@pytest.fixture(scope="module", autouse=True)
def in_this_process(request):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", range(32))
def test_command_lines(seed):
    fault = try_command(seed)
    assert fault is None, fault


@pytest.mark.parametrize("seed", range(20))
def test_damaged_run_directories(seed):
    fault = try_folder(seed)
    assert fault is None, fault


def refused(name, parameter, value, place):
    """The one line that refuses a value, which names the option, before anything was made."""
    words = ["run"] if name == "evaluate" and parameter.flags else []
    line = [name, *words, *([f"{parameter.flags[0]}={value}"] if parameter.flags else ["--", value])]
    result = invoke(*line)
    assert result.exit_code == 2, (line, result.output)
    (sentence,) = result.stderr.strip("\n").split("\n")
    # An argument that may be left out stands in brackets.
    called = re.escape(parameter.flags[0]) if parameter.flags else rf"\[?{parameter.name.upper()}\]?"
    assert re.match(rf"robustkern: Invalid value for '{called}'.*: must be .*, got ", sentence), sentence
    assert len(sentence) < 400 and not list(place.iterdir()), sentence
    return sentence


@pytest.mark.parametrize(("name", "parameter"), WITH_VALUES, ids=label)
def test_no_value_is_empty(name, parameter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in ("", " ", "a\0b"):
        refused(name, parameter, value, tmp_path)


@pytest.mark.parametrize(("name", "parameter"), NUMBERS, ids=label)
def test_every_number_has_a_range(name, parameter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = ["x", "nan", "-1", "-1e-9", "1/0", "1,2"]
    if parameter.kind is int:
        wrong += ["1.5", "inf", str(2**63), "9" * 5000]
    elif parameter.name != "norm":  # the only number that may be infinite
        wrong += ["inf", "1e999"]
    for value in wrong:
        refused(name, parameter, value, tmp_path)


def test_every_option_that_takes_a_value_has_a_reader():
    assert all(parameter.parser is not None for _, parameter in WITH_VALUES)
    assert len(OPTIONS) > 70 and len(NUMBERS) > 40
    assert {name for name, _ in OPTIONS} == set(commands()) - {"info", "doctor"}


@pytest.mark.parametrize("name", ["train", "evaluate", "study", "demo"])
@pytest.mark.parametrize(
    ("option", "wrong"),
    [("seed", str(2**63)), ("threads", "0"), ("threads", "1025"), ("device", "tpu"), ("eps", "0"), ("batch-size", "0")],
)
def test_commands_are_equally_strict(name, option, wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [p for p in commands()[name] if f"--{option}" in p.flags]
    for parameter in found:
        assert f"got '{wrong}'" in refused(name, parameter, wrong, tmp_path)
    assert found or name not in ("train", "evaluate")


@pytest.mark.parametrize("line", [["train", "--colour"], ["train", "more"], ["evaluate"], ["x"], ["train", "--epochs"],
                                  ["evaluate", "a", "b"], ["info", "more"], ["--colour"]], ids=" ".join)  # fmt: skip
def test_what_is_no_option_is_one_line_too(line):
    result = invoke(*line)
    (sentence,) = result.stderr.strip("\n").split("\n")
    assert result.exit_code == 2 and sentence.startswith("robustkern: ") and (line[-1] in sentence or "RUN" in sentence)


def test_the_fuzzer_sees_faults(monkeypatch):
    """A traceback, success without a result, two lines, a line that names nothing, files left behind."""

    def judged(place, **given):
        usual = {"exit_code": 1, "exception": SystemExit(1), "stdout": "", "stderr": "robustkern: it failed"}
        return fuzz_commands.fault_of(SimpleNamespace(**{**usual, **given}), ["train"], place, {})

    named = "robustkern: epochs must be an integer"
    with fuzz_commands.copy_of_the_world() as place, fuzz_commands.quick():
        assert "names no argument" in judged(place)
        assert "not one line" in judged(place, stderr=f"{named}\nand more")
        assert "exit code 3" in judged(place, exit_code=3)
        assert "without results.json" in judged(place / "empty", exit_code=0)
        assert judged(place, stderr=named) is None
        (place / ".tmp-x").write_text("")
        assert "temporary files" in judged(place, stderr=named)
        monkeypatch.setattr(train_module, "train", lambda *args, **options: 1 / 0)
        result = invoke("train", *fuzz_commands.TINY, "--out", "new")
        assert "ZeroDivisionError" in fuzz_commands.fault_of(result, ["train"], place, {})
