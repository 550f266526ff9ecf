"""robustkern: second derivatives at the cost of the arithmetic, for robust training in PyTorch."""

from robustkern import distributed, losses, ops, reference
from robustkern._version import __version__
from robustkern.compiled import compile
from robustkern.coupling import batch_coupling
from robustkern.double_backward import fused_double_backward, install, is_installed, uninstall
from robustkern.draw import Draw
from robustkern.graphs import graphed
from robustkern.jacobian import input_jacobian, jacobian_norm, suggest_projections
from robustkern.penalties import gradient_norm
from robustkern.spectral_norm import jacobian_spectral_norm
from robustkern.terms import Terms

__all__ = [
    "Draw", "Terms", "__version__", "batch_coupling", "compile", "distributed", "fused_double_backward",
    "gradient_norm", "graphed", "input_jacobian", "install", "is_installed", "jacobian_norm", "jacobian_spectral_norm",
    "losses", "ops", "reference", "suggest_projections", "uninstall",
]  # fmt: skip
