import copy
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from llmjepa_kernels import (
    Example,
    PackedBatch,
    Segment,
    llm_jepa_example,
    pack,
    packing,
    view_attention,
)
from llmjepa_kernels.example import IGNORE, segment_ends, without_views
from llmjepa_kernels.tubes import TokenPath
from tests.support.helpers import random_examples

PAD = 999


def expected_facts(examples):
    """What separate passes would compute: contexts of tokens, loss terms, pairs and tubes."""
    contexts, terms, pairs, tubes = set(), Counter(), Counter(), Counter()
    for example in examples:
        paths = []
        for segment in example.segments:
            above = () if segment.parent is None else paths[segment.parent]
            for i, token in enumerate(segment.input_ids):
                context = above + tuple(segment.input_ids[: i + 1])
                contexts.add(context)
                label = -100 if segment.labels is None else segment.labels[i]
                if label != -100 and len(context) > 1:
                    terms[context[:-1], token, label] += 1
            paths.append(above + tuple(segment.input_ids))
        pairs.update((paths[p], paths[t]) for p, t in example.pairs)
        for tube in example.tubes:
            steps = [(i, *step) for i, vector in enumerate(tube) for step in vector]
            sequence = paths[example.path.segment]
            tubes[tuple((i, sequence[: s + 1], sequence[: e + 1]) for i, s, e in steps)] += 1
    return contexts, terms, pairs, tubes


def packed_facts(batch):
    """The same, read off the packed rows through the mask alone."""
    contexts, terms, pairs, tubes = set(), Counter(), Counter(), Counter()
    for b in range(len(batch["input_ids"])):
        ids, positions, labels, until = (
            batch[key][b].tolist()
            for key in ("input_ids", "position_ids", "labels", "visible_until")
        )
        paths = []
        for i in range(len(ids)):
            seen = [j for j in range(i + 1) if i < until[j]]
            paths.append(tuple(ids[j] for j in seen))
            if ids[i] == PAD:
                assert seen == [i]
                assert labels[i] == -100
                assert positions[i] == 0
                continue
            assert positions[i] == len(seen) - 1
            contexts.add(paths[i])
            if labels[i] != -100:
                assert paths[i] == (*paths[i - 1], ids[i]), "the label's predictor is not before it"
                terms[paths[i - 1], ids[i], labels[i]] += 1
        for predictor, target in batch["view_pairs"][b].tolist():
            assert (predictor == -1) == (target == -1)
            if predictor >= 0:
                pairs[paths[predictor], paths[target]] += 1
        for tube in batch["tubes"][b].tolist():
            steps = [(i, *step) for i, vector in enumerate(tube) for step in vector if step[0] >= 0]
            if steps:
                tubes[tuple((i, paths[start], paths[end]) for i, start, end in steps)] += 1
    return contexts, terms, pairs, tubes


@st.composite
def forests(draw):
    """Examples over a tiny vocabulary, so that prefixes coincide all the time."""
    examples = []
    for _ in range(draw(st.integers(1, 6))):
        segments = []
        for index in range(draw(st.integers(1, 6))):
            ids = draw(st.lists(st.integers(0, 2), min_size=1, max_size=5))
            parent = draw(st.sampled_from([None, *range(index)]))
            keep = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
            labels = [t if k else -100 for t, k in zip(ids, keep, strict=True)]
            segments.append(Segment(ids, parent, draw(st.sampled_from([None, labels]))))
        index = st.integers(0, len(segments) - 1)
        example = Example(segments, draw(st.lists(st.tuples(index, index), max_size=3)))
        path = TokenPath(draw(index), ())
        token = st.integers(0, segment_ends(example)[path.segment] - 1)
        steps = st.lists(st.tuples(token, token), max_size=3)
        tubes = draw(st.lists(st.tuples(steps, steps).filter(any), max_size=2))
        examples.append(replace(example, path=path, tubes=tubes))
    return examples


@settings(deadline=None, max_examples=300)
@given(examples=forests(), share=st.booleans(), max_length=st.sampled_from([None, 64, 80]))
def test_nothing_is_lost_or_added(examples, share, max_length):
    batch = pack(examples, max_length, share_prefixes=share, pad_token_id=PAD)
    assert packed_facts(batch) == expected_facts(examples)


