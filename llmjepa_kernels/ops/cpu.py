"""CPU back end of the operations: C++ kernels for AVX-512, AMX, AVX2, NEON and plain vectors.

Everything is summed in float32 (float64 for float64). On AVX512-BF16, and on AMX where it is asked
for before the first use, attention of bfloat16 multiplies pairs of them, and rounds P and dS for it
as GPUs do; elsewhere it widens them first.

Source: FlashAttention-2, arXiv:2307.08691, in the layout that csrc/attention.h describes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llmjepa_kernels.ops.block_mask import BlockMask, check_visible_until
from llmjepa_kernels.ops.common import (
    MAX_HEAD_DIM,
    AttentionOptions,
    check_pairs,
    compute_dtype,
    empty_seq_major,
)

# Another library, as built with sanitizers, and another instruction set than the best.
LIBRARY_VARIABLE = "LLMJEPA_CPU_LIBRARY"
ISA_VARIABLE = "LLMJEPA_CPU_ISA"
LIBRARY = Path(os.environ.get(LIBRARY_VARIABLE) or Path(__file__).with_name("_cpu.so"))
SOURCES = Path(__file__).parents[2] / "csrc"  # in a checkout
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
METRICS = {"cosine": 0, "l2": 1, "mse": 2}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
OK, OUT_OF_MEMORY, OUT_OF_RANGE, BAD_SCHEDULE = range(4)  # LkStatus


@cache
def is_available() -> bool:
    """Whether the compiled library is there."""
    return LIBRARY.exists()


def isas() -> list[str]:
    """The instruction sets the library has kernels for and this machine can run, best first."""
    library = _library()
    names: list[str] = []
    while name := library.lk_isa_name(len(names)):
        names.append(name.decode())
    return names


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """out, stored as (batch, seq, num_heads, head_dim), and lse (batch, num_heads, seq)."""
    call = _AttentionCall(q, k, v, mask, options)
    out, lse = empty_seq_major(q), call.stats()
    call.set(out=out, lse=lse)
    call.run("lk_attention_forward")
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
    """dq, dk, dv, stored like out, and dsinks (None without sinks)."""
    call = _AttentionCall(q, k, v, mask, options)
    dq, dk, dv = (empty_seq_major(x) for x in (q, k, v))
    call.set(dout=dout, out=out, lse=lse.contiguous(), dq=dq, dk=dk, dv=dv)
    if options.sinks is None:
        call.run("lk_attention_backward")
        return dq, dk, dv, None
    dsinks = torch.empty_like(call.sinks)
    call.set(delta=call.stats(), dsinks=dsinks)
    call.run("lk_attention_backward")
    return dq, dk, dv, dsinks.to(options.sinks.dtype)


def distance_forward(
    hidden: Tensor, pairs: Tensor, *, metric: str, reduction: str
) -> tuple[Tensor, Tensor]:
    """The loss: (batch, num_pairs) or reduced; and what its backward needs (…, 3)."""
    dtype, shape = compute_dtype(hidden), pairs.shape[:2]
    loss = hidden.new_empty(shape if reduction == "none" else (), dtype=dtype)
    stats = hidden.new_empty(*shape, 3, dtype=dtype)
    _run_pairs(
        "lk_distance_forward",
        hidden,
        pairs,
        metric=METRICS[metric],
        reduction=REDUCTIONS[reduction],
        stats=stats.data_ptr(),
        loss=loss.data_ptr(),
    )
    return loss, stats


def distance_backward(
    ddistance: Tensor, hidden: Tensor, pairs: Tensor, stats: Tensor, *, metric: str
) -> Tensor:
    """dhidden (batch, seq, hidden_size), zero except at the pairs' rows."""
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    ddistance, stats = ddistance.contiguous(), stats.contiguous()
    _run_pairs(
        "lk_distance_backward",
        hidden,
        pairs,
        metric=METRICS[metric],
        ddistance=ddistance.data_ptr(),
        stats=stats.data_ptr(),
        dhidden=dhidden.data_ptr(),
    )
    return dhidden


