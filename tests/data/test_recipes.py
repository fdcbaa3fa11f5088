"""What the recipes make of the rows of well-known datasets."""

import pytest

from llmjepa_kernels.data.recipes import RECIPES
from llmjepa_kernels.data.samples import read_chats

ROWS = {
    "gsm8k": ({"question": "1 + 1?", "answer": "2\n#### 2"}, "1 + 1?", "2\n#### 2"),
    "nq_open": ({"question": "who", "answer": ["A. B.", "B"]}, "who", "A. B.; B"),
    "nl_rx": ({"src": "lines with a vowel", "targ": "[aeiou]"}, "lines with a vowel", "[aeiou]"),
    "spider": (
        {"db_id": "store", "question": "How many?", "query": "SELECT 1"},
        "For db_id:[store]\n\nHow many?",
        "SELECT 1",
    ),
    "rotten_tomatoes": ({"text": "fine .", "label": 1}, "fine .", "Good"),
    "yelp": ({"text": "so so", "label": 2}, "so so", "Mediocre"),
    "hellaswag": (
        {"ctx": "A dog", "endings": ["runs", "sits", "eats", "flies"], "label": "1"},
        "A dog\nA) runs\nB) sits\nC) eats\nD) flies",
        "B",
    ),
}


def test_every_recipe_is_tested():
    assert ROWS.keys() | {"paraphrase"} == RECIPES.keys()


@pytest.mark.parametrize("name", ROWS)
def test_recipes(name):
    row, user, assistant = ROWS[name]
    (sample,) = read_chats([row], recipe=name)
    assert [turn["content"] for turn in sample["messages"][1:]] == [user, assistant]
    views = {"text": "A dog", "code": "sits"} if name == "hellaswag" else {}
    assert {key: value for key, value in sample.items() if key != "messages"} == views
    missing = next(iter(row))
    with pytest.raises(ValueError, match=rf"row 0: expected the column '{missing}', got"):
        list(read_chats([{k: v for k, v in row.items() if k != missing}], recipe=name))


def test_paraphrases():
    def contents(row):
        samples = read_chats([row], recipe="paraphrase")
        return [[turn["content"] for turn in sample["messages"]] for sample in samples]

    assert contents({"paraphrases": ["a", "b", "c"]}) == [["a", "b"], ["b", "c"]]
    assert contents({"sentence1": "a", "sentence2": "b", "label": 1}) == [["a", "b"]]
    assert contents({"text": "a", "paraphrase": "b"}) == [["a", "b"]]
    pair = {"question1": "a", "question2": "b"}
    for yes in (True, 1, "1", None):
        assert contents({**pair, "is_duplicate": yes}) == [["a", "b"]]
    for row, message in (
        ({"sentence1": "a", "sentence2": "b", "label": 0}, "label says that these are no par"),
        ({"sentence1": "a", "sentence2": "b", "label": True}, "label must be an integer in 0 .. 1"),
        ({**pair, "is_duplicate": False}, "is_duplicate says that .* got False: give pairs with"),
        ({**pair, "is_duplicate": "0"}, "is_duplicate says that these are no paraphrases, got '0'"),
        ({**pair, "is_duplicate": "no"}, r"is_duplicate must be an integer in 0 \.\. 1, got 'no'"),
        ({"paraphrases": ["a"]}, "must be a list of 2 or more strings"),
        ({"paraphrases": ["a", 2]}, "must be a list of 2 or more strings"),
        ({"paraphrases": ["a", " "]}, "must not be empty"),
        ({"question1": "a"}, r"expected the columns paraphrases or sentence1 and sentence2"),
    ):
        with pytest.raises(ValueError, match=f"row 0: .*{message}"):
            contents(row)


@pytest.mark.parametrize("name", ["rotten_tomatoes", "yelp", "hellaswag"])
@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_that_is_none_is_refused(name, label):
    row = {**ROWS[name][0], "label": label}
    with pytest.raises(
        ValueError, match=rf"row 0: label must be an integer in 0 \.\. \d, got {label}"
    ):
        list(read_chats([row], recipe=name))


@pytest.mark.parametrize("label", [1, "1", " 1 "])
def test_labels_are_integers_or_their_digits(label):
    (sample,) = read_chats([{"text": "fine", "label": label}], recipe="rotten_tomatoes")
    assert sample["messages"][-1]["content"] == "Good"


@pytest.mark.parametrize("label", [1.0, 1.9, True, None, "", "1.0", "one", "٣", [1]])
def test_other_labels_are_refused(label):
    with pytest.raises(ValueError, match=r"row 0: label must be an integer in 0 \.\. 1, got"):
        list(read_chats([{"text": "fine", "label": label}], recipe="rotten_tomatoes"))


def test_an_answer_of_nq_open_may_be_a_string():
    (sample,) = read_chats([{"question": "where", "answer": "Paris"}], recipe="nq_open")
    assert sample["messages"][-1]["content"] == "Paris"


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("nq_open", "answer", [], r"answer must be a list of 1 or more strings, got \[\]"),
        (
            "nq_open",
            "answer",
            ["a", 3],
            r"answer must be a list of 1 or more strings, got \['a', 3",
        ),
        ("nq_open", "question", None, "question must be a string, got None"),
        (
            "hellaswag",
            "endings",
            ["a", "b", "c"],
            r"endings must be a list of 4 strings, got \['a'",
        ),
        ("hellaswag", "endings", "abcd", "endings must be a list of 4 strings, got 'abcd'"),
        ("hellaswag", "label", "", r"label must be an integer in 0 \.\. 3, got ''"),
        ("gsm8k", "answer", 18, "answer must be a string, got 18"),
        ("spider", "query", None, "query must be a string, got None"),
    ],
)
def test_a_value_of_another_kind_is_named(name, key, value, message):
    with pytest.raises(ValueError, match=f"row 0: {message}"):
        list(read_chats([{**ROWS[name][0], key: value}], recipe=name))
