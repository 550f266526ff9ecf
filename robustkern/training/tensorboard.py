"""The metrics of a run as scalars for TensorBoard."""

from pathlib import Path
from typing import Any

from robustkern._packages import pip_install

from .checkpoint import Progress, Row
from .config import TrainingConfig
from .errors import UsageError
from .observer import Observer


class TensorBoard(Observer):
    """Writes every number of every epoch's row into the folder `tensorboard` of a run, against the step.

    A resumed run replaces what was written after its checkpoint.

    Args:
        out: The run directory.

    Raises:
        UsageError: The package tensorboard is not installed.
    """

    def __init__(self, out: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                f"TensorBoard's scalars take the package tensorboard: {pip_install('tensorboard')}"
            ) from error
        self._make, self._folder = SummaryWriter, Path(out) / "tensorboard"
        self._writer: Any = None

    def on_start(self, config: TrainingConfig, steps_per_epoch: int, progress: Progress) -> None:
        self._writer = self._make(str(self._folder), purge_step=progress.step + 1 if progress.step else None)

    def on_epoch(self, row: Row) -> None:
        for name, value in row.items():
            if value is not None and name != "step":
                self._writer.add_scalar(name, value, int(row["step"] or 0))

    def on_end(self) -> None:
        self._writer.close()
