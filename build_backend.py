"""setuptools' own build backend, but that PyTorch is required only where something is compiled: not for an sdist."""

import sysconfig
from importlib import metadata

from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    """What compiles the extensions: with the PyTorch of the environment that is installed into, if it has one.

    `robustkern._aten` serves no other than the PyTorch that it was built with.
    """
    installed = next(iter(metadata.distributions(name="torch", path=[sysconfig.get_path("purelib")])), None)
    torch = f"torch=={installed.version.split('+')[0]}" if installed else "torch>=2.10"
    return ["ninja", "numpy", torch]


get_requires_for_build_editable = get_requires_for_build_wheel
