"""Random masks, and the one rule by which every back end is compared with the reference."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmjepa_kernels import (
    BlockMask,
    Example,
    Segment,
    last_token_loss,
    semantic_tube_loss,
    view_attention,
)
from llmjepa_kernels.example import with_tubes
from llmjepa_kernels.tubes import TokenPath, TubeSampler


def random_forest(seq: int, seed: int, mean_length: float = 8.0) -> tuple[Tensor, Tensor]:
    """visible_until (1, seq) and position_ids (1, seq) of a random depth-first forest."""
    rng = random.Random(seed)
    visible_until, positions = [0] * seq, [0] * seq
    open_segments: list[tuple[int, int]] = []  # (start, end) of the segments above

    def close(segment: tuple[int, int], end: int) -> None:
        for j in range(*segment):
            visible_until[j] = end

    start = 0
    while start < seq:
        while open_segments and rng.random() < 0.4:
            close(open_segments.pop(), start)
        end = min(seq, start + 1 + int(rng.expovariate(1 / mean_length)))
        depth = positions[open_segments[-1][1] - 1] + 1 if open_segments else 0
        positions[start:end] = range(depth, depth + end - start)
        open_segments.append((start, end))
        start = end
    for segment in open_segments:
        close(segment, seq)
    return (
        torch.tensor([visible_until], dtype=torch.int32),
        torch.tensor([positions], dtype=torch.int64),
    )


def random_rows(batch: int, seq: int, seed: int, mean_length: float = 8.0) -> tuple[Tensor, Tensor]:
    """The same for several different rows."""
    rows = [random_forest(seq, seed * 1000 + b, mean_length) for b in range(batch)]
    return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])


def random_examples(count: int, seed: int, vocab: int = 50, views: str = "shared") -> list[Example]:
    """Ragged LLM-JEPA examples whose texts, headers and codes often begin alike."""
    rng = random.Random(seed)

    def tokens(low: int, high: int, vocab: int = vocab) -> list[int]:
        return [rng.randrange(4, vocab) for _ in range(rng.randint(low, high))]

    header, code_header = tokens(3, 6), tokens(2, 4)
    openings = [tokens(1, 4) for _ in range(3)]
    examples = []
    for _ in range(count):
        text = header + rng.choice(openings) + tokens(1, 12)
        code = tokens(1, 9)
        answer = code_header + code
        labels = [-100] * len(code_header) + code
        pred = [2] * rng.randint(0, 2)
        if views == "shared":
            segments = [Segment(text), Segment(answer, 0, labels)]
            segments += [Segment(pred, 0)] if pred else []
            segments.append(Segment(answer))
            pair = (2 if pred else 0, len(segments) - 1)
            last = 1
        else:
            chat = text + answer
            chat_labels = [-100] * len(text) + labels
            user = text[len(header) // 2 :] + pred
            segments = [Segment(chat, labels=chat_labels), Segment(user), Segment(answer)]
            pair = (1, 2)
            last = 0
        start = len(text) + len(code_header)
        path = TokenPath(last, [(len(header), len(text)), (start, start + len(code))])
        examples.append(with_tubes(Example(segments, [pair], path), TubeSampler(count=2)))
    return examples


def random_tubes(batch: int, num_tubes: int, seq: int, seed: int = 0) -> Tensor:
    """(batch, num_tubes, 2, 3, 2): many in the same rows, some with fewer steps, some padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, num_tubes, 2, 3)
    tubes = torch.randint(seq // 2 + 1, (*shape, 2), generator=generator)
    tubes[torch.rand(shape, generator=generator) < 0.4] = -1
    tubes[:, ::2, :, 2, 1] = torch.where(tubes[:, ::2, :, 2, 0] >= 0, seq - 1, -1)
    tubes[0, num_tubes // 2 :: 3] = -1
    return tubes


@dataclass
class AttentionCase:
    """Inputs of view_attention in float64, and its options."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    visible_until: Tensor
    position_ids: Tensor
    window: int | None = None
    softcap: float | None = None
    softmax_scale: float | None = None
    sinks: Tensor | None = None

    @classmethod
    def random(
        cls,
        *,
        batch: int = 1,
        heads: int = 2,
        kv_heads: int = 1,
        seq: int = 77,
        head_dim: int = 64,
        mean_length: float = 8.0,
        sinks: bool = False,
        seed: int = 0,
        **options,
    ) -> AttentionCase:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            # Stored as (batch, seq, heads, head_dim), as in a model.
            x = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return x.transpose(1, 2)

        return cls(
            randn(batch, seq, heads, head_dim),
            randn(batch, seq, kv_heads, head_dim),
            randn(batch, seq, kv_heads, head_dim),
            randn(batch, seq, heads, head_dim),
            *random_rows(batch, seq, seed, mean_length),
            sinks=torch.randn(heads, generator=generator, dtype=torch.float64) if sinks else None,
            **options,
        )

    def rounded(self, dtype: torch.dtype) -> AttentionCase:
        """The same case with inputs that `dtype` represents exactly."""
        changed = {name: getattr(self, name).to(dtype).double() for name in ("q", "k", "v", "dout")}
        if self.sinks is not None:
            changed["sinks"] = self.sinks.to(dtype).double()
        return AttentionCase(**{**self.__dict__, **changed})

    def run(
        self,
        impl: str,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        block_size: tuple[int, int] | None = None,
        mask_window: bool = True,
    ) -> dict[str, Tensor]:
        """out and all gradients of one back end."""
        inputs = {"q": self.q, "k": self.k, "v": self.v, "sinks": self.sinks}
        inputs = {
            name: x.to(device=device, dtype=dtype).detach().requires_grad_()
            for name, x in inputs.items()
            if x is not None
        }
        visible_until = self.visible_until.to(device)
        position_ids = self.position_ids.to(device)
        block_mask = None
        if block_size is not None:
            window = self.window if mask_window else None
            block_mask = BlockMask.from_visible_until(
                visible_until, block_size, position_ids=position_ids, window=window
            )
        out = view_attention(
            inputs["q"],
            inputs["k"],
            inputs["v"],
            visible_until,
            position_ids=position_ids,
            window=self.window,
            softcap=self.softcap,
            softmax_scale=self.softmax_scale,
            sinks=inputs.get("sinks"),
            block_mask=block_mask,
            impl=impl,
        )
        gradients = torch.autograd.grad(
            out, list(inputs.values()), self.dout.to(device=device, dtype=dtype)
        )
        names = [f"d{name}" for name in inputs]
        return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


def check_attention(
    case: AttentionCase, impl: str, dtype: torch.dtype, device: str = "cpu", **options
) -> None:
    """The back end's error is at most twice that of plain PyTorch in `dtype`, plus rounding."""
    plain_dtype = _plain_dtype(dtype)
    case = case.rounded(plain_dtype)
    expected = case.run("reference")
    plain = _as_plain(dtype, case.run("reference", plain_dtype), expected)
    actual = case.run(impl, dtype, device, **options)
    for name, value in expected.items():
        assert_within_rule(actual[name].cpu(), value, plain[name], name)


def check_loss(
    hidden: Tensor, pairs: Tensor, metric: str, impl: str, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """The same rule for last_token_loss: distances, and the gradient of their weighted sum."""
    loss = functools.partial(last_token_loss, metric=metric)
    _check_loss(loss, hidden, pairs, impl, dtype, device)


def check_tubes(
    hidden: Tensor, tubes: Tensor, impl: str, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """The same for semantic_tube_loss."""
    _check_loss(semantic_tube_loss, hidden, tubes, impl, dtype, device)


def _check_loss(
    loss: Callable[..., Tensor],
    hidden: Tensor,
    indices: Tensor,
    impl: str,
    dtype: torch.dtype,
    device: str,
) -> None:
    plain_dtype = _plain_dtype(dtype)
    hidden = hidden.to(plain_dtype).double()

    def run(impl: str, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        x = hidden.to(device=device, dtype=dtype).detach().requires_grad_()
        distance = loss(x, indices.to(device), reduction="none", impl=impl)
        weight = torch.linspace(0.5, 2.0, distance.numel(), dtype=torch.float64)
        scaled = distance * weight.view_as(distance).to(distance)
        (dhidden,) = torch.autograd.grad(scaled.sum(), x)
        return {"distance": distance.detach().cpu(), "dhidden": dhidden.cpu()}

    expected = run("reference", torch.float64, "cpu")
    plain = _as_plain(dtype, run("reference", plain_dtype, "cpu"), expected)
    for name, value in run(impl, dtype, device).items():
        assert_within_rule(value, expected[name], plain[name], name)


def _plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 is the oracle's own dtype: what plain PyTorch errs in it is seen in float32."""
    return torch.float32 if dtype == torch.float64 else dtype


def _as_plain(
    dtype: torch.dtype, plain: dict[str, Tensor], expected: dict[str, Tensor]
) -> dict[str, Tensor]:
    if dtype != torch.float64:
        return plain
    # Twice, since what is expected errs as much as what is compared with it.
    finer = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return {
        name: value + (plain[name].double() - value) * finer for name, value in expected.items()
    }


def assert_within_rule(actual: Tensor, expected: Tensor, plain: Tensor, name: str) -> None:
    """max |actual − expected| ≤ 2 · max |plain − expected| + rounding of the result."""
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    assert actual.isfinite().all(), f"{name} is not finite"
    error = (actual.double() - expected).abs().max().item()
    allowed = 2 * (plain.double() - expected).abs().max().item()
    allowed += torch.finfo(actual.dtype).eps * expected.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
