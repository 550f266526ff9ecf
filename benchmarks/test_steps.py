"""pytest-benchmark suite of training steps: python -m pytest benchmarks/test_steps.py --size large."""

from __future__ import annotations

import pytest

from .bench_steps import check
from .step_cases import PROVIDERS, Case, specs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    size = "tiny" if metafunc.config.getoption("--size") == "tiny" else "full"
    metafunc.parametrize("spec", specs(size, metafunc.config.getoption("--device")), ids=str)
    metafunc.parametrize("provider", PROVIDERS)


def test_time(run, spec, provider, device, backend):
    run(Case(spec, device).work(provider, backend))


def test_gradient(spec, provider, device, backend):
    case = Case(spec, device)
    assert check(spec, case, provider, case.gradient(provider, backend)) < 1.0
