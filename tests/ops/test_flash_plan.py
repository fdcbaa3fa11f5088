"""The plan of varlen calls: every visible pair in one of them, and as few of them as can be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjepa_kernels import BlockMask, Example, FlashPlan, Segment, llm_jepa_example, pack
from llmjepa_kernels.ops.dense import visible
from llmjepa_kernels.ops.flash_plan import MIN_SOLITARY
from tests.support.helpers import random_examples, random_rows

pytestmark = pytest.mark.usefixtures("one_thread")

plan_of = FlashPlan.from_visible_until


def covered(plan, seq, window=None, exact=True):
    """How many calls make query i attend to key j, (batch, seq, seq); checks the calls' form."""
    plan.check()
    batch = len(plan.rows)
    assert all(x.dtype == torch.int32 and len(x) == batch for x in plan.tensors())
    count = torch.zeros(batch, seq, seq, dtype=torch.long)
    for number, call in enumerate(plan.calls):
        lengths = call.bounds.diff()
        assert lengths.min() >= 0
        longest = lengths.amax((0, 2)).tolist()
        given = [call.max_seqlen_q, call.max_seqlen_k]
        assert longest == given or (not exact and longest[0] <= given[0] and longest[1] <= given[1])
        num_queries = call.slots.shape[1] if number else seq
        assert (call.bounds[..., 0] == 0).all()
        assert (call.bounds[..., -1] == torch.tensor([num_queries, seq])).all()
        call_window = {0: window, 1: 1}.get(number)
        for b in range(batch):
            queries = plan.rows[b, call.slots[b].long()] if number else torch.arange(seq)
            keyless = []
            for (q0, k0), (q1, k1) in zip(call.bounds[b].T[:-1], call.bounds[b].T[1:], strict=True):
                num_q, num_k = int(q1 - q0), int(k1 - k0)
                distance = torch.arange(num_q)[:, None] + num_k - num_q - torch.arange(num_k)
                seen = torch.ones(num_q, num_k, dtype=torch.bool)
                if number <= 1:
                    seen &= distance >= 0
                if call_window is not None:
                    seen &= distance < call_window
                count[b, queries[q0:q1].long(), k0:k1] += seen
                if num_k == 0:
                    keyless += queries[q0:q1].tolist()
            if number:  # what fills up a row is one token, and no query of this call
                assert len(set(keyless)) <= 1
                real = len(queries) - len(keyless)
                assert len(set(queries.tolist()) - set(keyless)) == real
    return count


def seen_by(visible_until, position_ids=None, window=None):
    return visible(visible_until, position_ids, window).long()


def num_levels(plan):
    return len(plan.calls) - 2


def has_solitary(plan):
    return plan.calls[1].slots.shape[1] > 0


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
    plan = plan_of(visible_until)
    assert torch.equal(covered(plan, visible_until.shape[1]), seen_by(visible_until))
    assert num_levels(plan) <= depth(visible_until)


@given(st.integers(1, 20).flatmap(lambda n: st.lists(st.integers(1, n), min_size=n, max_size=n)))
@settings(max_examples=300, deadline=None)
def test_a_mask_of_no_forest_is_covered_or_refused(ends):
    visible_until = torch.tensor([ends], dtype=torch.int32)
    visible_until = torch.maximum(visible_until, torch.arange(1, len(ends) + 1).int())
    sees = [range(j, int(end)) for j, end in enumerate(visible_until[0])]
    crossing = any(b.start < a.stop < b.stop for a in sees for b in sees if a.start < b.start)
    try:
        plan = plan_of(visible_until)
    except ValueError:
        assert crossing
        with pytest.raises(ValueError, match="must be that of a forest"):
            plan_of(visible_until)
        return
    assert torch.equal(covered(plan, len(ends)), seen_by(visible_until))


def test_prompt_completion_and_pred_are_two_calls_whatever_their_number():
    for count in (1, 9):
        examples = [
            llm_jepa_example([i] * 5, [i] * 7, [i] * 4, pred_ids=[1]) for i in range(2, 2 + count)
        ]
        plan = plan_of(pack(examples, share_prefixes=False)["visible_until"])
        assert not has_solitary(plan)
        assert num_levels(plan) == 1
        # Prompt and completion are one causal sequence; a PRED and a target are one each.
        assert plan.calls[0].max_seqlen_q == 12
        assert plan.calls[0].bounds.shape[2] - 1 == 3 * count
        # Only PRED tokens are queries of the other call: one sequence with queries per example.
        assert plan.calls[2].slots.shape[1] == plan.rows.shape[1] == count
        assert (plan.calls[2].bounds[:, 0].diff() > 0).sum() == count


