"""random_cotangents: random directions in the space of a model's outputs, for estimates of its Jacobian."""

import torch
from torch import Tensor

from robustkern import _library, reference
from robustkern._arguments import check_choice, check_generator, check_integer
from robustkern._choices import KINDS, LAWS, Impl, Kind, Law
from robustkern.ops._chains import register_chain
from robustkern.ops._register import register_fake, register_looped_vmap
from robustkern.ops._select import check_floating, use_kernel
from robustkern.reference.random_cotangents import draw_seed

# In the order of csrc/math/random_cotangents.h.


def random_cotangents(
    outputs: Tensor,  # [B, C] or [B, C, d1, ...]
    projections: int,
    *,
    law: Law = "sphere",
    kind: Kind = "plain",
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:  # [K, B, C, ...]
    r"""w_k = v_k, v_k - mean_c(v_k) or sqrt(p) v_k - p <sqrt(p), v_k>, with random v_k, E[v_k v_k^T] = I.

    mean_k ||J^T w_k||^2 is then an unbiased estimate for each sample, J being the Jacobian of its outputs: of
    ||J||_F^2 (plain), of ||(I - 11^T/C) J||_F^2 (centred, cross-Lipschitz), of the trace of the Fisher information
    with p = softmax(outputs) (fisher).  One sample's outputs, D = C d1 ... of them, are one vector; mean, softmax and
    inner product are taken over the C classes, at each position by itself.  Bytes moved: outputs once if fisher, the
    result once.

    Args:
        outputs: logits, [B, C] or [B, C, d1, ...] float32, float64, float16 or bfloat16; B may be 0.  They lend the
            result their shape, dtype and device; only kind="fisher" reads them.
        projections: K >= 1.
        law: of v.  "sphere": sqrt(D) times a unit vector; "gaussian": normal entries; "rademacher": entries +-1;
            "orthonormal": sqrt(D) times K orthonormal vectors, uniformly distributed (Haar), K <= D: of all laws the
            least variance, none at K = D.
        kind: "plain", "centred" or "fisher", as above.
        generator: source of the seed, on the device of outputs.  None: the default one.  torch.compile traces
            no generators: give a compiled function the seed.
        seed: one int64 on the device of outputs, [1].  The same seed gives the same v.
        impl: "auto" (the kernel if there is one), "kernel" or "reference".

    Returns:
        [K, *outputs.shape] in the dtype of outputs; computed in float32, float64 for float64, from the same random
        bits in every dtype.

    Raises:
        TypeError: outputs is not a floating-point tensor.
        ValueError: an unknown law or kind, K < 1, K > D for "orthonormal", a seed that is not one int64, a seed or
            generator on another device, or both of them.

    Differentiability: kind="fisher" once in outputs; a further derivative raises.  The others do not depend on them.
    Determinism: Philox4x32-10, keyed by the seed and counted by entry, projection and sample: the same bits on every
    run, on CPU and CUDA, and for any number of threads.  Without a seed, the result follows the generator.  Saved for
    backward: outputs and the seed, from which v is drawn again.

    >>> v = rk.ops.random_cotangents(torch.zeros(2, 4), 3, law="orthonormal")  # [K, B, C]
    >>> torch.allclose(v[:, 0] @ v[:, 0].T, 4 * torch.eye(3), atol=1e-5)  # of length sqrt(C)
    True
    """
    op = "random_cotangents"
    check_floating(op, "outputs", outputs)
    if outputs.dim() < 2:
        raise ValueError(f"{op}: outputs must be [B, C] or [B, C, ...], got shape {list(outputs.shape)}")
    check_choice(op, "law", law, LAWS)
    check_choice(op, "kind", kind, KINDS)
    projections = check_integer(op, "projections", projections, 1)
    if law == "orthonormal" and projections > (size := outputs.shape[1:].numel()):
        more = f"{size} are exact already, and the other laws take any number" if size else "outputs has no entries"
        raise ValueError(
            f"{op}: projections must be at most {size} for orthonormal vectors in {size} dimensions, got {projections};"
            f" {more}"
        )
    if seed is None:
        check_generator(op, generator, outputs.device)
        seed = draw_seed(outputs, generator)
    elif generator is not None:
        raise ValueError(f"{op}: give a generator or a seed, not both")
    elif not isinstance(seed, Tensor):
        raise TypeError(f"{op}: seed must be a tensor of one int64, got {type(seed).__name__}")
    elif seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != outputs.device:
        raise ValueError(
            f"{op}: seed must be one int64 on {outputs.device} like outputs, "
            f"got {list(seed.shape)} {str(seed.dtype).removeprefix('torch.')} on {seed.device}"
        )
    elif seed.dim() != 1:
        seed = seed.reshape(1)
    if not use_kernel(op, impl, outputs):
        outputs = outputs if kind == "fisher" else outputs.detach()
        return reference.random_cotangents(outputs, projections, law=law, kind=kind, seed=seed)
    outputs = outputs if kind == "fisher" else outputs.detach()
    return torch.ops.robustkern.random_cotangents(outputs, seed, projections, LAWS.index(law), KINDS.index(kind))


def _register() -> None:
    ops = torch.ops.robustkern

    @register_fake("random_cotangents")
    def _(outputs, seed, projections, law, kind):  # type: ignore[no-untyped-def]
        return outputs.new_empty([projections, *outputs.shape])

    @register_fake("random_cotangents_backward")
    def _(grad, outputs, seed, law):  # type: ignore[no-untyped-def]
        return outputs.new_empty(outputs.shape)

    register_chain("random_cotangents", only=("kind", KINDS.index("fisher")))

    # Each mapped call draws v from its seed as a loop would; one call on all rows would draw other numbers.
    register_looped_vmap(ops.random_cotangents)
    register_looped_vmap(ops.random_cotangents_backward)


if _library.extension() is not None:
    _register()
