"""The YAML that describes a run: read, written, overridden, refused."""

import dataclasses

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("yaml")

from typer.testing import CliRunner

from robustkern import training
from robustkern.cli import train as cli_train
from robustkern.cli.app import app
from robustkern.cli.train import train_command
from robustkern.training import TrainingConfig, UsageError, recipe, train

pytestmark = pytest.mark.usefixtures("no_figures")


def test_a_run_directory_reproduces_itself(tmp_path):
    first = [
        "train", "--method", "fisher", "--epochs", "1", "--train-samples", "96", "--batch-size", "32", "--eval-samples",
        "20", "--pgd-steps", "2", "--threads", "1", "--eps", "32/255", "--ema", "0.9", "--validation", "0.2",
        "--set", "projections=2", "--schedule", "triangular", "--seed", "7", "--out", tmp_path / "a",
    ]  # fmt: skip
    again = ["train", "--config", tmp_path / "a" / "config.yaml", "--out", tmp_path / "b"]
    outputs = [CliRunner().invoke(app, list(map(str, arguments))) for arguments in (first, again)]
    assert [output.exit_code for output in outputs] == [0, 0], outputs[0].output + outputs[1].output
    for name in ("model", "ema", "best"):
        a, b = ((tmp_path / run / f"{name}.safetensors").read_bytes() for run in "ab")
        assert a == b
    assert (tmp_path / "a" / "config.yaml").read_text() == (tmp_path / "b" / "config.yaml").read_text()
    assert (tmp_path / "a" / "results.json").read_text() == (tmp_path / "b" / "results.json").read_text()
    assert "best weights (epoch 1): test accuracy" in outputs[0].stdout


def test_options_override_the_file_and_the_recipe_completes_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("method: jacobian\neps: 32/255\nepochs: 1\ntrain_samples: 64\neval_samples: 10\npgd_steps: 1\n"
                    "weight_decay: 1e-4\noptions: {weight: 2, projections: 3}\n")  # fmt: skip
    arguments = ["train", "--config", file, "--weight", "0.5", "--epochs", "2", "--out", tmp_path / "run"]
    output = CliRunner().invoke(app, list(map(str, arguments)))
    assert output.exit_code == 0, output.output
    config = training.read_config(tmp_path / "run")
    assert (config.data, config.method, config.eps, config.epochs) == ("digits", "jacobian", 32 / 255, 2)
    assert config.weight_decay == 1e-4 and config.lr == recipe("digits").lr
    assert config.options["weight"] == 0.5 and config.options["projections"] == 3


@pytest.mark.parametrize(
    "text, message",
    [("epoch: 3", "unknown setting epoch"), (None, "No such file"), ("a: [", "not YAML"), (b"\xff\xfe", "codec")],
)
def test_bad_files_are_one_line(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    output = CliRunner().invoke(app, ["train", "--config", str(file), "--out", str(tmp_path / "run")])
    assert output.exit_code == 2 and output.stderr.count("\n") == 1
    assert message in output.stderr and str(file) in output.stderr and not (tmp_path / "run").exists()


def test_runs_of_earlier_versions_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="a run of an earlier version"):
        train(recipe("digits"), tmp_path)


def test_every_setting_is_an_option_of_the_command_line_and_says_what_it_is():
    import inspect

    options = inspect.signature(train_command).parameters
    for field in dataclasses.fields(TrainingConfig):
        if field.name != "options":
            assert options[field.name].annotation.__metadata__[0].help, field.name


def test_every_option_arrives_at_its_setting(tmp_path, monkeypatch):
    """Each option gets a different value."""
    given = {
        "data": "digits-28", "method": "fgsm", "model": "preact-resnet18", "eps": 0.0625, "epochs": 7, "batch_size": 33,
        "optimizer": "adamw", "lr": 0.125, "weight_decay": 0.25, "schedule": "step", "milestones": (2, 5),
        "gamma": 0.375, "ramp": 0.4375, "clip": 1.5, "ema": 0.625, "accumulate": 3, "channels_last": True,
        "betas": (0.75, 0.875), "decay_matrices_only": True, "layer_decay": 0.6875, "warm_up": 1, "least_lr": 0.0078125,
        "plain_epochs": 3, "recompute": True, "amp": True, "seed": 11, "impl": "reference",
        "device": "cpu", "threads": 2, "train_samples": 200, "shuffle_labels": True, "validation": 0.1875,
        "eval_samples": 50, "eval_every": 3, "pgd_steps": 13, "watch": "stop", "checkpoint_every": 17,
        "max_skipped": 19, "init": str(tmp_path / "weights.pt"), "smooth_activations": "silu", "data_mean": (0.25,),
        "data_std": (0.5,), "model_options": {"widths": [8, 16], "stem": 4}, "image_size": 48,
        "crop_scale": 0.5, "flip": 0.25, "eval_crop": 0.75, "extra": str(tmp_path), "extra_share": 0.375,
        "randaugment": 2, "magnitude": 7.5, "colour": 0.125, "erasing": 0.3125, "mixup": 0.8, "cutmix": 1.5,
    }  # fmt: skip
    seen = []
    monkeypatch.setattr(cli_train, "train", lambda config, *args, **kwargs: seen.append(config))
    monkeypatch.setattr(cli_train, "_print_result", lambda *args: None)
    words = ["train", "--out", str(tmp_path / "run")]
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if isinstance(value, dict):
            words += [word for key, entry in value.items() for word in ("--model-set", f"{key}={entry}")]
            continue
        words += [flag] if value is True else [flag, text]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    settings = {name for name in vars(seen[0]) if name not in ("options", "sync_batch_norm")}  # it needs GPUs
    assert given == {name: getattr(seen[0], name) for name in settings}
