"""The plan of varlen calls, and the flash-attn back end over a stand-in for flash-attn."""

import gc
import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjepa_kernels import Example, Segment, attention, attention_flash, llm_jepa_example, pack
from llmjepa_kernels.flash_plan import MIN_SOLITARY, plan_calls
from llmjepa_kernels.reference import visible
from tests.helpers import AttentionCase, check_attention, random_rows
from tests.varlen_stand_in import FlashAttention2StandIn, FlashAttention3StandIn

pytestmark = pytest.mark.usefixtures("one_thread")


def covered(plan, tokens):
    """How many calls make query i attend to key j, (tokens, tokens)."""
    for call, slot in zip(plan.levels, plan.slots, strict=True):
        assert (call.rows.diff() > 0).all()
        assert torch.equal(plan.levels[0].rows[slot], call.rows)
    count = torch.zeros(tokens, tokens, dtype=torch.long)
    for call in plan.calls:
        rows = torch.arange(tokens) if call.rows is None else call.rows
        q, k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
        assert q[0] == k[0] == 0
        assert q[-1] == len(rows)
        assert max(call.cu_seqlens_q.diff()) == call.max_seqlen_q
        assert max(call.cu_seqlens_k.diff()) == call.max_seqlen_k
        for s in range(len(q) - 1):
            num_q, num_k = q[s + 1] - q[s], k[s + 1] - k[s]
            assert num_q >= 0
            assert num_k >= 0
            distance = torch.arange(num_q)[:, None] + num_k - num_q - torch.arange(num_k)
            seen = torch.ones(num_q, num_k, dtype=torch.bool)
            if call.causal:
                seen &= distance >= 0
            if call.window is not None:
                seen &= distance < call.window
            count[rows[q[s] : q[s + 1], None], torch.arange(k[s], k[s + 1])] += seen
            if num_q and call.keys is not None:
                assert torch.isin(torch.arange(k[s], k[s + 1]), call.keys).all()
    return count


def seen_by_all(visible_until, position_ids=None, window=None):
    return torch.block_diag(*visible(visible_until, position_ids, window).long())


def depth(visible_until):
    """How many segments, runs of tokens that are seen equally far, are above the deepest one."""
    deepest = 0
    for row, seen in zip(visible_until, visible(visible_until), strict=True):
        segment = (row.diff() != 0).cumsum(0)
        segment = torch.nn.functional.pad(segment, (1, 0))
        deepest = max(deepest, *(len(segment[sees].unique()) - 1 for sees in seen))
    return deepest


@st.composite
def rows(draw):
    batch, seq = draw(st.integers(1, 3)), draw(st.integers(1, 60))
    mean_length = draw(st.sampled_from([0.5, 2.0, 10.0]))
    visible_until, position_ids = random_rows(batch, seq, draw(st.integers(0, 10**6)), mean_length)
    padding = draw(st.integers(0, seq))
    visible_until.clamp_(max=max(seq - padding, 1))
    own = torch.arange(1, seq + 1, dtype=torch.int32)
    return torch.maximum(visible_until, own), position_ids


@given(rows())
@settings(max_examples=150, deadline=None)
def test_every_visible_pair_is_in_one_call(case):
    visible_until, _ = case
    plan = plan_calls(visible_until)
    assert torch.equal(covered(plan, visible_until.numel()), seen_by_all(visible_until))
    assert len(plan.levels) <= depth(visible_until)


@given(st.integers(1, 20).flatmap(lambda n: st.lists(st.integers(1, n), min_size=n, max_size=n)))
@settings(max_examples=300, deadline=None)
def test_a_mask_of_no_forest_is_covered_or_refused(ends):
    visible_until = torch.tensor([ends], dtype=torch.int32)
    visible_until = torch.maximum(visible_until, torch.arange(1, len(ends) + 1).int())
    sees = [range(j, int(end)) for j, end in enumerate(visible_until[0])]
    crossing = any(b.start < a.stop < b.stop for a in sees for b in sees if a.start < b.start)
    try:
        plan = plan_calls(visible_until)
    except ValueError:
        assert crossing
        with pytest.raises(ValueError, match="must be that of a forest"):
            plan_calls(visible_until)
        return
    assert torch.equal(covered(plan, len(ends)), seen_by_all(visible_until))


def test_prompt_completion_and_pred_are_two_calls_whatever_their_number():
    for count in (1, 9):
        examples = [
            llm_jepa_example([i] * 5, [i] * 7, [i] * 4, pred_ids=[1]) for i in range(2, 2 + count)
        ]
        plan = plan_calls(pack(examples, share_prefixes=False)["visible_until"])
        assert len(plan.calls) == 2
        # Prompt and completion are one causal sequence; a PRED and a target are one each.
        assert plan.causal.max_seqlen_q == 12
        assert len(plan.causal.cu_seqlens_q) - 1 == 3 * count
        # Only PRED tokens are queries of the other call: one sequence with queries per example.
        assert len(plan.levels[0].rows) == count
        assert (plan.levels[0].cu_seqlens_q.diff() > 0).sum() == count


