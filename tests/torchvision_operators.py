"""Makes torchvision, which timm imports, importable beside a PyTorch without CUDA.

The torchvision of the index loads its operators from a library linked with CUDA. Its Python part imports without them,
once two of them are declared. A program that tests start calls `declare()` itself.
"""

import importlib.metadata
import sys

import torch

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def declare() -> None:
    """Declares the operators that `import torchvision` looks for, where the installed torchvision cannot bring them."""
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return
    # A build for the CPU says so in its version: 0.28.0+cpu.
    if sys.platform == "linux" and torch.version.cuda is None and "+" not in version:
        torch.library.define("torchvision::nms", _BOXES)
        torch.library.define("torchvision::qnms", _BOXES)
