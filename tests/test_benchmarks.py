"""The benchmarks' baselines compute the official loss, and their commands run in miniature."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import (
    baselines,
    bench_packing,
    flash_calls,
    head,
    peers,
    scaling,
    timing,
    train_step,
    workload,
)
from benchmarks.baselines import Baseline, Sequences
from benchmarks.report import Table
from llmjepa_kernels import BlockMask, Example, FlashPlan, Segment, llm_jepa_example, pack
from llmjepa_kernels.hf.patch import patch_model, unpatch_model
from llmjepa_kernels.ops.dense import visible
from llmjepa_kernels.training.objective import llm_jepa_loss
from tests.support.helpers import random_examples, random_forest

PAD = 0


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny operations only wait for each other on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def gradients(model):
    """Losses of a step, and the gradient of every parameter."""

    def run(step):
        model.zero_grad()
        unpatch_model(model)
        step.prepare(model)
        losses = step.step(model, jepa_weight=0.7)
        return losses, {name: p.grad.clone() for name, p in model.named_parameters()}

    baselines.register_document_attention()
    yield run
    unpatch_model(model)


def every_baseline(sequences):
    def three(part):
        return baselines.three_rows(part, PAD, length=40)

    def additive(part):
        return baselines.additive_mask(part, PAD, length=40)

    documents = [baselines.documents(sequences)]
    return {
        "official three rows": Baseline([three(sequences)]),
        "official additive mask": Baseline([additive(sequences)]),
        "official, accumulated": Baseline(baselines.in_micro_batches(three, sequences, 3)),
        "dynamic padding": Baseline([baselines.three_rows(sequences, PAD)]),
        "unpadded": Baseline(documents, baselines.DOCUMENTS),
        "unpadded, supervised head": Baseline(documents, baselines.DOCUMENTS, True),
        "unpadded, Transformers' packing": Baseline([without_bounds(documents[0])]),
    }


def without_bounds(batch):
    inputs = {k: v for k, v in batch.inputs.items() if not k.startswith("document_")}
    return baselines.MicroBatch(inputs, batch.labels, batch.pairs)


@pytest.mark.parametrize("views", ["shared", "official"])
def test_baselines_equal_ours(model, gradients, views):
    examples = random_examples(7, seed=3, views=views)
    ours, expected = gradients(train_step.Packed(pack(examples)))
    assert ours[1] > 0.05
    for name, step in every_baseline([Sequences.of(x) for x in examples]).items():
        losses, actual = gradients(step)
        assert losses == pytest.approx(ours, rel=1e-5), name
        for parameter, gradient in expected.items():
            scale = gradient.abs().max()
            error = (actual[parameter] - gradient).abs().max()
            assert error <= 1e-5 * scale, (name, parameter)


def test_official_loss_by_hand(model, gradients):
    """Both official layouts give NTP + (1 − cos) as computed one sequence at a time."""
    examples = random_examples(4, seed=5, views="official")
    sequences = [Sequences.of(x) for x in examples]
    unpatch_model(model)
    model.set_attn_implementation("eager")
    nll, distances = [], []
    with torch.no_grad():
        for s in sequences:
            logits = model(torch.tensor([s.chat])).logits[0].log_softmax(-1)
            nll += [-logits[i - 1, y] for i, y in enumerate(s.labels) if i and y != -100]
            x, y = (model.model(torch.tensor([ids]))[0][0, -1] for ids in s.pairs[0])
            distances.append(1 - torch.dot(x, y) / (x.norm() * y.norm()))
    expected = (torch.stack(nll).mean().item(), torch.stack(distances).mean().item())
    for name, step in every_baseline(sequences).items():
        losses, _ = gradients(step)
        assert losses == pytest.approx(expected, rel=1e-5), name


def test_tokens_are_counted():
    example = llm_jepa_example([5, 6, 7], [8, 9], [8, 9, 9], pred_ids=[3])
    sequences = [Sequences.of(example)] * 2
    assert sequences[0].chat == [5, 6, 7, 8, 9]
    assert sequences[0].labels == [-100, -100, -100, 8, 9]
    assert sequences[0].pairs == [([5, 6, 7, 3], [8, 9, 9])]
    padded = Baseline([baselines.three_rows(sequences, PAD, length=16)])
    assert (padded.tokens, padded.head_tokens) == (6 * 16, 6 * 16)
    mask = Baseline([baselines.additive_mask(sequences, PAD, length=16)])
    assert (mask.tokens, mask.num_labels, mask.num_pairs) == (4 * 16, 4, 2)
    packed = Baseline([baselines.documents(sequences)], baselines.DOCUMENTS, True)
    assert (packed.tokens, packed.head_tokens) == (2 * (5 + 4 + 3), 4)
    alone = Baseline([baselines.documents(sequences, views=False)])
    assert (alone.tokens, alone.num_pairs) == (10, 0)


def test_bad_input():
    branching = Example([Segment([1, 2]), Segment([3], 0, [3]), Segment([4], 0, [4])])
    with pytest.raises(ValueError, match="two branches"):
        Sequences.of(branching)
    long = [Sequences.of(llm_jepa_example([5] * 9, [8], [8]))]
    with pytest.raises(ValueError, match="10 tokens, more than length = 8"):
        baselines.three_rows(long, PAD, length=8)


def test_loss_dropout_keeps_the_chats():
    examples = random_examples(8, seed=1)
    kept = train_step.dropped(examples, 0.75)
    assert [bool(x.pairs) for x in kept].count(True) == 2
    chats = [(s.chat, s.labels) for s in map(Sequences.of, examples)]
    assert [(s.chat, s.labels) for s in map(Sequences.of, kept)] == chats


def test_a_wrong_loss_is_not_printed(model):
    """The jepa term of other examples must not pass for these."""
    patch_model(model)
    examples = random_examples(4, seed=1)
    ours = llm_jepa_loss(model, pack(examples))
    comparison = object.__new__(train_step.Comparison)
    comparison.model, comparison.device, comparison.pad, comparison.vocab = model, "cpu", PAD, 50
    comparison._expected = {}
    row = train_step.Row("row", lambda: None, examples)
    right = (ours.ntp_loss.item(), ours.jepa_loss.item())
    comparison._check(row, right)
    for wrong in ((right[0] + 1e-3, right[1]), (right[0], right[1] * 1.001), (math.nan, right[1])):
        with pytest.raises(train_step.WrongLossError, match="separate passes"):
            comparison._check(row, wrong)


def test_train_step_command(tmp_path, capsys):
    path = tmp_path / "step.json"
    arguments = ["--examples", "3", "--rounds", "1", "--loss-dropout", "0.67"]
    arguments += ["--official-length", "96", "--plot"]
    assert train_step.main([*arguments, "--output", str(path)]) == 0
    report = json.loads(path.read_text())
    rows = {row["name"]: row for row in report["tables"][0]["rows"]}
    assert len(rows) == 16
    assert "FlexAttention has no backward" in str(report["tables"][0]["notes"])
    assert all(row["rounds"] == 1 for row in rows.values())
    assert len({round(row["ntp_loss"], 4) for row in rows.values()}) == 1
    assert rows[train_step.OURS]["tokens"] < rows["three rows, unpadded"]["tokens"]
    assert torch.__version__.startswith(report["machine"]["versions"]["torch"])
    assert capsys.readouterr().out.count("three rows, unpadded") == 2
    assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize("mean_length", [1, 8, 500])
def test_random_rows_have_the_length_asked_for(mean_length):
    for seq in (1, 3, 4, 77, 300):
        row = workload.random_row(seq, mean_length)
        assert row["input_ids"].shape == (1, seq)
    assert len(row["view_pairs"][0]) >= 300 / (8 * mean_length)


def test_runs_are_the_mask():
    visible_until, _ = random_forest(90, seed=4, mean_length=3)
    seen = torch.zeros(90, 90, dtype=torch.bool)
    for start, end, before in workload.runs(visible_until[0]):
        seen[start:end, before] = True
        seen[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    assert torch.equal(seen, visible(visible_until)[0])


@pytest.mark.parametrize("peer", ["ours", "SDPA, dense mask", "SDPA, per run"])
def test_peers_compute_the_same(peer):
    case = workload.Case("", seq=70, mean_length=6, heads=4, kv_heads=2, head_dim=16)
    attend = peers.PEERS[peer](case)
    peers.verify(case, attend, backward=True)
    with pytest.raises(AssertionError, match="out is wrong"):
        peers.verify(case, lambda q, k, v: attend(q, k, v) + 1e-4, backward=False)
    with pytest.raises(AssertionError, match="dk is wrong"):
        peers.verify(
            case, lambda q, k, v: attend(q, k.detach() * 0.99 + k * 0.01, v), backward=True
        )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_same(monkeypatch):
    """Forward only, on a CPU."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # takes long
    case = workload.Case("", seq=300, mean_length=20, heads=2, kv_heads=1)
    attend = peers.PEERS["FlexAttention"](case)
    peers.verify(case, attend, backward=False)
    with pytest.raises(peers.UnavailableError, match="no backward on a CPU"):
        peers.verify(case, attend, backward=True)


