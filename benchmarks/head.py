"""The language model head and its loss: memory and time of all logits at once and in parts.

python -m benchmarks.head --vocab 32768 131072
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
from llmjepa_kernels.training.next_token_loss import MAX_LOGITS

COLUMNS = (
    ("vocab", "vocabulary", "{:d}"),
    ("tokens", "supervised\ntokens", "{:d}"),
    ("what", "logits", "{}"),
    ("seconds", "step\ns", "{:.2f}"),
    ("mib", "extra peak\nMiB", "{:,.0f}"),
    ("error", "of the loss\nrelative", "{:.1e}"),
)


def step(model: torch.nn.Module, batch: PackedBatch, max_logits: int | None) -> torch.Tensor:
    """The loss of a forward and backward."""
    model.zero_grad(set_to_none=True)
    loss = llm_jepa_loss(model, batch, max_logits=max_logits).loss
    assert loss is not None
    loss.backward()
    return loss.detach()


def head_rows(
    vocab: int, tokens: int, hidden_size: int, max_logits: int, rounds: int
) -> list[dict[str, Any]]:
    """A row of the table for all logits at once, and one for parts of them."""
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
    model = patch_model(LlamaForCausalLM(config))
    ids = torch.randint(vocab, (tokens + 1,)).tolist()
    batch = pack([Example([Segment(ids, labels=ids)])])
    steps = {
        what: partial(step, model, batch, limit)
        for what, limit in (("all at once", None), ("in parts", max_logits))
    }
    losses = {what: run() for what, run in steps.items()}
    peaks = {}
    for what, run in steps.items():
        model.zero_grad()
        with PeakMemory() as peak:
            run()
        peaks[what] = peak.bytes
    seconds = interleaved(steps, rounds=rounds, budget=600, device="cpu", report=progress)
    return [
        {
            "vocab": vocab,
            "tokens": tokens,
            "what": what,
            "seconds": median(seconds[what]),
            "mib": None if peaks[what] is None else peaks[what] / 2**20,
            "error": float((losses[what] / losses["all at once"] - 1).abs()),
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
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    table = Table("Head, loss and their backward", COLUMNS)
    for vocab in args.vocab:
        table.rows += head_rows(vocab, args.tokens, args.hidden_size, args.max_logits, args.rounds)
    table.notes.append(
        f"a Llama of one layer, float32; at most {args.max_logits:,} logits at once in parts; the "
        "peak is beyond the model, its gradients included"
    )
    show([table], args.output, "cpu", vars(args))


if __name__ == "__main__":
    main()
