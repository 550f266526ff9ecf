"""Every benchmark runs once at a tiny size, so that none breaks unnoticed; speed is not tested."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from robustkern import _library

ROOT = Path(__file__).resolve().parent.parent
# On a busy machine, threads would mostly wait for each other; and this pytest's options are not for another one.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}

pytestmark = pytest.mark.skipif(_library.extension() is None, reason=f"kernels not built: {_library.why_unavailable()}")


def python(*arguments):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_suites():
    options = ("--benchmark-disable", "--backend", "eager", "--device", "cpu", "-p", "no:cacheprovider")
    python("-m", "pytest", "benchmarks", "-q", *options)


def test_programs_that_only_print():
    orders = python("-m", "benchmarks.bench_orders", "--only", "rms_norm", "--seconds", "0.001", "--limit", "99")
    assert orders.count("| rms_norm |") == 15 and "0 above 99.0" in orders
    host = python("-m", "benchmarks.bench_host", "--seconds", "0.01", "--limit", "99")
    assert host.count("\n| ") == 10 and "0 above 99.00" in host
    layers = python("-m", "benchmarks.bench_first_layers", "--only", "digits", "--seconds", "0.001", "--limit", "99")
    assert layers.count("| digits") == 6
    assert "0 above 99.0" in layers
    options = ("--size", "tiny", "--rounds", "2", "--launches", "1", "--limit", "99", "--only", "RMSNorm", "entropy")
    trees = python("-m", "benchmarks.compare", str(ROOT), *options)
    assert trees.count("\n| ") == 5 and "second backward: RMSNorm" in trees


@pytest.mark.skipif(sys.platform != "linux", reason="a script for bash and coreutils")
def test_rehearsal_of_the_script_for_gpus(tmp_path):
    """Every stage runs on the CPU, says so in a line, and leaves its log."""
    environment = {**ENVIRONMENT, "PYTHON": sys.executable, "OUT": str(tmp_path), "SECONDS_IN_ALL": "900"}
    script = ["bash", "benchmarks/gpu.sh", "cpu"]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1000)
    stages = {line[8:20].strip(): line[21:33].strip() for line in (tmp_path / "summary.txt").read_text().splitlines()}
    tools = dict.fromkeys(("memcheck", "racecheck", "synccheck", "counters"), "skipped")
    passed = dict.fromkeys(("build", "checks", "operators", "suite", "kernels", "steps"), "passed")
    assert stages == tools | passed, done.stdout + done.stderr
    assert done.returncode == 0
    assert all((tmp_path / f"{stage}.log").exists() for stage in stages)
    assert len(json.loads((tmp_path / "kernels.json").read_text())["rows"]) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="a script for bash and coreutils")
def test_the_script_for_gpus_ends_in_time(tmp_path):
    """What there is no time for is said, and the exit status tells."""
    environment = {**ENVIRONMENT, "PYTHON": sys.executable, "OUT": str(tmp_path), "SECONDS_IN_ALL": "6"}
    script = ["bash", "benchmarks/gpu.sh", "cpu"]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "OUT OF TIME" in (tmp_path / "summary.txt").read_text()


def test_programs_write_results_that_render(tmp_path, monkeypatch):
    out, page, readme = tmp_path / "cpu-machine.json", tmp_path / "benchmarks.md", tmp_path / "README.md"
    shared = ["--device", "cpu", "--seconds", "0.01", "--backend", "eager", "--out", str(out)]
    # In a process of their own, since the programs make the C library keep freed memory.
    tiny = ["--size", "tiny", *shared[:4], "--out", str(out)]
    steps = ["--size", "tiny", *shared, "--only", "Batch", "--providers"]
    programs = {
        "bench_ops": [["--sizes", "tiny", "--providers", "eager", "robustkern", "operator", *shared]],
        **{
            f"bench_{name}": [tiny]
            for name in (
                "double_backward",
                "jacobian",
                "cotangents",
                "attacks",
                "methods",
                "attention",
                "precision",
            )
        },
        # The second joins the first.
        "penalised_step": [[*steps, "plain", "plain_installed", "eager", "installed"], [*steps, "installed_compile"]],
    }
    python(
        "-c",
        "import importlib\n"
        f"for name, calls in {programs}.items():\n"
        "    for arguments in calls:\n"
        "        assert not importlib.import_module('benchmarks.' + name).main(arguments), name",
    )
    results = json.loads(out.read_text())
    assert results["ops"]["complete"]
    assert not results["steps"]["complete"]
    assert results["ops"]["stamp"]["torch"] == torch.__version__
    assert {row["op"] for row in results["ops"]["rows"]} == {"row_norm", "softmax_cross_entropy", "kl_divergence"}
    for row in results["ops"]["rows"]:
        assert row["ms"] > 0
        assert 0 < row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] * 1e-6, rel=1e-2)
    rows = {row["provider"]: row for row in results["steps"]["rows"]}
    assert list(rows) == ["plain", "plain_installed", "eager", "installed", "installed_compile"]
    assert rows["plain"]["ratio"] == 1.0
    assert all(row["ms"] > 0 and row["gradient_error"] < 1e-4 for row in rows.values())

    cotangents = results["cotangents"]["rows"]
    assert {(row["law"], row["provider"]) for row in cotangents} == {
        (law, provider) for law in ("sphere", "orthonormal") for provider in ("pytorch", "robustkern")
    }
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in cotangents)

    attention = results["attention"]["rows"]
    assert {row["provider"] for row in attention} >= {"robustkern", "MATH"}
    assert all(row["ms"] > 0 and 0 < row["error"] < 0.01 and row["peak_bytes"] > 0 for row in attention)

    precision = results["precision"]["rows"]
    assert {row["provider"] for row in precision} == {"eager", "finite_differences", "installed"}
    for row in precision:
        low, high = row["interval"]
        assert low <= row["ratio"] <= high and row["peak"] > 1 and row["error"] < 2
    errors = {(row["network"], row["precision"], row["provider"]): row["error"] for row in precision}
    for row in precision:
        if row["provider"] == "finite_differences":
            assert row["error"] == min(row["errors"].values())
            assert row["error"] > errors[row["network"], row["precision"], "installed"]

    attacks = results["attacks"]
    assert attacks["complete"]
    assert {row["attack"] for row in attacks["attacks"]} >= {"stock PGD", "PGD", "APGD", "FGSM", "N-FGSM"}
    assert all(row["ms"] > 0 for row in (*attacks["attacks"], *attacks["operators"]))

    methods = results["methods"]
    assert methods["complete"] and len(methods["rows"]) == 19
    assert all(row["ratio"] > 0 and row["stock_ratio"] > 0 and row["passes"] >= 3 for row in methods["rows"])

    jacobian = results["jacobian"]
    assert jacobian["complete"]
    assert {row["provider"] for row in jacobian["rows"] if row["ms"]} == {
        "plain",
        "robustkern",
        "recipe",
        "rows",
        "vmap",
    }
    for row in jacobian["variances"]:
        assert row["measured"] == pytest.approx(row["predicted"], rel=0.2, abs=1e-3)

    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import render

    markers = "\n".join(f"<!-- benchmarks:{end} {name} -->" for name, _ in render.BLOCKS for end in ("begin", "end"))
    page.write_text(f"before\n{markers}\nafter\n")
    readme.write_text("<!-- benchmarks:begin front -->\n<!-- benchmarks:end front -->\n")
    options = ["--results", str(tmp_path), "--page", str(page), "--readme", str(readme), "--images", str(tmp_path)]
    assert render.main([*options, "--check"]) == 1
    assert render.main(options) == 0
    assert render.main([*options, "--check"]) == 0
    assert "| tiny ConvNeXt | " in readme.read_text()
    assert "ResNet" in page.read_text()
    assert "BatchNorm2d" in page.read_text()
    assert "double backward" in out.with_suffix(".md").read_text()
    assert "as precise" in page.read_text()
    assert "torch.linalg.qr" in page.read_text()
    assert "| pgd with awp | 29 | 9.67 |" in page.read_text()
    assert "N-FGSM, tiny PreAct-ResNet" in page.read_text() and "attack_step, l1" in page.read_text()
    for name in ("penalised_step.png", "projections.png", "precision.png"):
        (tmp_path / name).unlink()
        assert render.main([*options, "--check"]) == 1
        assert render.main(options) == 0
        assert render.main([*options, "--check"]) == 0


def test_a_crash_costs_one_column(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import supervise

    program = tmp_path / "crashes.py"
    program.write_text(
        "import os, pathlib, sys\n"
        "from benchmarks.supervise import Progress\n"
        "progress = Progress(pathlib.Path(sys.argv[-1]))\n"
        "for case in 'ab':\n"
        "    for column in ('good', 'bad'):\n"
        "        if progress.is_finished(case) or progress.why_left_out(case, column): continue\n"
        "        progress.enter(case, column)\n"
        "        print(case, column, file=open(sys.argv[1], 'a'))\n"
        "        if case == 'a' and column == 'bad': os.abort()\n"
        "    progress.finish(case)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    log = tmp_path / "log"
    assert supervise.supervise("crashes", [str(log)]) == 1
    assert log.read_text().splitlines() == ["a good", "a bad", "a good", "b good", "b bad"]


def test_columns_do_not_leave_robustkern_installed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import robustkern
    from benchmarks import step_cases

    case = step_cases.Case(step_cases.specs("tiny", "cpu")[0], "cpu")
    seen = []
    monkeypatch.setattr(case, "_plain", lambda x, y: seen.append(robustkern.is_installed()) or case.model(x).sum())
    for provider in ("plain", "plain_installed", "plain"):
        case.step(provider)()
    assert seen == [False, True, False]
    assert not robustkern.is_installed()
    robustkern.install()
    try:
        with pytest.raises(RuntimeError, match="installed already"):
            case.step("plain")()
    finally:
        robustkern.uninstall()


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import bench_ops, op_cases

    case = op_cases.specs("tiny", "cpu")[0].build("cpu")
    right = case.robustkern
    case.robustkern = lambda x: 1.01 * right(x)
    with pytest.raises(AssertionError, match="exceeds"):
        bench_ops.check(case, "robustkern", "eager")


def test_results_are_replaced_whole_and_by_section(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import harness

    path = tmp_path / "machine.json"
    harness.write_section(path, "ops", {"rows": [{"a": 1}]})
    harness.write_section(path, "steps", {"rows": []})
    with pytest.raises(TypeError):
        harness.write_section(path, "ops", {"rows": [{"a": object()}]})
    assert json.loads(path.read_text()) == {"ops": {"rows": [{"a": 1}]}, "steps": {"rows": []}}
    assert [p.name for p in tmp_path.iterdir()] == ["machine.json"]


def test_peak_memory_counts_what_is_held_at_once(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import harness

    megabyte = torch.empty(1 << 18)

    def work():
        first = megabyte + 1
        second = first + 1
        del first
        return second + 1

    assert harness.peak_memory(work, "cpu") == pytest.approx(2 * megabyte.nbytes, rel=1e-3)


def test_a_row_of_the_results_table(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import robustness

    out = tmp_path / "robustness.json"
    options = ["--data", "digits", "--samples", "8", "--attacks", "pgd", "--epochs", "1", "--method", "standard"]
    options += ["--runs", str(tmp_path / "runs"), "--out", str(out)]
    robustness.main(options)
    written = json.loads(out.read_text())["rows"]
    assert [(row["data"], row["method"], row["seed"]) for row in written] == [("digits", "standard", 0)]
    robustness.main(options)  # everything is there: nothing changes
    assert json.loads(out.read_text())["rows"] == written
    other = copy.deepcopy(written[0])
    other["seed"], other["accuracies"]["clean"]["accuracy"] = 1, 0.5
    written.append(other)
    text = robustness.document(written)
    mean = 50 * sum(row["accuracies"]["clean"]["accuracy"] for row in written)
    assert f"| standard | 2 | {mean:.1f} ± " in text
    assert "the first 8 test images" in text


def test_the_page_shows_one_processor_and_links_to_the_others(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import render

    def measured(device, date, ratio):
        stamp = {"device": device, "date": date, "commit": "abc", "torch": torch.__version__}
        rows = [
            {"model": "net", "penalty": "L2", "provider": p, "ms": 1.0, "ratio": r, "quartiles": [1.0, 1.0, 1.0],
             "gradient_error": 0.0, "peak_bytes": 1}
            for p, r in (("plain", 1.0), ("eager", 3.0), ("installed", ratio))
        ]  # fmt: skip
        return json.dumps({"steps": {"stamp": stamp, "complete": True, "rows": rows}})

    (tmp_path / "cpu-old.json").write_text(measured("Old", "2026-01-01T00:00:00+00:00", 1.5))
    (tmp_path / "cpu-new.json").write_text(measured("New", "2026-01-02T00:00:00+00:00", 2.5))
    (tmp_path / "h100.json").write_text(measured("GPU", "2025-01-01T00:00:00+00:00", 2.25))
    page = tmp_path / "benchmarks.md"
    markers = "\n".join(f"<!-- benchmarks:{end} {name} -->" for name, _ in render.BLOCKS for end in ("begin", "end"))
    page.write_text(markers)
    assert render.main(["--results", str(tmp_path), "--page", str(page), "--images", str(tmp_path)]) == 0
    text = page.read_text()
    assert "2.50x" in text and "2.25x" in text
    assert (
        "Old: robustkern installed 1.50x to 1.50x, stock eager 3.00x to 3.00x: [benchmarks/results/cpu-old.md]" in text
    )
    complete = json.loads(measured("Old", "2026-01-01T00:00:00+00:00", 1.5))
    complete["steps"]["rows"].append({**complete["steps"]["rows"][1], "provider": "compile"})
    (tmp_path / "cpu-old.json").write_text(json.dumps(complete))
    assert render.main(["--results", str(tmp_path), "--page", str(page), "--images", str(tmp_path)]) == 0
    assert "New: robustkern installed 2.50x" in page.read_text()  # the last, but with fewer figures
    assert {path.name for path in tmp_path.glob("*.png")} == {"penalised_step.png", "penalised_step-h100.png"}


def test_samples_are_equally_long(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import harness

    now, calls = 0.0, {"short": 0, "long": 0}

    def work(name, seconds):
        def run():
            nonlocal now
            calls[name] += 1
            now += seconds

        return run

    functions = {"short": work("short", 0.06), "long": work("long", 0.3)}
    timings = harness.Interleaved("cpu", lambda: now)(functions, seconds=0, least=2, equally_long=True)
    assert timings["short"].ms == pytest.approx(60) and timings["long"].ms == pytest.approx(300)
    assert calls == {"short": 2 + 5 * 2, "long": 2 + 2}  # two before to know how long they are, then two samples


def test_a_column_measured_alone_is_held_to_the_error_of_stock(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import penalised_step

    spec, truth = penalised_step.specs("tiny", "cpu")[0], torch.tensor([3.0, 4.0], dtype=torch.float64)
    monkeypatch.setattr(penalised_step, "exact", lambda spec, device, provider: truth)
    monkeypatch.setattr(penalised_step.Case, "gradient", lambda case, provider: 1.01 * truth.float())
    alone = penalised_step.Truth(spec, "cpu")
    assert alone.error("installed", 1.03 * truth.float()) == pytest.approx(0.03, rel=1e-3)
    with pytest.raises(AssertionError, match="installed: relative error 0.05"):
        alone.error("installed", 1.05 * truth.float())
    beside_a_failure = penalised_step.Truth(spec, "cpu", ["eager", "installed"])  # stock's step is not run once more
    with pytest.raises(AssertionError, match="installed: relative error 0.03"):
        beside_a_failure.error("installed", 1.03 * truth.float())


def test_a_multiple_is_the_median_of_the_rounds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import harness

    plain, step = harness._timing([4.0, 2.0, 1.0]), harness._timing([8.0, 4.4, 3.0])
    assert step.over(plain) == pytest.approx(2.2) and step.rounds == 3
    with pytest.raises(ValueError, match="shorter"):
        step.over(harness._timing([1.0, 1.0]))


def test_what_readme_says_first_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import render

    readme = (ROOT / "README.md").read_text()
    said = re.search(r"PyTorch takes ([\d.]+) to ([\d.]+) plain steps, compiled ([\d.]+) to ([\d.]+)", readme)
    everything = {path: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    shown, _ = render.featured(everything, "steps")
    rows = [row for path in shown if path.stem.startswith("cpu-") for row in everything[path]["steps"]["rows"]]
    measured = [
        [row["ratio"] for row in rows if row["provider"] == name and row["ms"]] for name in ("eager", "compile")
    ]
    assert said.groups() == tuple(f"{end(ratios):.1f}" for ratios in measured for end in (min, max))


def test_multiples_of_several_runs_have_an_interval():
    from benchmarks.render import step_ratio

    row = {"provider": "installed", "ms": 1.0, "ratio": 2.04, "ratios": [2.1, 2.0, 2.04]}
    assert step_ratio(row) == "2.04x (2.00 to 2.10)"
    assert step_ratio({**row, "ratios": [2.0401, 2.0404, 2.0409], "first_call_s": 61}) == (
        "2.040x (2.040 to 2.041) after 61 s"
    )
    assert step_ratio({**row, "ratios": [2.04]}) == "2.04x"


@pytest.mark.parametrize("provider", ["jax", "forward_over_reverse", "installed_save_memory"])
def test_the_rivals_of_a_step_have_its_gradient(provider):
    from benchmarks.step_cases import Case, specs

    if provider == "jax":
        pytest.importorskip("jax")
    case = Case(next(spec for spec in specs("tiny", "cpu") if "MLP" in spec.model), "cpu")
    expected = case.gradient("eager")
    assert (case.gradient(provider) - expected).norm() < 1e-5 * expected.norm()
