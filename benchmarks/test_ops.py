"""pytest-benchmark suite of the operators: python -m pytest benchmarks/test_ops.py --size large."""

from __future__ import annotations

import pytest

from .bench_ops import check
from .op_cases import ORDERS, PROVIDERS, specs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    cases = specs(option("--size"), option("--device"))
    metafunc.parametrize("spec", cases, ids=str)
    metafunc.parametrize("provider", PROVIDERS)
    if "order" in metafunc.fixturenames:
        metafunc.parametrize("order", ORDERS)


def test_time(run, spec, provider, order, device, backend):
    run(spec.build(device).work(provider, order, backend))


def test_accuracy(spec, provider, device, backend):
    if provider == "operator":
        pytest.skip("the kernels that robustkern is checked with")
    check(spec.build(device), provider, backend)