@pytest.mark.parametrize(
    "peer",
    [
        "ours, flash-attn",
        "torch varlen, gathered",
        "flash-attn 2 varlen, gathered",
        "flash-attn 3 varlen, gathered",
    ],
)
def test_peers_say_why_they_cannot_run(peer):
    with pytest.raises(peers.UnavailableError, match="CUDA"):
        peers.PEERS[peer](workload.Case("", seq=70, mean_length=6))


def test_block_masks_are_verified():
    row = workload.random_row(700, 16)["visible_until"]
    flex = peers.flex_block_mask(row, compiled=False)()
    for mask in (BlockMask.from_visible_until(row, (128, 128)), flex):
        peers.verify_block_mask(mask, row)
        other = workload.random_row(700, 200, seed=1)["visible_until"]
        with pytest.raises(AssertionError, match="query block"):
            peers.verify_block_mask(mask, other)


def test_area_of_flash_attn_calls():
    """Tile by tile, over each sequence from its first query and key on."""
    visible_until = torch.cat([row[0] for row in (random_forest(90, 4, 3), random_forest(90, 5))])
    visible_until[0, 40:] = torch.arange(41, 91)
    visible_until[0, :40].clamp_(max=40)
    plan = FlashPlan.from_visible_until(visible_until)
    assert plan.calls[1].slots.shape[1] > 0
    tile, tiles = (8, 4), 0
    for number, call in enumerate(plan.calls):
        for q, k in call.bounds.diff().transpose(1, 2).flatten(0, 1).tolist():
            if not q or not k:
                continue
            seen = torch.zeros(q + -q % tile[0], k + -k % tile[1], dtype=torch.bool)
            seen[:q, :k] = True
            if number < 2:
                assert q == k
                seen = seen.tril().triu() if number else seen.tril()
            grid = seen.unfold(0, tile[0], tile[0]).unfold(1, tile[1], tile[1])
            tiles += int(grid.flatten(2).any(-1).sum())
    assert flash_calls.cascade_area(plan, tile) == tiles * 8 * 4


