"""A small study: trained, measured, drawn, stopped, resumed."""

import json
import pickle
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_data import write_cifar

from robustkern import data
from robustkern.attacks import PGD
from robustkern.cli import study as command
from robustkern.study import figures, inversion, results
from robustkern.study import study as module
from robustkern.study.measures import MEASURES, Judges, Protocol, measure, summarise
from robustkern.study.plan import OURS, PAPER, Plan, configuration
from robustkern.study.study import run
from robustkern.training import METHODS, TrainingError, UsageError, recipe, recipes, teacher_recipe, train

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
SMALL = {"data": "digits", "methods": ("standard", "fgsm"), "seeds": 1, "sweep": (3.0,), "samples": 12, "epochs": 1}


def study(*arguments):
    from typer.testing import CliRunner

    from robustkern.cli.app import app

    here = [] if "--jobs" in arguments else ["--jobs", 1]  # what is patched is not in other processes
    return CliRunner().invoke(app, ["study", *map(str, [*arguments, *here])])


@pytest.fixture(scope="module", autouse=True)
def short():
    """Makes inversions and the figures' attacks take few steps: their results are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        quick = partial(Protocol, seeds_per_class=1, noise_images=1, noise_steps=2, inversion_steps=2)
        patch.setattr(module, "Protocol", quick)
        patch.setattr(
            figures, "invert", lambda *images, **options: inversion.invert(*images, **{**options, "steps": 1})
        )
        patch.setattr(figures, "PGD", lambda eps, **options: PGD(eps, **{**options, "steps": 1}))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    options = ["--data", "digits", "--methods", "standard,fgsm", "--seeds", 1, "--sweep", "3", "--samples", 12]
    result = study(*options, "--epochs", 1, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_a_study_leaves_every_number_and_figure(done):
    folder, output = done
    written = json.loads((folder / "study.json").read_text())
    names = [
        "standard", "fgsm", "gradient-penalty", "gradient-penalty x 0", "gradient-penalty x 3",
        "gradient-penalty x 0, labels shuffled", "gradient-penalty, labels shuffled",
    ]  # fmt: skip
    assert list(written["summary"]) == names
    for measures in written["summary"].values():
        assert list(measures) == list(MEASURES)
        for values in measures.values():
            assert values["low"] <= values["value"] <= values["high"] and len(values["seeds"]) == 1
    page = (folder / "report.html").read_text()
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert figures == {
        "accuracy", "gradients", "inversions", "noise", "perturbations", "terms", "smoothness", "two_by_two"
    }  # fmt: skip
    assert len(re.findall("data:image/png;base64,", page)) == len(figures)
    assert all(name in page for name in names)
    assert "http" not in re.sub('base64,[^"]*', "", page)  # needs nothing beside it
    assert written["judges"].keys() == {"robust", "standard"} and "the judges name" in page
    assert list(written["rank correlation with smoothness"]) == list(results.SMOOTHNESS)
    tables = (folder / "tables.md").read_text()
    for name, measures in written["summary"].items():
        assert re.search(
            rf"^\| {re.escape(name)} \| {100 * measures['clean_accuracy']['value']:.1f} % \(", tables, re.M
        )
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in tables.splitlines() if line.startswith("|")}
    assert widths == {len(MEASURES) + 2, len(results.SMOOTHNESS) + 2}  # bars inside cells are escaped
    assert "robustkern study --data digits --seeds 1 --samples 12 --epochs 1 --methods standard,fgsm --sweep 3" in page
    assert "report.html" in output and "about" in output


def test_what_is_there_is_not_made_again(done, monkeypatch):
    folder, _ = done
    before = {path: path.stat().st_mtime_ns for path in folder.glob("measures/*")}
    summary = json.loads((folder / "study.json").read_text())["summary"]
    models = {path: path.stat().st_mtime_ns for path in folder.glob("models/*/model.safetensors")}
    (gone,) = [path for path in before if path.stem == "fgsm-0"]
    gone.unlink()
    again = run(Plan(**SMALL), folder)
    assert {path for path in folder.glob("measures/*") if path.stat().st_mtime_ns != before.get(path)} == {gone}
    assert again.summary == summary  # measured again, to the same numbers
    assert models == {path: path.stat().st_mtime_ns for path in folder.glob("models/*/model.safetensors")}
    from safetensors.torch import load_file, save_file

    # Measures of an earlier version, which took fewer, do not count.
    kept = load_file(gone)
    save_file({name: value for name, value in kept.items() if name != "median_gradient_norm"}, gone)
    assert run(Plan(**SMALL), folder).summary == summary
    # A model that was trained in another way than now does not count.
    monkeypatch.setitem(recipes._BY_METHOD["digits"], "gradient-penalty", {"weight": 5.0})
    with pytest.raises(UsageError, match=r"written with other settings: weight 4.0 -> 5.0"):
        run(Plan(**SMALL), folder)


def test_damaged_files_of_a_study_are_made_again_or_named(done, tmp_path):
    folder = shutil.copytree(done[0], tmp_path / "study")
    unit = module.Unit(next(entry for entry in Plan(**SMALL).entries() if entry.name == "fgsm"))
    measures = folder / "measures" / "fgsm-0.safetensors"
    whole = measures.read_bytes()
    for content, there in ((whole, True), (whole[:-9], False), (b"\x05\0\0\0\0\0\0\0[1,2]", False), (b"", False)):
        measures.write_bytes(content)
        assert module._is_there(unit, Plan(**SMALL), folder, data.load("digits", split="test")) == there
    rows, plan = folder / "models" / "fgsm-0" / "metrics.jsonl", folder / "plan.json"
    for path, content, message in (
        (rows, b'{"epoch": "one"}\n', "metrics.jsonl: not the metrics of a run"),
        (rows, b"", "metrics.jsonl: no rows"),
        (rows, b"\xff", "metrics.jsonl: 'utf-8' codec"),
        (plan, b"[1]", "plan.json: not the plan of a study"),
        (plan, b'{"data": {"a": []}}', "holds another study"),
        (plan, b"[" * 50_000, "plan.json: not the plan of a study (nested too deeply)"),
        (plan, b" " * 100_000, "plan.json: not the plan of a study (larger"),
    ):
        path.write_bytes(content)
        read = partial(module._rows, rows.parent) if path == rows else partial(module._claim, Plan(**SMALL), folder)
        with pytest.raises((UsageError, TrainingError), match=re.escape(message)) as caught:
            read()
        assert "\n" not in str(caught.value)
        shutil.copy(done[0] / path.relative_to(folder), path)


def test_a_folder_belongs_to_one_study(done):
    folder, _ = done
    with pytest.raises(UsageError, match=r"holds another study \(epochs 1 -> 2\): choose another folder"):
        run(Plan(**{**SMALL, "epochs": 2}), folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "standard,magic"], "no method 'magic' in the study"),
        (["--seeds", "0"], "'--seeds': must be an integer from 1 to 1000, got '0'"),
        (["--sweep", "1,x"], "--sweep: numbers with commas, or none"),
        (["--sweep", "-1"], "multiples must be positive"),
        (["--sweep", "inf"], "multiples must be positive"),
        (["--epochs", 0], "'--epochs': must be an integer from 1 to 2147483647, got '0'"),
        (["--samples", -5], "'--samples': must be an integer from 1 to 2147483647, got '-5'"),
        (["--threads", 0], "'--threads': must be an integer from 1 to 1024, got '0'"),
        (["--checkpoint", "a=:f"], "--checkpoint: NAME=RUN, NAME=module:function or NAME=MODEL@FILE, got 'a=:f'"),
        (["--checkpoint", "a=x:f", "--checkpoint", "a=x:g"], "two of the networks that are given have the same name"),
        (["--checkpoint", "gradient-penalty=x:f"], "train the gradient penalty themselves: give yours another name"),
        (["--checkpoint", "gradient-penalty-x-0.1=x:f"], "would share its files with another network of the study"),
    ],
)
def test_misuse_is_one_line(options, message, tmp_path):
    result = study("--data", "digits", "--out", tmp_path / "study", *options)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_every_kind_of_model_has_a_configuration(tmp_path):
    plan = Plan("digits")
    entries = {entry.name: entry for entry in plan.entries()}
    assert set(PAPER + OURS) <= set(entries)
    configurations = {name: configuration(plan, entry, 2, tmp_path, (1, 8, 8)) for name, entry in entries.items()}
    assert all(config.method in METHODS and config.seed == 2 for config in configurations.values())
    assert configurations["distillation"].options["teacher"] == str(
        tmp_path.resolve() / "models" / "distillation-teacher-2"
    )
    assert configurations["gradient-penalty-linf"].options["norm"] == float("inf")
    usual = configurations["gradient-penalty"].options["weight"]
    assert configurations["gradient-penalty x 0.1"].options["weight"] == pytest.approx(0.1 * usual)
    norms = {"gradient-penalty-l2": (20, 40 / 7), "gradient-penalty-linf": (200, 800 / 49)}  # 28x28, 8x8
    for name, (large, small) in norms.items():
        assert configurations[name].options["weight"] == pytest.approx(small * usual)
        config = configuration(plan, entries[name], 2, tmp_path, (1, 28, 28))
        assert config.options["weight"] == pytest.approx(large * usual)
    shuffled = {name for name, config in configurations.items() if config.shuffle_labels}
    assert shuffled == {"gradient-penalty x 0, labels shuffled", "gradient-penalty, labels shuffled"}


@pytest.mark.long
def test_given_networks_are_measured_beside_those_that_are_trained(done, tmp_path, monkeypatch):
    folder, _ = done
    (tmp_path / "my_networks.py").write_text(
        "import torch\n"
        "def linear():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
        "def other():\n"
        "    torch.manual_seed(1)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
        "def small():\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))\n"
        "def number():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    given = ["--checkpoint", "mine=my_networks:linear", "--checkpoint", f"theirs={folder / 'models' / 'fgsm-0'}"]
    alone = ["--data", "digits", "--samples", 12, "--epochs", 1, "--methods", "none", "--sweep", "none"]
    out = tmp_path / "study"
    result = study(*alone, "--no-two-by-two", *given, "--out", out, "--report", tmp_path / "page")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "page" / "study.json").read_text())
    assert list(written["summary"]) == ["mine", "theirs"]
    known = json.loads((folder / "study.json").read_text())
    assert written["summary"]["theirs"] == known["summary"]["fgsm"]  # a run, measured by the same protocol
    assert written["curves"]["theirs"] == known["curves"]["fgsm"]
    page = (tmp_path / "page" / "report.html").read_text()
    assert (tmp_path / "page" / "figures" / "accuracy.png").exists() and not (out / "figures").exists()
    assert "--checkpoint mine=my_networks:linear" in page
    again = [*alone, "--no-two-by-two", "--checkpoint", "mine=my_networks:other", "--out", out]
    assert study(*again).exit_code == 0  # the same name, another network: no number of the first one
    other = json.loads((out / "study.json").read_text())["summary"]["mine"]
    assert other["gradient_norm"]["value"] != written["summary"]["mine"]["gradient_norm"]["value"]
    refused = {
        "mine": "--checkpoint: NAME=RUN, NAME=module:function or NAME=MODEL@FILE, got 'mine'",
        "mine=nowhere": "nowhere: neither a run directory, a weight file, module:function nor MODEL@FILE",
        "mine=my_networks:nothing": "my_networks:nothing: AttributeError: module",
        "mine=my_networks:number": "my_networks:number returned a int, not a torch.nn.Module",
        "mine=my_networks:small": "my_networks:small gives (2, 3) for two images, digits takes logits of 10 classes",
    }
    for text, message in refused.items():
        result = study(*alone, "--no-two-by-two", "--checkpoint", text, "--out", tmp_path / "other")
        assert result.exit_code == 2 and message in result.stderr, (text, result.stderr)
    result = study(*alone, "--no-two-by-two", "--out", tmp_path / "other")
    assert result.exit_code == 2 and "nothing to study" in result.stderr
    assert not (tmp_path / "other").exists()


def test_accuracy_falls_with_the_radius(done):
    folder, _ = done
    for points in json.loads((folder / "study.json").read_text())["curves"].values():
        accuracies = [point["accuracy"] for point in points]
        assert accuracies == sorted(accuracies, reverse=True)
        assert all(point["low"] <= point["accuracy"] <= point["high"] for point in points)


def test_units_can_be_sent_to_other_processes(done, tmp_path, monkeypatch):
    folder, _ = done

    def in_parallel(tasks, work, jobs, **told):
        assert jobs == 2
        module_in_parallel(*pickle.loads(pickle.dumps((tasks, work))), 1, **told)

    module_in_parallel = module.in_parallel
    monkeypatch.setattr(module, "in_parallel", in_parallel)
    plan = Plan(**{**SMALL, "methods": ("standard",), "sweep": (), "two_by_two": False})
    known = json.loads((folder / "study.json").read_text())["summary"]["standard"]
    assert run(plan, tmp_path, jobs=2).summary == {"standard": known}


@pytest.mark.parametrize(("cores", "threads", "on", "jobs"), [
    (2, 1, "cpu", 2), (2, 2, "cpu", 1), (1, 2, "cpu", 1), (64, 1, "cpu", 8), (2, 1, "cuda", 1),
])  # fmt: skip
def test_every_core_gets_a_model(monkeypatch, tmp_path, cores, threads, on, jobs):
    told = []

    def run(plan, folder, **options):
        told.append(options["jobs"])
        raise UsageError("enough")

    monkeypatch.setattr(command.os, "sched_getaffinity", lambda process: range(cores))
    monkeypatch.setattr(command, "run", run)
    for given in ({}, {"jobs": 3}):
        with pytest.raises(UsageError, match="enough"):
            command.run_study(tmp_path, Console(), data="digits", threads=threads, device=on, **given)
    assert told == [jobs, 3]


def test_half_the_epochs_of_a_training():
    assert Plan("digits").epochs == recipe("digits").epochs // 2
    assert Plan("digits", epochs=3).epochs == 3


def test_inversions_from_noise_are_drawn_as_they_were_measured(done, tmp_path, monkeypatch):
    folder, _ = done
    study = module._read(Plan(**SMALL), folder, data.load("digits", split="test"))
    assert study.noise.keys() == study.summary.keys()
    assert all(images.shape == (10, 1, 8, 8) and images.std() > 0 for images in study.noise.values())
    monkeypatch.setattr(figures, "invert", None)
    networks = {name: study.network(name) for name in ("standard", "fgsm")}
    figures.noise_grids(tmp_path / "noise.png", study.data, networks, made=study.noise)
    assert (tmp_path / "noise.png").stat().st_size > 1000


@pytest.mark.long
def test_colour_images_are_studied_and_drawn(tmp_path, monkeypatch):
    write_cifar(tmp_path / "cifar-10-batches-py", 60)
    monkeypatch.setitem(recipes._RECIPES, "cifar10", {**recipes._RECIPES["cifar10"], "model": "small-cnn"})  # quicker
    small = ["--methods", "gradient-penalty", "--seeds", 1, "--sweep", "none", "--no-two-by-two", "--samples", 8]
    result = study("--data", "cifar10", "--root", tmp_path, "--epochs", 1, "--out", tmp_path / "study", *small)
    assert result.exit_code == 0, result.output
    assert {path.stem for path in (tmp_path / "study" / "figures").iterdir()} == {
        "gradients", "inversions", "noise", "perturbations", "terms", "accuracy",
    }  # fmt: skip
    measures = json.loads((tmp_path / "study" / "study.json").read_text())["summary"]["gradient-penalty"]
    assert measures["gradient_norm"]["value"] > 0 and measures["total_variation_ratio"]["value"] > 0


def test_distillation_learns_from_a_teacher_of_its_own_temperature(tmp_path):
    entry = next(entry for entry in Plan("digits").entries() if entry.name == "distillation")
    pupil, teacher = configuration(Plan("digits"), entry, 2, tmp_path, (1, 8, 8)), teacher_recipe("digits", seed=2)
    assert pupil.options["temperature"] == teacher.options["temperature"] == 100.0
    assert pupil.lr == teacher.lr and teacher.method == "standard"


def test_shuffled_labels_are_the_same_labels_in_another_order(tmp_path):
    images = data.load("digits")
    first, again, other = (images.with_shuffled_labels(seed) for seed in (0, 0, 1))
    assert torch.equal(first.images, images.images)
    assert torch.equal(first.labels, again.labels) and not torch.equal(first.labels, other.labels)
    assert torch.equal(first.labels.bincount(), images.labels.bincount())
    assert 0.05 < float((first.labels == images.labels).float().mean()) < 0.15
    config = configuration(Plan("digits", epochs=2), Plan("digits").entries()[-2], 0, tmp_path, (1, 8, 8))
    result = train(config, tmp_path / "run")
    assert result.accuracies["last"]["clean_accuracy"] < 0.3


def test_a_trained_network_takes_the_place_of_a_method(tmp_path):
    plan = Plan("digits", given=(("pgd", "somewhere"), ("mine", "elsewhere")), sweep=(), two_by_two=False)
    entries = {entry.name: entry for entry in plan.entries()}
    assert list(entries) == [*PAPER, *OURS, "mine"]
    assert {name: entry.source for name, entry in entries.items() if entry.source} == dict(plan.given)
    assert not entries["pgd"].method


def test_sweep():
    assert command._sweep("none") == ()
    assert command._sweep("0.5, 2") == (0.5, 2.0)


def test_the_committed_text_has_the_committed_numbers():
    folder = Path(__file__).parents[1] / "docs" / "study"
    text, written = (folder / "README.md").read_text(), json.loads((folder / "study.json").read_text())
    found = {name: {m: v["value"] for m, v in measures.items()} for name, measures in written["summary"].items()}
    rows = {
        "labels shuffled, no penalty": "gradient-penalty x 0, labels shuffled",
        "labels shuffled, penalty: smoothness alone": "gradient-penalty, labels shuffled",
        "true labels, no penalty: orientation alone": "gradient-penalty x 0",
        "both": "gradient-penalty",
    }
    for label, name in rows.items():
        v = found[name]
        shares = [f"{100 * v[m]:.0f} %" for m in ("inversion_accuracy", "noise_inversion_accuracy")]
        lipschitz = v["local_lipschitz"]
        numbers = [f"{v['edge_concentration']:.2f}", f"{v['gradient_norm']:.3f}",
                   f"{lipschitz:.{0 if lipschitz > 10 else 1}f}"]  # fmt: skip
        assert f"| {' | '.join([label, *shares, *numbers])} |" in text
    inversions = {name: f"{100 * v['inversion_accuracy']:.0f}" for name, v in found.items()}
    table = text[text.index("| inversions named by the robust judge | trained with") : text.index("* Every method")]
    names = {"FGSM": "fgsm", "PGD": "pgd", "CURE": "cure", "LLR": "llr", "TRADES": "trades", "Fisher": "fisher",
             "L∞": "gradient-penalty-linf", "L1": "gradient-penalty", "L2": "gradient-penalty-l2",
             "Jacobian": "jacobian", "cross-Lipschitz": "cross-lipschitz", "label smoothing": "label-smoothing",
             "distillation": "distillation"}  # fmt: skip
    for label, name in names.items():
        assert re.search(rf"\b{label} {inversions[name]}\b", table), label
    assert f"smooth labels: control {inversions['gradient-penalty x 0']} %" in table
    assert f"without: control {inversions['standard']} %" in table
    for column, (inverted, edges, aligned) in zip(
        results.SMOOTHNESS, zip((0.38, -0.46, 0.30), (0.85, 0.35, 0.36), (0.57, -0.04, 0.29)), strict=True
    ):
        ranks = written["rank correlation with smoothness"][column]
        for name, rho in (("inversion_accuracy", inverted), ("edge_concentration", edges), ("alignment", aligned)):
            assert round(ranks[name], 2) == rho and f"{rho:.2f}".replace("-", "−") in text
    judges = [f"{100 * share:.1f} %" for share in written["judges"].values()]
    assert all(share in text for share in judges)


def test_any_model_and_images_can_be_measured_and_drawn(tmp_path):
    torch.manual_seed(0)
    model, robust, standard = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)) for _ in range(3))
    own = data.Dataset("mine", torch.rand(30, 3, 8, 8), torch.arange(30) % 2, ("cat", "dog"))
    values = measure(model, own, Judges(robust=robust, standard=standard), Protocol(eps=8 / 255, noise_steps=3))
    assert summarise(values).keys() == MEASURES.keys()
    figures.inversion_grids(tmp_path / "inversions.png", own, {"mine": model})
    assert (tmp_path / "inversions.png").stat().st_size > 1000
