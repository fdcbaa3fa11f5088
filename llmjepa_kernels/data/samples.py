"""Training samples from JSONL files and `datasets`, checked line by line, and a small tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, pairwise
from typing import Any

from llmjepa_kernels.data.chat import check_content, check_messages, check_views
from llmjepa_kernels.data.grammar import SYSTEM_PROMPT as REGEX_PROMPT
from llmjepa_kernels.data.sources import Rows, Source, open_rows

Recipe = Callable[[Mapping[str, Any]], "Mapping[str, Any] | list[Mapping[str, Any]]"]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def read_chats(
    source: Source,
    *,
    recipe: str | Recipe | None = None,
    on_error: Callable[[ValueError], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Streams checked samples; at no time is more than one in memory.

    A sample has ``messages`` ([system,] user, assistant turns). It may have ``text`` and ``code``,
    its own views in place of the user's and the assistant's content, given as a string or as a list
    of one turn and yielded as a string; ``views``, further ones by name, each a string or a turn;
    and ``pairs``, the names of the views that predict each other, see `chat_example`. Keys of these
    whose value is null, as ``datasets`` fills gaps, are left out. Other keys are kept. Blank lines
    at the end of a file or between samples are no samples.

    Args:
        source: A JSONL path, a directory, a data set of the hub, or an iterable of paths and of
            mappings, such as a ``Dataset`` or ``IterableDataset``: see `open_rows`.
        recipe: Makes a sample, or a list of some, of a row with other columns: a key of
            ``RECIPES`` or a function.
        on_error: Called with the error of a bad sample, which is then left out. Default: raise.
    Yields:
        A new dictionary per sample, in order.
    Raises:
        ValueError: A sample is malformed; begins with file and line, or with the row's index.
        FileNotFoundError: A path does not exist; raised before anything is yielded if ``source``
            is a single path.
        ImportError: The package datasets is needed and missing.
    """
    return (sample for _, sample in located_chats(source, recipe=recipe, on_error=on_error))


