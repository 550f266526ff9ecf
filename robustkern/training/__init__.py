"""Training: `train(recipe("digits", "gradient-penalty"), "runs/digits")`, and `load_model` to use the result."""

from .averaging import WeightAverage
from .checkpoint import CheckpointError, Progress, Row
from .config import TrainingConfig, read_settings
from .errors import Interrupted, TrainingError, UsageError
from .evaluation import clean_accuracy, input_gradients, robust_accuracy
from .methods import METHODS, Method, build_loss
from .observer import Observer, Observers
from .recipes import recipe, teacher_recipe
from .run_folder import read_config
from .trainer import Result, train
from .weights import load_model, save_weights

__all__ = [
    "METHODS", "CheckpointError", "Interrupted", "Method", "Observer", "Observers", "Progress", "Result", "Row",
    "TrainingConfig", "TrainingError", "UsageError", "WeightAverage", "build_loss", "clean_accuracy", "input_gradients",
    "load_model", "read_config", "read_settings", "recipe", "robust_accuracy", "save_weights", "teacher_recipe",
    "train",
]  # fmt: skip
