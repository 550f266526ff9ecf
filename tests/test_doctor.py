"""`robustkern doctor`, `--version` and completion: what is said, and that it is said without the extras."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("typer")

from typer.testing import CliRunner

import robustkern
from robustkern import _library
from robustkern.cli import doctor
from robustkern.cli.app import app


def test_here_nothing_needed_is_missing(capsys):
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == f"ok       PyTorch: {torch.__version__}"
    assert "ok       robustkern._C: kernels for the CPU" in lines
    assert any(line.startswith("ok       robustkern._aten: install() replaces") for line in lines)
    assert lines[-1] == "Everything that robustkern needs is here."
    assert doctor.run(["--all"]) == 2 and "takes no arguments" in capsys.readouterr().err


def test_what_is_missing_comes_with_what_to_do(monkeypatch, capsys):
    why = f"robustkern._aten was built with PyTorch 2.12.0 and does not load; rebuild it with: {_library.BUILD}"
    monkeypatch.setattr(_library, "aten_why_unavailable", lambda: why)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert doctor.run([]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("MISSING  robustkern._aten: robustkern._aten was built with PyTorch 2.12.0 and does not load")
    assert lines[at + 1] == f"         do: {_library.BUILD}"
    assert lines[lines.index("without  networks of timm: not installed") + 1] == "         do: pip install timm"
    assert "         do: unset ATEN_CPU_CAPABILITY" in lines
    assert lines[-1] == "Something that robustkern needs is missing."


def test_a_gpu_without_kernels_is_found(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(_library, "cuda_why_unavailable", lambda: f"it is not built; build it with: {_library.BUILD}")
    assert doctor.run([]) == 1
    assert "MISSING  robustkern._cuda: it is not built" in capsys.readouterr().out.splitlines()


@pytest.mark.long
@pytest.mark.parametrize("argument", ["doctor", "--version"])
def test_it_works_without_the_extras(argument):
    code = (
        "import runpy, sys\n"
        "for name in ('typer', 'rich', 'matplotlib', 'sklearn', 'safetensors', 'yaml'): sys.modules[name] = None\n"
        "runpy.run_module('robustkern', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if argument == "--version":
        assert done.stdout == f"robustkern {robustkern.__version__}\n"
    else:
        assert "without  the command line: not installed" in done.stdout and "pip install typer" in done.stdout


def test_the_version_and_completion_are_options_of_the_command():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output == f"robustkern {robustkern.__version__}\n"
    words = {"COMP_WORDS": "robustkern do", "COMP_CWORD": "1", "_ROBUSTKERN_COMPLETE": "complete_bash"}
    result = CliRunner().invoke(app, [], env=words, prog_name="robustkern")
    assert result.output.split() == ["doctor"]
