"""Runs that test_distributed.py compares with one process; torchrun starts this file."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from robustkern import data as datasets
from robustkern import losses, models
from robustkern.attacks import PGD
from robustkern.terms import Terms
from robustkern.training import METHODS, TrainingConfig, build_loss, recipe, train
from robustkern.training import trainer as trainer_module
from robustkern.training.distributed import settle_imports
from robustkern.training.run_folder import RunFolder


def adversarial(model, x, y, draw, *, eps):
    """Cross-entropy at an adversary from a random start, and at a noisy copy: every sample draws its own numbers."""
    adversary = PGD(eps, steps=2)(model, x, y, draw.generator, indices=draw.samples(x))
    terms = losses.CrossEntropy()(model, x + 0.1 * draw.normal(x), y)
    return Terms(terms.orientation, losses.CrossEntropy()(model, adversary, y).orientation - terms.orientation, 1.0)


def build(name, options, *, eps, impl):
    if name == "distillation":  # from a network that is the same in every process, without a run of its own
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return losses.Distillation(models.create("small-cnn", 10, (1, 8, 8)), options["temperature"], impl=impl)
    if options.get("label_smoothing") == 0.125:
        return partial(adversarial, eps=eps)
    return build_loss(name, options, eps=eps, impl=impl)


# An odd batch, so that the parts differ; the last sample, alone in a batch, joins the batch before.
SETTINGS = {"epochs": 2, "batch_size": 33, "train_samples": 67, "eval_samples": 30, "pgd_steps": 2, "threads": 1,
            "lr": 0.02, "ramp": 0.5}  # fmt: skip


def small(method="standard", **given) -> TrainingConfig:
    return recipe("digits", method, **{**SETTINGS, **given})


def quick(method) -> TrainingConfig:
    return small(method, options={"steps": 2} if "steps" in METHODS[method].options else {})


CASES = {
    **{method: quick(method) for method in METHODS if method != "distillation"},
    "distillation": small("distillation", options={"teacher": "untrained", "temperature": 2.0}),
    "weights perturbed": small("trades", options={"steps": 2, "awp": 0.01}),
    "attack and noise": small(options={"label_smoothing": 0.125}),
    "few projections": small("jacobian", options={"projections": 3, "law": "sphere", "every": 2}),
    "lazy": small("llr", options={"every": 2, "awp": 0.01}),
    "a fraction": small("fisher", options={"projections": 2, "fraction": 0.1}),
    "exact": small("cross-lipschitz", options={"projections": 0, "fraction": 0.5}),
    "no row for one": small("trades", options={"steps": 2, "awp": 0.01}, batch_size=1, train_samples=5),
    "no row, a fraction": small("fisher", options={"projections": 2, "fraction": 0.1}, batch_size=1, train_samples=5),
    "in parts": small("fisher", options={"projections": 2, "fraction": 0.5}, accumulate=5),
    "everything else": small(
        optimizer="adamw", lr=3e-3, weight_decay=0.1, ema=0.9, validation=9, clip=0.1, schedule="triangular", epochs=3
    ),
}


# The same in float32, as users run it.
CASES["pgd in float32"], CASES["lazy in float32"] = CASES["pgd"], CASES["lazy"]
FLOAT32 = {"pgd in float32", "lazy in float32"}

# Divided by FSDP2; tests/test_wrap.py has every method.
SHARDED = {f"{case}, sharded": case for case in ("gradient-penalty", "pgd", "weights perturbed", "everything else")}
CASES.update({name: CASES[case] for name, case in SHARDED.items()})

# Cases that take no sign of a gradient. The others depend on the signs of gradients that are nearly zero, which
# another division of the batch may flip in float32: they are compared in float64.
SMOOTH = {"standard", "label-smoothing", "distillation", "gradient-penalty", "jacobian", "fisher", "cross-lipschitz",
          "few projections", "a fraction", "no row, a fraction", "exact", "everything else", "in parts",
          "gradient-penalty, sharded", "everything else, sharded"}  # fmt: skip


@contextmanager
def precision_of(case: str) -> Iterator[None]:
    """Makes networks float64 if the case needs it."""
    create = models.create

    def create_double(*args, **kwargs):
        model = create(*args, **kwargs).double()
        model.register_forward_pre_hook(lambda module, inputs: tuple(x.double() for x in inputs))
        return model

    models.create = create if case in SMOOTH | FLOAT32 else create_double
    try:
        yield
    finally:
        models.create = create


def prepare() -> None:
    """Prepares every process that is compared: crops as for photographs, no figures."""
    trainer_module.build_loss = build
    trainer_module.check_options = lambda *args: None  # that teacher is no file
    datasets.augmentation = lambda name: datasets.CropFlip(1, flip=False)
    RunFolder.draw = lambda *_: None


def run_all(out: Path, names: list[str]) -> None:
    torch.distributed.init_process_group("gloo")
    for name in names:
        with precision_of(name):
            result = train(CASES[name], out / name, shard=name in SHARDED)
        flat = torch.cat([value.double().flatten() for value in result.model.state_dict().values()])
        both = [torch.empty_like(flat) for _ in range(2)]
        torch.distributed.all_gather(both, flat)
        assert torch.equal(*both), f"{name}: the processes ended with different weights"
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    prepare()
    settle_imports()
    run_all(Path(sys.argv[1]), [name for name in CASES if name not in SHARDED])
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads  # one that outlives the group may abort the exit
    run_all(Path(sys.argv[1]), list(SHARDED))  # DTensor's caches keep the group and its threads
