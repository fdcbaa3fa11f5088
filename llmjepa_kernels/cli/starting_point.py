"""What a training run starts from: the model, its tokenizer and the format of its examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed

from llmjepa_kernels.cli.fingerprints import weights_fingerprint
from llmjepa_kernels.cli.train_options import TrainOptions
from llmjepa_kernels.cli.training_defaults import SEPARATOR, SMALL_LLAMA, VOCAB_MULTIPLE
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.predictor_tokens import (
    add_tokens,
    known_predictor_tokens,
    predictor_tokens,
)
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.evaluation.predict import ends_of, max_positions, own_ends
from llmjepa_kernels.hf import load as models
from llmjepa_kernels.hf.dtypes import weight_shape


@dataclass(frozen=True)
class StartingPoint:
    """A model before training, maybe with LoRA around it, and what belongs to it.

    Attributes:
        model, tokenizer, example_format: Of the run.
        weights: The fingerprint of those that were loaded; None of random ones.
        max_positions: Tokens that the model can tell the places of; None if it does not say.
    """

    model: Any
    tokenizer: Any
    example_format: ExampleFormat
    weights: str | None
    max_positions: int | None

    def count_parameters(self) -> tuple[int, int]:
        """All of them, and those that are trained."""
        parameters = list(self.model.parameters())
        sizes = [(weight_shape(p).numel(), p.requires_grad) for p in parameters]
        return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def starting_point(
    options: TrainOptions, samples: Sequence[Mapping[str, Any]], seed: int
) -> StartingPoint:
    """Loads or makes what to train: the same for the same seed.

    Args:
        options: Of the command.
        samples: To train a tokenizer on, if there is none.
        seed: Of random weights and new tokens.

    Raises:
        ValueError: The tokenizer has no chat template, but is asked for it.
        ImportError: It is to be quantised, and bitsandbytes is not installed.
        OSError: The model is not there.
    """
    set_seed(seed)
    weights = None
    if options.random_weights:
        model, tokenizer = _random(options, samples)
        models.cast_weights(model, options.dtype)
    else:
        if options.load_in is not None and models.is_adapter(str(options.model)):
            raise ValueError(
                f"--model {options.model} is a LoRA adapter, which --load-in cannot merge into its "
                "base model: merge it by llmjepa export --merge first"
            )
        model, tokenizer = models.load_pretrained(
            str(options.model),
            options.dtype,
            load_in=options.load_in,
            device=PartialState().device if options.load_in else None,
            trust_remote_code=options.trust_remote_code,
        )
        weights = weights_fingerprint(model)
    if options.template == "chat" and not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of --model {options.model} has no chat template: train with "
            "--format plain, or give it one"
        )
    example_format, new_ids = _format(options, model, tokenizer, seed)
    _stop_at(model, tokenizer, example_format)
    if options.lora_rank is not None:
        model = models.add_lora(model, options.lora_rank, new_ids=new_ids)
    return StartingPoint(model, tokenizer, example_format, weights, max_positions(model))


def _stop_at(model: Any, tokenizer: Any, example_format: ExampleFormat) -> None:
    """Has ``generate`` stop where answers in a format end, in other programs too."""
    stops = own_ends(model, tokenizer)
    if example_format.end_id is not None:
        stops = {example_format.end_id}
    elif example_format.template == "chat":
        stops |= ends_of(tokenizer, example_format)
    if stops:
        model.generation_config.eos_token_id = min(stops) if len(stops) == 1 else sorted(stops)


class StartingPoints:
    """A fresh starting point for every run, as training changes the model.

    Args:
        options: Of the command.
        samples: As in `starting_point`.
        first: For the first run, if it has that seed: the one that the data were made for.
        seed: Of `first`.
    """

    def __init__(
        self,
        options: TrainOptions,
        samples: Sequence[Mapping[str, Any]],
        first: StartingPoint,
        seed: int,
    ) -> None:
        self._options, self._samples = options, samples
        self._fresh: dict[int, StartingPoint] = {seed: first}

    def take(self, seed: int) -> StartingPoint:
        """Hands it out; nobody else gets it."""
        fresh = self._fresh.pop(seed, None)
        self._fresh.clear()  # of the memory of one that no run has taken
        return fresh or starting_point(self._options, self._samples, seed)


def _random(options: TrainOptions, samples: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
    """A model with random weights, and a tokenizer."""
    trust = {"trust_remote_code": options.trust_remote_code}
    if options.model is None or options.vocab_size is not None:
        size = {} if options.vocab_size is None else {"vocab_size": options.vocab_size}
        tokenizer = train_tokenizer(samples, **size)
    else:
        tokenizer = models.load_tokenizer(options.model, **trust)
    if options.model is not None:
        return models.from_scratch(options.model, tokenizer, **trust), tokenizer
    given = {name: getattr(options, name) for name in SMALL_LLAMA}
    size = SMALL_LLAMA | {name: n for name, n in given.items() if n is not None}
    return models.small_llama(tokenizer, **size), tokenizer


def _format(
    options: TrainOptions, model: Any, tokenizer: Any, seed: int
) -> tuple[ExampleFormat, list[int]]:
    """The format, and the tokens that were added for it."""
    predictors = predictor_tokens(options.num_pred_tokens)
    named = {"separator_id": options.separator or SEPARATOR, "end_id": options.end_token}
    taken = [*predictors, *predictor_tokens(known_predictor_tokens(tokenizer))]
    for token in named.values() if options.template == "plain" else ():
        if token in taken:
            raise ValueError(f"{token} is a [PRED] token: take another --separator or --end-token")
    known: dict[str, int] = {}  # those that are one token without being added
    unknown: dict[str, str] = {}
    for name, token in named.items() if options.template == "plain" else ():
        ids = [] if token is None else tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            known[name] = ids[0]
        elif token is not None:
            unknown[name] = token
    multiple = options.pad_vocab_to_multiple_of
    if multiple is None and torch.accelerator.current_accelerator(check_available=True):
        multiple = VOCAB_MULTIPLE
    new_ids = add_tokens(
        model,
        tokenizer,
        [*predictors, *unknown.values()],
        seed=seed,
        pad_to_multiple_of=multiple,
    )
    known |= zip(unknown, new_ids[len(predictors) :], strict=True)
    pred_ids = tuple(new_ids[: len(predictors)])
    if not options.random_weights and Path(str(options.model)).is_dir():
        trained = ExampleFormat.load(str(options.model)).pred_ids
        if set(trained) == set(pred_ids):
            pred_ids = trained  # each keeps its role
    example_format = ExampleFormat(
        template=options.template,
        layout=options.layout,
        direction=options.direction,
        pred_position=options.pred_position,
        pred_ids=pred_ids,
        supervise=options.supervise,
        embedding_token=options.compared_token,
        add_special_tokens=options.add_special_tokens,
        separator_id=known.get("separator_id"),
        end_id=known.get("end_id"),
    )
    return example_format, new_ids