def test_flash_calls_command(capsys):
    flash_calls.main(["--tokens", "300", "--block", "16", "16", "--tile", "16", "16"])
    header, _, short, long = capsys.readouterr().out.splitlines()[:4]
    assert header.startswith("| segments | tokens | calls |")
    assert short.startswith("| about 32 tokens | 300 | 2 |")
    ratios = [float(row.split("|")[-2]) for row in (short, long)]
    assert ratios[0] > ratios[1] >= 1


def test_packing_is_verified():
    examples = random_examples(6, seed=2)
    bench_packing.verify(pack(examples, 64), examples)
    with pytest.raises(AssertionError):
        bench_packing.verify(pack(examples[:-1], 64), examples)


def test_interleaved_rounds():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = timing.interleaved(steps, rounds=2)
    assert order == ["a", "b", "c", "c", "b", "a"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    lines = []
    seconds = timing.interleaved(steps, rounds=3, budget=1e-12, report=lines.append)
    assert len(seconds["a"]) == 1
    assert not lines
    timing.interleaved(steps, rounds=2, report=lines.append)
    assert lines == ["round 1 of 2; about 0 s left"]
    order.clear()
    timing.interleaved(steps, rounds=1, setup=lambda name: order.append(f"before {name}"))
    assert order == ["before a", "a", "before b", "b", "before c", "c"]
    assert timing.seconds_left([4.0, 6.0], rounds=5, budget=21) == 3 * 5
    assert timing.seconds_left([4.0, 6.0], rounds=5, budget=19) == 2 * 5
    assert timing.ratio([2.0, 8.0, 3.0], [1.0, 2.0, 1.0]) == 3.0
    assert timing.ratio([8.0], [1.0, 2.0, 9.0]) == 4.0


def test_times_leave_the_first_call_out(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: 0.125 * len(calls)))
    assert timing.measure(lambda: calls.append("measured")) == 0.125
    calls.clear()
    assert timing._times(lambda: calls.append("called"), "cpu") == [0.125] * 4  # half a second
    assert len(calls) == 5