def views_forward(hidden: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs' rows at length 1, (2, batch, num_pairs, hidden_size), and their squared norms."""
    dtype, (batch, num_pairs, _) = compute_dtype(hidden), pairs.shape
    views = hidden.new_empty(2, batch, num_pairs, hidden.shape[2], dtype=dtype)
    squares = hidden.new_empty(2, batch, num_pairs, dtype=dtype)
    _run_pairs(
        "lk_views_forward", hidden, pairs, views=views.data_ptr(), squares=squares.data_ptr()
    )
    return views, squares


def views_backward(
    dviews: Tensor, hidden: Tensor, pairs: Tensor, views: Tensor, squares: Tensor
) -> Tensor:
    """dhidden (batch, seq, hidden_size), zero except at the pairs' rows."""
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    dviews, views, squares = (x.contiguous() for x in (dviews, views, squares))
    dots = torch.empty_like(squares)
    _run_pairs(
        "lk_views_backward",
        hidden,
        pairs,
        dviews=dviews.data_ptr(),
        views=views.data_ptr(),
        squares=squares.data_ptr(),
        dots=dots.data_ptr(),
        dhidden=dhidden.data_ptr(),
    )
    return dhidden


def tubes_forward(hidden: Tensor, tubes: Tensor) -> Tensor:
    """Both vectors of each tube, (batch, num_tubes, 2, hidden_size)."""
    vectors = hidden.new_empty(*tubes.shape[:3], hidden.shape[2], dtype=compute_dtype(hidden))
    status = _run_tubes(
        "lk_tubes_forward",
        tubes,
        hidden.shape,
        hidden.dtype,
        hidden_batch_stride=hidden.stride(0),
        hidden_seq_stride=hidden.stride(1),
        hidden=hidden.data_ptr(),
        vectors=vectors.data_ptr(),
    )
    if status == OUT_OF_RANGE:
        check_pairs(tubes, hidden.shape[1], "tubes")
    _check_status(status)
    return vectors


def tubes_backward(dvectors: Tensor, tubes: Tensor, seq: int, dtype: torch.dtype) -> Tensor:
    """dhidden (batch, seq, hidden_size), zero except at the tubes' rows."""
    dvectors = dvectors.contiguous()
    dhidden = dvectors.new_empty(len(tubes), seq, dvectors.shape[-1], dtype=dtype)
    status = _run_tubes(
        "lk_tubes_backward",
        tubes,
        dhidden.shape,
        dtype,
        dhidden=dhidden.data_ptr(),
        dvectors=dvectors.data_ptr(),
    )
    _check_status(status)
    return dhidden


# The structures of csrc/api.h.


class _TensorArgument(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("seq_stride", ctypes.c_int64),
    )


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _AttentionArguments(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "batch heads kv_heads seq dim block_m block_n kv_indices_stride"),
        *_fields(ctypes.c_void_p, "visible_until kv_offsets kv_full_start kv_indices positions"),
        ("window", ctypes.c_int64),
        *_fields(ctypes.c_double, "softcap scale"),
        *_fields(ctypes.c_int32, "full_is_full dtype isa num_threads"),
        ("sinks", ctypes.c_void_p),
        *_fields(_TensorArgument, "q k v out"),
        ("lse", ctypes.c_void_p),
        *_fields(_TensorArgument, "dout dq dk dv"),
        *_fields(ctypes.c_void_p, "delta dsinks"),
    )


class _PairsArguments(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "batch seq dim num_pairs hidden_batch_stride hidden_seq_stride"),
        *_fields(ctypes.c_void_p, "hidden pairs dhidden"),
        *_fields(ctypes.c_int32, "dtype isa num_threads metric reduction"),
        *_fields(ctypes.c_void_p, "stats loss ddistance views squares dviews dots"),
    )


class _TubesArguments(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "batch seq dim num_vectors hidden_batch_stride hidden_seq_stride"),
        *_fields(ctypes.c_void_p, "hidden tubes dhidden"),
        *_fields(ctypes.c_int32, "dtype isa num_threads"),
        *_fields(ctypes.c_void_p, "vectors dvectors"),
    )


