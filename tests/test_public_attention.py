"""Forward mode over other people's transformers, whose attention is scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import robustkern as rk


class Network(nn.Module):
    """A model, and how it maps an input to its output."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.model, x)


def encoder() -> tuple[Network, Tensor]:
    """An encoder of words, some of which are padding."""
    package = pytest.importorskip("transformers", reason="pip install transformers")
    config = package.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50,
        attn_implementation="sdpa",
    )  # fmt: skip
    padding = (torch.arange(7) < torch.tensor([[7], [5]])).long()

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return model(inputs_embeds=x, attention_mask=padding).last_hidden_state[:, :5]

    return Network(package.BertModel(config), run), torch.randn(2, 7, 32)


def decoder() -> tuple[Network, Tensor]:
    """A causal one, in which several heads share a head of keys."""
    package = pytest.importorskip("transformers", reason="pip install transformers")
    config = package.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=50, attn_implementation="sdpa",
    )  # fmt: skip

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return model(inputs_embeds=x, use_cache=False).last_hidden_state

    return Network(package.LlamaModel(config), run), torch.randn(2, 7, 32)


def vision() -> tuple[Network, Tensor]:
    package = pytest.importorskip("timm", reason="pip install timm")
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 10}
    model = package.create_model("vit_tiny_patch16_224", **options)
    return Network(model, lambda model, x: model(x)), torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("build", [encoder, decoder, vision])
def test_jvp_in_inputs_and_weights(build, dtype, not_emulated):
    """As on the MATH backend, but for rounding."""
    model, x = build()
    model, x = model.eval().to(dtype), x.to(dtype)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def function(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, x)

    tangents = {name: torch.randn_like(w) for name, w in weights.items()}, torch.randn_like(x)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(function, (weights, x), tangents)
    with pytest.raises(NotImplementedError, match="_scaled_dot_product_flash_attention_for_cpu"):
        torch.func.jvp(function, (weights, x), tangents)
    rk.install()
    with torch.profiler.profile() as profile:
        actual = torch.func.jvp(function, (weights, x), tangents)
    assert any(event.name == "robustkern::attention_jvp" for event in profile.events())
    rounding = 64 * torch.finfo(dtype).eps
    for a, e in zip(actual, expected, strict=True):
        assert e.any()
        assert (a - e).norm() <= rounding * e.norm()
