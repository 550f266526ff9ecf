"""robustkern: second derivatives at the cost of the arithmetic, for robust training in PyTorch."""

from robustkern import losses, ops, reference
from robustkern._version import __version__
from robustkern.double_backward import fused_double_backward, install, is_installed, uninstall
from robustkern.penalties import gradient_norm
from robustkern.terms import Terms

__all__ = [
    "Terms",
    "__version__",
    "fused_double_backward",
    "gradient_norm",
    "install",
    "is_installed",
    "losses",
    "ops",
    "reference",
    "uninstall",
]