def test_medians_and_rates(monkeypatch):
    """A time is the median of several; a limit of the machine is what the fastest reached."""
    monkeypatch.setattr(timing, "_times", lambda function, device: [8.0, 1.0, 2.0])
    assert timing.median_of(print) == timing.device_seconds(print, "cpu") == 2
    assert timing.matmul_rate("cpu", torch.float32, size=4) == 2 * 4**3
    assert timing.copy_bandwidth("cpu") == 2 * 2**27


def test_peak_memory():
    with timing.PeakMemory() as memory:
        torch.zeros(25_000_000).sum()  # 100 MB, gone before the end
    assert memory.bytes is None or 90e6 < memory.bytes < 200e6


def test_scaling_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # takes long
    path = tmp_path / "scaling.json"
    arguments = ["--segment", "8", "--tokens", "128", "--rows", "64", "128", "256", "--rounds", "2"]
    arguments += ["--segments", "4", "8", "16", "--masks", "256", "1024", "--heads", "2", "1"]
    assert scaling.main([*arguments, "--head-dim", "16", "--plot", "--output", str(path)]) == 0
    by_row, by_segment, masks = json.loads(path.read_text())["tables"]
    assert [row["seq"] for row in by_row["rows"]] == [64, 128, 256]
    assert all(row["ours"] > 0 and row["predicted"] > 0 for row in by_segment["rows"])
    assert masks["rows"][1]["times"] > 1
    assert not any(row.get("layer_share") for row in masks["rows"][1:])
    assert masks["rows"][0]["layer_share"] > 0
    assert "µs per tile" in capsys.readouterr().out
    assert path.with_suffix(".png").exists()


def test_the_roof_is_the_slower_of_arithmetic_and_memory(monkeypatch):
    rates = iter([5.0, 3.0, 10.0, 4.0, 7.0, 2.0])
    monkeypatch.setattr(scaling, "matmul_rate", lambda *_: next(rates))
    monkeypatch.setattr(scaling, "copy_bandwidth", lambda *_: next(rates))
    roof = scaling.Roof("cpu", torch.float32)
    roof.measure()
    roof.measure()
    assert (roof.matmul, roof.copy) == (10, 4)  # the best of three times
    case = workload.Case("", 70, 6, heads=4, kv_heads=2, head_dim=16)
    flops, elements = sum(case.flops), 70 * 16 * (4 + 2 + 2 + 4)  # of q, k, v and the result
    roof.matmul, roof.copy = 1.0, 1e9
    assert roof.seconds(case) == flops
    roof.matmul, roof.copy = 1e12, 2.0
    assert roof.seconds(case) == 3 * 4 * elements / 2  # with their gradients, of four bytes


def test_attention_is_told_in_medians_rates_and_shares(monkeypatch):
    times = {"ours": [1.0, 2.0, 9.0], scaling.RUN: [5.0, 4.0, 4.0], scaling.DENSE: [6.0]}
    monkeypatch.setattr(
        scaling, "interleaved", lambda steps, **_: {key: times[key[1]] for key in steps}
    )
    roof = SimpleNamespace(measure=lambda: None, seconds=lambda case: 0.5)
    case = workload.Case("", 70, 6, heads=4, kv_heads=2, head_dim=16)
    (row,) = scaling.attention_table("", [case], 3, roof).rows
    assert [row[peer] for peer in times] == [2000, 4000, 6000]
    assert row["gflops"] == sum(case.flops) / 2 / 1e9
    assert (row["roof_share"], row["pairs"]) == (0.25, case.pairs)
    assert row["tiles"] == case.block_mask.num_tiles


