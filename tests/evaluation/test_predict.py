"""Generation in batches, the rules applied to it, and what is reported."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from tokenizers import AddedToken
from transformers.utils import logging

from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.splits import Split
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.evaluation.predict import (
    ROOM,
    Accuracy,
    Prediction,
    accuracies,
    evaluate,
    predict,
)
from llmjepa_kernels.evaluation.rules import Rule, answer_rule
from llmjepa_kernels.hf import load as models
from llmjepa_kernels.hf.patch import patch_model

MAX_NEW_TOKENS = 5


@pytest.fixture(scope="module")
def samples():
    return grammar.generate(6, seed=3)


@pytest.fixture(scope="module")
def tokenizer(samples):
    return train_tokenizer(samples)


@pytest.fixture
def model(tokenizer):
    return talkative_llama(tokenizer)


def talkative_llama(tokenizer):
    """Random weights so large that it does not just repeat the last token."""
    torch.manual_seed(0)
    model = models.small_llama(tokenizer, hidden_size=64, num_layers=2)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.5)
        torch.nn.init.normal_(layer.self_attn.v_proj.weight, std=0.5)
    return model


def with_answers(samples, answers):
    return [
        {"messages": [*sample["messages"][:-1], {"role": "assistant", "content": answer}]}
        for sample, answer in zip(samples, answers, strict=True)
    ]


@torch.no_grad()
def argmax_completion(model, tokenizer, prompt) -> tuple[str, bool]:
    """One token after the other, without cache, batch and padding; and whether it ends."""
    ids, finished = list(prompt), False
    while not finished and len(ids) < len(prompt) + MAX_NEW_TOKENS:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        finished = ids[-1] == tokenizer.eos_token_id
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True), finished


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("patched", [False, True])
def test_predictions_are_the_argmax(model, tokenizer, samples, batch_size, template, patched):
    separator = tokenizer.convert_tokens_to_ids("<|assistant|>")
    example_format = ExampleFormat(
        template=template, separator_id=separator if template == "plain" else None
    )
    prompts = [example_format.prompt(sample, tokenizer) for sample in samples]
    assert len({len(prompt) for prompt in prompts}) > 2  # so that there is padding
    answers = [argmax_completion(model, tokenizer, prompt) for prompt in prompts]
    expected, finished = [completion for completion, _ in answers], [end for _, end in answers]
    assert len(set(expected)) > 2
    # What a model's own configuration asks for must not bend it.
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    mixed = with_answers(samples, [e if i % 2 else "(x)*" for i, e in enumerate(expected)])
    found = evaluate(
        patch_model(model) if patched else model,
        tokenizer,
        mixed,
        example_format,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=batch_size,
    )
    assert [p.completion for p in found] == expected
    assert [p.finished for p in found] == finished
    assert [p.index for p in found] == list(range(6))
    assert [p.correct for p in found] == [False, True] * 3
    assert [p.answer for p in found] == [s["messages"][-1]["content"] for s in mixed]
    assert [p.prompt for p in found] == tokenizer.batch_decode(prompts)


class Parrot(torch.nn.Module):
    """Answers everything alike, and writes on behind the end of its turn."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, answer: str):
        super().__init__()
        ids = tokenizer(answer)["input_ids"]
        self.tail = torch.tensor([*ids, tokenizer.eos_token_id, *ids])
        self.stop_id, self.calls = tokenizer.eos_token_id, []

    def generate(self, input_ids, attention_mask, eos_token_id, **options):
        assert (attention_mask.sum(dim=1) > 0).all()
        assert self.stop_id in eos_token_id
        assert not self.training
        self.calls.append((len(input_ids), options["max_new_tokens"]))
        return torch.cat([input_ids, self.tail.expand(len(input_ids), -1)], dim=1)


def test_whole_answers_are_compared_up_to_the_stop_token(tokenizer, samples):
    parrot = Parrot(tokenizer, samples[0]["messages"][-1]["content"])
    found = evaluate(parrot, tokenizer, samples)
    assert [p.correct for p in found] == [True] + [False] * 5
    assert all(p.finished for p in found)
    assert parrot.training  # as before
    lengths = [len(tokenizer(s["messages"][-1]["content"])["input_ids"]) for s in samples]
    # The longest answer with the end of its turn, and one more.
    assert parrot.calls == [(6, max(lengths) + 2)]


