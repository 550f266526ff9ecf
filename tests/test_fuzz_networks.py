"""The fuzzer of networks: fixed seeds pass, and planted faults are found."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

import robustkern as rk
from tests import fuzz_networks
from tests.fuzz_networks import check, shrink
from tests.random_networks import FEATURES, HOWS, LAYERS, LAYOUTS, Case, make_case

SEEDS = range(300)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Each case calls install() itself.  PyTorch's warnings of slow paths are ignored; one thread is fastest."""
    rk.uninstall()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)
    assert not rk.is_installed()


@pytest.mark.parametrize("seed", SEEDS)
def test_network(seed, not_emulated):
    case, _ = make_case(seed)
    _, wrong = check(case)
    assert wrong is None, f"{wrong}\n{case}"


# One of each kind of fault that random seeds have found, as small as it still failed.
FOUND = [
    Case(
        dtype="float32",
        shape=(1, 6, 3, 3, 2),
        layout="channels_last",
        layers=("nn.GroupNorm(3, 6)", "nn.InstanceNorm3d(6, track_running_stats=True).eval()", "F.softsign(x)"),
        loss="y.sum()",
        features={"switch": "101"},
        seed=1,
    ),
    Case(
        seed=4,
        shape=(2, 4, 3, 3, 2),
        layout="channels_last",
        layers=("nn.GroupNorm(4, 4, affine=False)",),
        loss="F.cross_entropy(y, labels(y), reduction='none').square().sum()",
        order=3,
    ),
    Case(
        seed=4005948,
        dtype="float32",
        shape=(3, 4, 4),
        layers=(
            "nn.TransformerEncoderLayer(4, 4, 3, dropout=0, activation='gelu', batch_first=True, norm_first=True)",
        ),
        loss="y.sum()",
        order=3,
        features={"batched": ("vmap", 1)},
    ),
    Case(
        seed=2019358,
        shape=(1, 6, 5, 3),
        layers=("Fn('F.group_norm(x, 2, w, b)', w=(6,), b=None)",),
        loss="y.sum()",
        features={"checkpoint": (0, 3, False), "frozen": ("x", "*.weight"), "write": ("first", "?.*")},
    ),
    Case(
        seed=4005441,
        shape=(3, 3, 3),
        layers=("nn.RMSNorm((3, 3), eps=1e-5, elementwise_affine=True)", "Fn('x * w', w=(3, 3))"),
        loss="y.sum()",
        order=3,
        features={"nonfinite": ("x", "inf"), "only": "*.weight"},
    ),
    Case(layers=("x.sigmoid()", "F.silu(x, inplace=True)"), order=1, features={"checkpoint": (0, 2, False)}),
    Case(
        layers=("nn.Linear(4, 4)", "F.silu(x, inplace=True)", "nn.Linear(4, 4)"),
        features={"checkpoint": (1, 2, False), "nonleaf": "x * 1.0", "saved_tensors_hooks": ("identity", "all")},
    ),
    Case(layers=("nn.RMSNorm(4)",), order=1, features={"checkpoint": (0, 1, False), "switch": "101"}),
    Case(layers=("nn.GroupNorm(2, 4)",), order=1, features={"checkpoint": (0, 1, False), "switch": "s0"}),
    Case(layers=("nn.BatchNorm1d(4)",), order=1, features={"write": ("between", "*.bias"), "twice": True}),
    Case(layers=("nn.BatchNorm1d(4)",), features={"write": ("first", "*.bias")}),
    Case(layers=("nn.GroupNorm(2, 4)",), order=1, features={"inference": "*.bias"}),
    Case(layers=("nn.LayerNorm(4)",), features={"subclass": True}),
    Case(layers=("nn.RMSNorm(4)",), order=1, features={"subclass": True}),
    Case(shape=(1, 1, 4), layers=("Attention(4, 1, 1, 1, None, True)", "Stop.apply(x)"), loss="y.sum()"),
    Case(shape=(2, 4, 3, 3), layout="channels_last", layers=("nn.GroupNorm(2, 4)",), features={"batched": ("vmap", 2)}),
    Case(shape=(2, 4, 3), layers=("nn.BatchNorm1d(4)",), loss="y.sum()", how="functional.hessian", order=3),
    Case(
        shape=(3, 1, 5, 3),
        layers=("nn.RMSNorm((3,))", "Fn('x * w', w=(1, 5, 3))"),
        loss="y.sum()",
        features={"frozen": ("x",), "nonfinite": ("0.*", "inf")},
    ),
    Case(
        shape=(2, 4, 3, 3),
        layers=("nn.BatchNorm2d(4)",),
        loss="F.cross_entropy(y, labels(y), reduction='none').square().sum()",
        order=3,
    ),
]


@pytest.mark.parametrize("case", FOUND, ids=repr)
def test_what_was_found(case):
    basis, wrong = check(case)
    assert wrong is None and basis.startswith(
        ("stock", "composites")
    )  # later versions of PyTorch refuse third orders that they get wrong


def test_the_seeds_reach_everything():
    """Every kind of layer, layout, feature and way to differentiate is in some case; most are compared with PyTorch."""
    chosen = set().union(*(make_case(seed)[1] for seed in range(1000)))
    assert chosen >= {*LAYERS, *LAYOUTS, *FEATURES, *HOWS, "float64", "float32", "bfloat16", "float16"}


def test_a_seed_is_one_case():
    for seed in range(20):
        case, _ = make_case(seed)
        assert make_case(seed)[0] == case
        assert eval(repr(case), vars(fuzz_networks)) == case


PLANTED = Case(layers=("2 * x", "F.gelu(x)", "x.flip(0)"), features={"retain": True, "mixed": True})


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda name, t: t * (1 + 1e-6), "differs by"),
        (lambda name, t: None if name == "order 2 x" else t, "order 2 x differs by"),
        (lambda name, t: t + float("inf"), "is not finite in 8 of 8 places"),
        (lambda name, t: t.float(), "is torch.float32, stock's torch.float64"),
        (lambda name, t: t[0], "has shape"),
    ],
)
def test_what_is_planted_is_found(spoil, says, monkeypatch):
    run = fuzz_networks.Run.__call__

    def spoilt(self: fuzz_networks.Run) -> fuzz_networks.Results:
        gelu = any("gelu" in text for text in self.case.layers)
        results = run(self)
        return {n: spoil(n, t) if n == "order 2 x" and gelu and self.switch.mode else t for n, t in results.items()}

    monkeypatch.setattr(fuzz_networks.Run, "__call__", spoilt)
    _, wrong = check(PLANTED)
    assert wrong is not None and says in wrong
    small, _ = shrink(PLANTED)
    assert small == Case(layers=("F.gelu(x)",), loss="y.sum()")


def test_raising_is_found():
    error = mock.Mock(side_effect=RuntimeError("no kernel"))
    with mock.patch.object(rk, "install", error):
        assert check(PLANTED)[1] == "default: raises where stock works: RuntimeError: no kernel"


def test_command_line(capsys):
    assert fuzz_networks.main(["--seeds", "0:3", "--order", "2", "--dtype", "float64"]) == 0
    assert "3 seeds in" in capsys.readouterr().out
    assert fuzz_networks.main(["--case", repr(PLANTED)]) == 0
    assert capsys.readouterr().out == "agrees (stock)\n"
