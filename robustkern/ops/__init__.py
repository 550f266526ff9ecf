"""The operators: fused kernels with a chain of derivatives, each beside its reference."""

from robustkern.ops.row_norm import row_norm
from robustkern.ops.softmax_cross_entropy import softmax_cross_entropy

__all__ = ["row_norm", "softmax_cross_entropy"]