@pytest.mark.parametrize(
    "own",
    [
        {"min_new_tokens": 5},
        {"no_repeat_ngram_size": 1},
        {"repetition_penalty": 9.0},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"stop_strings": ["a"]},
        {"prompt_lookup_num_tokens": 3},
        {"max_time": 1e-9},
        {"do_sample": True, "temperature": 9.0},
        {"encoder_repetition_penalty": 9.0},
        {"bad_words_ids": [[7], [8], [9]]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"assistant_early_exit": 1},
        {"token_healing": True},
        {"dola_layers": "high"},
    ],
    ids=str,
)
def test_defaults_of_a_model_do_not_bend_what_it_says(model, tokenizer, samples, own):
    expected = evaluate(model, tokenizer, samples, max_new_tokens=MAX_NEW_TOKENS)
    model.generation_config.update(**own)
    assert evaluate(model, tokenizer, samples, max_new_tokens=MAX_NEW_TOKENS) == expected


def test_transformers_has_nothing_to_say(model, tokenizer, samples, caplog):
    """Of arguments that contradict each other, for every batch."""
    logging.enable_propagation()
    try:
        evaluate(model, tokenizer, samples, max_new_tokens=MAX_NEW_TOKENS)
    finally:
        logging.disable_propagation()
    assert not caplog.records


def test_further_ends_of_a_model_are_ends(model, tokenizer, samples):
    (first,) = evaluate(model, tokenizer, samples[:1], max_new_tokens=MAX_NEW_TOKENS)
    second = tokenizer(first.completion, add_special_tokens=False)["input_ids"][1]
    assert not first.finished
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, second]
    # A default that was left in place where it is a piece of text is none.
    assert evaluate(model, tokenizer, samples[:1], max_new_tokens=MAX_NEW_TOKENS) == [first]
    tokenizer.add_tokens([AddedToken(tokenizer.convert_ids_to_tokens(second), normalized=False)])
    (found,) = evaluate(model, tokenizer, samples[:1], max_new_tokens=MAX_NEW_TOKENS)
    assert found.finished
    assert first.completion.startswith(found.completion)
    assert found.completion != first.completion


def test_special_tokens_in_an_answer_are_part_of_it(tokenizer, samples):
    sample = with_answers(samples[:1], ["cp <|system|> /tmp"])[0]
    assert tokenizer.convert_tokens_to_ids("<|system|>") in tokenizer.all_special_ids
    parrot = Parrot(tokenizer, "cp <|system|> /tmp")
    assert evaluate(parrot, tokenizer, [sample])[0].correct


def test_a_last_turn_that_is_none(model, tokenizer, samples):
    *asked, last = samples[0]["messages"]
    wrong = {
        "role and content": {"role": "assistant"},
        "has tool_calls": {**last, "tool_calls": [1]},
        "a weight of 0 or 1": {**last, "weight": 0.5},
    }
    for message, turn in wrong.items():
        with pytest.raises(ValueError, match=rf"sample 0: messages\[\d\].*{message}"):
            evaluate(model, tokenizer, [{"messages": [*asked, turn]}])


def test_the_weight_of_the_last_answer_does_not_matter(model, tokenizer, samples):
    last = {**samples[0]["messages"][-1], "weight": 0}
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    messages = [*asked, *samples[0]["messages"][1:-1], last]
    with_weight, without = (
        {"messages": [*messages[:-1], x]} for x in (last, {**last, "weight": 1})
    )
    assert evaluate(model, tokenizer, [with_weight]) == evaluate(model, tokenizer, [without])


def test_batches_hold_answers_of_similar_length_and_leave_out_what_is_done(tokenizer, samples):
    parrot = Parrot(tokenizer, "x")
    batches = list(predict(parrot, tokenizer, samples, batch_size=2, done={0, 5}))
    assert [len(batch) for batch in batches] == [2, 2]
    found = [prediction.index for batch in batches for prediction in batch]
    assert sorted(found) == [1, 2, 3, 4]
    lengths = [len(tokenizer(samples[i]["messages"][-1]["content"])["input_ids"]) for i in found]
    assert lengths == sorted(lengths, reverse=True)
    assert list(predict(parrot, tokenizer, [])) == []