def test_calls_are_one_more_than_the_nesting_of_branches():
    only_children = [Segment([5] * 3)] + [Segment([6] * 3, parent=i) for i in range(4)]
    assert num_levels(plan_of(pack([Example(only_children)])["visible_until"])) == 0

    def binary(parent, levels):
        for _ in range(2 if levels else 0):
            segments.append(Segment([len(segments)] * 2, parent=parent))
            binary(len(segments) - 1, levels - 1)

    segments = [Segment([99] * 2)]
    binary(0, 3)
    assert num_levels(plan_of(pack([Example(segments)])["visible_until"])) == 3


def test_padding_is_few_sequences():
    examples = [llm_jepa_example([2] * 5, [3] * 7, [4] * 4, pred_ids=[1])]
    bare = pack(examples)["visible_until"]
    padded = pack(examples, pad_to_multiple_of=512)["visible_until"]
    plan = plan_of(padded)
    causal, solitary, *_ = plan.calls
    assert not has_solitary(plan_of(bare))
    tokens = plan.rows[0, solitary.slots[0].long()]
    assert tokens.tolist() == list(range(bare.shape[1], 512))
    # 495 tokens in sequences of 128; in the causal call, queries and keys of each apart.
    assert (solitary.bounds[0].diff() > 0).all(0).sum() == 4
    assert causal.bounds.shape[2] == plan_of(bare).calls[0].bounds.shape[2] + 8
    assert causal.max_seqlen_q == 128
    assert torch.equal(covered(plan, 512), seen_by(padded))

    own = torch.arange(1, MIN_SOLITARY + 1, dtype=torch.int32)[None]
    assert has_solitary(plan_of(own))
    assert not has_solitary(plan_of(own[:, :-1]))


def test_successions_of_single_tokens_end_with_the_row():
    own = torch.arange(1, MIN_SOLITARY, dtype=torch.int32).expand(2, -1)
    plan = plan_of(own)
    assert not has_solitary(plan)
    assert torch.equal(covered(plan, MIN_SOLITARY - 1), seen_by(own))


def test_rows_are_filled_up_in_sequences_that_are_not_longer_than_others():
    """A row with 600 queries in a call beside one without any."""
    branches = [Segment([5] * 3)] + [Segment([6] * 100, parent=0) for _ in range(7)]
    busy = pack([Example(branches)], share_prefixes=False)["visible_until"]
    plain = torch.full_like(busy, busy.shape[1])
    for visible_until in (torch.cat([busy, plain]), torch.cat([plain, busy])):
        plan = plan_of(visible_until)
        assert plan.rows.shape == (2, 600)
        assert plan.calls[2].max_seqlen_q == 600
        assert torch.equal(covered(plan, busy.shape[1]), seen_by(visible_until))
    many = [Example([Segment([i] * 3), Segment([5] * 3, 0), Segment([6], 0)]) for i in range(300)]
    many = pack(many, share_prefixes=False)["visible_until"]
    visible_until = torch.cat([many, torch.full_like(many, many.shape[1])])
    assert plan_of(visible_until).calls[2].max_seqlen_q == 128


