"""Tubes drawn from paths: what the two vectors of each stand for, and when draws are the same."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmjepa_kernels.tubes import TokenPath, TubeSampler

IDS = list(range(100, 120))
PATH = TokenPath(0, [(2, 6), (9, 14)])  # nine tokens, three between the contents
CONTENT = [*range(2, 6), *range(9, 14)]


def covered(steps):
    """How often each token lies on the steps: a state minus an earlier one is what came between."""
    length = len(IDS)
    states = torch.tril(torch.ones(length, length, dtype=torch.int64))
    return sum((states[end] - states[start] for start, end in steps), torch.zeros(length)).tolist()


@given(
    first=st.integers(0, 3),
    lengths=st.lists(st.integers(0, 5), min_size=2, max_size=2),
    between=st.integers(0, 3),
    max_length=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 100),
)
def test_a_released_span_and_its_rest_are_the_path(first, lengths, between, max_length, seed):
    spans = [(first, first + lengths[0])]
    start = spans[0][1] + between
    spans.append((start, start + lengths[1]))
    content = {i for span in spans for i in range(*span)} - {0}  # no state before the first token
    sampler = TubeSampler(count=3, max_length=max_length, seed=seed)
    tubes = sampler.draw(TokenPath(0, spans), IDS)
    assert len(tubes) == (3 if len(content) > 1 else 0)
    for rest, span in tubes:
        both = covered([*rest, *span])
        assert {i for i, count in enumerate(both) if count} == content
        assert set(both) <= {0, 1}
        inside = [i for i, count in enumerate(covered(span)) if count]
        assert 1 <= len(inside) <= (max_length or len(content) - 1)
        order = sorted(content)
        assert inside == order[order.index(inside[0]) :][: len(inside)]
        assert len(rest) <= 3


def test_released_draws_are_uniform():
    tubes = TubeSampler(count=20_000).draw(PATH, IDS)
    starts, stops_from_0, stops_from_4 = Counter(), Counter(), Counter()
    for _, span in tubes:
        inside = [CONTENT.index(i) for a, b in span for i in range(a + 1, b + 1)]
        starts[inside[0]] += 1
        if inside[0] == 0:
            stops_from_0[inside[-1]] += 1
        if inside[0] == 4:
            stops_from_4[inside[-1]] += 1
    for counts, values in (
        (starts, range(9)),
        (stops_from_0, range(8)),
        (stops_from_4, range(4, 9)),
    ):
        assert sorted(counts) == list(values)
        mean = counts.total() / len(values)
        assert all(abs(count - mean) < 5 * mean**0.5 for count in counts.values())


@pytest.mark.parametrize("max_length", [None, 2, 4])
def test_paper_form_takes_three_tokens_of_the_path(max_length):
    seen = set()
    for tube in TubeSampler("paper", 200, max_length).draw(PATH, IDS):
        [[(s, t)], [(r, also_s)]] = tube
        assert s == also_s
        r, s, t = (CONTENT.index(i) for i in (r, s, t))
        assert r < s < t <= r + (max_length or 9)
        seen |= {r, s, t}
    assert seen == set(range(9))
    assert TubeSampler("paper").draw(TokenPath(0, [(3, 5)]), IDS) == []


def test_turns_are_the_two_contents():
    assert TubeSampler("turns", count=5).draw(PATH, IDS) == [([(1, 5)], [(8, 13)])]
    assert TubeSampler("turns").draw(TokenPath(0, [(0, 1), (2, 6)]), IDS) == []


def test_draws_depend_on_seed_epoch_and_tokens_alone():
    def draw(seed=0, epoch=0, ids=IDS):
        return TubeSampler(count=4, seed=seed).draw(PATH, ids, epoch)

    assert draw() == draw()
    others = [draw(seed=1), draw(epoch=1), draw(ids=IDS[::-1])]
    assert all(other != draw() for other in others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "random"}, "form must be one of .* got 'random'"),
        ({"count": 0}, "count must be an integer, at least 1, got 0"),
        ({"count": 1.5}, "count must be an integer, at least 1, got 1.5"),
        ({"max_length": 0}, "max_length must be an integer, at least 1, got 0"),
        ({"form": "paper", "max_length": 1}, "max_length must be an integer, at least 2, got 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TubeSampler(**options)


def test_a_rest_of_more_steps_than_a_tube_has_is_refused():
    path = TokenPath(0, [(0, 3), (4, 6), (7, 9)])
    with pytest.raises(ValueError, match="a path of at most 2 spans, got 3"):
        TubeSampler().draw(path, list(range(9)))
    assert TubeSampler(form="paper").draw(path, list(range(9)))
