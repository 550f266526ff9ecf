"""The switch that gives PyTorch's own operators fused second derivatives."""

import functools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from robustkern import _library, _sync_batch_norm
from robustkern._graph import graph_nodes

__all__ = ["fused_double_backward", "install", "is_installed", "uninstall"]


def install(*, materialize_zeros: bool = False, save_memory: bool = False) -> None:
    """Makes the second backward of PyTorch's own operators fused, for every model in this process.

    Nothing about a model changes.  Where a graph is built that can be differentiated again (`create_graph=True`), the
    operators that `robustkern info` lists remember their inputs, and their second backward is one fused kernel instead
    of a chain of small ones; SyncBatchNorm, which PyTorch cannot differentiate twice, gets a second backward.
    Everywhere else (no grad mode, plain training steps, torch.func, forward-mode differentiation, derivatives that are
    taken inside a torch.utils.checkpoint, DTensor and other tensors with a `__torch_dispatch__` of their own) PyTorch's
    own kernels run.  The exceptions are RMSNorm's backward, which PyTorch composes of a dozen operators, fused
    attention in forward mode, which PyTorch refuses, and on the CPU the input gradient of a first layer (a Conv2d of 1
    to 4 input channels), for which PyTorch takes 4 to 10 times the time of its forward.

    First derivatives keep their bits, with these exceptions, which run fused kernels too and differ by rounding: that
    input gradient, LayerNorm, RMSNorm and GroupNorm under `create_graph` (RMSNorm always), and GELU, SiLU and Mish for
    several cotangents at once (torch.func.vmap over autograd.grad).

    Calling it again only changes the option.  A graph keeps the derivatives it was built with: one built before
    `install()` stays PyTorch's, one built after it stays fused, whenever it is run.

    Args:
        materialize_zeros: return derivatives that are identically zero, such as that of ReLU's gradient in its input,
            as tensors of zeros, as PyTorch does.  By default they are not computed: after `.backward()`, a parameter
            that a penalty does not depend on has `.grad` None instead of zeros.  Optimizers with momentum or weight
            decay and DistributedDataParallel (`find_unused_parameters`) treat the two differently.  Behind tensors of
            fewer than 16,384 elements on the CPU, PyTorch's zeros stay.  Either way,
            `torch.autograd.grad(outputs, inputs)` returns zeros for the inputs that it is asked for.
        save_memory: keep no tensor that is cheap to compute again.  Where a convolution or a matrix product keeps what
            BatchNorm, GroupNorm, LayerNorm, GELU, SiLU, Mish, ReLU, or one of their first backwards has made, and on
            the CPU that of attention, it is made again from what these keep themselves when it is needed; of ReLU's
            result the signs are kept.  Results have the same bits.  A penalised step then peaks at 1.2 to 1.5 times
            the memory of a plain one rather than twice, for some per cent more time; plain steps keep less, too.  Does
            nothing under torch.compile, within torch.func transforms that differentiate, and where saved tensors have
            hooks already, such as in a torch.utils.checkpoint: around it, it does.

    Raises:
        RuntimeError: the extension is missing; the message says why.

    Differentiability: any order; beyond the second, PyTorch's own formulas run.  Determinism: the same bits on every
    run. Thread safety: may be called from any thread at any time.

    >>> rk.install()
    >>> rk.is_installed()
    True
    >>> rk.uninstall()
    """
    extension = _extension("install")
    extension.materialize_zeros(materialize_zeros)
    extension.save_memory(save_memory)
    extension.install()
    _tag_compiled_code(extension, materialize_zeros)


def uninstall() -> None:
    """Restores PyTorch's own second derivatives; does nothing if they were never replaced.

    >>> rk.uninstall()
    >>> rk.is_installed()
    False
    """
    extension = _library.aten_extension()
    if extension is not None:
        extension.uninstall()
        extension.materialize_zeros(False)
        extension.save_memory(False)
        _tag_compiled_code(extension)


def is_installed() -> bool:
    """Whether `install()` is in force; scopes of `fused_double_backward` do not count.

    >>> rk.is_installed()
    False
    """
    extension = _library.aten_extension()
    return extension is not None and extension.is_installed()


