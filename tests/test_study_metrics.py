"""The study's measures against closed forms."""

import math

import pytest
import torch
from torch import nn

from robustkern.evaluation import wilson_interval
from robustkern.study import results
from robustkern.study.bootstrap import bootstrap_interval
from robustkern.study.gradients import (
    alignment,
    edge_concentration,
    input_gradients,
    low_frequency_share,
    total_variation_ratio,
    white_noise_baseline,
)
from robustkern.study.inversion import inversion_accuracy, invert, noise, seeded_grid
from robustkern.study.measures import MEASURES, summarise


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 3)).double()


@pytest.fixture
def images():
    return torch.rand(6, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


Y = torch.tensor([0, 1, 2, 0, 1, 2])


def test_input_gradients_of_a_linear_classifier(linear, images):
    weight = linear[1].weight.detach()
    p = linear(images).softmax(1).detach()
    expected = {
        "logit": weight[Y],
        "loss": (p - nn.functional.one_hot(Y, 3)) @ weight,
        "margin": weight[Y] - weight[linear(images).scatter(1, Y[:, None], -torch.inf).argmax(1)],
    }
    for of, value in expected.items():
        found = input_gradients(linear, images, Y, of, batch_size=4)
        torch.testing.assert_close(found, value.view_as(images))
    assert all(parameter.grad is None for parameter in linear.parameters())
    with pytest.raises(ValueError, match="of must be one of 'logit', 'loss', 'margin', got 'logits'"):
        input_gradients(linear, images, Y, "logits")


def test_alignment(images):
    torch.testing.assert_close(alignment(-3 * images, images), torch.ones(6, dtype=torch.float64))
    length = images.flatten(1).norm(dim=1)
    torch.testing.assert_close(alignment(images, images, cosine=False), length)
    other = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    across = other - images * ((other * images).flatten(1).sum(1) / length**2).view(-1, 1, 1, 1)
    assert float(alignment(across, images).max()) < 1e-12
    assert float(alignment(torch.zeros_like(images), images).max()) == 0.0
    # A gradient that brightens everything follows every image, until the mean is taken out.
    bright = torch.ones_like(images)
    assert float(alignment(bright, images).min()) > 0.7
    assert float(alignment(bright + 1e-9 * other, images, centred=True).max()) < 0.5
    pairs = zip(other, images, strict=True)
    correlation = [abs(float(torch.corrcoef(torch.stack([g.flatten(), i.flatten()]))[0, 1])) for g, i in pairs]
    assert alignment(other, images, centred=True).tolist() == pytest.approx(correlation)


def waves(cycles, size=16):
    place = torch.arange(size, dtype=torch.float64)
    wave = torch.cos(2 * math.pi * cycles * place / size)
    return (wave[:, None] * torch.ones(size)).expand(1, 1, size, size)


@pytest.mark.parametrize(("cycles", "share"), [(1, 1.0), (4, 1.0), (5, 0.0), (8, 0.0)])
def test_one_frequency_is_low_or_high(cycles, share):
    assert float(low_frequency_share(waves(cycles) + 7.0, 0.25)) == pytest.approx(share, abs=1e-12)


def test_energy_adds():
    both = 3 * waves(2) + 4 * waves(7)
    assert float(low_frequency_share(both)) == pytest.approx(9 / 25)
    assert float(low_frequency_share(torch.ones(1, 1, 8, 8))) == 0.0
    with pytest.raises(ValueError, match="radius must be in"):
        low_frequency_share(both, 0.0)


def test_total_variation_of_a_chessboard_a_step_and_a_constant():
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(7), indexing="ij")
    board = (1.0 - 2.0 * ((rows + columns) % 2)).expand(1, 2, 6, 7)
    pairs = 5 * 7 + 6 * 6
    assert float(total_variation_ratio(5 * board)) == pytest.approx(2 * pairs / (2 * 42))
    step = (columns >= 3).float().expand(1, 1, 6, 7)
    assert float(total_variation_ratio(step)) == pytest.approx(6 / (2 * 6 * 4))
    assert total_variation_ratio(torch.stack([torch.ones(1, 6, 7), torch.zeros(1, 6, 7)])).tolist() == [0.0, 0.0]


