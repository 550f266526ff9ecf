"""Training: `train(recipe("digits", "gradient-penalty"), "runs/digits")`, and `load_model` to use the result."""

from .checkpoint import CheckpointError, Progress, Row
from .config import TrainingConfig
from .errors import Interrupted, TrainingError, UsageError
from .evaluation import clean_accuracy, input_gradients, robust_accuracy
from .methods import METHODS, Method, build_loss
from .recipes import recipe
from .trainer import Observer, Result, read_config, train
from .weights import load_model, save_weights

__all__ = [
    "METHODS",
    "CheckpointError",
    "Interrupted",
    "Method",
    "Observer",
    "Progress",
    "Result",
    "Row",
    "TrainingConfig",
    "TrainingError",
    "UsageError",
    "build_loss",
    "clean_accuracy",
    "input_gradients",
    "load_model",
    "read_config",
    "recipe",
    "robust_accuracy",
    "save_weights",
    "train",
]
