"""[PRED] tokens: the predictor of LLM-JEPA, which adds embedding rows and no other weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from llmjepa_kernels.checks import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def predictor_token(index: int) -> str:
    """The `index`-th [PRED] token, counted from 1, named as in the authors' release."""
    return f"<|predictor_{index}|>"


def predictor_tokens(num_tokens: int) -> list[str]:
    """The [PRED] tokens behind a view: the last one first, as in the authors' release.

    So a checkpoint of theirs that is trained further keeps the role of each.
    """
    return [predictor_token(index) for index in range(num_tokens, 0, -1)]


def known_predictor_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many [PRED] tokens a tokenizer has, from the first on."""
    known = tokenizer.get_added_vocab()
    return next(n for n in count() if predictor_token(n + 1) not in known)


def warn_if_frozen(model: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Warns if nothing would train the embeddings of these tokens, as under a plain LoraConfig."""
    parameters = list(model.get_input_embeddings().parameters())
    if token_ids and parameters and not any(x.requires_grad for x in parameters):
        warnings.warn(
            f"the embeddings of the model are frozen, so the rows of the tokens {list(token_ids)} "
            "stay as they were drawn: train them, with PEFT by "
            f"LoraConfig(trainable_token_indices={list(token_ids)}, …)",
            RuntimeWarning,
            stacklevel=3,
        )


def add_predictor_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    *,
    seed: int = 0,
    pad_to_multiple_of: int | None = None,
) -> list[int]:
    """Adds [PRED] tokens to a tokenizer and their rows to a model's embeddings.

    Args:
        model, tokenizer, seed, pad_to_multiple_of: As in `add_tokens`.
        num_tokens: k ≥ 0.

    Returns:
        The token ids, in the order of `predictor_tokens`.

    Raises:
        ValueError: `num_tokens` is negative, or the embeddings lack rows of the tokenizer.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens must be 0 or more, got {num_tokens}")
    return add_tokens(
        model,
        tokenizer,
        predictor_tokens(num_tokens),
        seed=seed,
        pad_to_multiple_of=pad_to_multiple_of,
    )


@torch.no_grad()
def add_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[str],
    *,
    seed: int = 0,
    pad_to_multiple_of: int | None = None,
) -> list[int]:
    """Adds special tokens to a tokenizer and their rows to a model's embeddings.

    A new row is the mean of the embeddings plus a tenth of their standard deviation in noise of
    its own: equal rows would make the tokens one token, and rows far from the others would
    dominate the softmax of a tied head. Spare rows, which some models carry beyond their
    tokenizer, are used before the embeddings grow; they never shrink. A token that the tokenizer
    already has keeps its row, so that a checkpoint may be trained further.

    Args:
        model: A causal language model of Transformers, tied or untied. For PEFT, call this on the
            base model first and train the rows with ``trainable_token_indices``.
        tokenizer: Changed in place.
        tokens: Their names.
        seed: Of the noise.
        pad_to_multiple_of: Grow the embeddings to a multiple of so many rows, which matrix products
            on GPUs like. ``generate`` of Transformers never writes those that are no token.

    Returns:
        The token ids, in order.

    Raises:
        ValueError: The embeddings lack rows of the tokenizer.

    Warns:
        RuntimeWarning: The embeddings are frozen, so the new rows would stay random.
    """
    known = len(tokenizer)
    rows = len(_weight(model.get_input_embeddings()))
    if known > rows:
        raise ValueError(
            f"the tokenizer has {known} tokens, but the model has embeddings for {rows} only"
        )
    if pad_to_multiple_of is not None:
        check_whole("pad_to_multiple_of", pad_to_multiple_of, least=1)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    needed = max(rows, len(tokenizer))
    padded = needed + -needed % (pad_to_multiple_of or 1)
    if padded > rows:
        _resize(model, padded)
    embeddings = [_weight(model.get_input_embeddings())]
    head = model.get_output_embeddings()
    if head is not None and _weight(head) is not embeddings[0]:
        embeddings.append(_weight(head))
    for start, stop in ((known, len(tokenizer)), (needed, padded)):
        for weight in embeddings:
            end = min(stop, len(weight))  # a head may lack rows that the embeddings have to spare
            if start < end:
                _init_rows(weight, start, end, seed)
    _never_generate(model, range(needed, padded), new=range(known, len(tokenizer)))
    if len(tokenizer) > known:
        warn_if_frozen(model, list(range(known, len(tokenizer))))
    return cast(list[int], tokenizer.convert_tokens_to_ids(list(tokens)))


def _resize(model: PreTrainedModel, rows: int) -> None:
    """Grows the embeddings, in the parameters that an optimizer may hold already.

    Transformers keeps those of the input and replaces those of a head that is not tied to them.
    """
    head = model.get_output_embeddings()
    held = {} if head is None else dict(head.named_parameters(recurse=False))
    model.resize_token_embeddings(rows, mean_resizing=False)
    grown = model.get_output_embeddings()
    for name, parameter in held.items():
        new = getattr(grown, name)
        if new is not parameter and new is not model.get_input_embeddings().weight:
            parameter.data = new.data
            setattr(grown, name, parameter)


def _never_generate(model: PreTrainedModel, padding: range, *, new: range) -> None:
    """Has ``generate`` pass over rows that are no token, also of the model as it is saved."""
    config = getattr(model, "generation_config", None)
    if config is not None:
        before = config.suppress_tokens or []
        config.suppress_tokens = [*(i for i in before if i not in new), *padding] or None


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


def _init_rows(weight: Tensor, start: int, stop: int, seed: int) -> None:
    """Draws rows start..stop of (vocab, hidden) around the mean of those before."""
    std, mean = torch.std_mean(weight[:start].float(), dim=0)
    # Rows that another call adds, with the same seed, are others.
    generator = torch.Generator().manual_seed(seed + start)
    noise = torch.randn(stop - start, weight.shape[1], generator=generator)
    weight[start:stop] = (mean + 0.1 * std * noise.to(weight.device)).to(weight.dtype)
