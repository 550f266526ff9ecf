"""The operators: fused kernels with a chain of derivatives, each beside its reference."""

# Imported for what they register: derivatives of PyTorch's own operators.
from robustkern.ops import activation, batch_norm, group_norm, layer_norm, softmax  # noqa: F401
from robustkern.ops.attack_start import attack_start
from robustkern.ops.attack_step import attack_step
from robustkern.ops.attention import attention_jvp
from robustkern.ops.kl_divergence import kl_divergence
from robustkern.ops.margin_loss import margin_loss
from robustkern.ops.random_cotangents import random_cotangents
from robustkern.ops.row_norm import row_norm
from robustkern.ops.softmax_cross_entropy import softmax_cross_entropy

# These cannot be differentiated: they write into a tensor, for attacks.
IN_PLACE = ("attack_start", "attack_step")

__all__ = [
    "attack_start",
    "attack_step",
    "attention_jvp",
    "kl_divergence",
    "margin_loss",
    "random_cotangents",
    "row_norm",
    "softmax_cross_entropy",
]