def test_edges():
    x = torch.zeros(2, 1, 10, 10)
    x[:, :, :, 5:] = 1.0  # columns 4 and 5 are the edge: a fifth of the image
    on = torch.zeros(2, 1, 10, 10)
    on[:, :, :, 4:6] = torch.randn(2, 1, 10, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(edge_concentration(on, x, 0.2), torch.full((2,), 5.0))
    torch.testing.assert_close(edge_concentration(torch.ones_like(x), x, 0.2), torch.ones(2))
    torch.testing.assert_close(edge_concentration(torch.ones_like(x) * (on == 0), x, 0.2), torch.zeros(2))
    with pytest.raises(ValueError, match="share must be in"):
        edge_concentration(on, x, 1.0)


@pytest.mark.montecarlo
def test_white_noise_has_its_baseline():
    generator = torch.Generator().manual_seed(0)
    count, shape = 2000, (2, 12, 12)
    g = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    x = torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    found = {
        "low_frequency_share": low_frequency_share(g),
        "total_variation_ratio": total_variation_ratio(g),
        "edge_concentration": edge_concentration(g, x),
        "alignment": alignment(g, x, centred=True),
    }
    for name, expected in white_noise_baseline(shape).items():
        values = found[name]
        z = (float(values.mean()) - expected) / (float(values.std()) / count**0.5)
        # Ratios of sums and the finite number of pixels shift the means by O(1/pixels): one per cent at most here.
        assert abs(z) < 4 or abs(float(values.mean()) / expected - 1) < 0.01, (name, z)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_inversion_of_a_linear_classifier_walks_straight(norm, linear, images):
    two = nn.Sequential(nn.Flatten(), nn.Linear(60, 2)).double()
    weight = two[1].weight.detach()
    target = torch.tensor([0, 1, 0, 1, 0, 1])
    way = (weight[target] - weight[1 - target]).view_as(images)
    direction = way.sign() if norm == "linf" else way / way.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    expected = images.clone()
    for _ in range(5):
        expected = (expected + 0.07 * direction).clamp(0, 1)
    found = invert(two, images, target, steps=5, step_size=0.07, norm=norm, batch_size=4)
    assert float((found - expected).abs().max()) < 1e-9
    assert all(parameter.requires_grad and parameter.grad is None for parameter in two.parameters())


def test_inversion_takes_a_step_for_each_channel(images):
    torch.manual_seed(0)
    two = nn.Sequential(nn.Flatten(), nn.Linear(60, 2)).double()
    middle = torch.full_like(images, 0.5)
    step = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).view(3, 1, 1)
    found = invert(two, middle, Y % 2, steps=1, step_size=step)
    torch.testing.assert_close((found - middle).abs(), step.expand_as(middle))


def test_inversion_refuses(linear, images):
    with pytest.raises(ValueError, match="norm must be one of 'linf', 'l2', got 'l1'"):
        invert(linear, images, Y, norm="l1")
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        invert(linear, images, Y, steps=0)


def test_the_grid_has_every_image_with_every_target(images):
    starts, targets = seeded_grid(images[:2], 3)
    assert targets.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(starts, torch.stack([images[0]] * 3 + [images[1]] * 3))


def test_noise_is_reproducible_and_an_image():
    first = noise(5, (1, 4, 4), seed=3, spread=0.6)
    assert torch.equal(first, noise(5, (1, 4, 4), seed=3, spread=0.6))
    assert not torch.equal(first, noise(5, (1, 4, 4), seed=4, spread=0.6))
    assert float(first.min()) == 0.0 and float(first.max()) == 1.0


def test_inversion_accuracy(linear, images):
    named = linear(images).argmax(1)
    target = torch.where(torch.arange(6) < 2, (named + 1) % 3, named)
    assert inversion_accuracy(linear, images, target, batch_size=4).tolist() == [0, 0, 1, 1, 1, 1]


def test_bootstrap_interval_is_that_of_the_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap_interval(values)
    half = 1.96 * float(values.std()) / 20
    assert (low, high) == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=0.02)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(torch.full((7,), 0.5)) == (0.5, 0.5)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_resamples_images_not_numbers():
    """Ten seeds with the same value for every image are no more evidence than one."""
    values = torch.rand(60, generator=torch.Generator().manual_seed(0))
    assert bootstrap_interval(values[:, None].expand(60, 10)) == pytest.approx(bootstrap_interval(values))


