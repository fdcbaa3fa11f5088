"""What a model answers: batched greedy generation, judged by the rule of the data."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.messages import WEIGHT_KEYS
from llmjepa_kernels.data.splits import Split
from llmjepa_kernels.evaluation.rules import Rule, answer_of, answer_rule
from llmjepa_kernels.example import IGNORE, Example, segment_ends

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 64
# Rules that judge what a completion begins with, and how much longer than the sample's own answer
# it may be for them: enough to see that it goes on.
BEGINNINGS = ("exact", "startswith")
ROOM = 16

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
# Of Transformers' GenerationConfig, what would change what is most likely, or how it comes back.
UNBENT: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "stop_strings": None,
    "max_time": None,
    "prompt_lookup_num_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "guidance_scale": None,
    "exponential_decay_length_penalty": None,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "watermarking_config": None,
    "assistant_early_exit": None,
    "token_healing": False,
    "penalty_alpha": None,
    "dola_layers": None,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
}


@dataclass(frozen=True)
class Prediction:
    """What a model answered to one sample.

    Attributes:
        index: Of the sample.
        prompt: Everything before the answer, as the model saw it.
        answer: The sample's own answer.
        completion: The model's.
        correct: Whether the completion is right by the rule.
        finished: Whether the model ended it; False where it was cut, see `max_new_tokens`.
    """

    index: int
    prompt: str
    answer: str
    completion: str
    correct: bool
    finished: bool


@dataclass(frozen=True)
class Accuracy:
    """Correct answers out of a total, and those that the model did not end."""

    correct: int
    total: int
    unfinished: int = 0

    @property
    def value(self) -> float:
        """The fraction; NaN of none."""
        return self.correct / self.total if self.total else float("nan")

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's interval, which is sound near 0 and 1; from 0 to 1 where there is nothing."""
        from scipy.stats import binomtest

        if not self.total:
            return 0.0, 1.0
        found = binomtest(self.correct, self.total).proportion_ci(confidence, method="wilson")
        return float(found.low), float(found.high)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Mapping[str, Any]],
    example_format: ExampleFormat | None = None,
    rule: Rule | None = None,
    **options: Any,
) -> list[Prediction]:
    """Has a model answer samples and judges the answers.

    Args:
        model, tokenizer, samples, example_format, rule, **options: As in `predict`.

    Returns:
        A prediction per sample, in order.
    """
    batches = predict(model, tokenizer, samples, example_format, rule, **options)
    found = [prediction for batch in batches for prediction in batch]
    return sorted(found, key=lambda prediction: prediction.index)


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Mapping[str, Any]],
    example_format: ExampleFormat | None = None,
    rule: Rule | None = None,
    *,
    max_new_tokens: int | None = None,
    batch_size: int = BATCH_SIZE,
    done: Container[int] = (),
    places: Sequence[str] | None = None,
) -> Iterator[list[Prediction]]:
    """The same batch by batch, as they are made; those with long answers come first.

    Args:
        model: A causal language model of Transformers, patched or not.
        tokenizer: Its tokenizer.
        samples: With ``messages``, the last of which is the assistant's turn, the answer.
        example_format: How a sample becomes a prompt. Default: by the tokenizer's chat template.
        rule: Which answers are correct, from `rules.answer_rule`. Default: exactly the sample's.
        max_new_tokens: Longest completion. Default: one more than the longest answer; by the rules
            exact and startswith, `ROOM` more than the longest of its batch, if that is less.
        batch_size: Prompts generated from at once.
        done: Indices of samples to leave out.
        places: What errors call each sample. Default: its index.

    Raises:
        ValueError: A sample does not fit the format, the rule or the model's positions, which is
            found before anything is generated, or the model's logits are NaN.
        OSError: The rule needs a file that is missing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    # Only the chat with its answer is of interest here, neither its views nor other losses.
    example_format = replace(
        example_format or ExampleFormat(),
        layout="shared",
        embedding_token="content",
        direction="text_to_code",
        pred_position="append",
        pred_ids=(),
        supervise="assistant",
    )
    rule = rule or answer_rule()
    if places is None:
        places = [f"sample {index}" for index in range(len(samples))]
    prompts, examples = [], []
    for index, sample in enumerate(samples):
        try:
            rule.check(sample)
            prompts.append(example_format.prompt(sample, tokenizer))
            *asked, last = sample["messages"]
            judged = {  # whatever its weight
                key: value
                for key, value in last.items()
                if key not in WEIGHT_KEYS or value not in (0, 1)
            }
            example = example_format.example({**sample, "messages": [*asked, judged]}, tokenizer)
            examples.append(example)
        except ValueError as error:
            raise ValueError(f"{places[index]}: {error}") from error
    positions = max_positions(model)
    for index, example in enumerate(examples):
        if reason := beyond_positions(example, positions):
            raise ValueError(f"{places[index]}: {reason}")
    lengths = [len(_answer_ids(example)) for example in examples]
    # A batch takes as long as its longest answer: rows should end together.
    order = sorted(range(len(samples)), key=lambda i: (lengths[i], len(prompts[i])), reverse=True)
    order = [i for i in order if i not in done]
    stops = stop_ids(tokenizer, examples[:100]) | own_ends(model, tokenizer)
    if example_format.end_id is not None:
        stops.add(example_format.end_id)
    longest = max_new_tokens or max(lengths, default=0) + 1
    if rule.name == "exact" and longest < max(lengths, default=0):
        warnings.warn(
            f"max_new_tokens={max_new_tokens} cuts answers, of which the longest has "
            f"{max(lengths)} tokens: one that equals its sample's where it was cut counts as right",
            RuntimeWarning,
            stacklevel=2,
        )
    choice_ids: dict[int, str] = {}
    if rule.choices and samples:
        choice_ids = _choice_ids(rule.choices, samples[0], tokenizer, example_format)
        stops, longest = set(), 1
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    room: dict[int, int] = {}
    if positions:  # where they end, each sample has room for another number of tokens
        room = {i: positions - len(prompts[i]) for i in order}
        batches = [
            some
            for batch in batches
            for some in (
                [batch] if longest <= min(room[i] for i in batch) else [[i] for i in batch]
            )
        ]
    by_batch = max_new_tokens is None and rule.name in BEGINNINGS
    for batch in batches:
        needed = max(lengths[i] for i in batch) + ROOM if by_batch else longest
        generated = _generate(
            model,
            tokenizer,
            [prompts[i] for i in batch],
            stop_ids=stops,
            max_new_tokens=min([longest, needed, *(room[i] for i in batch if positions)]),
            allowed_ids=list(choice_ids),
        )
        predictions = []
        for i, ids in zip(batch, generated, strict=True):
            finished = ids[-1] in stops
            if rule.choices:
                completion, finished = choice_ids[ids[0]], True
            else:
                answer = ids[:-1] if finished else ids
                completion = _text(tokenizer, answer)
            predictions.append(
                Prediction(
                    index=i,
                    prompt=_text(tokenizer, prompts[i]),
                    answer=answer_of(samples[i]),
                    completion=completion,
                    correct=rule.is_correct(completion, samples[i]),
                    finished=finished,
                )
            )
        yield predictions


def max_positions(model: Any) -> int | None:
    """Tokens that a model of Transformers can tell the places of; None if it does not say."""
    config = getattr(model, "config", None)
    return config and getattr(config.get_text_config(), "max_position_embeddings", None)


def beyond_positions(example: Example, positions: int | None) -> str | None:
    """Why an example is too long for a model of so many positions; None if it is not."""
    length = max(segment_ends(example))
    if positions and length > positions:
        return f"it is {length} tokens long, more than the {positions} of the model"
    return None


def accuracies(
    predictions: Iterable[Prediction],
    samples: Sequence[Mapping[str, Any]],
    split: Split | None = None,
) -> dict[str, Accuracy]:
    """Accuracy on ``"all"``; with a split also ``"in_distribution"`` and ``"out_of_distribution"``.

    Args:
        predictions: Of some or all of the samples.
        samples: What `evaluate` got.
    """
    parts: dict[str, list[Prediction]] = {"all": []}
    if split is not None:
        parts |= {"in_distribution": [], "out_of_distribution": []}
    for prediction in predictions:
        parts["all"].append(prediction)
        if split is not None:
            out = split.is_out_of_distribution(samples[prediction.index])
            parts["out_of_distribution" if out else "in_distribution"].append(prediction)
    return {name: accuracy(found) for name, found in parts.items()}


def accuracy(predictions: Sequence[Prediction]) -> Accuracy:
    """That of all of them together."""
    return Accuracy(
        correct=sum(each.correct for each in predictions),
        total=len(predictions),
        unfinished=sum(not each.finished for each in predictions),
    )


def stop_ids(tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example]) -> set[int]:
    """The tokens that end an assistant's turn: EOS, and special tokens that examples end with."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {answer[-1] for example in examples if (answer := _answer_ids(example))}
    return {tokenizer.eos_token_id} - {None} | ends & special


