"""robustkern: second derivatives at the cost of the arithmetic, for robust training in PyTorch."""

from robustkern import losses, ops, reference
from robustkern._version import __version__
from robustkern.penalties import gradient_norm
from robustkern.terms import Terms

__all__ = ["Terms", "__version__", "gradient_norm", "losses", "ops", "reference"]