def located_chats(
    source: Source,
    *,
    recipe: str | Recipe | None = None,
    on_error: Callable[[ValueError], None] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same, each sample behind the place that it is from: ``file:line`` or ``row index``.

    With a `shard` of (i, n) only every n-th row, from the i-th on, is looked at.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {sorted(RECIPES)}, got {recipe!r}")
        recipe = RECIPES[recipe]
    return _stream(islice(open_rows(source), shard[0], None, shard[1]), recipe, on_error)


def _stream(rows: Rows, recipe, on_error) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, load in rows:
        try:
            row = load()
            made = recipe(row) if recipe else [row]
            samples = [_sample(each) for each in (made if isinstance(made, list) else [made])]
        except (ValueError, LookupError, TypeError) as error:
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"not JSON: {error.msg} at column {error.colno}"
            elif isinstance(error, KeyError):
                reason = f"expected the column {error}, got {sorted(row)}"
            located = ValueError(f"{place}: {reason}")
            if on_error is None:
                raise located from error
            on_error(located)
        else:
            yield from ((place, sample) for sample in samples)


def _sample(row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with the key messages, got {type(row).__name__}")
    if "messages" not in row:
        raise ValueError(f"expected the key messages, got the keys {sorted(row)}")
    check_messages(row["messages"])
    sample = dict(row)
    for name, role in (("text", "user"), ("code", "assistant")):
        view = sample.pop(name, None)
        if view is None:
            continue
        if isinstance(view, list):
            if len(view) != 1 or not isinstance(view[0], Mapping) or view[0].get("role") != role:
                raise ValueError(f"{name} must be a string or one {role} turn, got {view!r}")
            view = view[0].get("content")
        check_content(view, name)
        sample[name] = view
    views, pairs = sample.pop("views", None), sample.pop("pairs", None)
    if isinstance(views, Mapping):
        views = {name: _only(view) for name, view in views.items() if view is not None}
    check_views(views, pairs)
    return sample | {k: v for k, v in (("views", views), ("pairs", pairs)) if v is not None}


def _only(view: Any) -> Any:
    """The turn, where a view is given as a list of one."""
    return view[0] if isinstance(view, list) and len(view) == 1 else view


def _chat(system: str, user: str, assistant: str, **views: str) -> dict[str, Any]:
    contents = zip(("system", "user", "assistant"), (system, user, assistant), strict=True)
    return {"messages": [{"role": role, "content": text} for role, text in contents], **views}


def _label(row: Mapping[str, Any], num_labels: int) -> int:
    label = int(row["label"])
    if not 0 <= label < num_labels:
        raise ValueError(f"label must be in 0 .. {num_labels - 1}, got {row['label']!r}")
    return label


def _hellaswag(row: Mapping[str, Any]) -> dict[str, Any]:
    label, endings = _label(row, 4), row["endings"]
    options = [f"{letter}) {ending}" for letter, ending in zip("ABCD", endings, strict=True)]
    return _chat(
        "Which one of A), B), C), or D) is the best ending for the context? Answer A, B, C, or D.",
        "\n".join([row["ctx"], *options]),
        "ABCD"[label],
        text=row["ctx"],
        code=endings[label],
    )


def _sentiment(*labels: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    system = "Determine whether the comment is positive or negative"
    return lambda row: _chat(system, row["text"], labels[_label(row, len(labels))])


PARAPHRASE_COLUMNS = (
    ("sentence1", "sentence2"),  # GLUE's MRPC, PAWS
    ("question1", "question2"),  # Quora
    ("text", "paraphrase"),
)


def _paraphrases(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each paraphrase of a group followed by the next one, as in the paper; no system prompt."""
    group = row.get("paraphrases")
    if group is None:
        columns = next((pair for pair in PARAPHRASE_COLUMNS if row.keys() >= set(pair)), None)
        if columns is None:
            known = ["paraphrases", *map(" and ".join, PARAPHRASE_COLUMNS)]
            raise ValueError(f"expected the columns {' or '.join(known)}, got {sorted(row)}")
        group = [row[column] for column in columns]
    if row.get("label", 1) != 1:
        raise ValueError(f"its label says that these are no paraphrases: {row['label']!r}")
    if not isinstance(group, list) or len(group) < 2:
        raise ValueError(f"paraphrases must be a list of at least two, got {group!r}")
    return [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in pairwise(group)
    ]


# The columns of the datasets on the Hugging Face hub → the chats of the LLM-JEPA authors.
RECIPES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "gsm8k": lambda row: _chat(
        "Answer the math question, show steps.", row["question"], row["answer"]
    ),
    "hellaswag": _hellaswag,
    "nq_open": lambda row: _chat(
        "Answer the question below.", row["question"], "; ".join(row["answer"])
    ),
    "nl_rx": lambda row: _chat(REGEX_PROMPT, row["src"], row["targ"]),  # SYNTH and TURK
    "paraphrase": _paraphrases,
    "rotten_tomatoes": _sentiment("Bad", "Good"),
    "spider": lambda row: _chat(
        "Convert natural language to SQL.",
        f"For db_id:[{row['db_id']}]\n\n{row['question']}",
        row["query"],
    ),
    "yelp": _sentiment("Very Bad", "Bad", "Mediocre", "Good", "Very Good"),
}


def train_tokenizer(samples: Iterable[Mapping[str, Any]], *, vocab_size: int = 512):
    """A byte-level BPE tokenizer of the samples' contents, with BOS, EOS, PAD and a chat template.

    The template writes a BOS, then every turn as one role token, the content and EOS, so greedy
    generation stops by itself. Any text can be encoded. Saves and loads as every other
    tokenizer, through ``AutoTokenizer``.

    Args:
        samples: As ``read_chats`` yields them; only the contents of ``messages`` are used.
        vocab_size: Tokens at most, special ones included.
    Returns:
        A ``PreTrainedTokenizerFast``.
    Raises:
        ValueError: ``vocab_size`` cannot hold the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    least = 256 + len(special) + len(roles)
    if vocab_size < least:
        raise ValueError(f"vocab_size must be at least {least}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special.values(), *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    contents = (turn["content"] for sample in samples for turn in sample["messages"])
    tokenizer.train_from_iterator(contents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special,
        additional_special_tokens=roles,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
