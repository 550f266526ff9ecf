"""Whose run a folder holds: what is asked of it before anything is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from robustkern._files import read_bytes
from robustkern._text import brief

from .checkpoint import manifests
from .config import TrainingConfig
from .errors import UsageError
from .files import names_in
from .methods import METHODS
from .yaml_files import MOST_BYTES


def check_claim(config: TrainingConfig, out: Path, resume: bool) -> None:
    """Refuse a folder whose run is not the one to be started or resumed."""
    path = out / "config.yaml"
    names = names_in(out)
    if path.name not in names:
        if "config.json" in names:
            raise UsageError(f"{out} holds a run of an earlier version, with a config.json: choose another --out")
        if manifests(out):
            raise UsageError(
                f"{out} holds checkpoints, but not their config.yaml: put it back, or choose another --out"
            )
        if names:
            raise UsageError(f"{out} is neither empty nor a run, it holds {brief(names[0])}: choose another --out")
        return
    if not resume:
        raise UsageError(f"{out} already holds a run: pass --resume to go on with it, or another --out")
    if changed := differences(read_config(out), config):
        raise UsageError(f"{path} was written with other settings: {', '.join(changed)}; start anew with another --out")
    if not manifests(out) and (weights := [name for name in names if name.endswith(".safetensors")]):
        raise UsageError(f"{out} holds {weights[0]}, but no checkpoint to go on from: choose another --out")


def differences(written: TrainingConfig, config: TrainingConfig) -> list[str]:
    """What differs between two configurations, options that are left out taken for their defaults."""
    return _completed(written).differences(_completed(config))


def _completed(config: TrainingConfig) -> TrainingConfig:
    """With the options left out, such as those that are younger than the run."""
    defaults = METHODS[config.method].options if config.method in METHODS else {}
    return replace(config, options={**defaults, **config.options})


def read_config(out: str | Path) -> TrainingConfig:
    """The configuration of a run directory."""
    path = Path(out) / "config.yaml"
    try:
        return TrainingConfig.from_yaml(read_bytes(path, 4 * MOST_BYTES).decode())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, UsageError) as error:
        raise UsageError(f"{path}: {error}") from error
