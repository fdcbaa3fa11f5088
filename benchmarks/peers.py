"""Other ways to compute the same attention, for whoever can run them.

Each peer takes a `Case`, does its one-time work (masks, indices), and returns a function of
q, k and v. What cannot run here raises `UnavailableError` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks.baselines import causal_varlen, repeated
from benchmarks.workload import Case, runs
from llmjepa_kernels import BlockMask, FlashPlan, view_attention
from llmjepa_kernels.ops.dense import dense_attention, visible

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
MAX_DENSE_BYTES = 2**31
MAX_FLEX_TOKENS = 16384  # of create_block_mask where it is not compiled: takes ten bytes a pair


class UnavailableError(Exception):
    """Why a peer cannot run here."""


def ours(case: Case) -> Attention:
    mask = case.block_mask
    return lambda q, k, v: view_attention(q, k, v, case.visible_until, block_mask=mask)


def ours_flash_attn(case: Case) -> Attention:
    """Our cascade of flash-attn's calls: no copy of keys."""
    _needs_cuda(case, "flash-attn")
    plan = FlashPlan.from_visible_until(case.visible_until)
    options = {"flash_plan": plan, "impl": "flash"}
    attend = partial(view_attention, visible_until=case.visible_until, **options)
    try:
        attend(*case.tensors)
    except RuntimeError as error:
        raise UnavailableError(str(error)) from None
    return attend


def sdpa_dense_mask(case: Case) -> Attention:
    seq = case.visible_until.shape[1]
    if seq * seq * 4 > MAX_DENSE_BYTES:
        raise UnavailableError(f"a mask of {seq} x {seq} numbers exceeds 2 GiB")
    seen = visible(case.visible_until)[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v, grouped = _heads(q, k, v)
        mask = seen.to(q.device)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

    return attend


def sdpa_per_run(case: Case) -> Attention:
    """A loop over runs; the keys of each are gathered, all at once, and get a mask if need be."""
    device = case.visible_until.device
    q_sizes, k_sizes, keys = _gathered(runs(case.visible_until[0].cpu()))
    keys = keys.to(device)
    masks = [
        None
        if q_size == k_size
        else torch.ones(q_size, k_size, dtype=torch.bool, device=device).tril(k_size - q_size)
        for q_size, k_size in zip(q_sizes, k_sizes, strict=True)
    ]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # One gather has one backward; one for each run would add a gradient of the whole row.
        k, v, grouped = _heads(q, *(x.index_select(2, keys) for x in (k, v)))
        parts = (q.split(q_sizes, dim=2), k.split(k_sizes, dim=2), v.split(k_sizes, dim=2))
        outs = [
            scaled_dot_product_attention(*qkv, mask, is_causal=mask is None, enable_gqa=grouped)
            for *qkv, mask in zip(*parts, masks, strict=True)
        ]
        return torch.cat(outs, dim=2)

    return attend


def _heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Keys and values as SDPA is fastest with beside a mask, and whether heads share them.

    On a GPU it has fast kernels for masks only where every head has its own.
    """
    if q.device.type != "cpu":
        k, v = repeated(q, k, v)
    return k, v, k.shape[1] != q.shape[1]


def flex_attention(case: Case) -> Attention:
    """FlexAttention compiled, with the same mask; torch has no backward of it on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = flex_block_mask(case.visible_until, compiled=True)()
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cpu":
            if torch.is_grad_enabled():
                raise UnavailableError("FlexAttention has no backward on a CPU")
            q, k, v = q.detach(), k.detach(), v.detach()  # it refuses what requires gradients
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)

    return attend


def flex_block_mask(visible_until: Tensor, *, compiled: bool) -> Callable[[], FlexBlockMask]:
    """Makes torch's BlockMask of the same mask.

    Each one is compiled anew for its shape, and those before it are forgotten: beyond a few
    shapes, torch would fall back to code for any shape, or to none.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    batch, seq = visible_until.shape

    def mask_mod(b, h, q, k):
        return (k <= q) & (q < visible_until[b, k])

    create = create_block_mask
    if compiled:
        torch.compiler.reset()
        create = torch.compile(create_block_mask, dynamic=False)

    def make() -> FlexBlockMask:
        try:
            return create(mask_mod, batch, None, seq, seq, device=visible_until.device)
        except RuntimeError as error:  # without a compiler, or of memory
            reason = str(error).strip().split("\n")[0]
            raise UnavailableError(f"create_block_mask fails here: {reason}") from error

    return make


def verify_block_mask(mask: BlockMask | FlexBlockMask, visible_until: Tensor) -> None:
    """Raises AssertionError unless some query blocks of 128 list their visible tiles, no other."""
    seq = visible_until.shape[1]
    key = torch.arange(seq, device=visible_until.device)
    blocks = -(-seq // 128)
    for m in torch.linspace(0, blocks - 1, min(blocks, 8)).long().tolist():
        query = key[m * 128 : (m + 1) * 128, None]
        seen = ((key <= query) & (query < visible_until)).any(dim=0)
        visited = pad(seen, (0, -seq % 128)).view(-1, 128).any(dim=1)
        expected, listed = visited.nonzero().flatten().tolist(), sorted(_key_blocks(mask, m))
        assert listed == expected, f"query block {m} lists {listed}, and sees {expected}"


def _key_blocks(mask: BlockMask | FlexBlockMask, m: int) -> list[int]:
    if isinstance(mask, BlockMask):
        low, high = mask.kv_offsets[0, m : m + 2].tolist()
        return mask.kv_indices[0, low:high].tolist()
    lists = (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    )
    return [n for count, ns in lists for n in ns[0, 0, m, : count[0, 0, m]].tolist()]


def torch_varlen(case: Case) -> Attention:
    """Runs as documents, keys before them gathered: exact, and no mask anywhere."""
    _needs_cuda(case, "varlen_attn")
    plan = _VarlenPlan.of(case)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = plan.inputs(q, k, v)
        out = causal_varlen(q, k, v, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k)
        return out[None].transpose(1, 2)

    return attend


def flash_attn_varlen(module: str, case: Case) -> Attention:
    """The same with flash-attn's kernels, which FlashAttention-3 ships in a module of its own."""
    _needs_cuda(case, module)
    try:
        varlen = import_module(module).flash_attn_varlen_func
    except ImportError as error:
        raise UnavailableError(f"{module} cannot be imported: {error}") from None
    plan = _VarlenPlan.of(case)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = plan.inputs(q, k, v)
        lengths = (plan.cu_q, plan.cu_k, plan.max_q, plan.max_k)
        out = varlen(q, k, v, *lengths, causal=True)
        out = out[0] if isinstance(out, tuple) else out  # FlashAttention-3 used to add the lse
        return out[None].transpose(1, 2)

    return attend


