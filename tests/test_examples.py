"""Every public name has an example in its docstring, and all examples of the package give what they say.

They begin after `import torch`, `from torch import nn` and `import robustkern as rk`.
"""

import doctest
import importlib
import inspect
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import robustkern as rk

ROOT = Path(rk.__file__).parent
MODULES = sorted(
    ".".join(["robustkern", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text()
)
PACKAGES = ("robustkern", *(f"robustkern.{name}" for name in ("attacks", "losses", "models", "ops", "testing")))


def public():
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                yield pytest.param(value, id=f"{package.removeprefix('robustkern.')}.{name}")


@pytest.mark.parametrize("value", public())
def test_every_public_name_has_an_example(value):
    assert ">>> " in inspect.getdoc(value), f"give {value.__module__}.{value.__name__} an example that runs"


@pytest.mark.parametrize("module", MODULES)
def test_examples_give_what_they_say(module):
    torch.manual_seed(0)
    names = {"torch": torch, "nn": nn, "rk": rk}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # graphed says that there is no GPU
        for example in doctest.DocTestFinder(exclude_empty=True).find(
            importlib.import_module(module), extraglobs=names
        ):
            runner.run(example, out=report.append)
    rk.uninstall()
    assert runner.tries > 0 and runner.failures == 0, "".join(report)