def own_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that a model's own generation ends with, and that are no text.

    A config's default may be left in place beside a tokenizer to which it is a piece of a word.
    """
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set(ids if isinstance(ids, list) else [ids]) & tokenizer.added_tokens_decoder.keys()


def ends_of(tokenizer: PreTrainedTokenizerBase, example_format: ExampleFormat) -> set[int]:
    """The tokens that end an answer in a format."""
    plain = replace(
        example_format,
        pred_ids=(),
        layout="shared",
        embedding_token="content",
        supervise="assistant",
    )
    stops = stop_ids(tokenizer, [plain.example({"messages": TURNS}, tokenizer)])
    return stops if example_format.end_id is None else stops | {example_format.end_id}


def _answer_ids(example: Example) -> list[int]:
    """The last run of supervised tokens: earlier turns of a chat may be supervised too."""
    answer: list[int] = []
    for segment in reversed(example.segments):
        for label in reversed(segment.labels or ()):
            if label != IGNORE:
                answer.append(label)
            elif answer:
                return answer[::-1]
    return answer[::-1]


def _choice_ids(
    choices: Sequence[str],
    sample: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    example_format: ExampleFormat,
) -> dict[int, str]:
    """The first token of each choice where an answer begins."""
    found = {}
    for choice in choices:
        messages = [*sample["messages"][:-1], {"role": "assistant", "content": choice}]
        example = example_format.example({"messages": messages}, tokenizer)
        found[_answer_ids(example)[0]] = choice
    if len(found) < len(choices):
        raise ValueError(f"the tokenizer begins several of {', '.join(choices)} with one token")
    return found


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Iterable[int],
    max_new_tokens: int,
    allowed_ids: list[int],
) -> list[list[int]]:
    """The most likely next tokens of one batch, up to a stop token and with it.

    Of `allowed_ids`, if any.
    """
    stop_ids = sorted(set(stop_ids))
    pad_token_id = tokenizer.pad_token_id
    if pad_token_id is None:
        pad_token_id = stop_ids[0] if stop_ids else 0
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = [[pad_token_id] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * n + [1] * (width - n) for n in padding]
    options: dict[str, Any] = {"logits_processor": [refuse_nan]}
    if allowed_ids:
        options["prefix_allowed_tokens_fn"] = lambda batch_id, sent: allowed_ids
    was_training = model.training
    model.eval()
    try:
        generated = cast(Any, model).generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stop_ids or None,
            pad_token_id=pad_token_id,
            use_cache=True,
            **unbent(model),
            **options,
        )
    finally:
        model.train(was_training)
    answers = []
    for tokens in generated[:, width:].tolist():
        end = next((n for n, token in enumerate(tokens) if token in stop_ids), len(tokens))
        answers.append(tokens[: end + 1])
    return answers


def unbent(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of ``generate``: a model's own defaults must not bend what it says."""
    config = getattr(model, "generation_config", None)
    return {name: value for name, value in UNBENT.items() if hasattr(config, name)}


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], **options: bool) -> str:
    # Some tokenizers are configured to drop spaces before commas and the like, as in " ,".
    options["clean_up_tokenization_spaces"] = False
    return cast(str, tokenizer.decode(list(ids), **options))


def refuse_nan(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor: the most likely of NaNs would be a token like any other."""
    if scores.isnan().any():
        raise FloatingPointError("the model's logits are NaN: it cannot be evaluated")
    return scores
