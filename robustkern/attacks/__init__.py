"""Attacks: callables `(model, x, y, generator=None) -> adversarial x`. Images are in [0, 1], eps in the same units."""

from ._common import attacked
from .apgd import APGD
from .fgsm import FGSM, NFGSM
from .pgd import PGD

__all__ = ["APGD", "FGSM", "NFGSM", "PGD", "attacked"]
