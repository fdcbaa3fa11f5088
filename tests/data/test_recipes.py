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
    for row, message in (
        ({"sentence1": "a", "sentence2": "b", "label": 0}, "these are no paraphrases: 0"),
        ({"paraphrases": ["a"]}, "must be a list of at least two"),
        ({"paraphrases": ["a", " "]}, "must not be empty"),
        ({"question1": "a"}, r"expected the columns paraphrases or sentence1 and sentence2"),
    ):
        with pytest.raises(ValueError, match=f"row 0: .*{message}"):
            contents(row)


@pytest.mark.parametrize("name", ["rotten_tomatoes", "yelp", "hellaswag"])
@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_that_is_none_is_refused(name, label):
    row = {**ROWS[name][0], "label": label}
    with pytest.raises(ValueError, match=rf"row 0: label must be in 0 \.\. \d, got {label}"):
        list(read_chats([row], recipe=name))
