"""Devices, seeds and the report of what ran where.

Every test that takes `device` runs on the CPU, and on CUDA where there is a device and kernels for it.
ROBUSTKERN_REQUIRE_CUDA=1 makes their absence a failure.  ROBUSTKERN_EMULATED=<file>, built by
tests/cuda_emulator/build.py, puts the emulated CUDA kernels in place of the CPU kernels.
"""

import importlib.util
import os
import random
import sys
from collections import Counter, defaultdict

import hypothesis
import pytest
import torch

EMULATED = os.environ.get("ROBUSTKERN_EMULATED")
REQUIRE_CUDA = os.environ.get("ROBUSTKERN_REQUIRE_CUDA") == "1"

if EMULATED:  # before anything imports robustkern, which would load its own extension
    if "robustkern" in sys.modules:
        raise RuntimeError("robustkern was imported before tests/conftest.py could put the emulated kernels in place")
    _spec = importlib.util.spec_from_file_location("robustkern._C", EMULATED)
    sys.modules["robustkern._C"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["robustkern._C"])

import robustkern  # noqa: E402
import torchvision_operators  # noqa: E402
from robustkern import _library  # noqa: E402

torchvision_operators.declare()

torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False

hypothesis.settings.register_profile(
    "robustkern",
    max_examples=10 if EMULATED else 60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much],
)
hypothesis.settings.load_profile("robustkern")


def why_no_cuda() -> str | None:
    """What is missing to test the CUDA kernels on a device; None if nothing is."""
    if _library.cuda_why_unavailable() is not None:
        return f"CUDA kernels not loaded: {_library.cuda_why_unavailable()}"
    return None if torch.cuda.is_available() else "CUDA kernels loaded, but PyTorch sees no device"


def pytest_generate_tests(metafunc):
    if "device" not in metafunc.fixturenames:
        return
    devices = ["cpu"]
    if why_no_cuda() is None or REQUIRE_CUDA:
        devices.append(pytest.param("cuda", marks=pytest.mark.cuda))
    metafunc.parametrize("device", devices)


def pytest_addoption(parser):
    parser.addoption("--few", type=int, metavar="N", help="at most N cases of each test, none of a long one")


def few(items, most):
    """All cases of tests with at most `most`; of others so many, or as many as it takes for every value to occur."""
    seen, kept, cases = set(), defaultdict(set), Counter(item.function for item in items)
    for item in random.Random(0).sample(items, len(items)):
        parameters = item.callspec.params if hasattr(item, "callspec") else {"": None}
        values = {(item.function, name, id(value)) for name, value in parameters.items()}
        enough = len(kept[item.function]) >= most and not item.get_closest_marker("every_value")
        if cases[item.function] <= most or (not enough and not values <= seen):
            seen |= values
            kept[item.function].add(item)
    return set().union(*kept.values())


def pytest_collection_modifyitems(config, items):
    """Leaves out slow tests unless -m asks about them, and with --few long ones and most combinations."""
    chosen = items if "slow" in config.option.markexpr else [i for i in items if not i.get_closest_marker("slow")]
    kept = set(chosen)
    if config.option.few:
        kept = few([item for item in chosen if not item.get_closest_marker("long")], config.option.few)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_runtest_setup(item):
    device = item.callspec.params.get("device") if hasattr(item, "callspec") else None
    if device is None:
        return
    item.user_properties.append(("device", device))
    reason = why_no_cuda() if device == "cuda" else _library.why_unavailable()
    if reason is None:
        return
    if device == "cpu" or REQUIRE_CUDA:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(autouse=True, scope="session")
def however_small():
    """Replaces derivatives even for tensors so small that PyTorch's are as fast: tests use such tensors."""
    if _library.aten_extension() is not None:
        _library.aten_extension().however_small(True)


@pytest.fixture
def emulated() -> bool:
    """Whether CPU tensors are served by the emulated CUDA kernels."""
    return bool(EMULATED)


@pytest.fixture
def not_emulated() -> None:
    """Skips a test that the emulator would need minutes for, or that is about the CPU kernels."""
    if EMULATED:
        pytest.skip("too slow in the emulator, or about the CPU kernels")


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Runs are trained but not drawn, since drawing takes longer."""
    from robustkern.training.run_folder import RunFolder

    monkeypatch.setattr(RunFolder, "draw", lambda *_: None)


@pytest.fixture(autouse=True)
def reproducible():
    """The same random numbers for every test, whatever ran before; nothing installed or compiled left behind."""
    random.seed(0)
    torch.manual_seed(0)
    yield
    robustkern.uninstall()
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters:
        dynamo.reset()
        dynamo.utils.counters.clear()


def describe_build() -> list[str]:
    """Which kernels these tests run on."""
    extension = _library.extension()
    if EMULATED:
        cpu = f"emulated CUDA kernels ({EMULATED})"
    elif extension is not None:
        info = extension.build_info()
        cpu = f"CPU kernels built with {info['compiler']} for PyTorch {info['torch']}, running {info['cpu_runs']}"
    else:
        cpu = f"none: {_library.why_unavailable()}"
    missing = why_no_cuda()
    cuda = torch.cuda.get_device_name() if missing is None else f"not tested: {missing}"
    threads = f"{torch.get_num_threads()} threads"
    versions = f"robustkern {robustkern.__version__}, PyTorch {torch.__version__}, {threads}"
    return [versions, f"  cpu: {cpu}", f"  cuda: {cuda}"]


def pytest_report_header():
    return describe_build()


def pytest_sessionstart(session):
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None and not reporter.showheader:  # -q leaves the header out
        for line in describe_build():
            reporter.write_line(line)


def pytest_terminal_summary(terminalreporter):
    ran = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            ran[dict(report.user_properties).get("device", "no device")] += 1
    cpu = "emulated" if EMULATED else "cpu"
    counts = [f"{cpu} {ran['cpu']}", f"cuda {ran['cuda']}", f"independent of a device {ran['no device']}"]
    terminalreporter.write_line(f"tests run: {', '.join(counts)}")
