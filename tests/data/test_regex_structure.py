"""Structures of hand-read regexes; the grammar's own are checked in test_grammar."""

import pytest

from llmjepa_kernels.data.regex_structure import OPERATORS, Structure, structure


@pytest.mark.parametrize(
    ("regex", "depth", "operators", "pairs"),
    [
        ("dog", 0, "", ""),
        ("[A-Za-z]", 0, "", ""),
        ("[])|(]", 0, "", ""),
        (".", 0, "", ""),
        (".*", 0, "", ""),
        ("((dog))", 0, "", ""),
        (r"\.\(", 1, "concat", ""),
        ("(dog)*", 1, "star", ""),
        ("(.*)*", 1, "star", ""),
        ("dog+", 2, "concat plus", "concat>plus"),
        ("g?", 1, "optional", ""),
        ("([0-9]){3}", 1, "repeat", ""),
        ("([0-9]){3,}", 1, "repeat", ""),
        ("([0-9]){3,5}", 1, "repeat", ""),
        ("~~a", 2, "not not", "not>not"),
        ("~(a)*", 2, "star not", "star>not"),
        ("(a)|(b)|(c)", 1, "or", ""),
        ("a&b|c&d", 2, "or and and", "or>and"),
        ("(a)(.*)", 1, "starts_with", ""),
        ("(.*)(a)", 1, "ends_with", ""),
        (".*a.*", 1, "contains", ""),
        ("a.*b", 1, "followed_by", ""),
        ("(a).*(a).*", 1, "followed_by", ""),
        (r"\bdog\b", 1, "word", ""),
        (r"\b\b", 1, "word", ""),
        # Lines of NL-RX-SYNTH
        ("(..*[0-9].*){6,}", 2, "repeat followed_by", "repeat>followed_by"),
        (".*(.*)(([AEIOUaeiou])*).*", 2, "contains star", "contains>star"),
        (r"\b((dog).*(.).*)&(truck)\b", 3, "and word followed_by word", None),
        (
            "~(([A-Z])&([0-9].*dog.*))",
            3,
            "not and followed_by",
            "and>followed_by not>and",
        ),
        ("((.*)(([A-Z])|([AEIOUaeiou]))).*(.).*", 3, "followed_by ends_with or", None),
        ("(.*)(.*[0-9].*)", 2, "ends_with contains", "ends_with>contains"),
    ],
)
def test_structure(regex, depth, operators, pairs):
    found = structure(regex)
    assert (found.depth, " ".join(found.operators)) == (depth, operators)
    if pairs is not None:
        assert " ".join(found.operator_pairs) == pairs


def test_pairs_are_sorted_and_without_repetition():
    found = structure("~(((a)*)|((b)*)|(~(c)))")
    assert found == Structure(
        depth=3,
        operators=("not", "or", "star", "star", "not"),
        operator_pairs=("not>or", "or>not", "or>star"),
    )


@pytest.mark.parametrize(
    ("regex", "problem"),
    [
        ("", r"expected an expression at column 1"),
        ("(a", r"expected '\)' at column 3"),
        ("a)", r"expected its end at column 2"),
        ("a|", r"expected an expression at column 3"),
        ("()", r"expected an expression at column 2"),
        ("(a)&|b", r"expected an expression at column 5"),
        ("*a", r"expected an expression at column 1"),
        ("[a", r"expected an expression at column 1"),
        ("a{x}", r"expected an expression at column 2"),
        ("a\\", r"expected a character after '\\' at column 3"),
    ],
)
def test_malformed(regex, problem):
    with pytest.raises(ValueError, match=problem):
        structure(regex)


def test_operators_are_all_names_in_use():
    regexes = ["a|b", "a&b", "~a", "a*", "a+", "a?", "a{3}", r"\ba\b", r"\.\("]
    regexes += ["a.*", ".*a", ".*a.*", "a.*b"]
    assert {structure(regex).operators[0] for regex in regexes} == set(OPERATORS)
