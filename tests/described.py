"""What setup.py builds, for scripts that compile it in other ways: one list of sources, flags and defines for all."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension

ROOT = Path(__file__).resolve().parent.parent


def extensions(cuda: bool = False) -> dict[str, Extension]:
    """The extensions by name, such as robustkern._C; with robustkern._cuda if asked for, or SystemExit if it cannot be.

    Paths of sources are relative to `ROOT`, which becomes the working directory.
    """
    os.chdir(ROOT)
    os.environ["ROBUSTKERN_CUDA"] = "1" if cuda else "0"
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
    described: dict[str, Any] = {}
    setuptools.setup = described.update
    sys.argv[1:], arguments = ["build_ext"], sys.argv[1:]
    runpy.run_path("setup.py")
    sys.argv[1:] = arguments
    return {extension.name: extension for extension in described["ext_modules"]}


def defines(extension: Extension) -> list[str]:
    """The extension's macros as compiler flags."""
    return [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in extension.define_macros]


def run(command: list[str]) -> str:
    """The command's output; exits with it if the command fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