def test_fits_to_tokens_and_tiles():
    def table(points):
        rows = [{"seq": seq, "tiles": tiles, "ours": ours} for seq, tiles, ours in points]
        return Table("", (), rows)

    exact = table((x, y, 2 + 0.5 * x + 0.25 * y) for x, y in [(2, 4), (4, 4), (4, 16), (8, 32)])
    scaling.fit_tiles(exact)
    for row in exact.rows:
        assert row["predicted"] == pytest.approx(row["ours"])
    assert exact.notes[0].startswith("fit: 2 ms + 500 µs per token + 250 µs per tile; off by 0%")
    # Of relative errors: 1.2 is 20 % off from 1 and 40 % from 2, with the least sum of squares.
    rough = table([(8, 0, 1.0), (8, 0, 2.0), (8, 1, 5.0)])
    scaling.fit_tiles(rough)
    assert [row["predicted"] for row in rough.rows] == pytest.approx([1.2, 1.2, 5])
    assert rough.notes == ["fit: 1.2 ms + 3.8e+03 µs per tile; off by 20% on average, 40% at most"]

    powers = [{"x": x, "y": 3 * x**1.5} for x in (1, 2, 8)]
    powers.append({"x": 100})  # has not been measured
    assert scaling.exponent(Table("", (), powers), "x", "y") == pytest.approx(1.5)


