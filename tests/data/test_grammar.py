"""The built-in grammar against a parser of its English that is written apart from it."""

import random
import subprocess
import sys
from itertools import chain

import pytest

from llmjepa_kernels.data import grammar

LEAVES = {
    "a number": "[0-9]",
    "a letter": "[A-Za-z]",
    "a capital letter": "[A-Z]",
    "a lower-case letter": "[a-z]",
    "a vowel": "[AEIOUaeiou]",
    "a character": ".",
    "the string 'dog'": "dog",
    "the string 'truck'": "truck",
    "the string 'ring'": "ring",
    "the string 'lake'": "lake",
}


class Parser:
    """Recursive descent with one token of look-ahead per rule: success proves one reading."""

    def __init__(self, text):
        self.rest = text

    def take(self, *phrases):
        for phrase in phrases:
            if self.rest == phrase or self.rest.startswith(phrase + " "):
                self.rest = self.rest[len(phrase) + 1 :]
                return True
        return False

    def expression(self):
        """(regex, depth, operators, operator pairs) of the expression at the front."""
        for words, regex in LEAVES.items():
            if self.take(words):
                return regex, 0, [], set()
        if self.take("not", "anything but"):
            return self.apply("not", "~({})")
        if self.take("text starting with", "text beginning with"):
            return self.apply("starts_with", "({})(.*)")
        if self.take("text ending with", "text finishing with"):
            return self.apply("ends_with", "(.*)({})")
        if self.take("text containing", "text including"):
            return self.apply("contains", ".*({}).*")
        if self.take("the word"):
            return self.apply("word", r"\b({})\b")
        if self.take("zero or more of", "any number of"):
            return self.apply("star", "({})*")
        if self.take("either"):
            return self.apply("or", "({})|({})", ("or",))
        if self.take("both"):
            return self.apply("and", "({})&({})", ("and",))
        if self.take("first"):
            return self.apply("followed_by", "({}).*({})", ("then", "before"))
        for n in range(2, 8):
            if self.take(f"{n} or more of", f"at least {n} of"):
                return self.apply("repeat", f"({{}}){{{{{n},}}}}")
        raise AssertionError(f"no rule for {self.rest!r}")

    def apply(self, name, regex, separators=()):
        operands = [self.expression()]
        if separators:
            assert self.take(*separators), self.rest
            operands.append(self.expression())
        regexes, depths, operators, pairs = zip(*operands, strict=True)
        inner = {f"{name}>{names[0]}" for names in operators if names}
        return (
            regex.format(*regexes),
            1 + max(depths),
            [name, *chain(*operators)],
            inner.union(*pairs),
        )


@pytest.mark.parametrize("depth", range(6))
def test_every_text_has_one_reading_and_it_is_the_regex(depth):
    count = 16 if depth == 0 else 300
    for sample in grammar.generate(count, seed=3, min_depth=depth, max_depth=depth):
        system, user, assistant = sample["messages"]
        assert [turn["role"] for turn in sample["messages"]] == ["system", "user", "assistant"]
        assert system["content"] == "Convert natural language to regular expression."
        parser = Parser(user["content"])
        assert parser.take("lines with", "lines having")
        regex, parsed_depth, operators, pairs = parser.expression()
        assert parser.rest == ""
        assert assistant["content"] == regex
        assert sample["depth"] == parsed_depth == depth
        assert sample["operators"] == operators
        assert sample["operator_pairs"] == sorted(pairs)


def test_all_operators_words_and_depths_occur():
    samples = grammar.generate(4000, max_depth=3)
    seen = {name for sample in samples for name in sample["operators"]}
    assert seen == set(grammar.OPERATORS)
    assert len({pair for s in samples for pair in s["operator_pairs"]}) == len(seen) ** 2
    depths = [sample["depth"] for sample in samples[:600]]
    assert all(depths.count(depth) > 120 for depth in (1, 2, 3))
    texts = " ".join(sample["messages"][1]["content"] for sample in samples)
    phrasings = [p for o in grammar.OPERATORS.values() for p in o.phrasings]
    for words in [*LEAVES, *(p.split(" {")[0] for p in phrasings if p[0] != "{")]:
        assert words in texts


def test_splits_share_no_regex_whatever_the_seed_and_depth():
    train = [*grammar.generate(3000, seed=0, max_depth=2), *grammar.generate(2000, seed=1)]
    heldout = [
        *grammar.generate(300, seed=0, split="heldout"),
        *grammar.generate(300, seed=7, split="heldout", max_depth=3),
    ]
    train_regexes = {sample["messages"][2]["content"] for sample in train}
    heldout_regexes = {sample["messages"][2]["content"] for sample in heldout}
    assert not train_regexes & heldout_regexes
    assert {grammar.split_of(regex) for regex in train_regexes} == {"train"}
    assert {grammar.split_of(regex) for regex in heldout_regexes} == {"heldout"}


def test_one_regex_in_ten_is_held_out():
    rng = random.Random(0)
    regexes = {grammar.random_expression(rng, 3)[1] for _ in range(5000)}
    share = sum(grammar.split_of(regex) == "heldout" for regex in regexes) / len(regexes)
    assert 0.08 < share < 0.12


def test_no_text_twice_and_no_operator_of_equal_operands_where_it_says_nothing():
    samples = grammar.generate(1000, max_depth=1)
    texts = [sample["messages"][1]["content"] for sample in samples]
    assert len(set(texts)) == len(texts)
    assert not any("either a vowel or a vowel" in text for text in texts)
    assert not any("both a letter and a letter" in text for text in texts)


def test_a_longer_stream_begins_with_the_shorter_one_and_seeds_differ():
    assert grammar.generate(50, seed=5) == grammar.generate(80, seed=5)[:50]
    assert grammar.generate(50, seed=5) != grammar.generate(50, seed=6)


def test_equal_in_another_process_with_other_hashing():
    code = "from llmjepa_kernels.data.grammar import generate; "
    code += "print(generate(20, seed=11, max_depth=4))"
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output == f"{grammar.generate(20, seed=11, max_depth=4)}\n"


def test_errors():
    with pytest.raises(ValueError, match=r"split must be one of .*got 'test'"):
        grammar.samples(split="test")
    with pytest.raises(ValueError, match="min_depth=3, max_depth=2"):
        grammar.samples(min_depth=3)
    with pytest.raises(ValueError, match="min_depth=-1"):
        grammar.samples(min_depth=-1)
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        grammar.generate(-1)
    with pytest.raises(ValueError, match="depth 0 to 0 gives only about 16 different train texts"):
        grammar.generate(21, min_depth=0, max_depth=0)
