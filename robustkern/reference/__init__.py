"""Every operator in plain PyTorch, for any device, dtype and order: the truth against which kernels are tested."""

from robustkern.reference.activation import activation_double_backward
from robustkern.reference.attack_start import attack_start
from robustkern.reference.attack_step import attack_step
from robustkern.reference.attention import attention_double_backward, attention_jvp
from robustkern.reference.batch_norm import batch_norm_double_backward
from robustkern.reference.group_norm import group_norm_backward, group_norm_double_backward
from robustkern.reference.kl_divergence import kl_divergence
from robustkern.reference.layer_norm import layer_norm_backward, layer_norm_double_backward
from robustkern.reference.margin_loss import margin_loss
from robustkern.reference.random_cotangents import random_cotangents
from robustkern.reference.row_norm import row_norm
from robustkern.reference.softmax import softmax_double_backward
from robustkern.reference.softmax_cross_entropy import softmax_cross_entropy

__all__ = [
    "activation_double_backward",
    "attack_start",
    "attack_step",
    "attention_double_backward",
    "attention_jvp",
    "batch_norm_double_backward",
    "group_norm_backward",
    "group_norm_double_backward",
    "kl_divergence",
    "layer_norm_backward",
    "layer_norm_double_backward",
    "margin_loss",
    "random_cotangents",
    "row_norm",
    "softmax_cross_entropy",
    "softmax_double_backward",
]
