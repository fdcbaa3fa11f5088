"""Which back end attends: by name, by device, or by a timing of Triton against flash-attn."""

from __future__ import annotations

import functools
import importlib
import importlib.util

from torch import Tensor

from llmjepa_kernels.ops import autotune
from llmjepa_kernels.ops.block_mask import BlockMask
from llmjepa_kernels.ops.common import MAX_HEAD_DIM, AttentionOptions
from llmjepa_kernels.ops.flash_plan import FlashPlan
from llmjepa_kernels.ops.registry import AttentionBackend, default_impl, load_backend
from llmjepa_kernels.ops.schedule import forms_of

BACKENDS = {
    "triton": "llmjepa_kernels.ops.triton.attention",
    "cpu": "llmjepa_kernels.ops.cpu",
    "reference": "llmjepa_kernels.ops.reference",
    "flash": "llmjepa_kernels.ops.flash",
}


def may_choose_flash() -> bool:
    """Whether ``impl=None`` may come to mean "flash", for batches that have a `FlashPlan`."""
    return autotune.is_enabled() and any(
        importlib.util.find_spec(name) for name in ("flash_attn", "flash_attn_3")
    )


def choose(
    impl: str | None,
    qkv: tuple[Tensor, Tensor, Tensor],
    block_mask: BlockMask | None,
    plan: FlashPlan | None,
    options: AttentionOptions,
) -> tuple[AttentionBackend, BlockMask | FlashPlan]:
    """The back end, and the mask in the form that it takes."""
    if (
        impl is None
        and plan is not None
        and block_mask is not None
        and autotune.is_enabled()
        and _flash_is_faster(*qkv, block_mask, plan, options)
    ):
        impl = "flash"
    if impl is None and qkv[0].shape[-1] > MAX_HEAD_DIM:
        impl = "reference"  # Gemma 4 has heads that no kernel holds
    mask = {"block_mask": block_mask, "flash_plan": plan}[forms_of(impl)[0]]
    if mask is None:
        raise ValueError(f"impl={impl!r} needs the mask in the form that it takes, got None")
    return load_backend(BACKENDS, impl, qkv[0].device), mask


def _flash_is_faster(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    plan: FlashPlan,
    options: AttentionOptions,
) -> bool:
    """Whether flash-attn can do it, and did such forwards and backwards faster than the default."""
    flash = importlib.import_module(BACKENDS["flash"])
    try:
        kernels = flash.check(q, plan, options.softmax_scale)
    except (ValueError, RuntimeError):
        return False

    def run(impl: str, mask: BlockMask | FlashPlan) -> None:
        backend = load_backend(BACKENDS, impl, q.device)
        out, lse = backend.attention_forward(q, k, v, mask, options)
        backend.attention_backward(out, q, k, v, out, lse, mask, options)

    default = default_impl(q.device)
    candidates = {
        default: functools.partial(run, default, mask),
        "flash": functools.partial(run, "flash", plan),
    }
    # Tokens, and how they fall into sequences and calls: to a power of two.
    sizes = (len(q) * n for n in (q.shape[2], plan.calls[0].bounds.shape[2], plan.rows.shape[1]))
    kind = (
        *("attention", type(kernels).__name__, *mask.block_size),
        *(q.dtype, q.shape[1], k.shape[1], q.shape[3]),
        *(len(plan.calls), *(size.bit_length() for size in sizes)),
        *(name for name, value in vars(options).items() if value is not None),
    )
    return autotune.fastest(" ".join(map(str, kind)), candidates) == "flash"
