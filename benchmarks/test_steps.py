"""pytest-benchmark suite of training steps: python -m pytest benchmarks/test_steps.py --size large."""

from __future__ import annotations

import math

import pytest

from robustkern.double_backward import replaced_operators

from .penalised_step import Truth
from .step_cases import COMPILED, INSTALLED, Case, specs
from .step_models import ATTENTION


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    size = "tiny" if metafunc.config.getoption("--size") == "tiny" else "full"
    cases = specs(size, metafunc.config.getoption("--device"))
    both = [(spec, provider) for spec in cases for provider in spec.providers]
    metafunc.parametrize("spec, provider", both, ids=[f"{spec}-{provider}" for spec, provider in both])


@pytest.fixture(autouse=True)
def differentiable(spec, provider):
    """PyTorch's fused attention has no second derivative of its own, on any device."""
    penalised = provider in (INSTALLED, COMPILED[1])
    if penalised and spec.model in ATTENTION and not any("scaled_dot" in name for name in replaced_operators()):
        pytest.skip("attention is not among the replaced operators")


def test_time(run, spec, provider, device, backend):
    run(Case(spec, device).step(provider, backend))


def test_gradient(spec, provider, device, backend):
    case, truth = Case(spec, device), Truth(spec, device)
    error = truth.error(provider, case.gradient(provider, backend))
    assert math.isfinite(error)  # what is held to a bound has been