@settings(deadline=None, max_examples=100)
@given(examples=forests())
def test_sharing_stores_every_prefix_that_nobody_supervises_once(examples):
    batch = pack(examples)
    _, terms, *_ = expected_facts(examples)
    predictors = {context for context, _, _ in terms}
    supervised = {(*context, token) for context, token, _ in terms}
    ids, until = batch["input_ids"][0].tolist(), batch["visible_until"][0].tolist()
    paths = Counter(tuple(ids[j] for j in range(i + 1) if i < until[j]) for i in range(len(ids)))
    for path, count in paths.items():
        # A path may stand several times only below a token that had to stay unshared.
        prefixes = {path[:i] for i in range(1, len(path) + 1)}
        assert count == 1 or prefixes & (predictors | supervised)


@pytest.mark.parametrize("views", ["shared", "official"])
def test_rows_respect_max_length_and_are_well_filled(views):
    examples = random_examples(200, 0, views=views)
    batch = pack(examples, 128, pad_token_id=PAD)
    assert batch["input_ids"].shape[1] <= 128
    assert packed_facts(batch) == expected_facts(examples)
    # Rows with the same examples without sharing would need at least this many.
    unshared = pack(examples, 128, share_prefixes=False, pad_token_id=PAD)
    assert len(batch["input_ids"]) < len(unshared["input_ids"])
    fill = (unshared["input_ids"] != PAD).float().mean()
    assert fill > 0.9


def test_the_shared_layout():
    example = llm_jepa_example([1, 2], [3, 4], [5, 6], pred_ids=[7])
    batch = pack([example])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 7, 5, 6]]
    assert batch["labels"].tolist() == [[-100, -100, 3, 4, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert batch["visible_until"].tolist() == [[5, 5, 4, 4, 5, 7, 7]]
    assert batch["view_pairs"].tolist() == [[[4, 6]]]


def test_without_predictor_tokens_the_prompt_predicts():
    example = llm_jepa_example([1, 2], [3], [5], completion_labels=[-100])
    assert pack([example])["view_pairs"].tolist() == [[[1, 3]]]


def test_a_shared_prompt_keeps_its_last_token_apart():
    batch = pack([llm_jepa_example([1, 2, 3], [10 + i], [20]) for i in range(2)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 10, 3, 11, 20]]
    assert batch["view_pairs"].tolist() == [[[2, 6], [4, 6]]]


def test_two_supervised_continuations_of_one_segment():
    """As in preference training: the second gets a copy of the token that predicts it."""
    prompt, chosen, rejected = Segment([1, 2]), Segment([3], 0, [3]), Segment([4], 0, [4])
    batch = pack([Example([prompt, chosen, rejected])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 2, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 1, 2]]
    assert batch["labels"].tolist() == [[-100, -100, 3, -100, 4]]


def test_the_first_label_of_a_root_is_ignored_as_hugging_face_does():
    batch = pack([Example([Segment([1, 2, 3], labels=[1, 2, 3])])])
    assert batch["labels"].tolist() == [[-100, 2, 3]]


def test_deep_trees_do_not_recurse():
    depth = 5000
    segments = [Segment([i % 7], i - 1 if i else None) for i in range(depth)]
    batch = pack([Example(segments, [(0, depth - 1)])])
    assert batch["position_ids"].tolist() == [list(range(depth))]


def test_tensors_and_padding():
    examples = [Example([Segment(torch.tensor([1, 2, 3]))]), Example([Segment([4])])]
    batch = pack(examples, 3, pad_token_id=PAD)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, PAD, PAD]]
    assert batch["visible_until"].tolist()[1] == [1, 2, 3]
    assert batch["view_pairs"].shape == (2, 0, 2)
    dtypes = {key: x.dtype for key, x in batch.items()}
    assert dtypes["input_ids"] == dtypes["labels"] == dtypes["view_pairs"] == torch.int64
    assert dtypes["visible_until"] == torch.int32
    assert all(len(x) == 2 for x in batch.values())


