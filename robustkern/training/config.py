"""The configuration of a run: everything that decides its result, as it is written to `config.yaml`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from robustkern import models
from robustkern._arguments import shown
from robustkern._settings import RADII, SEEDS, THREADS, Range, check_ranges, counts, setting
from robustkern._text import brief
from robustkern.data import View

from .errors import UsageError, naming, require
from .yaml_files import MOST_BYTES, dump_yaml, load_yaml

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("one-cycle", "cosine", "triangular", "step", "constant")
DEVICES = ("cpu", "cuda")
WATCHES = ("warn", "stop", "off")
WHAT, AUGMENTATION, OPTIMIZATION = "What is trained", "Augmentation", "Optimization"
RUN, MEASURING = "The run", "Validation and measuring"

_PLAIN: dict[str, type] = {"str": str, "bool": bool, "tuple[int, ...]": tuple, "tuple[float, ...]": tuple}
_DICTS = ("options", "model_options")


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the result of a run.

    Attributes:
        data: A name of `robustkern.data.NAMES`, or the path of an image folder.
        method: A name of `robustkern.training.METHODS`.
        options: The options of the method; those left out take the method's defaults.
        model: A name of `robustkern.models.MODELS`, timm:NAME, or package.module:function.
        model_options: More keyword arguments of the network.
        init: Weights to begin with: a file, a run directory, or "pretrained". A file is safetensors or of torch.save; a
            head for another number of classes begins anew.
        smooth_activations: What replaces ReLU modules: "gelu", "silu" or "none". A penalty on the input gradient wants
            one that varies.
        data_mean: Mean of each channel to normalise by, 0.485,0.456,0.406. (): that of the weights to begin with, or of
            the data.
        data_std: Standard deviation of each channel to normalise by. Likewise.
        image_size: Height and width that a folder's images are scaled to while training; 0: all in memory as they are.
            With it the images may have any sizes, and are read while they are used.
        crop_scale: Least share of an image's area that a random crop keeps, with an image size.
        flip: Probability that an image is mirrored, with an image size.
        eval_crop: Share of the shorter side that is kept for evaluation, the middle, with an image size.
        extra: Another folder of images of the same classes, such as synthetic ones, to train on beside `data`. An epoch
            is one of `data`.
        extra_share: Share of each batch that comes from `extra`.
        eps: Radius in units of the images: 8/255 or 0.1. Used by the attack that measures robustness, and by methods
            that need one.
        randaugment: Operations of RandAugment that each training image goes through; 0: none.
        magnitude: Their strength, 0 to 10.
        colour: Brightness, contrast and saturation of training images vary by this share; 0: not at all.
        erasing: Probability that a rectangle of a training image becomes grey.
        mixup: alpha of mixup, which mixes pairs of images and their labels; 0: none.
        cutmix: alpha of CutMix, likewise. With both, either with probability 1/2.
        epochs: Passes over the training set.
        batch_size: Samples per step, of all processes together. The last, smaller batch of an epoch is trained
            on as well, and a single sample left over joins the batch before.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw".
        lr: Peak learning rate.
        weight_decay: Weight decay. Decoupled for AdamW, L2 for SGD.
        betas: Decay of AdamW's averages of the gradient and of its square, 0.9,0.95.
        decay_matrices_only: No weight decay on biases and on what normalisation layers have. On parameters of fewer
            than two dimensions, that is.
        layer_decay: Factor on the learning rate for each block between a parameter and the head, such as 0.75. 1: all
            learn alike. See `robustkern.distributed.blocks`.
        schedule: "one-cycle", "cosine", "triangular", "step", "constant". In this order: a linear rise over the first
            quarter, then a cosine to zero; the cosine alone; a linear rise over the first half, a linear fall over the
            second; the peak times `gamma` at each of the `milestones`; the peak all the time.
        milestones: For schedule "step": epochs after which the rate falls, 100,150. None: after half and three
            quarters.
        gamma: Factor on the learning rate at each milestone.
        warm_up: Epochs in which the learning rate rises linearly before the schedule begins. For cosine, step and
            constant.
        least_lr: Learning rate that the schedule falls to in the place of 0.
        plain_epochs: Epochs of plain training, by cross-entropy alone, before the method begins. The ramp begins with
            the method.
        ramp: Share of the training over which the smoothness weight grows from 0 to full. It grows linearly.
        clip: Largest gradient norm; 0: no clipping. A longer gradient is scaled down to it.
        ema: Decay of a moving average of the weights, such as 0.995; 0: none. See `WeightAverage`.
        accumulate: Parts in which each process takes its share of a batch, one after the other. Less memory for a
            little time; gradients are those of the whole share, up to rounding, unless BatchNorm normalises each part.
        channels_last: Images and weights of convolutions with the channels last in memory.
        recompute: Keep the inputs of a network's blocks only, and compute the rest again for gradients.
        amp: Forward passes in bfloat16. Only those of the loss, where PyTorch's autocast does that; weights, reductions
            of the loss, optimizer and evaluation stay float32.
        sync_batch_norm: With several GPUs: BatchNorm over the whole batch. Otherwise over each process's part.
        seed: Seed of everything random. Decides initial weights, validation split, order of the samples, augmentation
            and everything random in losses and attacks.
        impl: "auto", "kernel" or "reference": which ops to use.
        device: "cpu" or "cuda".
        threads: CPU threads of each process. Part of the result, because they decide the order in which sums are taken.
        train_samples: Train on the first N samples; 0: all.
        shuffle_labels: A control: training images get each other's labels. The seed decides which. Images held
            out for validation get them too, so that there is nothing to learn but the images themselves.
        validation: Hold out this share, or number, of the training samples; keep the best weights. A share is below
            1; 0: none.
        eval_samples: Attack the first N test or validation samples; 0: all.
        eval_every: Epochs between attacks; the last is always measured. Robust accuracy is null in the rows between.
        pgd_steps: Steps of the attack.
        watch: What to do about catastrophic overfitting: "warn", "stop" or "off". See `overfitting`; "stop" ends the
            training, and needs a validation set.
        checkpoint_every: Steps between checkpoints inside an epoch; 0: only at its end.
        max_skipped: Steps in a row that may be skipped for a loss that is not finite. The same goes for a gradient;
            after more of them, the run fails.

    >>> from robustkern.training import TrainingConfig
    >>> config = TrainingConfig("digits", "standard", epochs=3)
    >>> TrainingConfig.from_yaml(config.to_yaml()) == config
    True
    """

    data: str = setting(panel=WHAT)
    method: str = setting(panel=WHAT)
    options: dict[str, Any] = field(default_factory=dict)
    model: str = setting("small-cnn", panel=WHAT)
    model_options: dict[str, Any] = field(default_factory=dict, metadata={"panel": WHAT})
    init: str = setting("", panel=WHAT)
    smooth_activations: str = setting("none", panel=WHAT)
    data_mean: tuple[float, ...] = setting((), panel=WHAT)
    data_std: tuple[float, ...] = setting((), panel=WHAT)
    image_size: int = setting(0, counts(0, 1 << 14), panel=WHAT)
    crop_scale: float = setting(0.08, Range(0, 1, open="("), panel=AUGMENTATION)
    flip: float = setting(0.5, Range(0, 1, open=""), panel=AUGMENTATION)
    eval_crop: float = setting(0.875, Range(0, 1, open="("), panel=WHAT)
    extra: str = setting("", panel=WHAT)
    extra_share: float = setting(0.7, Range(0, 1, open="()"), panel=WHAT)
    eps: float = setting(8 / 255, RADII, panel=WHAT)
    randaugment: int = setting(0, counts(0, 100), panel=AUGMENTATION)
    magnitude: float = setting(9.0, Range(0, 10, open=""), panel=AUGMENTATION)
    colour: float = setting(0.0, Range(0, 1, open=""), panel=AUGMENTATION)
    erasing: float = setting(0.0, Range(0, 1, open=""), panel=AUGMENTATION)
    mixup: float = setting(0.0, Range(0, 1e6), panel=AUGMENTATION)
    cutmix: float = setting(0.0, Range(0, 1e6), panel=AUGMENTATION)
    epochs: int = setting(30, counts(), panel=OPTIMIZATION)
    batch_size: int = setting(128, counts(), panel=OPTIMIZATION)
    optimizer: str = setting("sgd", panel=OPTIMIZATION)
    lr: float = setting(0.05, Range(0, open="()"), panel=OPTIMIZATION)
    weight_decay: float = setting(5e-4, Range(0), panel=OPTIMIZATION)
    betas: tuple[float, ...] = setting((0.9, 0.999), panel=OPTIMIZATION)
    decay_matrices_only: bool = setting(False, panel=OPTIMIZATION)
    layer_decay: float = setting(1.0, Range(0, 1, open="("), panel=OPTIMIZATION)
    schedule: str = setting("one-cycle", panel=OPTIMIZATION)
    milestones: tuple[int, ...] = setting((), panel=OPTIMIZATION)
    gamma: float = setting(0.1, Range(0, 1, open="("), panel=OPTIMIZATION)
    warm_up: int = setting(0, counts(0), panel=OPTIMIZATION)
    least_lr: float = setting(0.0, Range(0), panel=OPTIMIZATION)
    plain_epochs: int = setting(0, counts(0), panel=OPTIMIZATION)
    ramp: float = setting(0.3, Range(0, 1, open=""), panel=OPTIMIZATION)
    clip: float = setting(1.0, Range(0), panel=OPTIMIZATION)
    ema: float = setting(0.0, Range(0, 1), panel=OPTIMIZATION)
    accumulate: int = setting(1, counts(1, 1024), panel=OPTIMIZATION)
    channels_last: bool = setting(False, panel=OPTIMIZATION)
    recompute: bool = setting(False, panel=OPTIMIZATION)
    amp: bool = setting(False, panel=OPTIMIZATION)
    sync_batch_norm: bool = setting(False, panel=OPTIMIZATION)
    seed: int = setting(0, SEEDS, panel=RUN)
    impl: str = setting("auto", panel=RUN)
    device: str = setting("cpu", panel=RUN)
    threads: int = setting(1, THREADS, panel=RUN)
    train_samples: int = setting(0, counts(0), panel=RUN)
    shuffle_labels: bool = setting(False, panel=RUN, flags="--shuffle-labels")
    validation: float = setting(0.0, Range(0), panel=MEASURING)
    eval_samples: int = setting(1000, counts(0), panel=MEASURING)
    eval_every: int = setting(1, counts(), panel=MEASURING)
    pgd_steps: int = setting(20, counts(), panel=MEASURING)
    watch: str = setting("warn", panel=MEASURING)
    checkpoint_every: int = setting(0, counts(0), panel=RUN)
    max_skipped: int = setting(10, counts(0), panel=RUN)

    def __post_init__(self) -> None:
        check_ranges(self, UsageError)
        for given in dataclasses.fields(self):
            value, kind = getattr(self, given.name), _PLAIN.get(str(given.type), object)
            require(isinstance(value, kind), f"{given.name} must be {given.type}, got {shown(value)}")
        smooth = ("none", *models.SMOOTH)
        require(
            self.smooth_activations in smooth,
            f"smooth_activations: {', '.join(smooth)}, got {self.smooth_activations!r}",
        )
        require(
            len(self.data_mean) == len(self.data_std) and all(0 < value < math.inf for value in self.data_std),
            f"data_mean and data_std take as many numbers as the images have channels, and deviations above 0, got "
            f"{list(self.data_mean)} and {list(self.data_std)}",
        )
        most = self.batch_size - 1
        kept = not self.extra or 1 <= round(self.extra_share * self.batch_size) <= most
        require(kept, f"extra_share {self.extra_share:g} of batch_size {self.batch_size} leaves no sample on one side")
        for name in ("crop_scale", "flip", "eval_crop"):
            default = next(field.default for field in dataclasses.fields(self) if field.name == name)
            require(bool(self.image_size) or getattr(self, name) == default, f"{name} takes an image_size")
        whole = self.validation < 1 or float(self.validation).is_integer()
        require(whole, f"validation must be a share below 1 or a number of samples, got {self.validation}")
        require(self.optimizer in OPTIMIZERS, f"no optimizer {self.optimizer!r}: {', '.join(OPTIMIZERS)}")
        require(self.schedule in SCHEDULES, f"no schedule {self.schedule!r}: {', '.join(SCHEDULES)}")
        bounds = (0, *self.milestones, self.epochs)
        require(
            not self.milestones or all(a < b for a, b in pairwise(bounds)),
            f"milestones must be ascending epochs from 1 to {self.epochs - 1}, got {list(self.milestones)}",
        )
        pair = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(pair, f"betas must be two numbers in [0, 1), got {list(self.betas)}")
        require(
            self.optimizer == "adamw" or self.betas == (0.9, 0.999),
            f"betas belong to optimizer adamw, got optimizer {self.optimizer}",
        )
        rises = self.schedule in ("one-cycle", "triangular")
        require(not (rises and self.warm_up), f"schedule {self.schedule} has a rise of its own: no warm_up")
        for name in ("warm_up", "plain_epochs"):
            value = getattr(self, name)
            require(value < self.epochs, f"{name} must be less than the {self.epochs} epochs, got {value}")
        require(self.least_lr <= self.lr, f"least_lr must be at most lr, {self.lr}, got {self.least_lr}")
        only_step = self.schedule == "step" or not self.milestones
        require(only_step, f"milestones belong to schedule step, got schedule {self.schedule}")
        require(self.impl in ("auto", "kernel", "reference"), f"impl: auto, kernel or reference, got {self.impl!r}")
        require(self.device in DEVICES, f"device must be cpu or cuda, got {self.device!r}")
        require(self.watch in WATCHES, f"watch must be one of {', '.join(WATCHES)}, got {self.watch!r}")
        require(
            self.watch != "stop" or self.validation > 0,
            "watch stop takes a validation set: no run may end early by what it sees of the test images",
        )
        require(not self.sync_batch_norm or self.device == "cuda", "sync_batch_norm takes device cuda")

    @property
    def view(self) -> View | None:
        """How images are cropped and scaled; None where they are taken as they are."""
        return View(self.image_size, self.crop_scale, self.flip, self.eval_crop) if self.image_size else None

    def to_yaml(self) -> str:
        """The text that `from_yaml` reads; numbers keep their last bit."""
        values = dataclasses.asdict(self)
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return dump_yaml({**values, **lists})

    @classmethod
    def from_yaml(cls, text: str) -> TrainingConfig:
        """The configuration that `to_yaml` wrote; unknown and missing names, and wrong types, are refused."""
        values = parse_settings(text)
        missing = sorted(name for name in ("data", "method") if name not in values)
        require(not missing, f"missing setting {', '.join(missing)}")
        return cls(**values)

    def differences(self, other: TrainingConfig) -> list[str]:
        """What differs from another configuration, one readable phrase for each setting."""
        changed = []
        for name, mine in vars(self).items():
            theirs = vars(other)[name]
            pairs = [(name, mine, theirs)]
            if name in _DICTS:
                pairs = [(option, mine.get(option), theirs.get(option)) for option in sorted({*mine, *theirs})]
            changed += [f"{label} {old} -> {new}" for label, old, new in pairs if old != new]
        return changed


