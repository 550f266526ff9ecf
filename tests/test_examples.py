"""All examples in docstrings give what they say.

They begin after `import torch`, `from torch import nn` and `import robustkern as rk`.
"""

import doctest
import importlib
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