def test_calls_are_one_more_than_the_nesting_of_branches():
    only_children = [Segment([5] * 3)] + [Segment([6] * 3, parent=i) for i in range(4)]
    assert len(plan_calls(pack([Example(only_children)])["visible_until"]).calls) == 1

    def binary(parent, levels):
        for _ in range(2 if levels else 0):
            segments.append(Segment([len(segments)] * 2, parent=parent))
            binary(len(segments) - 1, levels - 1)

    segments = [Segment([99] * 2)]
    binary(0, 3)
    assert len(plan_calls(pack([Example(segments)])["visible_until"]).calls) == 4


def test_padding_is_few_sequences():
    examples = [llm_jepa_example([2] * 5, [3] * 7, [4] * 4, pred_ids=[1])]
    bare = pack(examples)["visible_until"]
    padded = pack(examples, pad_to_multiple_of=512)["visible_until"]
    without, plan = plan_calls(bare), plan_calls(padded)
    assert without.solitary is None
    assert plan.solitary.rows.tolist() == list(range(bare.shape[1], 512))
    # 495 tokens in sequences of 128; in the causal call, queries and keys of each apart.
    assert plan.solitary.cu_seqlens_q.diff().count_nonzero() == 4
    assert len(plan.causal.cu_seqlens_q) == len(without.causal.cu_seqlens_q) + 8
    assert plan.causal.max_seqlen_q == 128
    assert torch.equal(covered(plan, 512), seen_by_all(padded))

    own = torch.arange(1, MIN_SOLITARY + 1, dtype=torch.int32)[None]
    assert plan_calls(own).solitary is not None
    assert plan_calls(own[:, :-1]).solitary is None