def test_rows_are_padded_to_a_multiple():
    batch = pack([Example([Segment([1, 2, 3])])], 8, pad_token_id=PAD, pad_to_multiple_of=4)
    assert batch["input_ids"].tolist() == [[1, 2, 3, PAD]]
    assert batch["visible_until"].tolist() == [[3, 3, 3, 4]]


def test_pairs_are_padded_per_row():
    examples = [llm_jepa_example([1, 2], [3], [4]), Example([Segment([5, 6, 7, 8])])]
    batch = pack(examples, 4)
    assert sorted(batch["view_pairs"].flatten(1).tolist()) == [[-1, -1], [1, 3]]


def test_a_batch_is_a_mapping_that_moves_and_pickles():
    batch = pack(random_examples(5, 1))
    moved = batch.to("cpu")
    assert isinstance(moved, PackedBatch)
    assert isinstance(copy.copy(batch), PackedBatch)
    again = pickle.loads(pickle.dumps(batch))
    assert all(torch.equal(again[key], batch[key]) for key in batch)
    assert batch.block_mask.num_tiles > 0


def test_packing_is_deterministic():
    examples = random_examples(50, 2)
    first, second = pack(examples, 100), pack(examples, 100)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("segments", "pairs", "message"),
    [
        ([], (), "example 1: segments must hold at least one"),
        ([Segment([])], (), "example 1, segment 0: input_ids"),
        ([Segment([1], 0)], (), r"example 1, segment 0: parent .* got 0"),
        ([Segment([1]), Segment([1], 2)], (), r"segment 1: parent .* got 2"),
        ([Segment([1]), Segment([1], -1)], (), r"segment 1: parent .* got -1"),
        ([Segment([1, 2], labels=[1])], (), r"labels must be as many as input_ids \(2\), got 1"),
        ([Segment([1], labels=[])], (), r"labels must be as many as input_ids \(1\), got 0"),
        ([Segment([1])], [(0, 1)], r"pairs .* 1 segments, got \(0, 1\)"),
        ([Segment([1])], [(-1, 0)], r"pairs .* got \(-1, 0\)"),
        ([Segment([1])], [(0,)], r"pairs .* got \(0,\)"),
        ([Segment([1.0])], (), "segment 0: input_ids must be a flat .* integers, got 1.0"),
        ([Segment(torch.ones(1, 2).long())], (), r"input_ids must be .* got \[1, 1\]"),
        ([Segment([1], labels=[None])], (), "labels must be a flat .* integers, got None"),
        ([Segment([1] * 11)], (), "example 1 takes 11 tokens, more than max_length = 10"),
        ([Segment(torch.tensor(1))], (), "segment 0: input_ids must be a flat .* got tensor"),
        (
            [Segment([1]), Segment([1, 2], 0, np.zeros((2, 1), int))],
            (),
            r"segment 1: labels must be a flat .* got \[0\]",
        ),
        ([Segment([1]), Segment([1], 0, (x for x in ()))], (), r"as input_ids \(1\), got 0"),
        ([Segment([1]), Segment([1], [0], [1])], (), r"segment 1: parent .* got \[0\]"),
        ([Segment([1])], None, "example 1: pairs must be a sequence, got None"),
    ],
)
def test_bad_examples_are_named(segments, pairs, message):
    good = Example([Segment([1, 2])])
    with pytest.raises(ValueError, match=message):
        pack([good, Example(segments, pairs)], 10)


@pytest.mark.parametrize(
    "tubes",
    [
        [([(0.5, 1.7)], [(2, 3)])],
        [([(0, 1, 2)], [(2, 3)])],
        [([(0,)], [(2, 3)])],
        [((0, 1), (2, 3))],
        [3],
        [([(0, 9)], [(2, 3)])],
        [([(0, 1)] * 4, [(2, 3)])],
        [([], [])],
    ],
    ids=str,
)
def test_bad_tubes_are_named(tubes):
    example = Example([Segment([1, 2, 3, 4])], tubes=tubes, path=TokenPath(0, [(0, 2), (2, 4)]))
    with pytest.raises(ValueError, match="example 0: tubes must be 2 lists of up to 3 steps"):
        pack([example])


