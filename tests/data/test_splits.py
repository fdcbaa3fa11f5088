"""Splits by depth, length and operator pairs: what is out of distribution, and what stays in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.regex_structure import OPERATORS, structure
from llmjepa_kernels.data.splits import Split


def sample(answer: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": "a question longer than its answer"},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.mark.parametrize(
    ("spec", "inside", "outside"),
    [
        ("depth:0", "dog", "(dog)*"),
        ("depth:2", "~((dog)*)", "~(((dog)*)|(a))"),
        ("length:4", "dogs", "(dog)"),
        ("length:0", "", "7"),
        ("length:5", "SELEC", "SELECT 1"),
        ("pairs:not>star", "(~(dog))*", "[a-z]&(~((dog)*))"),
        ("pairs:or>and,star>or", "((a)|(b))&(c)", "((a)|(b))*"),
    ],
)
def test_out_of_distribution(spec, inside, outside):
    split = Split.parse(spec)
    assert not split.is_out_of_distribution(sample(inside))
    assert split.is_out_of_distribution(sample(outside))


@pytest.mark.parametrize(
    "spec", ["depth:2", "length:60", "pairs:0.1", "pairs:1e-06", "pairs:not>star,or>and"]
)
def test_str_is_the_spec(spec):
    assert str(Split.parse(spec)) == spec
    assert Split.parse(str(Split.parse(spec))) == Split.parse(spec)


def test_listed_pairs_have_one_order():
    assert Split.parse("pairs: or>and, not>star,or>and") == Split.parse("pairs:not>star,or>and")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", r"split must be depth:N .* got ''"),
        ("depth", r"split must be depth:N .* got 'depth'"),
        ("depth:", r"split must be depth:N"),
        ("size:3", r"split must be depth:N .* got 'size:3'"),
        ("depth:two", r"depth:N expects N to be 0, 1, 2, …, got 'two'"),
        ("depth:-1", r"got '-1'"),
        ("length:2.5", r"length:N expects .* got '2.5'"),
        ("pairs:0", r"fraction between 0 and 1 or outer>inner,…, got '0'"),
        ("pairs:1", r"fraction between 0 and 1"),
        ("pairs:-0.1", r"fraction between 0 and 1"),
        ("pairs:or", r"in quotes for a shell\) expects two of or, and, .* got 'or'"),
        ("pairs:or>nor", r"got 'or>nor'"),
        ("pairs:or>and,", r"got ''"),
        ("pairs:nan", r"got 'nan'"),
    ],
)
def test_malformed_spec(spec, expected):
    with pytest.raises(ValueError, match=expected):
        Split.parse(spec)


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.35, 0.9, 0.999])
def test_every_operator_stays_in_training_as_outer_and_inner(fraction):
    held_out = Split.parse(f"pairs:{fraction}").held_out_pairs
    n = len(OPERATORS)
    assert len(held_out) == min(max(1, round(fraction * n * n)), n * (n - 1))
    for side in (0, 1):
        counts = [sum(pair.split(">")[side] == name for pair in held_out) for name in OPERATORS]
        assert max(counts) - min(counts) <= 1  # as evenly as can be
        assert max(counts) < n


def test_a_greater_fraction_holds_out_more_of_the_same():
    small, large = (Split.parse(f"pairs:{fraction}").held_out_pairs for fraction in (0.1, 0.3))
    assert small < large


def test_the_held_out_pairs_are_the_same_in_every_process():
    code = (
        "from llmjepa_kernels.data.splits import Split; "
        "print(*sorted(Split.parse('pairs:0.1').held_out_pairs))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == sorted(Split.parse("pairs:0.1").held_out_pairs)


def test_the_grammar_splits_into_usable_sizes():
    samples = grammar.generate(400, max_depth=3)
    for spec in ("depth:2", "pairs:0.1", "length:30"):
        inside = [s for s in samples if not Split.parse(spec).is_out_of_distribution(s)]
        assert 0.5 < len(inside) / len(samples) < 0.95
        seen = {name for s in inside for name in structure(s["messages"][-1]["content"]).operators}
        assert seen == set(grammar.OPERATORS)


@pytest.mark.parametrize(
    "answer", ["SELECT name FROM playlists;", "#### 18", "Vancouver", "A", "a line\n", "(dog"]
)
@pytest.mark.parametrize("spec", ["depth:2", "pairs:0.1"])
def test_answers_that_are_no_regexes(answer, spec):
    with pytest.raises(ValueError, match=r"needs answers that are regexes, got .* length:N works"):
        Split.parse(spec).is_out_of_distribution(sample(answer))
    assert not Split.parse("length:60").is_out_of_distribution(sample(answer))
