"""What every benchmark shares: interleaved timing, peak memory, copy bandwidth, a stamp, files never half written."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Work = Callable[[], object]

_SAMPLE_SECONDS = 5e-4  # one sample of the clock on the CPU covers at least this much work
_LONG_SECONDS = 0.05  # a call this long has warmed everything up, and is a sample by itself
_COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}  # of each of the two tensors: far more than any cache holds


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, over the rounds."""

    ms: float  # the fastest: noise only ever adds time
    quartiles: tuple[float, float, float]
    samples: tuple[float, ...]  # one of every round

    @property
    def rounds(self) -> int:
        return len(self.samples)

    def over(self, other: Timing) -> float:
        """As a multiple of another timing of the same rounds: the median of the rounds' ratios.

        Timings of one round are slowed by the same neighbours.  For steps of a second, ten rounds on two noisy virtual
        CPUs give this ratio within 2 per cent, the ratio of the fastest within 5.
        """
        return self.over_quartiles(other)[1]

    def over_quartiles(self, other: Timing) -> tuple[float, float, float]:
        """The quartiles of the rounds' ratios."""
        return _quartiles([ours / theirs for ours, theirs in zip(self.samples, other.samples, strict=True)])


class Stopped(Exception):
    """Work that ran past its time limit."""