PEERS: dict[str, Callable[[Case], Attention]] = {
    "ours": ours,
    "ours, flash-attn": ours_flash_attn,
    "SDPA, dense mask": sdpa_dense_mask,
    "SDPA, per run": sdpa_per_run,
    "FlexAttention": flex_attention,
    "torch varlen, gathered": torch_varlen,
    "flash-attn 2 varlen, gathered": partial(flash_attn_varlen, "flash_attn"),
    "flash-attn 3 varlen, gathered": partial(flash_attn_varlen, "flash_attn_interface"),
}


def verify(case: Case, attend: Attention, *, backward: bool) -> None:
    """Raises AssertionError unless out and gradients of some queries are those of float64.

    Plain PyTorch in the case's own dtype is the measure: eight times its error, and eight units
    of the dtype's rounding, are allowed, since peers add up in other orders. A few queries of the
    row keep this affordable at any length.
    """
    seq = case.visible_until.shape[1]
    queries = torch.linspace(0, seq - 1, min(seq, 24)).long().unique().to(case.device)
    until, key = case.visible_until, torch.arange(seq, device=case.device)
    seen = (key <= queries[:, None]) & (queries[:, None] < until[:, None, :])
    weight = torch.randn(
        1, case.heads, len(queries), case.head_dim, generator=torch.Generator().manual_seed(1)
    ).to(case.device)

    def dense(dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in case.tensors)
        scale = case.head_dim**-0.5
        out, _ = dense_attention(q[:, :, queries], k, v, seen, softmax_scale=scale)
        return _with_gradients(out, (q, k, v), weight if backward else None)

    with torch.set_grad_enabled(backward):
        out = attend(*case.tensors)[:, :, queries]
        actual = _with_gradients(out, case.tensors, weight if backward else None)
        results = zip(actual, dense(torch.float64), dense(case.dtype), strict=True)
    for name, (value, expected, plain) in zip(("out", "dq", "dk", "dv"), results, strict=False):
        error = (value.double() - expected).abs().max().item()
        allowed = 8 * (plain.double() - expected).abs().max().item()
        allowed += 8 * torch.finfo(case.dtype).eps * expected.abs().max().item()
        assert error <= allowed, f"{name} is wrong: error {error:.2e}, allowed {allowed:.2e}"


def _with_gradients(out: Tensor, inputs: tuple[Tensor, ...], weight: Tensor | None) -> list[Tensor]:
    if weight is None:
        return [out]
    return [out, *torch.autograd.grad(out, inputs, weight.to(out.dtype))]


def _needs_cuda(case: Case, name: str) -> None:
    if not case.device.startswith("cuda"):
        raise UnavailableError(f"{name} has CUDA kernels only, the tensors are on {case.device}")
    if case.dtype not in (torch.float16, torch.bfloat16):
        raise UnavailableError(f"{name} takes float16 and bfloat16 only, not {case.dtype}")


@dataclass(frozen=True)
class _VarlenPlan:
    keys: Tensor  # which keys each run sees, one run after the other
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, case: Case) -> _VarlenPlan:
        device = case.visible_until.device
        q_sizes, k_sizes, keys = _gathered(runs(case.visible_until[0].cpu()))
        cu_q, cu_k = (
            torch.tensor([0, *sizes]).cumsum(0).int().to(device) for sizes in (q_sizes, k_sizes)
        )
        return cls(keys.to(device), cu_q, cu_k, max(q_sizes), max(k_sizes))

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, heads, head_dim) each."""
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return q, k.index_select(0, self.keys), v.index_select(0, self.keys)


def _gathered(plan: list[tuple[int, int, Tensor]]) -> tuple[list[int], list[int], Tensor]:
    """Queries and keys of each run, and the indices of the keys, one run after the other."""
    keys = [torch.cat([before, torch.arange(start, end)]) for start, end, before in plan]
    return [end - start for start, end, _ in plan], [len(x) for x in keys], torch.cat(keys)
