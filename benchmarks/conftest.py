"""Options of the pytest-benchmark suites: python -m pytest benchmarks --size small --device cpu."""

from __future__ import annotations

import pytest
import torch

from . import harness


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", default="tiny", choices=("tiny", "small", "large"), help="of the benchmarked tensors")
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.addoption("--backend", default="inductor", help="of torch.compile")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--backend"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    device = str(request.config.getoption("--device"))
    if device == "cpu":
        harness.keep_pages()
    return device


@pytest.fixture
def run(benchmark, device):  # type: ignore[no-untyped-def]
    """Benchmarks a call, waiting for the device."""

    def measure(work: harness.Work) -> None:
        def call() -> None:
            work()
            harness.synchronize(device)

        benchmark(call)

    yield measure
    torch._dynamo.reset()
