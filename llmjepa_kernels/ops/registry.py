"""Back ends by their names, and how functions become operations of torch."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from llmjepa_kernels.ops.common import AttentionOptions


class AttentionBackend(Protocol):
    """A module that computes attention in two functions.

    Validation, autograd, registration with torch and the fakes are written once, in `attention`.
    `mask` is a `BlockMask`, or a `FlashPlan` for "flash".
    """

    def attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        """out like q, stored as (batch, seq, num_heads, head_dim), and the natural-log lse."""
        ...

    def attention_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Any,
        options: AttentionOptions,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv, stored like out, and dsinks (None without sinks)."""
        ...


# At every call of a small operation the import system's own look-up would show.
_module = functools.cache(importlib.import_module)
CONFIGS = "llmjepa_kernels.ops.triton.configs"


def default_impl(device: torch.device) -> str:
    """The back end for tensors on `device`."""
    if device.type in ("cuda", "xpu"):
        return "triton"
    if device.type == "cpu":
        if _module("llmjepa_kernels.ops.cpu").is_available():
            return "cpu"
        _warn_of_reference()
    return "reference"


@functools.cache
def _warn_of_reference() -> None:
    warnings.warn(
        "the compiled CPU kernels are missing, so attention builds the whole (seq, seq) matrix: "
        "install a C++ compiler and reinstall llmjepa_kernels",
        RuntimeWarning,
        stacklevel=3,
    )


def load_backend(backends: Mapping[str, str], impl: str | None, device: torch.device) -> Any:
    """The module of a back end by its name, or by the device where none is given.

    Raises:
        ValueError: There is no such back end.
        RuntimeError: It does not run on `device`.
    """
    impl = default_impl(device) if impl is None else impl
    if impl not in backends:
        raise ValueError(f"impl must be one of {sorted(backends)}, got {impl!r}")
    if impl == "cpu" and device.type != "cpu":
        raise RuntimeError(f"impl='cpu' runs on CPU tensors, got tensors on {device}")
    if impl == "triton":
        check_can_launch("impl='triton'", device)
    return _module(backends[impl])


def check_can_launch(what: str, device: torch.device) -> None:
    """Raises RuntimeError, in the name of `what`, where Triton has no way to run on `device`."""
    if device.type == "cpu" and not _module(CONFIGS).can_launch():
        raise RuntimeError(
            f"{what} runs on GPU tensors, and on CPU tensors where Triton interprets "
            "(TRITON_INTERPRET=1, set before it is imported), got tensors on cpu"
        )


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes x's device the current one: that is where Triton launches, and on its stream."""
    return torch.accelerator.device_index(x.device.index)


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """Whether only autograd looks on: no compiler, tracer, mode, transform or kind of tensor.

    All of these see an operation of torch; a plain `torch.autograd.Function` costs less.

    Raises:
        RuntimeError: A transform or forward-mode differentiation looks on that neither supports.
    """
    if torch.compiler.is_compiling():
        return False
    transformed = torch._C._are_functorch_transforms_active()
    if transformed or getattr(forward_ad, "_current_level", 0) >= 0:
        _refuse_derivatives([x for x in tensors if x is not None])
    return not (
        transformed
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or any(x is not None and (type(x) not in _PLAIN or x.is_meta) for x in tensors)
    )


_PLAIN = (Tensor, torch.nn.Parameter)


_BATCHED = (torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor)


def refuse_vmap(*tensors: Tensor | None) -> None:
    """Raises RuntimeError for tensors that torch.vmap or is_grads_batched has taken apart."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and any(is_one(x) for is_one in _BATCHED) for x in tensors):
        raise RuntimeError(
            "torch.vmap cannot map view_attention and the losses: make the mapped dimension part "
            "of the batch"
        )


def _refuse_derivatives(tensors: list[Tensor]) -> None:
    """Raises RuntimeError for tangents, which torch would drop, and for torch.func.grad."""
    tangents = any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    if tangents or any(map(torch._C._functorch.is_gradtrackingtensor, tensors)):
        raise RuntimeError(
            "view_attention and the losses have no forward-mode derivatives, and torch.func's "
            "grad, vjp and jvp cannot see into them: use backward() or torch.autograd.grad"
        )


def operation(name: str) -> Callable[[Callable], Callable]:
    """Makes a function an operation of torch, for all devices, on that of its first tensor.

    As `torch.library.custom_op` does, without its checks for aliases at every call, which take
    longer than a small kernel; `torch.library.opcheck` makes them in the tests.
    """

    def register(function: Callable) -> Callable:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)

        @functools.wraps(function)
        def run(x: Tensor, *arguments: Any) -> Any:
            with on_device_of(x):
                return function(x, *arguments)

        torch.library.impl(name, "default", run)
        return run

    return register


def backward_operation(name: str) -> Callable[[Callable], Callable]:
    """Makes the gradients of an operation one themselves, which refuses to be differentiated.

    Left alone, torch would drop second derivatives with no more than a warning.
    """

    def refuse(ctx, *gradients):
        raise RuntimeError(
            f"{name} is not differentiable: view_attention and the losses have no second "
            "derivatives"
        )

    def register(function: Callable) -> Callable:
        run = operation(name)(function)
        torch.library.register_autograd(name, refuse)
        return run

    return register
