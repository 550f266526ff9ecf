"""Attacks: callables `(model, x, y, generator=None) -> adversarial x`. Images are in [0, 1], eps in the same units."""

from .pgd import PGD, attacked

__all__ = ["PGD", "attacked"]
