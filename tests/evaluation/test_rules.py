"""The answer rules, on what models write."""

from __future__ import annotations

from decimal import Decimal

import pytest

from llmjepa_kernels.evaluation.rules import (
    RULES,
    answer_rule,
    default_rule,
    listed_answers,
    number_after_marker,
)


def sample(answer: str, question: str = "?") -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes $18.\n#### 18", "18"),
        ("####18", "18"),
        ("#### 2,125", "2125"),
        ("#### 1,450,000.", "1450000"),
        ("#### -3", "-3"),
        ("#### \u22123", "-3"),
        ("#### +3", "3"),
        ("#### $5.50", "5.50"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### €7", "7"),
        ("#### .5", "0.5"),
        ("#### 20%", "20"),
        ("#### 18 dollars", "18"),
        ("#### 18, which is right", "18"),
        ("#### 18\n\nQuestion: next one\n#### 20", "18"),
        ("18", None),
        ("The answer is 18", None),
        ("### 18", None),
        ("####", None),
        ("#### eighteen", None),
        ("####\n18", None),
        ("#### 18/20", None),
        ("#### 5:30", None),
        ("#### 1.5.2", None),
        ("#### 1,234/5", None),
        ("#### 10,000.5.6", None),
        ("#### eighteen\n#### 18", "18"),
        ("#### --3", None),
        ("#### - -3", None),
        ("#### 1e5", None),
        ("#### 1 000", None),
        ("#### 1_000", None),
        ("#### 3 1/2", None),
        ("#### 2*3", None),
        ("#### 18 eggs", "18"),
        ("#### **18**", None),
        ("#### 18**", "18"),
        ("", None),
    ],
)
def test_number_after_marker(text, number):
    assert number_after_marker(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_by_value():
    judge = answer_rule("number").is_correct
    assert judge("so 36/2\n#### $18.00.", sample("9 * 2 = <<9*2=18>>18\n#### 18"))
    assert not judge("#### 1.8", sample("#### 18"))
    assert not judge("#### -18", sample("#### 18"))
    assert not judge("18", sample("#### 18"))
    assert judge("#### 12345678901234567891", sample("#### 12,345,678,901,234,567,891"))
    assert not judge("#### 12345678901234567890", sample("#### 12,345,678,901,234,567,891"))


def test_texts_are_compared_as_tokenizers_give_them():
    """Many compose what is written as a letter and its accent."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    for name in ("exact", "startswith", "any"):
        assert answer_rule(name).is_correct(composed, sample(apart))
        assert answer_rule(name).is_correct(apart, sample(composed))


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        ("in 1972", "2", False),
        ("Jordan", "Dan", False),
        ("1.5", "15", True),  # as without punctuation
        ("a lot", "A", False),
        ("A", "A", True),
        ("Schindler\u2019s List", "Schindler's list", True),
        ("it was 5\u20134", "5-4", True),
        ("Paris,London", "Paris", True),
        ("Paris;London", "London", True),
        ("Answer:Paris", "Paris", True),
        ("Paris\u2014the capital", "Paris", True),
        ("Paris-based", "Paris", True),
        ("New York/Boston", "Boston", True),
        ("Obama (1961\u20132020)", "2020", True),
        ("the U.S. president", "US", True),
        ("Obama's wife", "Obama", True),
        ("the 1970s", "1970", False),
        ("the bass", "bas", False),
    ],
)
def test_listed_answers_are_whole_words(completion, answer, correct):
    assert answer_rule("any").is_correct(completion, sample(answer)) is correct


def test_exact_ignores_white_space_around_only():
    judge = answer_rule().is_correct
    assert judge(" (dog)*\n", sample("(dog)*"))
    assert not judge("(dog) *", sample("(dog)*"))
    assert not judge("very bad", sample("Very Bad"))
    assert not judge("Good, I think", sample("Good"))


@pytest.mark.parametrize(
    ("completion", "correct"),
    [
        ("Drew Carey", True),
        ("the drew carey.", True),
        ("Bob  Barker\n", True),
        ("Johnny Carson; Drew Carey", True),
        ("Drew Carey and Bob Barker", True),
        ("It is Bob Barker's show.", True),
        ("Drew", False),
        ("Carey, Drew", False),
        ("", False),
        ("The", False),
        ("; Drew", False),
        ("; ", False),
    ],
)
def test_any_listed_answer(completion, correct):
    judge = answer_rule("any").is_correct
    assert judge(completion, sample("Bill Cullen; Drew Carey; Bob Barker")) is correct


@pytest.mark.parametrize(
    ("answer", "completion", "correct"),
    [
        ("Good", "Good", True),
        ("Good", " Good, I think\n", True),
        ("Good", "Very Good", False),
        ("Very Good", "Good", False),
        ("Bad", "bad", False),
        ("Bad", "", False),
        ("(dog)*", "(dog)*\n\nlines with", True),
        ("(dog)*", "(dog)", False),
    ],
)
def test_beginning_with_the_answer(answer, completion, correct):
    assert answer_rule("startswith").is_correct(completion, sample(answer)) is correct


def test_default_rules():
    assert default_rule(None) == default_rule("nl_rx") == default_rule("paraphrase") == "exact"
    assert default_rule(None, "plain") == default_rule("nl_rx", "plain") == "startswith"
    assert default_rule("gsm8k", "plain") == default_rule("gsm8k") == "number"
    assert default_rule("yelp") == default_rule("rotten_tomatoes") == "startswith"


def test_of_two_markers_the_first_with_a_number_counts():
    judge = answer_rule("number").is_correct
    assert judge("#### 18\n\nNext question: #### 20", sample("#### 18"))
    assert not judge("#### 20\n#### 18", sample("#### 18"))
    assert judge("#### is the mark\n#### 18", sample("#### 18"))


def test_articles_are_words_not_letters():
    assert listed_answers("An Answer; theatre; theatre!") == {"answer", "theatre"}


def test_answers_of_punctuation_and_articles_alone_stay():
    assert listed_answers("+; The; ; ") == {"+", "the"}


def test_choice_offers_four_letters():
    choice = answer_rule("choice")
    assert choice.choices == ("A", "B", "C", "D")
    assert choice.is_correct("B", sample("B"))
    assert not choice.is_correct("B", sample("C"))


@pytest.mark.parametrize(
    ("name", "bad", "good", "expected"),
    [
        ("number", "18", "#### 18", "a number after #### as the answer, got '18'"),
        ("any", " ", "white; red", r'answers separated by "; " as the answer, got'),
        ("choice", "E", "D", "A, B, C or D as the answer, got 'E'"),
    ],
)
def test_samples_whose_own_answer_is_none(name, bad, good, expected):
    answer_rule(name).check(sample(good))
    with pytest.raises(ValueError, match=expected):
        answer_rule(name).check(sample(bad))


def test_unknown_rules_and_misplaced_databases(tmp_path):
    with pytest.raises(ValueError, match=r"rule must be one of exact, .*, choice, got 'f1'"):
        answer_rule("f1")
    with pytest.raises(ValueError, match="rule sql needs databases"):
        answer_rule("sql")
    with pytest.raises(ValueError, match="databases is for rule sql, got rule exact"):
        answer_rule("exact", databases=tmp_path)
    with pytest.raises(NotADirectoryError, match="missing"):
        answer_rule("sql", databases=tmp_path / "missing")
    for name in RULES:
        assert answer_rule(name, databases=tmp_path if name == "sql" else None).name == name
