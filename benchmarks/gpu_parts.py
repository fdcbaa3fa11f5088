"""The parts of `benchmarks.gpu_day`: each measures, and hands on its rows as it has them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import bench_loss
from benchmarks.peers import PEERS, UnavailableError, verify
from benchmarks.report import ROOT
from benchmarks.timing import copy_bandwidth, device_seconds, matmul_rate, synchronize
from benchmarks.workload import Case, filled_row, load_chats, load_examples
from llmjepa_kernels import PackedBatch, pack

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

Row = dict[str, Any]

# Of pytest -v: "tests/… PASSED [ 1%]" alone, "[gw0] [ 1%] PASSED tests/…" beside other workers.
OUTCOME = re.compile(
    r"(?P<name>\S+\.py::.+) (?P<a>[A-Z]+)(?: \(.*\))? +\[ *\d+%\]\s*$"
    r"|\[gw\d+\] \[ *\d+%\] (?P<b>[A-Z]+) (?P<other>.+?)\s*$"
)


@dataclass(frozen=True)
class Setting:
    """Where a part runs, where it may write, and whether it has only to show that it starts."""

    device: str
    tiny: bool
    output: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32


@dataclass(frozen=True)
class Part:
    """What it answers, the rows that do, and the minutes that it should get."""

    what: str
    rows: Callable[[Setting], Iterator[Row]]
    minutes: float


class PartFailedError(Exception):
    """Something of a part was wrong; the rows before say what."""


def device_limits(setting: Setting) -> Iterator[Row]:
    if setting.on_gpu:
        about = torch.cuda.get_device_properties(setting.device)
        capability = f"sm_{about.major}{about.minor}"
        note = f"{about.multi_processor_count} multiprocessors, {about.total_memory >> 30} GiB"
        count = f"{torch.cuda.device_count()} in the machine"
        yield {"work": about.name, "what": capability, "note": f"{note}; {count}"}
    size = 64 if setting.tiny else None
    rate = matmul_rate(setting.device, setting.dtype, size)
    yield {"work": f"matrix product, {setting.dtype}", "what": "torch", "rate": rate / 1e12}
    copied = copy_bandwidth(setting.device)
    yield {"work": "copy", "what": "torch", "note": f"{copied / 1e12:.2f} TB/s read and written"}


def tests(*paths: str, tiny: Sequence[str]) -> Callable[[Setting], Iterator[Row]]:
    """The tests that run kernels natively; `tiny`: pytest's arguments for a few of them."""

    def rows(setting: Setting) -> Iterator[Row]:
        selection = list(tiny) if setting.tiny else ["-m", "gpu", *paths]
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
        if find_spec("xdist") and not setting.tiny:
            command += ["-n", str(min(15, os.cpu_count() or 1)), "--dist", "worksteal"]
        start, counts = time.perf_counter(), Counter[str]()
        process = subprocess.Popen(
            [*command, *selection], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for line in process.stdout or ():
            print(line, end="", flush=True)
            found = OUTCOME.match(line)
            if not found:
                continue
            name, outcome = found["name"] or found["other"], (found["a"] or found["b"]).lower()
            counts[outcome] += 1
            if outcome in ("failed", "error"):
                yield {"work": "test", "what": name, "note": outcome}
        code = process.wait()
        summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        yield {
            "work": "tests",
            "what": " ".join(paths),
            "milliseconds": 1e3 * (time.perf_counter() - start),
            "note": summary or "none ran",
        }
        if code:
            raise PartFailedError(f"pytest ended with {code}")

    return rows


def attention_cases(setting: Setting) -> list[Case]:
    """Rows in the head shapes of Llama 1B and 8B and of Gemma, and one causal segment."""
    options = {"dtype": setting.dtype, "device": setting.device}
    if setting.tiny:
        case = Case("tiny", 70, 6, heads=4, kv_heads=2, head_dim=16, **options)
        return [replace(case, row=real_row(96))]
    short, long = real_row(2048), real_row(8192)
    base = Case("", 8192, 512, heads=32, kv_heads=8, head_dim=64, **options)
    one = PackedBatch(visible_until=torch.full((1, 8192), 8192, dtype=torch.int32))
    return [
        replace(base, name="NL-RX-like, 2k, D64", seq=2048, row=short),
        replace(base, name="NL-RX-like, 8k, D64", row=long),
        replace(base, name="segments of 512, 8k, D64"),
        replace(base, name="segments of 512, 8k, D128", head_dim=128),
        replace(base, name="one segment, 8k, D128", head_dim=128, row=one),
        replace(base, name="segments of 512, 8k, D256", heads=8, kv_heads=4, head_dim=256),
    ]


@cache
def real_row(tokens: int) -> PackedBatch:
    """A row of about so many tokens, of chats of NL-RX's kind and lengths."""
    row = filled_row(load_examples(None, None, max(20, tokens // 10)), tokens)
    return PackedBatch({"visible_until": row["visible_until"]})


def attention(setting: Setting) -> Iterator[Row]:
    """Every peer that runs here, its result verified first; forward, and with the backward."""
    wrong = []
    ours: dict[tuple[str, str], float] = {}
    cases = attention_cases(setting)
    # Ours first of all; what compiles for half a minute per case comes last.
    for name in sorted(PEERS, key=lambda name: name == "FlexAttention"):
        for case in cases:
            build, row = PEERS[name], {"work": case.name, "what": name}
            try:
                attend = build(case)
                verify(case, attend, backward=True)
            except UnavailableError as reason:
                yield {**row, "note": f"cannot run here: {reason}"}
                continue
            except Exception as error:
                wrong.append(f"{case.name}, {name}")
                yield {**row, "note": f"{type(error).__name__}: {error}"}
                continue
            forward, backward = case.flops
            work = {"forward": forward, "forward + backward": forward + backward}
            for direction, flops in work.items():
                run = attention_call(case, attend, backward=direction != "forward")
                seconds = device_seconds(run, setting.device)
                if name == "ours":
                    ours[case.name, direction] = seconds
                yield {
                    "work": f"{case.name}, {direction}",
                    "what": name,
                    "milliseconds": 1e3 * seconds,
                    "speed": seconds / own if (own := ours.get((case.name, direction))) else None,
                    "rate": flops / seconds / 1e12,
                }
            del attend
    if wrong:
        raise PartFailedError("; ".join(wrong))


def attention_call(case: Case, attend: Callable, *, backward: bool) -> Callable[[], object]:
    dout = torch.ones_like(case.tensors[0])

    def forward() -> object:
        with torch.no_grad():
            return attend(*case.tensors)

    def both() -> object:
        return torch.autograd.grad(attend(*case.tensors), case.tensors, dout)

    return both if backward else forward


def loss(setting: Setting) -> Iterator[Row]:
    """The JEPA term against plain PyTorch."""
    seq, pairs, width = (64, 4, 32) if setting.tiny else (8192, 256, 2048)
    hidden = torch.randn(1, seq, width, device=setting.device, dtype=setting.dtype)
    hidden.requires_grad_()
    chosen = torch.randperm(seq)[: 2 * pairs].view(1, pairs, 2).to(setting.device)
    ours = None
    for name, function in bench_loss.LOSSES.items():

        def both(function: Callable = function) -> object:
            return torch.autograd.grad(function(hidden, chosen), hidden)

        seconds = device_seconds(both, setting.device)
        ours = ours or seconds
        yield {
            "work": f"loss of {pairs} pairs in {seq} x {width}, forward + backward",
            "what": name,
            "milliseconds": 1e3 * seconds,
            "speed": seconds / ours,
        }


def launches(setting: Setting) -> Iterator[Row]:
    """What the host spends on a forward and backward too small for the device to matter."""
    count = 3 if setting.tiny else 200
    case = Case("", 64, 16, 4, 4, 64, setting.dtype, setting.device)
    functions = {
        "ours": PEERS["ours"](case),
        "SDPA": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    ours = None
    for name, attend in functions.items():
        call = attention_call(case, attend, backward=True)
        call()
        synchronize(setting.device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        synchronize(setting.device)
        seconds = (time.perf_counter() - start) / count
        ours = ours or seconds
        yield {
            "work": "host, forward + backward of 64 tokens",
            "what": name,
            "milliseconds": 1e3 * seconds,
            "speed": seconds / ours,
        }


def choices(setting: Setting) -> Iterator[Row]:
    """Which of the shipped configurations is the fastest here, timed shape by shape."""
    os.environ |= {"LLMJEPA_AUTOTUNE": "1", "XDG_CACHE_HOME": str(setting.output / "choices")}
    stored = setting.output / "choices" / "llmjepa_kernels" / "autotune.json"
    stored.unlink(missing_ok=True)  # of an earlier run
    known: dict[str, Any] = {}
    for case in attention_cases(setting):
        attention_call(case, PEERS["ours"](case), backward=True)()
        synchronize(setting.device)
        found = json.loads(stored.read_text()) if stored.exists() else {}
        for key in found.keys() - known.keys():
            yield {"work": case.name, "what": key, "note": str(found[key])}
        known = found
    if not known:
        yield {"work": "choices", "note": "none to make on this device"}


def step(tokens: int) -> Callable[[Setting], Iterator[Row]]:
    """A training step over one row of about `tokens` tokens, against everybody's."""

    def rows(setting: Setting) -> Iterator[Row]:
        from benchmarks import train_step
        from llmjepa_kernels.data.predictor_tokens import add_predictor_tokens
        from llmjepa_kernels.data.tokenizer import train_tokenizer
        from llmjepa_kernels.hf.load import small_llama

        chats = load_chats(None, 4 if setting.tiny else 1000)
        tokenizer = train_tokenizer(chats)
        torch.manual_seed(0)
        model = small_llama(tokenizer, hidden_size=64, num_layers=1)
        if not setting.tiny:
            model = llama_1b(tokenizer, setting)
        pred_ids = add_predictor_tokens(model, tokenizer, 1)
        model.to(setting.device, setting.dtype).train()

        def compare(count: int) -> train_step.Comparison:
            length = 96 if setting.tiny else 512
            return train_step.Comparison(
                model, tokenizer, chats[:count], pred_ids, official_length=length
            )

        comparison = compare(len(chats))
        if not setting.tiny:
            whole = pack(comparison.layouts["shared"])["input_ids"].numel()
            comparison = compare(round(len(chats) * tokens / whole))
        # What matters most is written before what takes long: others' attention, and padding, of
        # which the longest rows get no more than they would anyway.
        fast, slow = [], []
        for row in comparison.rows([]):
            is_slow = row.name in train_step.SAME_ROW or ", padded" in row.name
            (slow if is_slow else fast).append(row)
        if tokens > 4096:
            slow = [row for row in slow if not row.name.endswith("padded 512")]
        ours, refused = None, []
        for group in (fast, slow):
            table = comparison.run(group, rounds=1 if setting.tiny else 3, budget=4.0)
            times = {row["name"]: row["milliseconds"] for row in table.rows}
            ours = times.get(train_step.OURS, ours)
            for row in table.rows:
                peak = "" if row["peak_mib"] is None else f", {row['peak_mib']:.0f} MiB at most"
                yield {
                    "work": f"step of {len(comparison.chats)} examples",
                    "what": row["name"],
                    "milliseconds": row["milliseconds"],
                    "speed": ours and row["milliseconds"] / ours,
                    "note": f"{row['tokens']} tokens, matmul rate {row['matmul_share']:.0%}{peak}, "
                    f"{row['rounds']} runs",
                }
            for note in table.notes:
                if note.startswith("cannot run here"):
                    yield {"work": "step", "note": note}
            for reason in table.refused:
                yield {"work": "step", "note": f"WRONG, refused: {reason}"}
            refused += table.refused
        if refused or ours is None:
            raise PartFailedError("a step of ours is missing, or a loss is wrong")

    return rows


def llama_1b(tokenizer: PreTrainedTokenizerBase, setting: Setting) -> LlamaForCausalLM:
    """The shape of Llama-3.2-1B, with random weights made where and as they are needed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(setting.dtype)
    try:
        with torch.device(setting.device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def first_compile(setting: Setting) -> Iterator[Row]:
    """What a user waits for before the first step: compiling the kernels of one head shape."""
    (case, *_) = attention_cases(setting)
    call = attention_call(case, PEERS["ours"](case), backward=True)
    with TemporaryDirectory() as empty:
        os.environ["TRITON_CACHE_DIR"] = empty
        start = time.perf_counter()
        call()
        synchronize(setting.device)
        seconds = time.perf_counter() - start
    yield {"work": f"first call, {case.name}", "what": "ours", "milliseconds": 1e3 * seconds}


PARTS = {
    "device": Part("what the device can do at most", device_limits, 0.3),
    "compile": Part("what the first call costs", first_compile, 0.3),
    "tests_ops": Part(
        "attention and losses, natively",
        tests("tests/ops", tiny=["tests/ops/test_triton_loss.py", "-k", "strided"]),
        2.0,
    ),
    "tests_models": Part(
        "families, trainer, inductor, natively",
        tests(
            "tests/hf/test_gpu.py",
            "tests/training/test_gpu.py",
            tiny=["tests/hf/test_gpu.py", "-k", "float32 and not families"],
        ),
        1.2,
    ),
    "attention": Part("attention against every peer", attention, 2.0),
    "loss": Part("the JEPA term against plain PyTorch", loss, 0.2),
    "launches": Part("the host's share", launches, 0.2),
    "step_2k": Part("a step of Llama 1B, rows of 2k", step(2048), 0.8),
    "step_8k": Part("a step of Llama 1B, rows of 8k", step(8192), 1.0),
    "choices": Part("the fastest configuration of each shape", choices, 0.6),
}
