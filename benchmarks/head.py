"""The language model head and its loss: memory and time of all logits at once and in parts.

python -m benchmarks.head --vocab 32768 131072
python -m benchmarks.head --device cuda --dtype bfloat16 --head-impl liger
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import Table, progress, show
from benchmarks.timing import PeakMemory, interleaved
from llmjepa_kernels import Example, PackedBatch, Segment, llm_jepa_loss, pack, patch_model
from llmjepa_kernels.training.next_token_loss import HEAD_IMPLS, MAX_LOGITS

COLUMNS = (
    ("vocab", "vocabulary", "{:d}"),
    ("tokens", "supervised\ntokens", "{:d}"),
    ("what", "logits", "{}"),
    ("seconds", "step\ns", "{:.2f}"),
    ("mib", "extra peak\nMiB", "{:,.0f}"),
    ("error", "of the loss\nrelative", "{:.1e}"),
)


def step(model: torch.nn.Module, batch: PackedBatch, **options: Any) -> torch.Tensor:
    """The loss of a forward and backward."""
    model.zero_grad(set_to_none=True)
    loss = llm_jepa_loss(model, batch, **options).loss
    assert loss is not None
    loss.backward()
    return loss.detach()


def head_rows(
    vocab: int,
    tokens: int,
    hidden_size: int,
    rounds: int,
    variants: dict[str, dict[str, Any]],
    device: str,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """A row of the table for each variant of the loss, the first of which is the exact one."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden_size,
        intermediate_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=hidden_size // 64,
        max_position_embeddings=tokens + 1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = patch_model(LlamaForCausalLM(config).to(device, dtype))
    ids = torch.randint(vocab, (tokens + 1,)).tolist()
    batch = pack([Example([Segment(ids, labels=ids)])]).to(device)
    steps = {what: partial(step, model, batch, **options) for what, options in variants.items()}
    losses = {what: run() for what, run in steps.items()}
    peaks = {}
    for what, run in steps.items():
        model.zero_grad()
        with PeakMemory(device) as peak:
            run()
        peaks[what] = peak.bytes
    seconds = interleaved(steps, rounds=rounds, budget=600, device=device, report=progress)
    exact = losses[next(iter(variants))]
    return [
        {
            "vocab": vocab,
            "tokens": tokens,
            "what": what,
            "seconds": median(seconds[what]),
            "mib": None if peaks[what] is None else peaks[what] / 2**20,
            "error": float((losses[what] / exact - 1).abs()),
        }
        for what in steps
    ]


def main(argv: list[str] | None = None) -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--tokens", type=int, default=2048, help="supervised ones")
    parser.add_argument("--hidden-size", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--max-logits", type=int, default=MAX_LOGITS, help="that exist at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--head-impl", nargs="+", choices=HEAD_IMPLS, default=[], help="these too")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    table = Table("Head, loss and their backward", COLUMNS)
    variants: dict[str, dict[str, Any]] = {
        "all at once": {"max_logits": None},
        "in parts": {"max_logits": args.max_logits},
    }
    variants |= {name: {"head_impl": name} for name in args.head_impl}
    dtype = getattr(torch, args.dtype)
    sizes = args.tokens, args.hidden_size, args.rounds
    for vocab in args.vocab:
        table.rows += head_rows(vocab, *sizes, variants, args.device, dtype)
    table.notes.append(
        f"a Llama of one layer, {args.dtype}; at most {args.max_logits:,} logits at once in parts; "
        "the peak is beyond the model, its gradients included"
    )
    show([table], args.output, args.device, vars(args))


if __name__ == "__main__":
    main()