@pytest.mark.parametrize(("rule", "short"), [("exact", True), ("any", False)])
def test_short_answers_need_not_wait_for_the_longest(tokenizer, samples, rule, short):
    answers = ["x", "x y z w " * 20]
    lengths = [len(tokenizer(answer)["input_ids"]) + 1 for answer in answers]
    asked = with_answers(samples[:2], answers)
    parrot = Parrot(tokenizer, "x")
    evaluate(parrot, tokenizer, asked, rule=answer_rule(rule), batch_size=1)
    longest = lengths[1] + 1
    assert longest > lengths[0] + ROOM
    assert parrot.calls == [(1, longest), (1, lengths[0] + ROOM if short else longest)]
    parrot.calls.clear()
    evaluate(parrot, tokenizer, asked, batch_size=1, max_new_tokens=50)
    assert parrot.calls == [(1, 50), (1, 50)]


def test_choice_takes_the_most_likely_letter(model, tokenizer, samples):
    asked = with_answers(samples, "ABCDAB")
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "ABCD"]
    expected = []
    for sample in asked:
        prompt = ExampleFormat().prompt(sample, tokenizer)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        assert int(logits.argmax()) not in letters
        expected.append("ABCD"[int(logits[letters].argmax())])
    found = evaluate(model, tokenizer, asked, rule=answer_rule("choice"), batch_size=4)
    assert [p.completion for p in found] == expected
    assert [p.correct for p in found] == [e == a for e, a in zip(expected, "ABCDAB", strict=True)]


def test_choices_must_differ_in_their_first_token(model, tokenizer, samples):
    alike = Rule("choice", lambda completion, sample: True, lambda sample: None, ("(a", "(b"))
    with pytest.raises(ValueError, match="begins several of \\(a, \\(b with one token"):
        evaluate(model, tokenizer, samples, rule=alike)


def test_nan_is_no_answer(model, tokenizer, samples):
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="logits are NaN"):
        evaluate(model, tokenizer, samples)
    with pytest.raises(FloatingPointError, match="logits are NaN"):
        evaluate(model, tokenizer, with_answers(samples, "ABCDAB"), rule=answer_rule("choice"))
    assert model.training


def test_mistakes_are_found_before_anything_is_generated(tokenizer, samples):
    parrot = Parrot(tokenizer, "x")
    with pytest.raises(ValueError, match="sample 0: expected a number after ####"):
        evaluate(parrot, tokenizer, samples, rule=answer_rule("number"))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(parrot, tokenizer, samples, batch_size=0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        evaluate(parrot, tokenizer, samples, max_new_tokens=0)
    assert parrot.calls == []


@pytest.mark.parametrize(("correct", "total"), [(0, 20), (3, 7), (143, 200), (20, 20)])
def test_interval_is_wilsons(correct, total):
    z = 1.959963984540054
    p = correct / total
    center = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    accuracy = Accuracy(correct, total)
    assert accuracy.value == p
    assert accuracy.interval() == pytest.approx((center - half, center + half), abs=1e-12)


def test_nothing_has_no_accuracy():
    assert math.isnan(Accuracy(0, 0).value)
    assert Accuracy(0, 0).interval() == (0.0, 1.0)


def test_accuracies_in_and_out_of_distribution(samples):
    answered = with_answers(samples, ["a", "abc", "b", "abcd", "c", "abcde"])
    predictions = [
        Prediction(i, "", "", "", correct=i in (0, 2, 3), finished=i != 5) for i in (5, 3, 2, 0)
    ]
    assert accuracies(predictions, answered) == {"all": Accuracy(3, 4, unfinished=1)}
    assert accuracies(predictions, answered, Split.parse("length:2")) == {
        "all": Accuracy(3, 4, unfinished=1),
        "in_distribution": Accuracy(2, 2),
        "out_of_distribution": Accuracy(1, 2, unfinished=1),
    }
