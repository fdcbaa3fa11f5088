"""One answer of a model, as long as it likes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.evaluation.predict import (
    ends_of,
    max_positions,
    own_ends,
    refuse_nan,
    unbent,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    example_format: ExampleFormat,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: Any = None,
) -> str:
    """What a model says next.

    Args:
        model: A causal language model of Transformers, patched or not.
        tokenizer: Its tokenizer.
        messages: The turns so far, the last one the user's.
        example_format: How turns become tokens.
        max_new_tokens: Longest answer; the model's positions may end it before.
        temperature: Of the tokens that are drawn, from torch's global generator; 0 takes the most
            likely one.
        streamer: Gets the tokens as they come, as in ``generate`` of Transformers.

    Raises:
        ValueError: The turns do not fit the format or the model, or its logits are NaN.
    """
    ids = example_format.prompt({"messages": list(messages)}, tokenizer)
    positions = max_positions(model)
    if positions and len(ids) >= positions:
        raise ValueError(
            f"the prompt is {len(ids)} tokens long, and the model has {positions} positions"
        )
    stops = ends_of(tokenizer, example_format) | own_ends(model, tokenizer)
    options: dict[str, Any] = {"do_sample": False}
    if temperature:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    prompt = torch.tensor([ids], device=model.device)
    generated = cast(Any, model.eval()).generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=min(max_new_tokens, (positions or len(ids) + max_new_tokens) - len(ids)),
        eos_token_id=sorted(stops) or None,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=[refuse_nan],
        streamer=streamer,
        **unbent(model),
        **options,
    )
    new = [token for token in generated[0, len(ids) :].tolist() if token not in stops]
    return str(tokenizer.decode(new, clean_up_tokenization_spaces=False))