@given(rows(), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_a_window_is_followed_or_refused(case, window):
    visible_until, position_ids = case
    seen = seen_by(visible_until, position_ids, window)
    seq = visible_until.shape[1]
    try:
        plan = plan_of(visible_until, position_ids=position_ids, window=window)
    except ValueError:
        assert (seen != seen_by(visible_until)).any()  # the window hides something
        assert plan_of(visible_until, position_ids=position_ids).reach > window
        return
    assert torch.equal(covered(plan, seq, window), seen)
    if plan.reach <= window:  # then the plan without a window will do
        plan = plan_of(visible_until, position_ids=position_ids)
        assert torch.equal(covered(plan, seq, window), seen)


def test_windows_that_can_and_cannot_be_followed():
    # Segments of 6, child 4, grandchild 3, second child 2.
    visible_until = torch.tensor([[15] * 6 + [13] * 4 + [13] * 3 + [15] * 2], dtype=torch.int32)
    position_ids = torch.tensor([[*range(13), 6, 7]])

    def planned(window, position_ids=position_ids):
        return plan_of(visible_until, position_ids=position_ids, window=window)

    assert planned(None).reach == planned(8).reach == 8
    assert num_levels(planned(8)) == 1
    message = r"row 0, window=7 cuts into queries 13 : 15 and keys 0 : 6"
    with pytest.raises(ValueError, match=message):
        planned(7)
    with pytest.raises(ValueError, match=message.replace("row 0", "row 1")):
        plan_of(
            torch.cat([torch.full_like(visible_until, 15), visible_until]),
            position_ids=torch.cat([torch.arange(15)[None], position_ids]),
            window=7,
        )

    # A second child so far away (as positions go) that the window hides the segment from it.
    far = torch.tensor([[*range(13), 30, 31]])
    plan = planned(7, far)
    assert num_levels(plan) == 0
    assert torch.equal(covered(plan, 15, 7), seen_by(visible_until, far, 7))
    assert num_levels(planned(25, far)) == 0
    with pytest.raises(ValueError, match="window=26 cuts"):
        planned(26, far)

    run, odd = torch.full((1, 5), 5).int(), torch.tensor([[0, 2, 4, 6, 8]])
    assert plan_of(run, position_ids=odd).reach == 9
    with pytest.raises(ValueError, match="position_ids count up by one"):
        plan_of(run, position_ids=odd, window=8)
    assert plan_of(run, position_ids=torch.zeros_like(odd)).reach == 5


def test_travels_with_a_batch():
    batch = pack(random_examples(20, 0), 120, flash_plan=True)
    keys = [key for key in batch if FlashPlan.has_key(key)]
    rows = len(batch["input_ids"])
    assert rows > 1
    for key in keys:
        assert batch[key].dtype == torch.int32, key
        assert len(batch[key]) == rows, key
    plan = FlashPlan.from_visible_until(batch["visible_until"], position_ids=batch["position_ids"])
    assert batch.flash_plan.reach == plan.reach > 1
    for travelled, made in zip(batch.flash_plan.tensors(), plan.tensors(), strict=True):
        assert torch.equal(travelled, made)
        assert travelled.shape == made.shape
    assert not any(map(FlashPlan.has_key, pack(random_examples(3, 0))))

    # Rows may be cut apart.
    last = FlashPlan.from_schedule(
        batch["visible_until"][-1:], {key: batch[key][-1:] for key in keys}
    )
    seq = batch["visible_until"].shape[1]
    expected = seen_by(batch["visible_until"])
    assert torch.equal(covered(last, seq, exact=False), expected[-1:])


def test_a_plan_that_cannot_travel_or_does_not_fit_is_refused():
    batch = pack(random_examples(4, 0), flash_plan=True)
    until = batch["visible_until"]
    with pytest.raises(ValueError, match="with position_ids and without window to travel"):
        plan_of(until).schedule()
    with pytest.raises(ValueError, match="with position_ids and without window to travel"):
        plan_of(until, position_ids=batch["position_ids"], window=500).schedule()
    for missing in ("flash_rows", "flash_slots_1", "flash_bounds_0"):
        given = {key: value for key, value in batch.items() if key != missing}
        with pytest.raises(ValueError, match="plan of visible_until is incomplete"):
            FlashPlan.from_schedule(until, given)
    with pytest.raises(ValueError, match="flash_rows must be an int32 tensor of 1 rows"):
        FlashPlan.from_schedule(until, {**batch, "flash_rows": batch["flash_rows"].long()})
    with pytest.raises(ValueError, match=r"flash_reach must be an int32 tensor of 2 rows on cpu"):
        FlashPlan.from_schedule(until.expand(2, -1), batch)
    longer = torch.nn.functional.pad(until, (0, 1), value=until.shape[1] + 1)
    with pytest.raises(ValueError, match=rf"rows of {until.shape[1]} tokens, but .* have"):
        FlashPlan.from_schedule(longer, batch)


@pytest.mark.parametrize("key", ["rows", "bounds_0", "bounds_2", "slots_2", "lengths_0"])
def test_calls_beyond_the_row_are_refused(key):
    batch = pack(random_examples(4, 0), flash_plan=True)
    until, wrong = batch["visible_until"], batch[f"flash_{key}"].clone()
    FlashPlan.from_schedule(until, batch).check()
    if key.startswith("lengths"):  # the longest sequence is longer than it is said to be
        wrong = wrong[:, 1:]
    else:
        wrong.flatten()[-1] += until.shape[1]
    with pytest.raises(ValueError, match=f"not those of rows of {until.shape[1]} tokens"):
        FlashPlan.from_schedule(until, {**batch, f"flash_{key}": wrong}).check()


def test_another_default_device_is_not_taken():
    visible_until, positions = random_rows(2, 60, 3, 9.0)
    expected = FlashPlan.from_visible_until(visible_until, position_ids=positions)
    mask = BlockMask.from_visible_until(visible_until)
    with torch.device("meta"):
        plan = FlashPlan.from_visible_until(visible_until, position_ids=positions)
        drawn = str(BlockMask.from_visible_until(visible_until))
    assert all(map(torch.equal, plan.tensors(), expected.tensors()))
    assert drawn == str(mask)