# By the name of the type, up to its first bracket.
_TYPES: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool, "dict": dict, "tuple": list}


def parse_settings(text: str) -> dict[str, Any]:
    """Fields of a `TrainingConfig`, or some of them, from YAML; unknown names and wrong types are refused."""
    values = load_yaml(text)
    require(isinstance(values, dict), f"expected a mapping of settings, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(TrainingConfig)}
    unknown = sorted(str(name) for name in set(values) - set(fields))
    require(not unknown, f"unknown setting {brief(', '.join(unknown))}")
    for name, value in values.items():
        kind = str(fields[name].type)
        if kind == "float" and isinstance(value, str):
            values[name] = value = parse_fraction(value)
        fits = isinstance(value, _TYPES[kind.split("[")[0]]) and (kind == "bool") == isinstance(value, bool)
        fits = fits and not (isinstance(value, int) and abs(value) >= 1 << 63)
        require(fits, f"{name} must be {kind}, got {brief(repr(value))}")
    for name in ("data_mean", "data_std", "betas"):
        if name in values:
            numbers = all(type(value) in (int, float) for value in values[name])
            require(numbers, f"{name} must be a list of numbers, got {brief(repr(values[name]))}")
            values[name] = tuple(map(float, values[name]))
    if "milestones" in values:
        numbers = all(type(epoch) is int and abs(epoch) < 1 << 63 for epoch in values["milestones"])
        require(numbers, f"milestones must be a list of epochs, got {brief(repr(values['milestones']))}")
        values["milestones"] = tuple(values["milestones"])
    for name in _DICTS:
        given = values.get(name, {})
        for key, value in given.items():
            plain = isinstance(key, str) and _is_plain(value, lists=name == "model_options")
            require(plain, f"{name} must be names with a number, a text, true or false each, got {brief(repr(given))}")
    return values


def _is_plain(value: Any, lists: bool) -> bool:
    if lists and isinstance(value, list):
        return all(_is_plain(entry, lists=False) for entry in value)
    return value is None or type(value) in (str, int, float, bool)


def read_settings(path: str | Path) -> dict[str, Any]:
    """`parse_settings` of a file; errors name it.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from robustkern.training import read_settings
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "mine.yaml").write_text("{data: digits, epochs: 3}")
    ...     print(read_settings(Path(folder) / "mine.yaml"))
    {'data': 'digits', 'epochs': 3}
    """
    # Not `read_bytes`: it may be a pipe, as the shell's <(...) is.
    with naming(path), open(path, "rb") as file:
        return parse_settings(file.read(4 * MOST_BYTES + 1).decode())


def parse_fraction(text: str) -> float:
    """A number written as such (0.1) or as a fraction (8/255)."""
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{brief(repr(text))} is neither a number nor a fraction such as 8/255") from None
