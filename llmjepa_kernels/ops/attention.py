"""view_attention: validates, chooses a back end, and is one differentiable operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmjepa_kernels.checks import LARGEST, check_finite, plain
from llmjepa_kernels.ops.block_mask import BlockMask, check_window, int32_positions
from llmjepa_kernels.ops.choice import choose
from llmjepa_kernels.ops.common import AttentionOptions, empty_seq_major, refuse_if
from llmjepa_kernels.ops.flash_plan import FlashPlan
from llmjepa_kernels.ops.registry import (
    AttentionBackend,
    backward_operation,
    on_device_of,
    operation,
    refuse_vmap,
    runs_eagerly,
)

MAX_SOFTCAP = LARGEST / 2  # Triton's powers are of base 2


def view_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    *,
    position_ids: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    sinks: Tensor | None = None,
    block_mask: BlockMask | None = None,
    flash_plan: FlashPlan | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attention in which a token sees its own segment and the segments above it.

    Query ``i`` sees key ``j`` if ``j <= i < visible_until[j]``. No tile of the score matrix in
    which nothing is visible is ever touched, and nothing of size ``seq x seq`` is stored.

    Args:
        q: (batch, num_heads, seq, head_dim) with unit stride in head_dim.
        k: (batch, num_kv_heads, seq, head_dim); num_kv_heads divides num_heads.
        v: Like k.
        visible_until: (batch, seq) int32, as in `PackedBatch`.
        position_ids: (batch, seq) int that fits in int32; needed with `window`. Passed as int32
            it need not be checked and copied in every call.
        window: Sliding window: also require ``position[i] - position[j] < window``.
        softcap: Replaces each score s by ``softcap * tanh(s / softcap)``.
        softmax_scale: Multiplies q·k. Default: ``head_dim ** -0.5``.
        sinks: (num_heads,); a learnable score per head that takes part in the softmax but has
            no value (gpt-oss).
        block_mask: The tiles to visit. Default: built here from `visible_until`, which costs
            about as much as a small kernel; pass it when several layers share one mask, and to
            torch.export and ``torch.compile(fullgraph=True)``.
        flash_plan: The calls of ``impl="flash"``. Default: made here where they are needed, which
            waits for the device; pass it when several layers share one mask.
        impl: "triton", "cpu", "reference" or "flash" (flash-attn's kernels; CUDA only, installed
            with the extra `flash`). An explicit choice never falls back to another. Default: by
            the device of q. That is never "flash", unless ``LLMJEPA_AUTOTUNE=1`` is set and a
            `flash_plan` given: then it is taken where a forward and backward in it were faster
            than in Triton when such shapes were first met.

    Returns:
        out: Like q, stored as a contiguous (batch, seq, num_heads, head_dim) buffer.

    Raises:
        ValueError: A shape, dtype, device or option differs from the above; says which.
        RuntimeError: The chosen back end cannot run here; says why.

    Source: FlashAttention-2, arXiv:2307.08691; FlashMask, arXiv:2410.01359.
    """
    _check_tensors(q, k, v, visible_until, sinks)
    if window is not None:
        check_window(window, position_ids, visible_until)
        window = plain(window)
    if softcap is not None:
        check_finite("softcap", softcap, positive=True)
        softcap = plain(softcap)
        if isinstance(softcap, int | float) and softcap > MAX_SOFTCAP:
            raise ValueError(f"softcap must be at most {MAX_SOFTCAP:g}, got {softcap}")
    if softmax_scale is not None:
        check_finite("softmax_scale", softmax_scale)
        softmax_scale = plain(softmax_scale)
    flash_plan = _fitting_plan(flash_plan, visible_until, position_ids, window, impl)
    if impl == "flash":
        block_mask = None
    elif block_mask is None:
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break("pass a block_mask to view_attention")
        elif torch.compiler.is_compiling():
            raise ValueError("block_mask must be given to export: its lists depend on data")
        block_mask = BlockMask.from_visible_until(
            visible_until, position_ids=position_ids, window=window
        )
    if block_mask is not None:
        _check_block_mask(block_mask, visible_until, window)
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    position_ids = position_ids if window is not None else None
    if runs_eagerly(q, k, v, sinks):
        if sinks is not None and sinks.device.type == "cpu":  # a GPU would wait, in every layer
            refuse_if(~(sinks < torch.inf).all(), "sinks must be numbers below infinity")
        if block_mask is not None:
            block_mask = block_mask.resolved()
        options = _options(position_ids, window, softcap, softmax_scale, sinks)
        return _EagerAttention.apply(
            q, k, v, sinks, position_ids, block_mask, flash_plan, options, impl
        )
    refuse_vmap(q, k, v, sinks)
    out, _ = torch.ops.llmjepa_kernels.attention_forward(
        *(q, k, v, *_flat(block_mask, flash_plan)),
        *(position_ids, window, softcap, softmax_scale, sinks, impl),
    )
    return out


