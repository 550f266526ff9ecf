"""The options that take one of a few texts: as types, and as the tuples that are checked at run time."""

from typing import Literal, get_args

Impl = Literal["auto", "kernel", "reference"]
Threat = Literal["linf", "l2"]
Norm = Literal["linf", "l2", "l1"]  # in the order of csrc/math/attack_step.h
Law = Literal["sphere", "gaussian", "rademacher", "orthonormal"]  # in the order of csrc/math/random_cotangents.h
Kind = Literal["plain", "centred", "fisher"]
Margin = Literal["cw", "dlr"]  # in the order of csrc/math/margin_loss.h
AttackObjective = Literal["ce", "cw", "dlr"]
Reduction = Literal["none", "mean", "sum"]
TargetedObjective = Literal["ce", "cw", "dlr", "dlr-targeted"]
Start = Literal["gaussian", "uniform"]
Estimator = Literal["exact", "finite-difference"]
GradientOf = Literal["logit", "loss", "margin"]
Statistic = Literal["mean", "median"]

IMPLS: tuple[Impl, ...] = get_args(Impl)
THREATS: tuple[Threat, ...] = get_args(Threat)
NORMS: tuple[Norm, ...] = get_args(Norm)
LAWS: tuple[Law, ...] = get_args(Law)
KINDS: tuple[Kind, ...] = get_args(Kind)
MARGINS: tuple[Margin, ...] = get_args(Margin)
OBJECTIVES: tuple[AttackObjective, ...] = get_args(AttackObjective)
TARGETED_OBJECTIVES: tuple[TargetedObjective, ...] = get_args(TargetedObjective)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
STARTS: tuple[Start, ...] = get_args(Start)
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
GRADIENTS_OF: tuple[GradientOf, ...] = get_args(GradientOf)
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