@pytest.mark.parametrize("values", [torch.empty(0), torch.tensor([1.0, math.nan])])
def test_bootstrap_refuses(values):
    with pytest.raises(ValueError, match="values must be finite"):
        bootstrap_interval(values)
    with pytest.raises(ValueError, match="confidence must be in"):
        bootstrap_interval(torch.ones(3), confidence=1.0)


def test_bootstrap_of_the_median():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(101, 3, generator=generator).exp()
    low, high = bootstrap_interval(values, statistic="median")
    assert low <= float(values.median()) <= high and high - low < 0.6
    values[0] = 1e9  # this would move a mean
    assert bootstrap_interval(values, statistic="median")[1] == pytest.approx(high, rel=0.1)
    with pytest.raises(ValueError, match="statistic must be 'mean' or 'median', got 'mode'"):
        bootstrap_interval(values, statistic="mode")


def test_summaries_resample_images_with_all_that_was_made_of_them():
    yes = (torch.arange(40) % 2 == 0).float()
    together = summarise({"inversion_accuracy": yes[:, None, None].expand(40, 3, 9)})["inversion_accuracy"]
    apart = summarise({"inversion_accuracy": yes.repeat_interleave(27)})["inversion_accuracy"]
    assert together["value"] == apart["value"] == 0.5 and together["images"] == 40
    ratio = (together["high"] - together["low"]) / (apart["high"] - apart["low"])
    assert ratio == pytest.approx(27**0.5, rel=0.2)


def test_unanimous_images_have_wilsons_interval():
    found = summarise({"clean_accuracy": torch.ones(20, 3), "gradient_norm": torch.zeros(20)})
    assert (found["clean_accuracy"]["low"], found["clean_accuracy"]["high"]) == wilson_interval(20, 20)
    assert (found["gradient_norm"]["low"], found["gradient_norm"]["high"]) == (0.0, 0.0)  # not a share
    nothing = summarise({"clean_accuracy": torch.zeros(20)}, differences=True)["clean_accuracy"]
    assert (nothing["low"], nothing["high"]) == (0.0, 0.0)


def test_medians_are_medians():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 1e6])
    found = summarise({"gradient_norm": values, "median_gradient_norm": values, "linearised_robustness": values})
    assert found["gradient_norm"]["value"] == pytest.approx(200002.0)
    assert found["median_gradient_norm"]["value"] == found["linearised_robustness"]["value"] == 3.0


def test_contrasts_are_paired_differences():
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(400, generator=generator), 0.1 * torch.randn(2, 400, generator=generator)

    def cell(effect):
        return [dict.fromkeys(MEASURES, effect + images + part) for part in noise]

    effects = {(False, False): 0.0, (False, True): 0.0, (True, False): 0.2, (True, True): 1.0}
    found = results.contrasts({key: cell(effect) for key, effect in effects.items()})
    assert list(found) == list(results.CONTRASTS)
    for label, (one, other) in results.CONTRASTS.items():
        values = found[label]["alignment"]
        # What depends on image and seed cancels: the difference is exact, whatever the spread of the images.
        for part in (values["value"], values["low"], values["high"], *values["seeds"]):
            assert part == pytest.approx(effects[one] - effects[other], abs=1e-5)


def test_rank_correlations_see_order_alone():
    steep = [8.0, 4.0, 2.0, 1.0]

    def networks(values):
        return [
            {name: {"value": steep[k] if name == "gradient_norm" else values[k]} for name in MEASURES} for k in range(4)
        ]

    assert results.rank_correlations(networks([1.0, 2.0, 3.0, 400.0]), "gradient_norm")["alignment"] == pytest.approx(1)
    assert results.rank_correlations(networks([4.0, 3.0, 2.0, -9.0]), "gradient_norm")["alignment"] == pytest.approx(-1)
    assert results.rank_correlations(networks([5.0] * 4), "gradient_norm")["alignment"] == 0
    # Ranks 1.5, 1.5, 3, 4 against 1, 2, 3, 4.
    tied = results.rank_correlations(networks([1.0, 1.0, 2.0, 3.0]), "gradient_norm")["alignment"]
    assert tied == pytest.approx(4.5 / (4.5 * 5.0) ** 0.5)
    assert "alignment" not in results.rank_correlations(networks([None, None, 1.0, 2.0]), "gradient_norm")
    assert results.rank_correlations(networks([1.0] * 4)[:2], "gradient_norm") == {}
