"""Every attack in every ball: optimal on linear models, always inside the ball, the same for any batch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robustkern import models, ops
from robustkern.attacks import APGD, FGSM, NFGSM, PGD
from robustkern.testing import assert_as_accurate_as_reference

NORMS = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}


def linear(seed=0, size=12, classes=2):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, classes)).double()
    model[1].weight.data = torch.randn(classes, size, generator=generator, dtype=torch.float64)
    return model


def distance(adversary, x, norm):
    return torch.linalg.vector_norm((adversary.double() - x.double()).flatten(1), ord=NORMS[norm], dim=1)


# ------------------------------------------------------------------ closed forms


def optimum(weight, x, eps, norm):
    """argmax <weight, x'> in ball and box, for x so far inside the box that only the ball counts (linf and l1: any)."""
    if norm == "linf":
        return (x + eps * weight.sign()).clamp(0, 1)
    if norm == "l2":
        return x + eps * weight / weight.norm(dim=1, keepdim=True)
    best, left = x.clone(), torch.full([len(x)], eps, dtype=x.dtype)
    for k in weight.abs().argsort(1, descending=True).unbind(1):  # the best coordinates first, each up to the box
        rows = torch.arange(len(x))
        room = torch.where(weight[rows, k] > 0, 1 - x[rows, k], x[rows, k])
        step = torch.minimum(room, left)
        best[rows, k] += step * weight[rows, k].sign()
        left -= step
    return best


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_optimal_on_a_linear_model(norm, eps):
    model = linear()
    x = 0.5 + 0.2 * torch.rand(6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.1
    y = torch.tensor([0, 1] * 3)
    direction = (model[1].weight[1] - model[1].weight[0]).detach() * torch.where(y == 0, 1.0, -1.0)[:, None]
    expected = optimum(direction, x, eps, norm)
    anywhere = norm != "l2"  # on a sphere, steps of constant length only approach the optimum
    attacks = [PGD(eps, norm=norm, steps=40, random_start=anywhere), FGSM(eps, norm=norm, random_start=False)]
    attacks += [APGD(eps, norm=norm, steps=40, random_start=anywhere)] if norm != "l1" else []
    for attack in attacks:
        torch.testing.assert_close(attack(model, x, y), expected)


def test_l1_goes_around_the_walls_of_the_box():
    model, eps = linear(), 2.0
    x = torch.rand(6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.tensor([0, 1] * 3)
    direction = (model[1].weight[1] - model[1].weight[0]).detach() * torch.where(y == 0, 1.0, -1.0)[:, None]
    adversary = PGD(eps, norm="l1", steps=400, step_size=0.1, random_start=False)(model, x, y)
    gain = ((adversary - x) * direction).sum(1)
    best = ((optimum(direction, x, eps, "l1") - x) * direction).sum(1)
    assert (gain > 0.99 * best).all()


@pytest.mark.parametrize("kind", ["cw", "dlr"])
def test_margin_losses_by_hand(kind):
    z = torch.tensor([[1.0, 4.0, 2.0, 0.0], [5.0, 1.0, 3.0, 2.0]])
    y, o = torch.tensor([2, 0]), torch.tensor([3, 2])
    value = ops.margin_loss(z, y, kind=kind)
    towards = ops.margin_loss(z, y, kind=kind, towards=o)
    if kind == "cw":
        assert value.tolist() == [2.0, -2.0]
        assert towards.tolist() == [-2.0, -2.0]
    else:
        torch.testing.assert_close(value, torch.tensor([2.0 / 3.0, -2.0 / 3.0]))
        torch.testing.assert_close(towards, torch.tensor([-2.0 / 3.5, -2.0 / 3.5]))


def test_dlr_of_equal_logits_is_zero():
    z = torch.ones(2, 5, requires_grad=True)
    loss = ops.margin_loss(z, torch.tensor([0, 4]), kind="dlr")
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert not loss.any()
    assert not grad.any()


# ------------------------------------------------------------------ invariants


@settings(deadline=None, max_examples=60)
@given(
    norm=st.sampled_from(list(NORMS)),
    eps=st.sampled_from([0.0, 1e-3, 8 / 255, 0.5, 3.0, 100.0]),
    step=st.sampled_from([0.0, 1e-4, 2 / 255, 1.0, 50.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    shape=st.sampled_from([(3, 2, 5, 4), (2, 1), (4, 37), (1, 3, 9, 1)]),
    seed=st.integers(0, 2**31),
    power=st.sampled_from([0, -30, -3, 4]),
    coordinates=st.sampled_from([1, 3, 100]),
)
def test_always_in_the_ball_and_the_box(norm, eps, step, dtype, shape, seed, power, coordinates):
    generator = torch.Generator().manual_seed(seed)
    x = (1.4 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.2).clamp(0, 1).to(dtype)
    seeds = torch.tensor([seed])
    adversary = ops.attack_start(x, eps=eps, norm=norm, seed=seeds)
    for _ in range(4):
        assert adversary.dtype == dtype
        assert adversary.min() >= 0
        assert adversary.max() <= 1
        rounding = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        # linf: half a unit in the last place of a number up to 1; else the rounding of N terms and their norm.
        slack = rounding if norm == "linf" else rounding * (x[0].numel() + 4 * eps + 4)
        assert (distance(adversary, x, norm) <= eps + slack).all()
        grad = torch.randn(shape, generator=generator, dtype=torch.float64).mul(10.0**power).to(dtype)
        ops.attack_step(adversary, x, grad, eps=eps, step_size=step, norm=norm, coordinates=coordinates)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_pixels_are_never_rounded_out_of_the_ball(dtype):
    x = torch.linspace(0, 1, 4097).to(dtype)[None]
    for eps in (8 / 255, 2 / 255, 1e-3):
        for grad in (torch.ones_like(x), -torch.ones_like(x)):
            adversary = ops.attack_step(x.clone(), x, grad, eps=eps, step_size=2 * eps)
            assert ((adversary.double() - x.double()).abs() <= torch.tensor(eps).double()).all()


@pytest.mark.parametrize("norm", NORMS)
def test_bad_gradients_move_nothing_else(norm):
    x = torch.full((5, 8), 0.5)
    grad = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    good = ops.attack_step(x.clone(), x, grad, eps=0.3, step_size=0.1, norm=norm)
    grad[1, 3], grad[2, 4], grad[3] = torch.nan, torch.inf, 0.0
    adversary = ops.attack_step(x.clone(), x, grad, eps=0.3, step_size=0.1, norm=norm)
    assert adversary.isfinite().all()
    assert torch.equal(adversary[[0, 4]], good[[0, 4]])
    assert adversary[1, 3] == 0.5
    assert torch.equal(adversary[3], x[3])


@pytest.mark.parametrize("power", [-40, -30, 30])
def test_a_step_has_its_length_whatever_the_gradient(power):
    x = torch.full((4, 50), 0.5)
    grad = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = ops.attack_step(x.clone(), x, (grad * 10.0**power).float(), eps=1.0, step_size=0.1, norm="l2")
    if power == -40:  # subnormal numbers have few digits
        assert ((distance(moved, x, "l2") - 0.1).abs() < 1e-3).all()
    else:
        expected = ops.attack_step(x.double(), x.double(), grad, eps=1.0, step_size=0.1, norm="l2", impl="reference")
        eager = ops.attack_step(x.clone(), x, grad.float(), eps=1.0, step_size=0.1, norm="l2", impl="reference")
        assert_as_accurate_as_reference(moved, eager, expected)


def test_eps_of_each_channel_and_pixel():
    x = torch.full((2, 3, 4, 4), 0.5)
    eps = torch.tensor([0.1, 0.0, 0.3]).view(3, 1, 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        images = x.contiguous(memory_format=layout)
        adversary = ops.attack_step(images.clone(), images, torch.ones_like(images), eps=eps, step_size=1.0)
        torch.testing.assert_close(adversary, (x + eps).contiguous(memory_format=layout))
        start = ops.attack_start(images, eps=eps)
        assert ((start - x).abs() <= eps + 1e-6).all()
        assert start.is_contiguous(memory_format=layout)
    pixels = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    adversary = ops.attack_step(x.clone(), x, torch.ones_like(x), eps=pixels, step_size=1.0)
    torch.testing.assert_close(adversary, (x + pixels).clamp(max=1))


# ------------------------------------------------------------------ random starts


@pytest.mark.parametrize("norm", NORMS)
def test_starts_are_uniform_in_the_ball(norm):
    """For a uniform point u in N dimensions, (||u|| / eps)^N is uniform in (0, 1), and its sign is symmetric."""
    x = torch.full((4000, 5), 0.5)
    u = ops.attack_start(x, eps=0.25, norm=norm, seed=torch.tensor([11])) - x
    share = (distance(u, torch.zeros_like(u), norm) / 0.25) ** 5
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        spread = (quantile * (1 - quantile) / 4000) ** 0.5
        assert abs(float((share < quantile).double().mean()) - quantile) < 4 * spread
    for column in u.unbind(1):
        assert abs(float(column.mean())) < 4 * float(column.std()) / 4000**0.5
        assert abs(float((column > 0).double().mean()) - 0.5) < 4 * 0.5 / 4000**0.5
    assert (torch.corrcoef(u.t()) - torch.eye(5)).abs().max() < 5 / 4000**0.5


@pytest.mark.parametrize("norm", NORMS)
def test_a_start_depends_on_seed_sample_and_restart_only(norm):
    x = torch.rand(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    seed, numbers = torch.tensor([5]), torch.tensor([4, 0, 9, 2**33, 1, 7])
    whole = ops.attack_start(x, eps=0.1, norm=norm, seed=seed, samples=numbers)
    order = torch.tensor([3, 1, 5])
    assert torch.equal(ops.attack_start(x[order], eps=0.1, norm=norm, seed=seed, samples=numbers[order]), whole[order])
    images = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.attack_start(images, eps=0.1, norm=norm, seed=seed, samples=numbers), whole)
    for options in ({"seed": torch.tensor([6])}, {"seed": seed, "restart": 1}):
        other = ops.attack_start(x, eps=0.1, norm=norm, samples=numbers, **options)
        assert ((other - x) != (whole - x)).float().mean() > 0.9
    offsets = (whole - x).flatten(1)
    assert all(not torch.equal(offsets[i], offsets[j]) for i in range(6) for j in range(i))


# ------------------------------------------------------------------ whole attacks


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = models.create("small-cnn", 4, (1, 8, 8)).eval()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(24, 1, 8, 8, generator=generator), torch.randint(4, (24,), generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


ATTACKS = [
    PGD(0.02, steps=5),
    PGD(0.02, steps=5, loss="cw", restarts=2),
    PGD(0.1, steps=5, norm="l2", loss="dlr", early_exit=True),
    PGD(1.0, steps=5, norm="l1", coordinates=5),
    PGD(0.02, steps=5, targeted=True),
    FGSM(0.02),
    FGSM(0.1, norm="l2", loss="cw"),
    FGSM(0.02, random_start=False, loss="dlr"),
    NFGSM(0.02),
    APGD(0.02, steps=10, restarts=2),
    APGD(0.1, steps=10, norm="l2", loss="dlr"),
    APGD(0.02, steps=10, loss="dlr-targeted", restarts=3),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_attack_stays_inside_and_finds_higher_losses(attack, layout, trained):
    model, x, y = trained
    x = x.expand(-1, 1, 8, 8).contiguous(memory_format=layout)
    adversary = attack(model, x, y, torch.Generator().manual_seed(1))
    again = attack(model, x, y, torch.Generator().manual_seed(1))
    assert torch.equal(adversary, again)
    assert adversary.min() >= 0
    assert adversary.max() <= 1
    assert not adversary.requires_grad
    norm = getattr(attack, "norm", "linf")
    eps = 3 * attack.eps if isinstance(attack, NFGSM) else attack.eps
    assert (distance(adversary, x, norm) <= eps + 1e-5).all()
    with torch.no_grad():
        before, after = (F.cross_entropy(model(v), y) for v in (x, adversary))
    assert after < before if getattr(attack, "targeted", False) else after > before


@pytest.mark.parametrize("options", [{}, {"restarts": 3}, {"norm": "l2", "eps": 0.06}, {"loss": "dlr"}], ids=str)
@pytest.mark.parametrize("targeted", [False, True])
def test_early_exit_fools_the_same_samples(options, targeted, trained):
    model, x, y = trained
    y = (y + 1) % 4 if targeted else y
    options = {"eps": 0.02 if targeted else 0.005, "steps": 6, "targeted": targeted, **options}
    fooled = []
    for early_exit in (False, True):
        adversary = PGD(**options, early_exit=early_exit)(model, x, y, torch.Generator().manual_seed(2))
        with torch.no_grad():
            hit = model(adversary).argmax(1) == y
        fooled.append(hit if targeted else ~hit)
    assert torch.equal(*fooled)
    assert fooled[0].any()
    assert not fooled[0].all()


def test_early_exit_saves_passes(trained):
    model, x, y = trained
    seen = []
    handle = model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    PGD(1.0, steps=10, early_exit=True)(model, x, y, torch.Generator().manual_seed(0))
    handle.remove()
    assert sum(seen) < 10 * len(x)
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("attack", [PGD(0.02, steps=3), FGSM(0.02), NFGSM(0.02), APGD(0.02, steps=5)], ids=repr)
def test_a_sample_is_attacked_alike_in_any_batch(attack, trained):
    """In float64, where the order of additions in a matrix product cannot flip a sign."""
    model, x, y = trained
    model, x = models.create("small-cnn", 4, (1, 8, 8)).double().eval(), x.double()
    numbers = torch.arange(24) * 3
    whole = attack(model, x, y, torch.Generator().manual_seed(3), indices=numbers)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:7]
    part = attack(model, x[order], y[order], torch.Generator().manual_seed(3), indices=numbers[order])
    torch.testing.assert_close(part, whole[order])


def test_apgd_halves_its_steps_and_beats_pgd(trained):
    model, x, y = trained

    def robust(attack):
        with torch.no_grad():
            return int((model(attack(model, x, y, torch.Generator().manual_seed(0))).argmax(1) == y).sum())

    strong = robust(APGD(0.02, steps=50))
    assert strong <= robust(PGD(0.02, steps=50))
    assert robust(APGD(0.02, steps=50, loss="dlr-targeted", restarts=3)) <= strong + 1


@pytest.mark.parametrize("attack", [PGD(0.1, steps=2), FGSM(0.1), NFGSM(0.1), APGD(0.1, steps=2)], ids=repr)
def test_empty_batch(attack, trained):
    model, x, y = trained
    assert attack(model, x[:0], y[:0]).shape == (0, 1, 8, 8)
