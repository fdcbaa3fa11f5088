"""One training step, forward and backward, of a real model on real data: ours and everybody's.

    python -m benchmarks.train_step --model MODEL --data CHATS.jsonl

Without arguments: a small Llama of random weights on the built-in grammar.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import baselines
from benchmarks.baselines import Baseline, Sequences
from benchmarks.peers import flex_block_mask
from benchmarks.report import Table, progress, show
from benchmarks.timing import (
    PeakMemory,
    duration,
    interleaved,
    matmul_rate,
    measure,
    median_of,
    ratio,
    seconds_left,
)
from benchmarks.workload import chat_examples, load_chats
from llmjepa_kernels import BlockMask, Example, PackedBatch, pack
from llmjepa_kernels.data.predictor_tokens import add_predictor_tokens
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.example import IGNORE, without_views
from llmjepa_kernels.hf.load import load_pretrained, small_llama
from llmjepa_kernels.hf.patch import patch_model, unpatch_model
from llmjepa_kernels.ops.reference import visible
from llmjepa_kernels.training.objective import llm_jepa_loss

# Of one micro-batch; larger steps accumulate gradients. A step takes about ten times as much.
MAX_LOGITS_BYTES = {"cpu": 2**30, "cuda": 2**32}
SFT = "SFT packed"
SFT_SUPERVISED = "SFT packed, head on supervised"
OURS = "ours shared + prefixes"
SAME_ROW = {"the same row, SDPA": "sdpa", "the same row, FlexAttention": "flex_attention"}

COLUMNS = (
    ("name", "", "{}"),
    ("milliseconds", "ms", "{:.0f}"),
    ("rounds", "of\nruns", "{:d}"),
    ("examples_per_second", "exam-\nples/s", "{:.2f}"),
    ("to_sft", "time /\nSFT", "{:.3f}"),
    ("tokens", "tokens", "{:d}"),
    ("head_tokens", "head\ntokens", "{:d}"),
    ("cost_per_token", "cost /\ntokens", "{:.3f}"),
    ("matmul_share", "matmul\nrate", "{:.0%}"),
    ("peak_mib", "peak\nMiB", "{:.0f}"),
    ("ntp_loss", "NTP loss", "{:.5f}"),
    ("jepa_loss", "JEPA loss", "{:.5f}"),
)
SPEEDUP_COLUMNS = (
    ("name", f"{OURS} against", "{}"),
    ("speedup", "times as fast", "{:.2f}"),
)


@dataclass
class Packed:
    """A step of this package, with the interface of `Baseline`."""

    batch: PackedBatch

    @property
    def tokens(self) -> int:
        return self.batch["input_ids"].numel()

    @property
    def head_tokens(self) -> int:
        return int((self.batch["labels"] != -100).sum())

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Packed:
        return Packed(self.batch.to(device))

    def prepare(self, model) -> None:
        patch_model(model)

    def step(
        self, model, jepa_weight: float = 1.0, *, backward: bool = True
    ) -> tuple[float, float]:
        with torch.set_grad_enabled(backward):
            out = llm_jepa_loss(model, self.batch, jepa_weight=jepa_weight)
        if backward:
            out.loss.backward()
        return out.ntp_loss.item(), out.jepa_loss.item()


@dataclass
class Row:
    """A step to time, and the examples whose separate passes its losses must equal."""

    name: str
    build: Callable[[], Baseline | Packed]
    examples: Sequence[Example]


class WrongLossError(Exception):
    """A step does not compute what it is compared for; it is not printed."""


@contextmanager
def _noting(row: Row, table: Table) -> Iterator[None]:
    """Writes into the table why a step cannot be in it."""
    try:
        yield
    except WrongLossError as error:
        table.refused.append(f"{row.name}: {error}")
    except Exception as error:  # of whatever a peer is made of
        table.notes.append(f"cannot run here: {row.name}: {error}")


class _Run:
    """A step under measurement, and the losses of its last call."""

    def __init__(self, step: Baseline | Packed, model):
        self.step, self.model = step, model
        self.losses: tuple[float, float] = (float("nan"), float("nan"))

    def __call__(self) -> None:
        self.losses = self.step.step(self.model)

    def first(self) -> None:
        """The first call, whose memory is measured."""
        with PeakMemory(self.model.device) as memory:
            self.seconds = measure(self, self.model.device)
        self.peak = memory.bytes


class Comparison:
    """All steps over one model and one set of chats."""

    def __init__(
        self,
        model,
        tokenizer,
        chats: Sequence[Any],
        pred_ids: Sequence[int],
        *,
        official_length: int = 512,
    ):
        self.model = model
        self.device = model.device
        self.pad = tokenizer.pad_token_id
        self.official_length = official_length
        self.vocab = model.config.get_text_config().vocab_size
        self.layouts = {
            layout: chat_examples(chats, tokenizer, layout, pred_ids)
            for layout in ("shared", "official")
        }
        self.chats = [without_views(example) for example in self.layouts["official"]]
        self._expected: dict[int, tuple[float, float]] = {}
        baselines.register_document_attention()

    def rows(self, loss_dropout: Sequence[float]) -> list[Row]:
        """What is compared, plain fine-tuning first."""
        shared, official = self.layouts["shared"], self.layouts["official"]
        rows = [
            Row(SFT, lambda: self._documents(self.chats), self.chats),
            Row(
                SFT_SUPERVISED,
                lambda: self._documents(self.chats, supervised_head=True),
                self.chats,
            ),
            self._ours("SFT our attention", self.chats, share=False),
            self._ours("SFT our attention + prefixes", self.chats),
            self._ours("ours shared", shared, share=False),
            self._ours(OURS, shared),
            self._ours("ours official", official, share=False),
            self._ours("ours official + prefixes", official),
        ]
        rows += [
            self._ours(f"ours {layout} + prefixes, dropout {rate}", dropped(examples, rate))
            for layout, examples in self.layouts.items()
            for rate in loss_dropout
        ]
        return [
            *rows,
            *(self._same_row(name, attention) for name, attention in SAME_ROW.items()),
            Row("three rows, unpadded", lambda: self._documents(official), official),
            Row("three rows, padded to longest", lambda: self._padded("three_rows"), official),
            self._official("additive_mask", "official additive mask"),
            self._official("additive_mask", "official additive mask + patch_model", None),
            self._official("three_rows", "official three rows"),
        ]

    def _official(self, kind: str, name: str, attention: str | None = "sdpa") -> Row:
        length = self.official_length
        official = self.layouts["official"]
        return Row(
            f"{name}, padded {length}", lambda: self._padded(kind, length, attention), official
        )

    def _ours(self, name: str, examples: Sequence[Example], *, share: bool = True) -> Row:
        return Row(name, lambda: Packed(pack(examples, share_prefixes=share)), examples)

    def _same_row(self, name: str, attention: str) -> Row:
        """Our row and labels through an attention that Transformers brings."""
        examples = self.layouts["shared"]

        def build() -> Baseline:
            batch = pack(examples)
            until = batch["visible_until"].to(self.device)
            if attention == "sdpa":
                mask = visible(until)[:, None]
            elif torch.device(self.device).type == "cpu":
                raise ValueError("FlexAttention has no backward on a CPU")
            else:
                mask = flex_block_mask(until, compiled=False)()
            row = torch.zeros_like(batch["view_pairs"][0])
            inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
            pairs = torch.stack([row, batch["view_pairs"][0]], -1)
            part = baselines.MicroBatch({**inputs, "attention_mask": mask}, batch["labels"], pairs)
            return Baseline([part], attention, supervised_head=True)

        return Row(name, build, examples)

    def _documents(self, examples: Sequence[Example], *, supervised_head: bool = False) -> Baseline:
        micro_batches = self._micro_batches(
            baselines.documents, examples, supervised_head=supervised_head
        )
        return Baseline(micro_batches, baselines.DOCUMENTS, supervised_head)

    def _padded(
        self, kind: str, length: int | None = None, attention: str | None = "sdpa"
    ) -> Baseline:
        def build(sequences: Sequence[Sequences]) -> baselines.MicroBatch:
            return getattr(baselines, kind)(sequences, self.pad, length=length)

        return Baseline(self._micro_batches(build, self.layouts["official"]), attention)

    def _micro_batches(
        self, build, examples: Sequence[Example], *, supervised_head: bool = False
    ) -> list[baselines.MicroBatch]:
        """As few as keep the logits of each in bounds."""
        sequences = [Sequences.of(example) for example in examples]
        size, limit = len(sequences), MAX_LOGITS_BYTES[torch.device(self.device).type]
        while True:
            parts = baselines.in_micro_batches(build, sequences, size)
            tokens = (
                int((part.labels[:, 1:] != IGNORE).sum()) if supervised_head else part.tokens
                for part in parts
            )
            largest = max(tokens) * self.vocab * 4
            if largest <= limit or size == 1:
                return parts
            size = (size + 1) // 2

    def run(self, rows: Sequence[Row], *, rounds: int, budget: float) -> Table:
        """Runs every step once, verifies its losses, and times those that are right.

        A first run that takes longer than `budget` seconds is its only one; the others' first
        runs do not count.
        """
        table = Table("One training step: forward and backward, no optimizer", COLUMNS)
        runs = self._verified(rows, table, rounds, budget)
        seconds = interleaved(
            {name: run for name, run in runs.items() if run.seconds <= budget},
            rounds=rounds,
            budget=budget,
            device=self.device,
            setup=lambda name: self._prepare(runs[name].step),
            report=progress,
        )
        self.model.zero_grad()
        self._fill(table, runs, {name: seconds.get(name) or [runs[name].seconds] for name in runs})
        return table

    def _verified(
        self, rows: Sequence[Row], table: Table, rounds: int, budget: float
    ) -> dict[str, _Run]:
        """The steps that run here with the right losses, each after its first run."""
        runs: dict[str, _Run] = {}
        steps: dict[str, Baseline | Packed] = {}
        for row in rows:
            with _noting(row, table):
                steps[row.name] = row.build().to(self.device, self.model.dtype)
        to_do = sum(map(self._flops, steps.values()))
        done, start, later = 0, time.perf_counter(), 0.0
        for row in rows:
            if row.name not in steps:
                continue
            with _noting(row, table):
                run = _Run(steps[row.name], self.model)
                self._prepare(run.step)
                # The first step of a process warms up for all; on a GPU each compiles kernels.
                if not runs or torch.device(self.device).type != "cpu":
                    run()
                if not runs:
                    start = time.perf_counter()
                self.model.zero_grad()  # of all steps alike, for the peak of memory
                run.first()
                self._check(row, run.losses)
                runs[row.name] = run
                if run.seconds <= budget:
                    later += run.seconds + seconds_left([run.seconds], rounds, budget)
                done += self._flops(run.step)
                left = (time.perf_counter() - start) / done * (to_do - done) + later
                progress(
                    f"{row.name}: {run.seconds:.2f} s, losses verified; about {duration(left)} left"
                )
        return runs

    def _prepare(self, step: Baseline | Packed) -> None:
        self.model.zero_grad()
        unpatch_model(self.model)
        step.prepare(self.model)

    def _check(self, row: Row, losses: tuple[float, float]) -> None:
        """Raises WrongLossError unless the losses are those of separate passes."""
        tolerance = self._tolerance()
        for name, got, want in zip(
            ("NTP", "JEPA"), losses, self._separate_passes(row.examples), strict=True
        ):
            if not abs(got - want) <= tolerance * max(1.0, abs(want)):
                raise WrongLossError(
                    f"{name} loss is {got:.7f}, that of separate passes {want:.7f}"
                )

    def _tolerance(self) -> float:
        return 1e-5 if self.model.dtype in (torch.float32, torch.float64) else 2e-2

    def _separate_passes(self, examples: Sequence[Example]) -> tuple[float, float]:
        """Every sequence in a padded row of its own, whatever the layout."""
        if id(examples) not in self._expected:
            step = Baseline(
                self._micro_batches(lambda s: baselines.three_rows(s, self.pad), examples)
            ).to(self.device, self.model.dtype)
            self._prepare(step)
            self._expected[id(examples)] = step.step(self.model, backward=False)
        return self._expected[id(examples)]

    def _flops(self, step: Baseline | Packed) -> int:
        """Of all weights, forward and backward; attention is left out."""
        head = self.model.get_output_embeddings().weight.numel()
        embeddings = self.model.get_input_embeddings().weight
        body = sum(p.numel() for p in self.model.parameters() if p.shape != embeddings.shape)
        return 6 * (body * step.tokens + head * step.head_tokens)

    def _fill(
        self, table: Table, runs: Mapping[str, _Run], seconds: Mapping[str, list[float]]
    ) -> None:
        examples = len(self.chats)
        rate = matmul_rate(self.device, self.model.dtype)
        for name, run in runs.items():
            step = run.step
            time_of_step = median(seconds[name])
            row = {
                "name": name,
                "seconds": seconds[name],
                "milliseconds": 1e3 * time_of_step,
                "examples_per_second": examples / time_of_step,
                "tokens": step.tokens,
                "head_tokens": step.head_tokens,
                "matmul_share": self._flops(step) / (time_of_step * rate),
                "peak_mib": None if run.peak is None else run.peak / 2**20,
                "ntp_loss": run.losses[0],
                "jepa_loss": run.losses[1],
                "micro_batches": len(step.micro_batches) if isinstance(step, Baseline) else 1,
                "rounds": len(seconds[name]),
            }
            if SFT in runs:
                row["to_sft"] = ratio(seconds[name], seconds[SFT])
            if SFT_SUPERVISED in runs:
                cost = ratio(seconds[name], seconds[SFT_SUPERVISED])
                row["cost_per_token"] = cost * runs[SFT_SUPERVISED].step.tokens / step.tokens
            table.rows.append(row)
        table.notes += [
            "ms: the median of so many runs. time / SFT: the median over the rounds of the two "
            "times' ratio, in which drift of the machine cancels. "
            f"cost / tokens: time over the time of '{SFT_SUPERVISED}', divided by the same ratio "
            "of tokens. matmul rate: the FLOPs of all weights, attention left out, as a share of "
            f"the {rate / 1e9:,.0f} GFLOP/s that a large matrix product reaches here.",
            "JEPA loss: of fewer pairs under loss dropout, none for SFT; of other views in the "
            "shared and the official layout. Each equals that of separate passes, within "
            f"{self._tolerance():.0e} of it.",
        ]
        parts = {row["name"]: row["micro_batches"] for row in table.rows}
        cut = [f"{name} in {count}" for name, count in parts.items() if count > 1]
        if cut:
            table.notes.append(f"in micro-batches, to bound their logits: {', '.join(cut)}")


def dropped(examples: Sequence[Example], rate: float, seed: int = 0) -> list[Example]:
    """Loss dropout: a share `rate` of the examples, drawn at random, without views and [PRED]."""
    chosen = random.Random(seed).sample(range(len(examples)), round(rate * len(examples)))
    return [without_views(x) if i in set(chosen) else x for i, x in enumerate(examples)]


def speedups(table: Table) -> Table:
    """How many times as fast our default is as every other step."""
    seconds = {row["name"]: row["seconds"] for row in table.rows}
    result = Table("What one packed pass buys", SPEEDUP_COLUMNS)
    if OURS in seconds:
        result.rows = [
            {"name": name, "speedup": ratio(times, seconds[OURS])}
            for name, times in seconds.items()
            if name != OURS
        ]
    return result


def plot(table: Table, path: Path) -> None:
    """Cost bars from plain fine-tuning = 1 on, on a logarithmic axis: left is cheaper."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in table.rows if "to_sft" in row][::-1]
    figure = Figure(figsize=(8, 0.3 * len(rows) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    costs = [row["to_sft"] for row in rows]
    ours = [row["name"].startswith(("ours", "SFT our")) for row in rows]
    axis.barh(
        [row["name"] for row in rows],
        [cost - 1 for cost in costs],
        left=1,
        color=["#c44e52" if own else "#8c8c8c" for own in ours],
    )
    for y, cost in enumerate(costs):
        axis.annotate(
            f"{cost:.2f}",
            (cost, y),
            xytext=(-4 if cost < 1 else 4, 0),
            textcoords="offset points",
            ha="right" if cost < 1 else "left",
            va="center",
            fontsize=8,
        )
    axis.set_xscale("log")
    axis.set_xlim(min(costs) / 1.5, max(costs) * 1.5)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_title(f"Time of one step, {SFT} = 1", fontsize=10, loc="left")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150)


def load(model: str | None, data: Path | None, examples: int):
    """Model, tokenizer and chats; the built-in ones where none are given."""
    chats = load_chats(data, examples)
    if model:
        return *load_pretrained(model), chats
    torch.manual_seed(0)
    tokenizer = train_tokenizer(chats)
    return small_llama(tokenizer), tokenizer, chats


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--model", help="name, directory or .gguf file")
    parser.add_argument("--data", type=Path, help="JSONL of chats")
    parser.add_argument("--examples", type=int, default=32, help="in one step (default: 32)")
    parser.add_argument("--num-pred-tokens", type=int, default=1)
    parser.add_argument("--loss-dropout", type=float, nargs="*", default=[0.5, 0.75])
    parser.add_argument(
        "--official-length", type=int, default=512, help="the official layouts pad to this"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="each times all steps once (default: 5)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=45.0,
        help="seconds after which a step is timed no more (default: 45)",
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose name contains this")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/train_step.json"))
    parser.add_argument("--plot", action="store_true", help="draw the cost bars beside the JSON")
    args = parser.parse_args(argv)
    if not all(0 <= rate <= 1 for rate in args.loss_dropout):
        parser.error(f"--loss-dropout must be shares from 0 to 1, got {args.loss_dropout}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.plot and args.only and not any(text in SFT for text in args.only):
        parser.error(f"--plot draws what is relative to {SFT!r}, which --only leaves out")
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")

    model, tokenizer, chats = load(args.model, args.data, args.examples)
    pred_ids = add_predictor_tokens(model, tokenizer, args.num_pred_tokens)
    model.to(args.device, getattr(torch, dtype)).train()
    comparison = Comparison(model, tokenizer, chats, pred_ids, official_length=args.official_length)
    rows = comparison.rows(args.loss_dropout)
    if args.only:
        rows = [row for row in rows if any(text in row.name for text in args.only)]
        if not rows:
            parser.error(f"--only {' '.join(args.only)}: no row has such a name")
    table = comparison.run(rows, rounds=args.rounds, budget=args.budget)
    batch = pack(comparison.layouts["shared"])
    packing = median_of(lambda: pack(comparison.layouts["shared"]))
    mask = median_of(lambda: BlockMask.from_visible_until(batch["visible_until"]))
    besides = (
        f"besides: packing these {len(chats)} examples takes {1e3 * packing:.1f} ms, of which the "
        f"block mask {1e3 * mask:.2f} ms"
    )
    ours = [row["milliseconds"] for row in table.rows if row["name"] == OURS]
    table.notes.append(besides + "".join(f", {1e3 * mask / step:.3%} of the step" for step in ours))
    show([table, speedups(table)], args.output, args.device, vars(args) | {"dtype": dtype})
    if args.plot:
        plot(table, args.output.with_suffix(".png"))
    return int(bool(table.refused))


if __name__ == "__main__":
    raise SystemExit(main())
