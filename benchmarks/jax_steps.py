"""A network of PyTorch's as a function of JAX, with the same weights: its exported graph, operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MISSING = "no JAX: pip install jax"


def available() -> bool:
    return find_spec("jax") is not None


def penalised_step(
    model: nn.Module, x: Tensor, y: Tensor, p: float, squared: bool, weight: float
) -> Callable[[], tuple[Tensor, ...]]:
    """A jitted step: the gradients of cross-entropy + weight * penalty in the model's parameters.

    jax.grad of a function that calls jax.grad, in float32 (float64 for float64 weights); BatchNorm normalises with the
    statistics of the batch.  Running it waits for the result.

    Raises:
        RuntimeError: JAX is not installed.
        NotImplementedError: the network has an operator that is not translated.
    """
    if not available():
        raise RuntimeError(MISSING)
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", x.dtype == torch.float64)
    network, names = translated(model, x)
    parameters = {name: jnp.asarray(value.detach().numpy()) for name, value in model.named_parameters()}
    images, labels = jnp.asarray(x.detach().numpy()), jnp.asarray(y.numpy())

    def losses(weights: Any, inputs: Any) -> Any:
        logits = network(weights, inputs)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]

    def total(weights: Any, inputs: Any) -> Any:
        value, back = jax.vjp(lambda images: losses(weights, images), inputs)
        (grad,) = back(jnp.ones_like(value))
        rows = grad.reshape(len(grad), -1)
        norm = jnp.square(rows).sum(1) if squared else jnp.linalg.norm(rows, p, axis=1)
        return value.mean() + weight * norm.mean()

    gradient = jax.jit(jax.grad(total))

    def step() -> tuple[Tensor, ...]:
        result = jax.block_until_ready(gradient(parameters, images))
        return tuple(torch.from_numpy(np.asarray(result[name])) for name in names)

    return step


def translated(model: nn.Module, x: Tensor) -> tuple[Callable[[Any, Any], Any], list[str]]:
    """The network as a function of its weights, by name, and an input; and the names, in PyTorch's order."""
    import jax.numpy as jnp
    from torch.export.graph_signature import InputKind

    exported = torch.export.export(model, (x.detach(),)).run_decompositions()
    kinds = {spec.arg.name: (spec.kind, spec.target) for spec in exported.graph_signature.input_specs}
    constants = {**dict(model.named_buffers()), **exported.constants}
    operators = _operators()

    def network(weights: Any, inputs: Any) -> Any:
        values: dict[Any, Any] = {}
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                kind, target = kinds[node.name]
                if kind == InputKind.PARAMETER:
                    values[node] = weights[target]
                elif kind == InputKind.USER_INPUT:
                    values[node] = inputs
                else:
                    values[node] = jnp.asarray(constants[target].detach().numpy())
            elif node.op == "call_function":
                name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
                if name not in operators:
                    raise NotImplementedError(f"no translation of {node.target} to JAX")
                arguments = torch.fx.node.map_arg(node.args, values.__getitem__)
                options = torch.fx.node.map_arg(dict(node.kwargs), values.__getitem__)
                values[node] = operators[name](*arguments, **options)
            elif node.op == "output":
                results = torch.fx.node.map_arg(node.args[0], values.__getitem__)
                return results[-1]  # before it stand the buffers that the network has changed
        raise AssertionError("a graph without output")

    return network, [name for name, _ in model.named_parameters()]