class _EagerAttention(torch.autograd.Function):
    """The operation below as autograd alone needs it, at a fraction of torch.library's cost."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, position_ids, block_mask, flash_plan, options, impl):
        with on_device_of(q):
            backend, mask = choose(impl, (q, k, v), block_mask, flash_plan, options)
            out, lse = backend.attention_forward(q, k, v, mask, options)
        # All, so that autograd notices if one has changed until the backward, and in the order of
        # the operation below, which may take this one's place where a checkpoint computes it again.
        tensors, _, _, plan = _flat(block_mask, flash_plan)
        ctx.save_for_backward(q, k, v, out, lse, position_ids, sinks, *tensors, *plan)
        ctx.arguments = backend, mask, block_mask, flash_plan, options, impl
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, _, sinks, *_ = ctx.saved_tensors
        refuse_vmap(dout)
        backend, mask, block_mask, flash_plan, options, impl = ctx.arguments
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        if runs_eagerly(dout) and not torch.is_grad_enabled():
            with on_device_of(q):
                dq, dk, dv, dsinks = backend.attention_backward(
                    dout, q, k, v, out, lse, mask, options
                )
        else:  # among others a second derivative, which the operation refuses
            dq, dk, dv, dsinks = torch.ops.llmjepa_kernels.attention_backward(
                *(dout, q, k, v, out, lse, *_flat(block_mask, flash_plan)),
                *(options.position_ids, options.window, options.softcap, options.softmax_scale),
                *(sinks, impl),
            )
        return dq, dk, dv, None if sinks is None else dsinks, *[None] * 5


# The operation as torch sees it. A BlockMask travels as its tensors and two plain values, a
# FlashPlan as its tensors; one that is not needed, as no tensors.


def _flat(
    mask: BlockMask | None, plan: FlashPlan | None
) -> tuple[list[Tensor], tuple[int, int], int | None, list[Tensor]]:
    tensors = [] if plan is None else plan.tensors()
    if mask is None:
        return [], (0, 0), None, tensors
    return [mask.visible_until, *mask.schedule_tensors()], mask.block_size, mask.window, tensors


def _resolve(
    qkv: tuple[Tensor, Tensor, Tensor],
    mask: Sequence[Tensor],
    block_size: Sequence[int],
    mask_window: int | None,
    plan: Sequence[Tensor],
    options: AttentionOptions,
    impl: str | None,
) -> tuple[AttentionBackend, BlockMask | FlashPlan]:
    """The back end, and the mask in the form that it takes."""
    block_mask = flash_plan = None
    if mask:
        block_mask = BlockMask.from_tensors(mask, block_size, mask_window)
    if plan:
        flash_plan = FlashPlan.from_tensors(plan, qkv[0].shape[2])
    return choose(impl, qkv, block_mask, flash_plan, options)


def _options(
    position_ids: Tensor | None,
    window: int | None,
    softcap: float | None,
    softmax_scale: float,
    sinks: Tensor | None,
) -> AttentionOptions:
    positions = None if position_ids is None else int32_positions(position_ids)
    return AttentionOptions(softmax_scale, positions, window, softcap, sinks)


@operation("llmjepa_kernels::attention_forward")
def _attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Sequence[Tensor],
    block_size: Sequence[int],
    mask_window: int | None,
    plan: Sequence[Tensor],
    position_ids: Tensor | None,
    window: int | None,
    softcap: float | None,
    softmax_scale: float,
    sinks: Tensor | None,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    options = _options(position_ids, window, softcap, softmax_scale, sinks)
    backend, form = _resolve((q, k, v), mask, block_size, mask_window, plan, options, impl)
    return backend.attention_forward(q, k, v, form, options)


@torch.library.register_fake("llmjepa_kernels::attention_forward")
def _(q, k, v, *arguments):
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return empty_seq_major(q), q.new_empty(q.shape[:3], dtype=lse_dtype)


@backward_operation("llmjepa_kernels::attention_backward")
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Sequence[Tensor],
    block_size: Sequence[int],
    mask_window: int | None,
    plan: Sequence[Tensor],
    position_ids: Tensor | None,
    window: int | None,
    softcap: float | None,
    softmax_scale: float,
    sinks: Tensor | None,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = _options(position_ids, window, softcap, softmax_scale, sinks)
    backend, form = _resolve((q, k, v), mask, block_size, mask_window, plan, options, impl)
    dq, dk, dv, dsinks = backend.attention_backward(dout, q, k, v, out, lse, form, options)
    # An operation cannot return None.
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


@torch.library.register_fake("llmjepa_kernels::attention_backward")
def _(dout, q, k, v, out, lse, *arguments):
    *_, sinks, _impl = arguments
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return empty_seq_major(q), empty_seq_major(k), empty_seq_major(v), dsinks


def _setup_context(ctx, inputs, output):
    q, k, v, mask, block_size, mask_window, plan, position_ids, *options, sinks, impl = inputs
    ctx.save_for_backward(q, k, v, *output, position_ids, sinks, *mask, *plan)
    ctx.mark_non_differentiable(output[1])
    ctx.arguments = (len(mask), tuple(block_size), mask_window, options, impl)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _dlse):
    q, k, v, out, lse, position_ids, sinks, *tensors = ctx.saved_tensors
    size, block_size, mask_window, options, impl = ctx.arguments
    mask, plan = tensors[:size], tensors[size:]
    nothing = ([None] * len(mask), None, None, [None] * len(plan), *[None] * 4)
    if dout is None:
        return None, None, None, *nothing, None, None
    refuse_vmap(dout)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dq, dk, dv, dsinks = torch.ops.llmjepa_kernels.attention_backward(
        *(dout, q, k, v, out, lse, mask, block_size, mask_window, plan, position_ids, *options),
        *(sinks, impl),
    )
    return dq, dk, dv, *nothing, None if sinks is None else dsinks, None


torch.library.register_autograd(
    "llmjepa_kernels::attention_forward", _backward, setup_context=_setup_context
)


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, sinks: Tensor | None
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have shape (batch, heads, seq, head_dim), got {tuple(x.shape)}"
            )
        if x.dtype != q.dtype or not x.dtype.is_floating_point:
            raise ValueError(
                "q, k and v must share one floating-point dtype, got "
                f"{q.dtype}, {k.dtype}, {v.dtype}"
            )
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            raise ValueError(
                f"{name} must have unit stride in head_dim, got strides {x.stride()}; "
                "call .contiguous()"
            )
    batch, num_heads, seq, head_dim = q.shape
    if q.numel() == 0:
        raise ValueError(f"q must not be empty, got shape {tuple(q.shape)}")
    kv_shape = (batch, k.shape[1], seq, head_dim)
    if k.shape != kv_shape or v.shape != kv_shape:
        raise ValueError(
            f"k and v must have shape (batch, num_kv_heads, seq, head_dim) matching q "
            f"{tuple(q.shape)}, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or num_heads % k.shape[1]:
        raise ValueError(
            f"num_kv_heads must divide num_heads, got {k.shape[1]} and {num_heads} heads"
        )
    if visible_until.dtype != torch.int32 or visible_until.shape != (batch, seq):
        raise ValueError(
            f"visible_until must be int32 of shape {(batch, seq)}, got "
            f"{visible_until.dtype} of shape {tuple(visible_until.shape)}"
        )
    if sinks is not None and (sinks.shape != (num_heads,) or not sinks.dtype.is_floating_point):
        raise ValueError(
            f"sinks must be floating point of shape {(num_heads,)}, got "
            f"{sinks.dtype} of shape {tuple(sinks.shape)}"
        )
    others = {"k": k, "v": v, "visible_until": visible_until, "sinks": sinks}
    for name, other in others.items():
        if other is not None and other.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {other.device}")


def _check_block_mask(mask: BlockMask, visible_until: Tensor, window: int | None) -> None:
    if mask.visible_until.shape != visible_until.shape or (
        mask.visible_until.device != visible_until.device
    ):
        raise ValueError(
            "block_mask must be built from this visible_until: expected shape "
            f"{tuple(visible_until.shape)} on {visible_until.device}, got "
            f"{tuple(mask.visible_until.shape)} on {mask.visible_until.device}"
        )
    # The kernels read the mask's own; and a compiler cannot look.
    if mask.visible_until is not visible_until and not torch.compiler.is_compiling():
        refuse_if(
            (mask.visible_until != visible_until).any(),
            "block_mask was built from another visible_until than was given",
        )
    if mask.window is not None and mask.window != window:
        raise ValueError(
            f"block_mask was built for window={mask.window}, but window={window} was given"
        )


def _fitting_plan(
    plan: FlashPlan | None,
    visible_until: Tensor,
    position_ids: Tensor | None,
    window: int | None,
    impl: str | None,
) -> FlashPlan | None:
    """A plan of this mask and window, if `impl` may need one."""
    if impl not in (None, "flash"):
        return None
    if plan is not None:
        shape = (len(plan.rows), plan.seq)
        if shape != visible_until.shape or plan.rows.device != visible_until.device:
            raise ValueError(
                "flash_plan must be made from this visible_until: expected shape "
                f"{tuple(visible_until.shape)} on {visible_until.device}, got {shape} on "
                f"{plan.rows.device}"
            )
        if plan.window is not None and plan.window != window:
            raise ValueError(
                f"flash_plan was made for window={plan.window}, but window={window} was given"
            )
        hides_nothing = window and plan.reach is not None and plan.reach <= window
        if window == plan.window or hides_nothing:
            return plan  # else one for this window is made, or says why there is none
    if impl is None:
        return None
    return FlashPlan.from_visible_until(visible_until, position_ids=position_ids, window=window)
