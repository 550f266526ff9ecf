"""PyTorch's BatchNorm backward is given what its own node gives it: on CUDA it reads what the CPU's passes over."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import robustkern as rk
from robustkern import _library

pytestmark = pytest.mark.skipif(_library.aten_extension() is None, reason="needs robustkern._aten")


class _Given(TorchDispatchMode):
    """The arguments of native_batch_norm_backward."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.native_batch_norm_backward.default:
            self.arguments = args
        return func(*args, **(kwargs or {}))


def given(norm, x, fused):
    with _Given() as mode:
        if fused:
            with rk.fused_double_backward():
                y = norm(x)
                assert "BatchNormBackward0" not in y.grad_fn.name()
                y.square().sum().backward()
        else:
            norm(x).square().sum().backward()
    names = [argument.name for argument in torch.ops.aten.native_batch_norm_backward.default._schema.arguments]
    return dict(zip(names, mode.arguments, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_arguments(training, dtype, device):
    x = torch.randn(8, 6, 4, 4, device=device, dtype=dtype).requires_grad_()
    norm = nn.BatchNorm2d(6, device=device, dtype=dtype).train(training)
    norm.running_var.fill_(0.3)
    with torch.backends.cudnn.flags(enabled=False):
        stock, ours = given(norm, x, fused=False), given(norm, x, fused=True)
    for name, expected in stock.items():
        if training and name in ("running_mean", "running_var"):  # which nobody reads
            assert ours[name] is None
        elif isinstance(expected, torch.Tensor):
            assert ours[name].dtype == expected.dtype and torch.equal(ours[name], expected), name
        else:
            assert ours[name] == expected, name