def keep_pages() -> bool:
    """Makes the C library keep freed memory, so that timings do not measure the operating system handing out zeroed
    pages.

    glibc returns blocks above 32 MiB to the system on every free, and each new page then costs a fault of up to a few
    microseconds: more than the kernels themselves.  Every column gains; those that allocate most gain most.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_max = -1, -4  # from malloc.h
        return bool(libc.mallopt(mmap_max, 0)) and bool(libc.mallopt(trim_threshold, 2**31 - 1))
    except (OSError, AttributeError):
        return False


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Interleaved:
    """Times several ways of doing the same thing in turn, so that a slow moment of the machine slows all of them.

    On CUDA each call lies between two events, after the L2 cache has been flushed by writing a buffer twice its size.
    On the CPU, data that fit into the cache are measured in cache: calls follow each other, as many per sample as make
    it long enough for the clock.
    """

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self._clock = device, clock
        self._flush = (
            torch.empty(2 * cache_bytes("cuda"), dtype=torch.int8, device="cuda") if device == "cuda" else None
        )

    def __call__(
        self,
        functions: Mapping[str, Work],
        *,
        seconds: float = 2.0,
        least: int = 4,
        most: int = 60,
        equally_long: bool = False,
    ) -> dict[str, Timing]:
        """Runs rounds until `seconds` have passed, but between `least` and `most` of them.

        With `equally_long`, a sample of a short function is as many calls as take the time of the longest function.
        Without it, the fastest of short samples finds quiet moments that are never long enough for a long sample, and
        a step that does ten times the work looks more than ten times as slow.
        """
        calls = {name: self._warm_up(function) for name, function in functions.items()}
        if equally_long and functions:
            once = {name: self._sample(function, calls[name]) for name, function in functions.items()}
            longest = max(once[name] * calls[name] for name in functions)
            calls = {name: max(1, round(longest / once[name])) for name in functions}
        samples: dict[str, list[float]] = {name: [] for name in functions}
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            end, rounds = time.perf_counter() + seconds, 0
            while rounds < least or (rounds < most and time.perf_counter() < end):
                for name, function in functions.items():
                    samples[name].append(self._sample(function, calls[name]))
                rounds += 1
        finally:
            if collecting:
                gc.enable()
        return {name: _timing(values) for name, values in samples.items()}

    def _warm_up(self, function: Work) -> int:
        """Warms up, and returns the number of calls per sample."""
        if self.device == "cuda":
            for _ in range(3):
                function()
            return 1
        if 1e-3 * self._sample(function, 1) > _LONG_SECONDS:
            return 1
        function()
        return max(1, round(_SAMPLE_SECONDS / max(self._sample(function, 1) * 1e-3, 1e-7)))

    def _sample(self, function: Work, calls: int) -> float:
        if self.device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            begin.record()
            function()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)
        begin = self._clock()
        for _ in range(calls):
            function()
        return 1e3 * (self._clock() - begin) / calls


def _timing(values: list[float]) -> Timing:
    return Timing(min(values), _quartiles(values), tuple(values))


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


class Copy:
    """torch's own copy_ between two tensors far above cache size: the yardstick of every memory-bound kernel."""

    def __init__(self, device: str, nbytes: int | None = None) -> None:
        nbytes = nbytes or _COPY_BYTES[device]
        self.source = torch.empty(nbytes // 4, dtype=torch.float32, device=device).normal_()
        self.target = torch.empty_like(self.source)
        self.bytes = 2 * self.source.nbytes  # read and written

    def __call__(self) -> None:
        self.target.copy_(self.source)

    def gb_per_s(self, timing: Timing) -> float:
        return self.bytes / timing.ms * 1e-6


def peak_memory(function: Work, device: str) -> int:
    """Bytes that `function` holds at its peak, above what was held before it.

    CUDA: torch.cuda.max_memory_allocated.  CPU: from the allocations and frees of PyTorch's CPU allocator in order of
    time, as its profiler records them; scratch memory that oneDNN or a kernel takes elsewhere is not among them.
    """
    function()  # lazily created state is not counted
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `Stopped` in the block after so many seconds; main thread only."""

    def stop(signum: int, frame: Any) -> None:
        raise Stopped(f"stopped after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


TOO_LATE_TO_COMPILE = "left out: the time for compilation was over"


def report_wrong(rows: Iterable[Mapping[str, Any]]) -> int:
    """Names the rows that failed the comparison with float64; returns the exit status."""
    wrong = {row["reason"]: None for row in rows if str(row.get("reason", "")).startswith("AssertionError")}
    for message in wrong:
        print(f"wrong result, not timed: {message}")
    return 1 if wrong else 0


def reason(error: BaseException) -> str:
    """One line that says why a column has no figure."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


@contextlib.contextmanager
def differentiable_compilation() -> Iterator[None]:
    """torch.compile traces torch.autograd.grad inside the compiled function: a penalised step becomes one graph."""
    config = torch._dynamo.config
    if not hasattr(config, "trace_autograd_ops"):
        raise RuntimeError(f"PyTorch {torch.__version__} has no torch._dynamo.config.trace_autograd_ops")
    with config.patch(trace_autograd_ops=True):
        yield


def cache_bytes(device: str) -> int:
    """The size of the last-level cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=32 << 20)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=ROOT)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu() -> str:
    with contextlib.suppress(OSError):
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """The name that results are filed under.  Virtual machines give processors of several generations the same name;
    their vector instructions tell them apart."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    vectors = {"AVX2": " with AVX2", "AVX512": " with AVX-512"}.get(torch.backends.cpu.get_cpu_capability(), "")
    return f"{_cpu()}{vectors}, {torch.get_num_threads()} core{'s' if torch.get_num_threads() > 1 else ''}"


def stamp(device: str) -> dict[str, Any]:
    """What a reader must know to reproduce or to doubt a figure."""
    import robustkern
    from robustkern import _library

    extension = _library.extension()
    commit = os.environ.get("ROBUSTKERN_COMMIT") or _output("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    if not os.environ.get("ROBUSTKERN_COMMIT") and _output("git", "status", "--porcelain", "--", "csrc", "robustkern"):
        commit += " with uncommitted changes"
    facts = {
        "device": device_name(device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "robustkern": robustkern.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()),  # from other work at the start: figures of a busy machine are unreliable
        "cache_bytes": cache_bytes(device),
        "kernels": extension.build_info() if extension is not None and hasattr(extension, "build_info") else None,
    }
    if device == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return facts


def results_path(device: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", device_name(device).lower())).strip("-")
    return RESULTS / f"{'cpu-' if device == 'cpu' else ''}{slug}.json"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Leaves the whole new file or the old one, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_section(path: Path, section: str, content: Mapping[str, Any]) -> None:
    """Replaces one section of a results file and keeps the others."""
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[section] = content
    write_atomically(path, dump(everything) + "\n")


def dump(value: Any, indent: int = 0) -> str:
    """JSON with one line per row, so that two runs can be compared with diff."""
    pad = " " * indent
    if isinstance(value, dict) and any(isinstance(item, (dict, list)) for item in value.values()):
        body = ",\n".join(f"{pad} {json.dumps(key)}: {dump(item, indent + 1)}" for key, item in value.items())
        return f"{{\n{body}\n{pad}}}" if indent < 2 else json.dumps(value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"{pad} {json.dumps(item)}" for item in value) + f"\n{pad}]"
    return json.dumps(value)