@given(rows(), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_a_window_is_followed_or_refused(case, window):
    visible_until, position_ids = case
    seen = seen_by_all(visible_until, position_ids, window)
    try:
        plan = plan_calls(visible_until, position_ids, window)
    except ValueError:
        assert (seen != seen_by_all(visible_until)).any()  # the window hides something
        return
    assert torch.equal(covered(plan, visible_until.numel()), seen)


def test_windows_that_can_and_cannot_be_followed():
    # Segments of 6, child 4, grandchild 3, second child 2.
    visible_until = torch.tensor([[15] * 6 + [13] * 4 + [13] * 3 + [15] * 2], dtype=torch.int32)
    position_ids = torch.tensor([[*range(13), 6, 7]])
    assert plan_calls(visible_until, position_ids, 13).causal.window is None
    assert len(plan_calls(visible_until, position_ids, 8).levels) == 1
    assert plan_calls(visible_until, position_ids, 8).causal.window == 8
    with pytest.raises(ValueError, match=r"row 0, window=7 cuts into queries 13 : 15 and keys 0"):
        plan_calls(visible_until, position_ids, 7)

    # A second child so far away (as positions go) that the window hides the segment from it.
    far = torch.tensor([[*range(13), 30, 31]])
    plan = plan_calls(visible_until, far, 7)
    assert plan.levels == ()
    assert torch.equal(covered(plan, 15), seen_by_all(visible_until, far, 7))
    assert plan_calls(visible_until, far, 25).levels == ()
    with pytest.raises(ValueError, match="window=26 cuts"):
        plan_calls(visible_until, far, 26)

    with pytest.raises(ValueError, match="position_ids count up by one"):
        plan_calls(torch.full((1, 5), 5).int(), torch.tensor([[0, 2, 4, 6, 8]]), 3)


# The back end, over stand-ins for flash-attn 2 and 3


@pytest.fixture(params=[FlashAttention2StandIn, FlashAttention3StandIn], ids=["v2", "v3"])
def kernels(request, monkeypatch):
    kernels = request.param()
    monkeypatch.setattr(attention_flash, "find_kernels", lambda device, head_dim: kernels)
    return kernels


OPTIONS = [
    {},
    {"heads": 6, "kv_heads": 2},
    {"softcap": 3.0},
    {"sinks": True},
    {"softmax_scale": 0.3},
    {"window": 200},
    {"batch": 3, "heads": 4, "kv_heads": 2, "softcap": 2.0, "sinks": True, "softmax_scale": 0.5},
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def check_exact(case):
    """In float64 the reference is no better than what it checks: equal up to rounding."""
    expected, actual = case.run("reference"), case.run("flash")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_matches_the_reference(kernels, options, dtype):
    case = AttentionCase.random(
        **{"batch": 2, "seq": 60, "head_dim": 16, "mean_length": 3, **options}
    )
    case.visible_until[0, 45:] = torch.arange(46, 61)  # some padding in one row
    case.visible_until[0, :45].clamp_(max=45)
    plan = plan_calls(case.visible_until)
    assert plan.solitary is not None
    assert len(plan.levels) >= 3
    if dtype == torch.float64:
        check_exact(case)
    else:
        check_attention(case, "flash", dtype)
    assert kernels.calls.count("forward") == kernels.calls.count("backward") == len(plan.calls)


@pytest.mark.parametrize("mean_length", [0.5, 3.0, 30.0])
@pytest.mark.parametrize("seed", range(4))
def test_matches_the_reference_on_many_forests(kernels, mean_length, seed):
    options = {"heads": 4, "kv_heads": 2, "head_dim": 8, "sinks": True, "softcap": 4.0}
    case = AttentionCase.random(
        batch=1 + seed % 3, seq=20 + 23 * seed, seed=seed, mean_length=mean_length, **options
    )
    check_exact(case)


def test_a_window_within_runs_matches_the_reference(kernels):
    case = AttentionCase.random(seq=40, head_dim=8, batch=2, heads=4, kv_heads=2, window=6)
    case.visible_until = torch.tensor([[25] * 25 + [40] * 15, [40] * 40], dtype=torch.int32)
    case.position_ids = torch.stack([torch.arange(40) % 25, torch.arange(40)])
    check_exact(case)


def test_single_pred_tokens_with_grouped_heads(kernels):
    """flash-attn 2 misreads a maximum of one query per sequence where some have none."""
    examples = [llm_jepa_example([i] * 5, [i] * 4, [i] * 3, pred_ids=[1]) for i in range(2, 6)]
    batch = pack(examples, share_prefixes=False)
    seq = batch["visible_until"].shape[1]
    case = AttentionCase.random(seq=seq, heads=4, kv_heads=2, head_dim=8)
    case.visible_until = batch["visible_until"]
    assert plan_calls(case.visible_until).levels[0].max_seqlen_q == 1
    check_exact(case)


def test_takes_heads_before_tokens_and_strided_inputs(kernels):
    case = AttentionCase.random(seq=30, heads=4, kv_heads=4, head_dim=8)
    expected = case.run("flash")
    qkv = torch.cat([case.q, case.k, case.v], dim=-1)
    case.q, case.k, case.v = qkv.contiguous().split(8, dim=-1)
    actual = case.run("flash")
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    case.q, case.k, case.v = (x.contiguous() for x in (case.q, case.k, case.v))
    for name, value in case.run("flash").items():
        assert torch.equal(value, expected[name]), name
        assert value.transpose(1, 2).is_contiguous(), name


def test_repeats_bit_by_bit(kernels):
    case = AttentionCase.random(batch=2, seq=50, heads=4, kv_heads=2, head_dim=8, sinks=True)
    first, second = (case.run("flash", torch.bfloat16) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_nothing_a_query_may_not_see_changes_it(kernels):
    case = AttentionCase.random(seq=60, head_dim=8, seed=3)
    before = case.run("flash")
    hidden = ~visible(case.visible_until)[0]
    token = int(hidden.tril().any(0).nonzero()[0])
    case.k[:, :, token] += 5.0
    case.v[:, :, token] -= 5.0
    after = case.run("flash")
    for name in ("out", "dq"):
        same = before[name][:, :, hidden[:, token]], after[name][:, :, hidden[:, token]]
        assert torch.equal(*same), name
    assert not torch.equal(before["out"], after["out"])


def test_opcheck(kernels):
    case = AttentionCase.random(batch=2, seq=9, head_dim=8, mean_length=3, sinks=True)
    mask = attention.BlockMask.from_visible_until(case.visible_until, (4, 4))
    inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    sinks = case.sinks.detach().requires_grad_()
    tensors = [mask.visible_until, *mask.schedule_tensors()]
    options = (mask.block_size, None, None, None, None, 0.5, sinks, "flash")
    torch.library.opcheck(torch.ops.llmjepa_kernels.attention_forward, (*inputs, tensors, *options))


@pytest.fixture
def planned(monkeypatch):
    """Every mask that is planned from here on."""
    masks = []

    def plan(visible_until, *args, **options):
        masks.append(visible_until.clone())
        return plan_calls(visible_until, *args, **options)

    monkeypatch.setattr(attention_flash, "plan_calls", plan)
    return masks


def test_layers_and_their_backward_share_one_plan(kernels, planned):
    case = AttentionCase.random(seq=30, head_dim=8)
    x = case.q.detach().requires_grad_()
    out = x
    for _ in range(3):
        out = attention.view_attention(out, case.k, case.v, case.visible_until, impl="flash")
    out.sum().backward()
    assert len(planned) == 1
    attention.view_attention(x, case.k, case.v, case.visible_until.clone(), impl="flash")
    assert len(planned) == 2


def test_a_mask_or_positions_written_to_are_planned_again(kernels, planned):
    case = AttentionCase.random(seq=30, head_dim=8, window=100)
    case.run("flash")
    case.position_ids = case.position_ids.clone()
    case.run("flash")
    assert len(planned) == 2
    case.position_ids += 7
    case.run("flash")
    assert len(planned) == 3
    case.visible_until[:] = torch.arange(1, 31)
    check_exact(case)
    assert len(planned) == 4
    with torch.inference_mode():
        case.visible_until = case.visible_until.clone()
        for end in (30, 20):
            case.visible_until[:, :end] = end
            out = {
                impl: attention.view_attention(
                    case.q, case.k, case.v, case.visible_until, impl=impl
                )
                for impl in ("flash", "reference")
            }
            torch.testing.assert_close(out["flash"], out["reference"])


def test_plans_die_with_their_masks(kernels):
    case = AttentionCase.random(seq=30, head_dim=8)
    gc.collect()
    before = len(attention_flash._plans)
    case.run("flash")
    assert len(attention_flash._plans) == before + 1
    del case
    gc.collect()
    assert len(attention_flash._plans) == before


def test_refuses_what_the_kernels_do_not_take(kernels, monkeypatch):
    def run(dtype=torch.float32, **options):
        AttentionCase.random(**{"seq": 20, "head_dim": 8, **options}).run("flash", dtype)

    with pytest.raises(ValueError, match=r"multiple of 8 up to 256 .* got 12"):
        run(head_dim=12)
    with pytest.raises(ValueError, match=r"multiple of 8 up to 256 .* got 264"):
        run(head_dim=264)
    with pytest.raises(ValueError, match=r"softmax_scale must be positive .* got -1"):
        run(softmax_scale=-1.0)
    with pytest.raises(ValueError, match="use impl='triton'"):
        run(window=2, mean_length=3)
    monkeypatch.setattr(type(kernels), "dtypes", attention_flash.FlashAttention2.dtypes)
    with pytest.raises(ValueError, match=r"q must be float16 or bfloat16 .* got torch\.float32"):
        run()
    monkeypatch.setattr(attention_flash, "MAX_SEQUENCES", 3)
    with pytest.raises(ValueError, match="at most 3 sequences"):
        run(torch.float16, mean_length=1)


class Packages:
    """importlib where only some packages are installed."""

    def __init__(self, *names):
        self.names = names

    def import_module(self, name):
        if name not in self.names:
            raise ImportError(name)
        return name


V2, V3 = "flash_attn.flash_attn_interface", "flash_attn_3._C"


@pytest.mark.parametrize(
    ("installed", "capability", "head_dim", "expected"),
    [
        ((V2, V3), (9, 0), 128, attention_flash.FlashAttention3),
        ((V3,), (9, 0), 192, attention_flash.FlashAttention3),
        ((V2, V3), (9, 0), 256, attention_flash.FlashAttention2),
        ((V2, V3), (8, 0), 128, attention_flash.FlashAttention2),
        ((V2,), (9, 0), 128, attention_flash.FlashAttention2),
        ((V3,), (8, 0), 128, None),
        ((), (9, 0), 128, None),
    ],
)
def test_chooses_what_is_installed(monkeypatch, installed, capability, head_dim, expected):
    monkeypatch.setattr(attention_flash, "importlib", Packages(*installed))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    find_kernels = attention_flash.find_kernels.__wrapped__
    if expected is not None:
        assert type(find_kernels(torch.device("cuda"), head_dim)) is expected
    else:
        with pytest.raises(RuntimeError, match=r"pip install 'llmjepa_kernels\[flash\]'"):
            find_kernels(torch.device("cuda"), head_dim)


def test_runs_on_gpus_only():
    with pytest.raises(RuntimeError, match="impl='flash' runs on CUDA GPUs, q is on cpu"):
        AttentionCase.random(seq=20, head_dim=8).run("flash")


# The real thing


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_flash_attn_on_a_gpu(options, head_dim, dtype):
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    case = AttentionCase.random(**{"batch": 2, "seq": 300, "head_dim": head_dim, **options})
    case.visible_until[0, 250:] = torch.arange(251, 301)
    case.visible_until[0, :250].clamp_(max=250)
    check_attention(case, "flash", dtype, "cuda")
    first, second = (case.run("flash", dtype, "cuda") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