class _AttentionCall:
    """Fills the arguments of a call and keeps the tensors alive that they point into."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: AttentionOptions):
        batch, heads, seq, dim = q.shape
        if dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM} on a CPU, got {dim}")
        mask.check_shapes()
        self.mask = mask
        kv_indices = mask.kv_indices.contiguous()
        self.stats_shape, self.stats_dtype = (batch, heads, seq), compute_dtype(q)
        self.tensors: list[Tensor] = []
        self.arguments = _AttentionArguments(
            batch=batch,
            heads=heads,
            kv_heads=k.shape[1],
            seq=seq,
            dim=dim,
            block_m=mask.block_size[0],
            block_n=mask.block_size[1],
            kv_indices_stride=kv_indices.shape[1],
            window=options.window or 0,
            softcap=options.softcap or 0.0,
            scale=options.softmax_scale,
            full_is_full=options.window is None or mask.window == options.window,
            dtype=_dtype(q.dtype),
            isa=_isa(),
            num_threads=torch.get_num_threads(),
        )
        self.set(
            q=q,
            k=k,
            v=v,
            visible_until=mask.visible_until.contiguous(),
            kv_offsets=mask.kv_offsets.contiguous(),
            kv_full_start=mask.kv_full_start.contiguous(),
            kv_indices=kv_indices,
        )
        if options.position_ids is not None:
            self.set(positions=options.position_ids.contiguous())
        if options.sinks is not None:
            self.sinks = options.sinks.to(self.stats_dtype).contiguous()
            self.set(sinks=self.sinks)

    def stats(self) -> Tensor:
        """An uninitialised (batch, num_heads, seq) tensor for lse or delta."""
        return self.mask.visible_until.new_empty(self.stats_shape, dtype=self.stats_dtype)

    def set(self, **tensors: Tensor) -> None:
        self.tensors.extend(tensors.values())
        for name, tensor in tensors.items():
            pointer = tensor.data_ptr()
            strides = tensor.stride()[:3]
            value = _TensorArgument(pointer, *strides) if tensor.dim() == 4 else pointer
            setattr(self.arguments, name, value)

    def run(self, function: str) -> None:
        status = getattr(_library(), function)(ctypes.byref(self.arguments))
        if status == OUT_OF_RANGE:
            check_visible_until(self.mask.visible_until)
        if status == BAD_SCHEDULE:
            raise ValueError(
                "block_mask is not the schedule of this visible_until, or of these positions and "
                "this window: build it again by BlockMask.from_visible_until"
            )
        _check_status(status)


def _run_pairs(function: str, hidden: Tensor, pairs: Tensor, **more: int) -> None:
    pairs = pairs.contiguous()
    batch, seq, dim = hidden.shape
    arguments = _PairsArguments(
        batch,
        seq,
        dim,
        pairs.shape[1],
        *hidden.stride()[:2],
        hidden.data_ptr(),
        pairs.data_ptr(),
        dtype=_dtype(hidden.dtype),
        isa=_isa(),
        num_threads=torch.get_num_threads(),
        **more,
    )
    status = getattr(_library(), function)(ctypes.byref(arguments))
    if status == OUT_OF_RANGE:
        check_pairs(pairs, seq)
    _check_status(status)


def _run_tubes(
    function: str, tubes: Tensor, shape: torch.Size, dtype: torch.dtype, **arguments: int
) -> int:
    tubes = tubes.contiguous()
    call = _TubesArguments(
        *shape,
        num_vectors=2 * tubes.shape[1],
        tubes=tubes.data_ptr(),
        dtype=_dtype(dtype),
        isa=_isa(),
        num_threads=torch.get_num_threads(),
        **arguments,
    )
    return getattr(_library(), function)(ctypes.byref(call))


def _check_status(status: int) -> None:
    if status != OK:
        raise MemoryError("the CPU kernels ran out of memory for their tiles")


def _dtype(dtype: torch.dtype) -> int:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {dtype}")
    return DTYPES[dtype]


def _isa() -> int:
    name = os.environ.get(ISA_VARIABLE)
    if not name:
        return 0
    if name not in isas():
        raise ValueError(f"{ISA_VARIABLE} must be one of {isas()} on this machine, got {name!r}")
    return isas().index(name)


@cache
def _library() -> ctypes.CDLL:
    if not is_available():
        raise RuntimeError(
            "impl='cpu' needs the compiled kernels, which this installation lacks; install "
            "llmjepa_kernels where GCC or Clang is present, or use impl='reference'"
        )
    library = ctypes.CDLL(str(LIBRARY))
    sizes = {
        "lk_attention_size": _AttentionArguments,
        "lk_pairs_size": _PairsArguments,
        "lk_tubes_size": _TubesArguments,
    }
    same = hasattr(library, "lk_sources") and all(
        getattr(library, name)() == ctypes.sizeof(structure) for name, structure in sizes.items()
    )
    if same and SOURCES.is_dir():  # as setup.py reads them; there are none beside a wheel's
        sources = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]*")))
        library.lk_sources.restype = ctypes.c_char_p
        digest = hashlib.blake2b(sources, digest_size=8).hexdigest()
        same = library.lk_sources() == digest.encode()
    if not same:
        raise RuntimeError(
            f"{LIBRARY} was compiled from another version of the sources: install "
            "llmjepa_kernels again, in a checkout by pip install -e ."
        )
    if os.environ.get(ISA_VARIABLE) == "amx":
        library.lk_ask_for_amx()
    library.lk_isa_name.restype = ctypes.c_char_p
    library.lk_set_parallel.argtypes = (ctypes.c_void_p,)
    library.lk_set_parallel.restype = None
    library.lk_set_parallel(_torch_parallel())
    return library


def _torch_parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch itself has loaded.

    The kernels link no OpenMP: a second runtime in the process would start its own threads and
    compete with torch's. A library's handle also finds the symbols of what it depends on, so this
    gets torch's own runtime whatever its file is called.
    """
    for library in Path(torch.__file__).with_name("lib").glob("libtorch_cpu.*"):
        try:
            function = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None
