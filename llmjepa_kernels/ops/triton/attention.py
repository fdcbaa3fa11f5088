"""The Triton back end of attention: lays out arguments and launches the kernels."""

from __future__ import annotations

import math
from functools import cache, lru_cache, partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llmjepa_kernels.ops import autotune
from llmjepa_kernels.ops.block_mask import BlockMask
from llmjepa_kernels.ops.common import MAX_HEAD_DIM, AttentionOptions, empty_seq_major
from llmjepa_kernels.ops.triton import attention_kernels as kernels
from llmjepa_kernels.ops.triton import configs as triton_configs
from llmjepa_kernels.ops.triton.attention_tiles import HeadDim, Strided
from llmjepa_kernels.ops.triton.configs import Config, head_dim_pieces

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROW_PADDING = 128  # the largest tile: row statistics of the backward are padded to it at least
DELTA_ROWS = 32
SUM_ROWS = 32
MIN_PART = 16  # products of a part of a list
MAX_LAYOUTS = 4096  # shapes and strides whose treatment is remembered


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """out (batch, num_heads, seq, head_dim) and the natural-log lse (batch, num_heads, seq)."""
    _check(q)
    batch, num_heads, seq, _ = q.shape
    out = empty_seq_major(q)
    lse = q.new_empty(batch, num_heads, seq, dtype=torch.float32)

    def launch(config: Config) -> None:
        grid = (-(-seq // config.block_m) * batch * num_heads,)
        kernels._attention_forward_kernel[grid](
            _operand(q, config.block_m, config),
            _operand(k, config.block_n, config),
            _operand(v, config.block_n, config),
            _strided(out),
            lse,
            *_lists(mask, "kv"),
            _positions(options),
            _sinks(options),
            batch,
            num_heads,
            num_heads // k.shape[1],
            seq,
            mask.kv_indices.shape[1],
            options.window or 0,
            *_scaling(options),
            FOLD_SCALE=options.softcap is None and options.softmax_scale > 0,
            **_constants(config, q, mask, options.window),
        )

    triton_configs.launch("forward", launch, **_kind(q, mask, (q, k, v), options))
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and dsinks (None without sinks). Source: arXiv:2307.08691, Algorithm 2."""
    _check(q)
    batch, num_heads, seq, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group_size = num_heads // num_kv_heads
    dq, dk, dv = empty_seq_major(q), empty_seq_major(k), empty_seq_major(v)
    lse2, delta, dsinks = _row_statistics(dout, out, lse, _sinks(options), mask.block_size[0])
    padded = lse2.shape[-1]

    part_size, num_slots = _parts(mask, num_kv_heads, group_size, _multiprocessors(q.device))
    num_blocks = mask.num_blocks[1]
    half = 1 << (num_blocks - 1).bit_length() >> 1
    planes = batch * num_kv_heads

    def launch_dkdv(config: Config, want: str) -> None:
        block_n = mask.block_size[1]
        shape = planes, max(num_slots, 1), block_n, head_dim
        parts = {name: q.new_empty(shape, dtype=torch.float32) for name in _gradients(want)}
        dk_parts, dv_parts = (_strided(parts.get(n, parts[want[:2]])) for n in ("dk", "dv"))
        places = num_blocks + mask.q_indices.shape[1] * group_size // part_size
        grid = (places * (block_n // config.block_n) * planes,)
        kernels._attention_dkdv_kernel[grid](
            _operand(q, config.block_m, config),
            _operand(k, config.block_n, config),
            _operand(v, config.block_n, config),
            _operand(dout, config.block_m, config),
            lse2,
            delta,
            _strided(dk),
            _strided(dv),
            dk_parts,
            dv_parts,
            *_lists(mask, "q"),
            _positions(options),
            batch,
            num_heads,
            group_size,
            part_size,
            half,
            seq,
            padded,
            mask.q_indices.shape[1],
            options.window or 0,
            options.softmax_scale,
            *_scaling(options),
            WANT_DK="dk" in want,
            WANT_DV="dv" in want,
            EAGER_DP=config.eager_dp and "dk" in want,
            **_constants(config, q, mask, options.window),
        )
        if not num_slots:
            return
        rows = min(SUM_ROWS, block_n)
        kernels._attention_sum_parts_kernel[(-(-seq // rows) * planes,)](
            _strided(dk),
            _strided(dv),
            dk_parts,
            dv_parts,
            mask.q_offsets.contiguous(),
            batch,
            num_kv_heads,
            group_size,
            part_size,
            seq,
            D=HeadDim(head_dim, head_dim_pieces(head_dim), "ieee"),
            MASK_N=block_n,
            WANT_DK="dk" in want,
            WANT_DV="dv" in want,
            BLOCK_N=rows,
        )

    def launch_dq(config: Config) -> None:
        grid = (-(-seq // config.block_m) * batch * num_heads,)
        kernels._attention_dq_kernel[grid](
            _operand(q, config.block_m, config),
            _operand(k, config.block_n, config),
            _operand(v, config.block_n, config),
            _operand(dout, config.block_m, config),
            lse2,
            delta,
            _strided(dq),
            *_lists(mask, "kv"),
            _positions(options),
            batch,
            num_heads,
            group_size,
            seq,
            padded,
            mask.kv_indices.shape[1],
            options.window or 0,
            options.softmax_scale,
            *_scaling(options),
            EAGER_DP=config.eager_dp,
            **_constants(config, q, mask, options.window),
        )

    kind = _kind(q, mask, (q, k, v, dout), options)
    _, *directions = triton_configs.directions(triton_configs.current_arch(), head_dim, q.dtype)
    for direction in directions:
        run = launch_dq if direction == "dq" else partial(launch_dkdv, want=direction)
        triton_configs.launch(direction, run, **kind)
    return dq, dk, dv, dsinks


def _row_statistics(
    dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None, block_m: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """lse in base 2 and delta, (batch, num_heads, padded seq), and the gradient of the sinks.

    They are padded to whole blocks of the mask: one that is not the last of a list is visited
    whole, even behind the row.
    """
    batch, num_heads, seq, head_dim = out.shape
    padding = max(ROW_PADDING, block_m)
    padded = -(-seq // padding) * padding
    tiles = padded // DELTA_ROWS
    lse2 = lse.new_empty(batch, num_heads, padded)
    delta = torch.empty_like(lse2)
    partial = None if sinks is None else lse.new_empty(batch, num_heads, tiles)
    kernels._attention_row_statistics_kernel[(tiles * batch * num_heads,)](
        _strided(out),
        _strided(dout),
        lse.contiguous(),
        lse2,
        delta,
        sinks,
        partial,
        batch,
        num_heads,
        seq,
        padded,
        D=HeadDim(head_dim, head_dim_pieces(head_dim), "ieee"),
        BLOCK_M=DELTA_ROWS,
        enable_fp_fusion=True,
    )
    if sinks is None or partial is None:
        return lse2, delta, None
    return lse2, delta, partial.sum(dim=(0, 2)).to(sinks.dtype)


def _parts(
    mask: BlockMask, num_kv_heads: int, group_size: int, multiprocessors: int
) -> tuple[int, int]:
    """(products of a part, slots for the parts of a row's lists): see attention_tiles.

    Parts are so small that each multiprocessor gets several of an even share, and no smaller than
    is worth another program. There are no slots where no list can be so long that it has parts.
    """
    batch, tiles = mask.q_indices.shape
    products = tiles * group_size
    part_size = max(MIN_PART, -(-products * batch * num_kv_heads // (4 * multiprocessors)))
    longest = min(tiles, mask.num_blocks[0]) * group_size
    return part_size, 2 * products // part_size if longest > part_size else 0


def _gradients(want: str) -> list[str]:
    return [name for name in ("dk", "dv") if name in want]


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1  # the interpreter, and what torch cannot say of a device


def _kind(
    q: Tensor, mask: BlockMask, operands: tuple[Tensor, ...], options: AttentionOptions
) -> dict:
    """What the choice of a configuration depends on."""
    problem: tuple = ()
    if autotune.is_enabled():  # sizes to a power of two
        sizes = *q.shape[::2], mask.kv_indices.shape[1]
        given = (options.window, options.softcap, options.sinks)
        problem = (
            *(size.bit_length() for size in sizes),
            *(q.shape[1], operands[1].shape[1]),
            *(option is not None for option in given),
        )
    return {
        "head_dim": q.shape[3],
        "dtype": q.dtype,
        "block_size": tuple(mask.block_size),
        "allow_tma": all(map(_aligned, operands)),
        "problem": problem,
    }


def _lists(mask: BlockMask, side: str) -> list[Tensor]:
    names = ("visible_until", f"{side}_offsets", f"{side}_full_start", f"{side}_indices")
    return [getattr(mask, name).contiguous() for name in names]


def _positions(options: AttentionOptions) -> Tensor | None:
    return None if options.position_ids is None else options.position_ids.contiguous()


def _sinks(options: AttentionOptions) -> Tensor | None:
    return None if options.sinks is None else options.sinks.contiguous()


def _scaling(options: AttentionOptions) -> tuple[float, float | None]:
    """(a, c) of the base-2 scores a q.k, or c tanh(a q.k) with a softcap."""
    if options.softcap is None:
        return options.softmax_scale * math.log2(math.e), None
    return options.softmax_scale / options.softcap, options.softcap * math.log2(math.e)


def _constants(config: Config, q: Tensor, mask: BlockMask, window: int | None) -> dict:
    head_dim, precision = q.shape[3], "ieee"
    if q.dtype == torch.float32:
        precision = triton_configs.dot_precision(q.dtype, triton_configs.current_arch(), head_dim)
    constants = {
        "D": HeadDim(head_dim, head_dim_pieces(head_dim, config.pieces), precision),
        "MASK_M": mask.block_size[0],
        "MASK_N": mask.block_size[1],
        "ALL_MASKED": window != mask.window,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "TMA": config.tma,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    if config.maxnreg is not None:
        constants["maxnreg"] = config.maxnreg
    return constants


def _operand(x: Tensor, rows: int, config: Config) -> Strided | TensorDescriptor:
    """What a kernel reads x through: its pointer and strides, or a tensor descriptor."""
    if not config.tma:
        return _strided(x)
    # Its checks would take longer than all else here; they depend on nothing but what was seen.
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(_described(x.shape, x.stride(), x.dtype, rows, config.pieces), base=x)
    return descriptor


@lru_cache(MAX_LAYOUTS)
def _described(
    shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, rows: int, pieces: int
) -> dict[str, Any]:
    """The fields of a descriptor of such tensors, but for its base."""
    # A stride over a dimension of size 1 is arbitrary, but the hardware wants it aligned.
    strides = [s if n > 1 else shape[3] for n, s in zip(shape, stride, strict=True)]
    strides[3] = 1
    (width,) = set(head_dim_pieces(shape[3], pieces))
    base = torch.empty(0, dtype=dtype)
    fields = vars(TensorDescriptor(base, list(shape), strides, [1, 1, rows, width]))
    return {name: value for name, value in fields.items() if name != "base"}


def _strided(x: Tensor) -> Strided:
    return Strided(x, *_strides(x.shape, x.stride()))


@lru_cache(MAX_LAYOUTS)
def _strides(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, int, tl.constexpr]:
    # Over a dimension of size 1 a stride is arbitrary: zero keeps it from compiling anew. The
    # stride between tokens is a constant of the model; known to the compiler, it turns most
    # addresses into immediates.
    batch, head, row, _ = stride
    num_rows, num_heads, *_ = shape
    return batch if num_rows > 1 else 0, head if num_heads > 1 else 0, tl.constexpr(row)


def _aligned(x: Tensor) -> bool:
    """Whether a tensor descriptor can address x."""
    return x.data_ptr() % 16 == 0 and _aligned_strides(x.shape, x.stride(), x.element_size())


@lru_cache(MAX_LAYOUTS)
def _aligned_strides(shape: torch.Size, stride: tuple[int, ...], size: int) -> bool:
    return all(
        n == 1 or (step > 0 and step * size % 16 == 0)
        for n, step in zip(shape[:3], stride, strict=False)
    )


def _check(q: Tensor) -> None:
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float16, bfloat16 or float32 for impl='triton', got {q.dtype}")
    if q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[3]}")