@contextmanager
def fused_double_backward(*, save_memory: bool = False) -> Iterator[None]:
    """`install()` for the graphs that any thread builds inside a with statement; an exception ends it too.

        with robustkern.fused_double_backward():
            loss = criterion(model(x), y)
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + grad.square().sum()).backward()  # fused, though outside

    Scopes may be nested and may overlap between threads: the replacements are in force while any scope is open.

    Args:
        save_memory: as for `install`; in force while any scope with it is open.  For a loss of `robustkern.losses` put
            the scope around the call: what its graph keeps is kept by then.

    Raises:
        RuntimeError: the extension is missing; the message says why.

    >>> x = torch.rand(4, 8, requires_grad=True)
    >>> with rk.fused_double_backward():
    ...     (grad,) = torch.autograd.grad(nn.functional.gelu(x).sum(), x, create_graph=True)
    >>> grad.square().sum().backward()
    >>> x.grad.shape
    torch.Size([4, 8])
    """
    extension = _extension("fused_double_backward")
    extension.enter()
    if save_memory:
        extension.enter_saving()
    _tag_compiled_code(extension)
    try:
        yield
    finally:
        if save_memory:
            extension.leave_saving()
        extension.leave()
        _tag_compiled_code(extension)


def fused_where_possible(impl: str = "auto") -> AbstractContextManager[None]:
    """The scope that robustkern's own penalties open: none for the reference, without the extension, or while tracing.

    What torch.compile traces is fused by `install()` alone: tracing cannot enter a scope halfway.
    """
    missing = _library.aten_why_unavailable()
    if missing and impl != "reference" and not torch.compiler.is_compiling() and not _library.why_unavailable():
        _library.warn_once(f"PyTorch's own second derivatives run: {missing}")
    if impl == "reference" or torch.compiler.is_compiling() or _library.aten_extension() is None or is_installed():
        return nullcontext()
    return fused_double_backward()


@contextmanager
def fast_input_gradient() -> Iterator[None]:
    """For a gradient that nobody differentiates: a first layer's is computed as under `install()`, no other."""
    extension = None if torch.compiler.is_compiling() else _library.aten_extension()
    if extension is None:
        yield
        return
    extension.enter_gradient()
    try:
        yield
    finally:
        extension.leave_gradient()


def replaced_operators(device: str = "cpu") -> list[str]:
    """The operators of PyTorch whose derivatives are replaced while installed, such as "aten::gelu_backward".

    Args:
        device: "cpu" or "cuda"; for "cuda" without the CUDA extension, only those that need no kernel of ours.
    """
    extension = _library.aten_extension()
    return [] if extension is None else sorted(set(extension.operators(device == "cuda")))


_tagging = threading.Lock()
_TAGS = {False: " robustkern", True: " robustkern with zeros"}


def _tag_compiled_code(extension, zeros: bool | None = None) -> None:  # type: ignore[no-untyped-def]
    """Separates torch.compile's disk caches: the key, the traced program, does not show what replaces its operators."""
    config = torch.compiler.config
    with _tagging:
        tag = config.cache_key_tag
        if zeros is None:
            zeros = _TAGS[True] in tag
        for old in reversed(_TAGS.values()):
            tag = tag.replace(old, "")
        config.cache_key_tag = tag + _TAGS[zeros] if extension.enabled() else tag


def folds(outputs: torch.Tensor, x: torch.Tensor, cotangents: int, impl: str = "auto") -> bool:
    """Whether this many backward passes from `outputs` to x are best run as one: torch.func.vmap over autograd.grad."""
    extension = _library.aten_extension()
    if impl == "reference" or extension is None or torch.compiler.is_compiling():
        return False
    return extension.folds(outputs, x, cotangents) and not _saves_through_hooks(outputs)


def _saves_through_hooks(outputs: torch.Tensor) -> bool:
    """Whether PyTorch's own nodes have saved anything through torch.autograd.graph.saved_tensors_hooks.

    Checkpointing does.  It runs the forward again inside the backward, where PyTorch's operators, under vmap, save
    other tensors or save them in another order; if their shapes agree, nothing reports the mistake.
    """
    for node in graph_nodes(outputs):
        for name in _saved_names(type(node)):
            saved = getattr(node, name)
            for tensor in saved if isinstance(saved, tuple) else (saved,):
                if tensor is not None and getattr(tensor, "unpack_hook", tensor) is not None:
                    return True  # or this PyTorch cannot tell
    return False


@functools.cache
def _saved_names(node: type) -> tuple[str, ...]:
    return tuple(name for name in dir(node) if name.startswith("_raw_saved_"))


def _extension(name: str):  # type: ignore[no-untyped-def]
    extension = _library.aten_extension()
    if extension is None:
        raise RuntimeError(f"{name}: {_library.aten_why_unavailable()}")
    _sync_batch_norm.replace(extension.enabled)
    return extension
