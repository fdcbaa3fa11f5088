"""What a model answers: batched greedy generation, compared with the assistant's turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from llmjepa_kernels.chat import chat_prompt
from llmjepa_kernels.packing import IGNORE, Example


def greedy_completions(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Iterable[int],
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """Completes prompts by the most likely token, in batches of similar length.

    Args:
        model: A causal language model of Transformers, patched or not.
        tokenizer: Its tokenizer.
        prompts: Token ids, at least one each.
        stop_ids: Tokens that end a completion and are not part of it.
        max_new_tokens: Longest completion.
        batch_size: Prompts generated from at once, left-padded.

    Returns:
        The completions' text, in the order of `prompts`.
    """
    stop_ids = sorted(set(stop_ids))
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions = [""] * len(prompts)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chunk)
        padding = [width - len(prompts[i]) for i in chunk]
        ids = [[pad_token_id] * n + list(prompts[i]) for n, i in zip(padding, chunk, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in padding]
        generated = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,  # a model's own defaults must not bend the argmax
            eos_token_id=stop_ids,
            pad_token_id=pad_token_id,
            use_cache=True,
        )
        for i, tokens in zip(chunk, generated[:, width:].tolist(), strict=True):
            end = next((n for n, token in enumerate(tokens) if token in stop_ids), len(tokens))
            completions[i] = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    model.train(was_training)
    return completions


def stop_ids(tokenizer, examples: Iterable[Example]) -> set[int]:
    """The tokens that end an assistant's turn: EOS, and special tokens that examples end with."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = set()
    for example in examples:
        labels = [y for s in example.segments for y in s.labels or () if y != IGNORE]
        ends.update(labels[-1:])
    return {tokenizer.eos_token_id} - {None} | ends & special


def exact_match(
    model, tokenizer, samples: Sequence[Mapping[str, Any]], **options: Any
) -> list[bool]:
    """Whether the greedy completion of each chat equals its assistant turn, white space aside.

    Args:
        model, tokenizer, **options: As in `greedy_completions`.
        samples: With ``messages``, the last of which is the assistant's turn.
    """
    prompts = [chat_prompt(sample["messages"], tokenizer) for sample in samples]
    completions = greedy_completions(model, tokenizer, prompts, **options)
    answers = [sample["messages"][-1]["content"] for sample in samples]
    return [c.strip() == a.strip() for c, a in zip(completions, answers, strict=True)]