def _operators() -> dict[str, Callable[..., Any]]:
    """Of PyTorch's core operators those that the networks here are made of."""
    import jax
    import jax.numpy as jnp

    def convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups):  # type: ignore[no-untyped-def]
        assert not transposed
        result = jax.lax.conv_general_dilated(
            x, w, stride, [(p, p) for p in padding], rhs_dilation=dilation, feature_group_count=groups,
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )  # fmt: skip
        return result if b is None else result + b[:, None, None]

    def normalised(x, axes, eps):  # type: ignore[no-untyped-def]
        mean = x.mean(axes, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(axes, keepdims=True) + eps)

    def batch_norm(x, w, b, running_mean, running_var, training, momentum, eps):  # type: ignore[no-untyped-def]
        assert training
        shape = (1, -1, *[1] * (x.ndim - 2))
        axes = (0, *range(2, x.ndim))
        return normalised(x, axes, eps) * w.reshape(shape) + b.reshape(shape), None, None, None, None

    def layer_norm(x, shape, w, b, eps):  # type: ignore[no-untyped-def]
        result = normalised(x, tuple(range(-len(shape), 0)), eps)
        result = result if w is None else result * w
        return result if b is None else result + b, None, None

    def group_norm(x, w, b, samples, channels, positions, groups, eps):  # type: ignore[no-untyped-def]
        result = normalised(x.reshape(samples, groups, -1), (2,), eps).reshape(x.shape)
        return result * w[:, None, None] + b[:, None, None], None, None

    def gelu(x, approximate="none"):  # type: ignore[no-untyped-def]
        return jax.nn.gelu(x, approximate=approximate == "tanh")

    def addmm(c, a, b):  # type: ignore[no-untyped-def]
        return a @ b + c

    def attention(q, k, v, dropout_p=0.0, is_causal=False, **options):  # type: ignore[no-untyped-def]
        assert not is_causal and not dropout_p and options.get("attn_mask") is None
        scale = options.get("scale") or q.shape[-1] ** -0.5
        return jax.nn.softmax(scale * q @ jnp.swapaxes(k, -1, -2), axis=-1) @ v, None

    def average_pool(x, size, stride=None, padding=(0, 0)):  # type: ignore[no-untyped-def]
        assert not any(padding)
        stride = stride or size
        window = (1, 1, *size), (1, 1, *stride)
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, *window, "VALID") / (size[0] * size[1])

    def adaptive_average_pool(x, size):  # type: ignore[no-untyped-def]
        n, c, h, w = x.shape
        return x.reshape(n, c, size[0], h // size[0], size[1], w // size[1]).mean((3, 5))

    def mean(x, dims=None, keepdim=False):  # type: ignore[no-untyped-def]
        return x.mean(None if dims is None else tuple(dims), keepdims=keepdim)

    def slices(x, dim=0, start=None, end=None, step=1):  # type: ignore[no-untyped-def]
        index = [slice(None)] * x.ndim
        index[dim] = slice(start, end if end is None else min(end, x.shape[dim]), step)
        return x[tuple(index)]

    def expand(x, shape):  # type: ignore[no-untyped-def]
        known = (1,) * (len(shape) - x.ndim) + x.shape
        return jnp.broadcast_to(x, [have if want == -1 else want for have, want in zip(known, shape)])

    return {
        "convolution": convolution, "_native_batch_norm_legit_functional": batch_norm,
        "native_layer_norm": layer_norm, "native_group_norm": group_norm,
        "relu": jax.nn.relu, "gelu": gelu, "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh,
        "addmm": addmm, "mm": jnp.matmul, "bmm": jnp.matmul, "_softmax": lambda x, dim, half: jax.nn.softmax(x, dim),
        "_scaled_dot_product_flash_attention_for_cpu": attention,
        "avg_pool2d": average_pool, "_adaptive_avg_pool2d": adaptive_average_pool, "mean": mean,
        "add": lambda a, b, alpha=1: a + alpha * b, "sub": lambda a, b, alpha=1: a - alpha * b,
        "mul": jnp.multiply, "div": jnp.divide,
        "view": lambda x, shape: x.reshape(shape), "_unsafe_view": lambda x, shape: x.reshape(shape),
        "reshape": lambda x, shape: x.reshape(shape), "permute": lambda x, dims: x.transpose(dims),
        "transpose": jnp.swapaxes, "t": jnp.transpose, "clone": lambda x, **_: x, "alias": lambda x: x,
        "unsqueeze": jnp.expand_dims, "squeeze": lambda x, dims: jnp.squeeze(x, tuple(np.atleast_1d(dims))),
        "expand": expand, "select": lambda x, dim, index: jnp.take(x, index, axis=dim), "slice": slices,
        "eq": lambda a, b: a == b, "logical_not": jnp.logical_not, "where": jnp.where,
        "any": lambda x, dim, keepdim=False: jnp.any(x, dim, keepdims=keepdim),
        "full_like": lambda x, value, **_: jnp.full_like(x, value),
        "cat": lambda tensors, dim=0: jnp.concatenate(tensors, dim), "getitem": lambda results, index: results[index],
    }  # fmt: skip