def test_bad_options():
    with pytest.raises(ValueError, match="at least one example"):
        pack([])
    with pytest.raises(ValueError, match="max_length must be an integer, at least 1, got 0"):
        pack([Example([Segment([1])])], 0)
    with pytest.raises(ValueError, match=r"pad_to_multiple_of must be an integer.* got 0"):
        pack([Example([Segment([1])])], pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="multiple of pad_to_multiple_of = 8, got 12"):
        pack([Example([Segment([1])])], 12, pad_to_multiple_of=8)
    with pytest.raises(ValueError, match=r"block_size must be .* power of two.* got 48"):
        pack([Example([Segment([1])])], block_size=48)


def test_the_block_size_follows_the_segments_and_the_gpu():
    def side(length, **options):
        examples = [Example([Segment(range(length))])] * 4
        return pack(examples, share_prefixes=False, **options).block_mask.block_size[0]

    assert side(50) == 64
    assert side(1000, compute_capability=(9, 0)) == side(1000) == 64
    assert side(1000, compute_capability=(10, 0)) == 128
    assert side(1000, compute_capability=(10, 0), block_size=32) == 32


def test_a_shared_prefix_may_make_an_example_fit():
    """Sharing also works within an example: its size counts once stored."""
    official = Example([Segment([1, 2, 3, 4]), Segment([1, 2, 3, 5])])
    assert pack([official], 5)["input_ids"].shape == (1, 5)
    with pytest.raises(ValueError, match="8 tokens"):
        pack([official], 5, share_prefixes=False)


def test_an_example_is_tried_in_few_of_many_rows(monkeypatch):
    """Else packing would be quadratic; benchmarks print its speed."""
    tried = Counter()

    def added_length(row, tree):
        tried[tree.name] += 1
        return plain(row, tree)

    plain = packing._Row.added_length
    monkeypatch.setattr(packing._Row, "added_length", added_length)
    batch = pack(random_examples(1000, seed=0), 128)
    assert (batch["view_pairs"][..., 0] >= 0).sum() == 1000
    assert len(batch["input_ids"]) > 100
    assert 0 < max(tried.values()) <= packing._CANDIDATES


def test_without_views_keeps_what_supervised_segments_hang_from():
    example = Example(
        [
            Segment([1, 2]),
            Segment([3], parent=0),
            Segment([4, 5], parent=0, labels=[-100, -100]),
            Segment([6], parent=0, labels=[6]),
            Segment([7], labels=[-100]),
        ],
        pairs=[(1, 4)],
    )
    assert without_views(example) == Example(
        [Segment([1, 2]), Segment([6], parent=0, labels=[6])], pairs=()
    )


def test_segment_ends_count_what_the_last_token_sees():
    example = Example([Segment([1, 2]), Segment([3], parent=0), Segment([4, 5, 6], parent=1)])
    assert segment_ends(example) == [2, 3, 6]
    assert segment_ends(Example([Segment([1, 2]), Segment([3])])) == [2, 1]


def test_forked_workers_pack_after_threads_were_used():
    """Threads do not survive a fork: what waits for them hangs, as torch's own operations do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    q = torch.randn(1, 4, 512, 32)
    view_attention(q, q, q, torch.full((1, 512), 512, dtype=torch.int32))
    torch.set_num_threads(threads)
    loader = DataLoader(
        random_examples(8, seed=1), 4, collate_fn=pack, num_workers=2,
        multiprocessing_context="fork", timeout=60,
    )  # fmt: skip
    assert [len(batch["view_pairs"][0]) for batch in loader] == [4, 4]


def test_rows_are_filled_by_what_a_prefix_in_common_leaves():
    examples = [Example([Segment([*range(8), i, i])]) for i in range(20, 24)]
    assert len(pack(examples, 16)["input_ids"]) == 1
    assert len(pack(examples, 16, share_prefixes=False)["input_ids"]) == 4


def test_the_path_and_the_tubes_stay_without_views():
    code = Segment([1, 2, 3], labels=[IGNORE, 2, 3])
    tubes = [([(0, 1)], [(1, 2)])]
    example = Example([Segment([9]), code], [(0, 1)], TokenPath(1, [(1, 3)]), tubes)
    bare = without_views(example)
    assert (bare.path.segment, bare.tubes) == (0, tubes)