def test_sizes_and_times_of_masks(monkeypatch):
    """Ours, torch's, and torch's compiled; of the longer row torch's would take too long."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # takes long
    seconds = iter([0.002, 0.010, 0.006, 0.004, 0.080])
    monkeypatch.setattr(scaling, "median_of", lambda *_: next(seconds))
    table = scaling.mask_table([256, 1024], 64, "cpu", budget=0.1, attention={256: 8.0})
    short, long = table.rows
    assert (short["milliseconds"], short["layer_share"], short["times"]) == (2, 0.25, 3)
    assert (short["flex_milliseconds"], short["compiled_milliseconds"]) == (10, 6)
    assert (long["milliseconds"], long["compiled_milliseconds"], long["times"]) == (4, 80, 20)
    assert not {"flex_milliseconds", "layer_share"} & long.keys()
    for seq, row in zip((256, 1024), table.rows, strict=True):
        until = workload.random_row(seq, 64)["visible_until"]
        mask = BlockMask.from_visible_until(until, (128, 128))
        size = sum(x.nbytes for x in [until, *mask.schedule().values()])
        assert row["bytes_per_token"] * seq == row["mib"] * 2**20 == size
    assert "BlockMask grows with tokens to the power 0.50" in table.notes
    assert "create_block_mask, compiled, grows with tokens to the power 1.87" in table.notes


def test_head_command(tmp_path, capsys):
    path = tmp_path / "head.json"
    sizes = ["--vocab", "96", "--tokens", "20", "--hidden-size", "64", "--max-logits", "500"]
    head.main([*sizes, "--rounds", "1", "--output", str(path)])
    (table,) = json.loads(path.read_text())["tables"]
    assert [row["what"] for row in table["rows"]] == ["all at once", "in parts"]
    assert all(row["error"] < 1e-6 for row in table["rows"])
    assert "in parts" in capsys.readouterr().out


def test_a_filled_row_has_the_first_examples_that_fit():
    examples = random_examples(30, seed=5)
    row = workload.filled_row(examples, 200)
    count = next(n for n in range(30) if pack(examples[: n + 1])["labels"].shape[1] > 200)
    assert torch.equal(row["input_ids"], pack(examples[:count])["input_ids"])
    assert row["input_ids"].shape[0] == 1
    whole = workload.filled_row(examples, 10**6)
    assert torch.equal(whole["input_ids"], pack(examples)["input_ids"])


def test_numbers_of_a_step(model, monkeypatch):
    """What took too long at first is timed no more, and stands there with that time."""
    times = {train_step.SFT: [1.0, 2.0, 9.0], train_step.SFT_SUPERVISED: [1.0, 1.0, 3.0]}
    times["fast"] = [3.0, 4.0, 9.0]
    sizes = {train_step.SFT: (10, 10), train_step.SFT_SUPERVISED: (10, 4)}
    sizes |= {"fast": (30, 4), "slow": (40, 40)}
    runs = {
        name: SimpleNamespace(
            step=SimpleNamespace(tokens=tokens, head_tokens=head_tokens),
            seconds=50.0 if name == "slow" else 5.0,
            peak=3 * 2**20,
            losses=(0.5, 0.25),
        )
        for name, (tokens, head_tokens) in sizes.items()
    }
    comparison = object.__new__(train_step.Comparison)
    comparison.model, comparison.device, comparison.chats = model, "cpu", [None] * 6
    comparison._verified = lambda *_: runs
    monkeypatch.setattr(train_step, "interleaved", lambda steps, **_: {x: times[x] for x in steps})
    monkeypatch.setattr(train_step, "matmul_rate", lambda *_: 1e6)
    rows = {row["name"]: row for row in comparison.run([], rounds=3, budget=20.0).rows}
    assert {name: row["seconds"] for name, row in rows.items()} == times | {"slow": [50.0]}
    assert [row["rounds"] for row in rows.values()] == [3, 3, 3, 1]
    assert [row["milliseconds"] for row in rows.values()] == [2000, 1000, 4000, 50_000]
    assert rows["fast"]["examples_per_second"] == 6 / 4
    assert rows["fast"]["to_sft"] == 2  # the median of 3, 2 and 1
    assert rows["slow"]["to_sft"] == 50 / 2
    assert rows["fast"]["cost_per_token"] == pytest.approx(3 / (30 / 10))
    assert (rows["fast"]["peak_mib"], rows["fast"]["jepa_loss"]) == (3, 0.25)
    layers = sum(p.numel() for p in [*model.model.layers.parameters(), model.model.norm.weight])
    flops = 6 * (30 * layers + 4 * model.lm_head.weight.numel())
    assert rows["fast"]["matmul_share"] == flops / (4 * 1e6)


def test_micro_batches_are_as_few_as_bound_the_logits(monkeypatch):
    monkeypatch.setitem(train_step.MAX_LOGITS_BYTES, "cpu", 3 * 10 * 50 * 4)
    comparison = object.__new__(train_step.Comparison)
    comparison.device, comparison.vocab = "cpu", 50
    examples = random_examples(9, seed=1)

    def sizes(tokens):
        parts = comparison._micro_batches(
            lambda part: SimpleNamespace(size=len(part), tokens=tokens * len(part)), examples
        )
        return [part.size for part in parts]

    assert sizes(1) == [9]
    assert sizes(10) == [3, 3, 3]  # 9, 5, 3
    assert sizes(1000) == [1] * 9


def test_a_head_on_supervised_tokens_has_the_logits_of_those(monkeypatch):
    monkeypatch.setitem(train_step.MAX_LOGITS_BYTES, "cpu", 3 * 50 * 4)
    comparison = object.__new__(train_step.Comparison)
    comparison.device, comparison.vocab = "cpu", 50
    ids = list(range(9))
    example = Example([Segment(ids, labels=[-100] * 8 + [8])])

    def count(**options):
        return len(comparison._micro_batches(baselines.documents, [example] * 3, **options))

    assert count(supervised_head=True) == 1
    assert count() == 3


def test_a_speedup_is_the_time_of_the_other_over_ours():
    table = Table("", ())
    table.rows = [{"name": train_step.OURS, "seconds": [1.0]}, {"name": "x", "seconds": [3.0]}]
    assert [row["speedup"] for row in train_step.speedups(table).rows] == [3.0]


def test_operations_of_a_case():
    case = workload.Case("", 70, 6, heads=4, kv_heads=2, head_dim=16)
    pairs = int(visible(case.visible_until).sum())
    assert (case.pairs, case.flops) == (pairs, (4 * pairs * 64, 10 * pairs * 64))


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (train_step, ["--loss-dropout", "1.5"], "--loss-dropout must be shares from 0 to 1"),
        (train_step, ["--rounds", "0"], "--rounds must be at least 1"),
        (train_step, ["--only", "ours", "--plot"], "--plot draws what is relative to"),
        (train_step, ["--examples", "4", "--only", "nobody"], "no row has such a name"),
        (scaling, ["--segments", "2048", "--tokens", "512"], "must have one of at most"),
    ],
)
def test_options_that_leave_nothing_to_measure(script, options, message, capsys):
    with pytest.raises(SystemExit):
        script.main(options)
    assert message in capsys.readouterr().err


def test_no_line_is_fitted_to_as_many_points():
    table = Table("", ())
    table.rows = [{"seq": n, "tiles": n // 64, "ours": float(n)} for n in (128, 256)]
    scaling.fit_tiles(table)
    assert not table.notes
