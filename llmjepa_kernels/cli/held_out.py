"""What `llmjepa` evaluates on: built-in samples, and the check that they can be judged."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.samples import located_chats
from llmjepa_kernels.data.splits import Split
from llmjepa_kernels.evaluation.rules import Rule, answer_of, answer_rule, default_rule

Located = Iterator[tuple[str, dict[str, Any]]]  # where samples are from, and the samples
MAX_DEPTH = 2  # of built-in samples, unless a split asks for deeper ones
MOST = 200_000  # of them in a row that are on one side of a split


def built_in_samples(part: str, *, seed: int, split: Split | None) -> Located:
    """An endless stream of built-in pairs, of both kinds that a split by depth tells apart.

    Args:
        part: "train" or "heldout", which have no pair in common.
        seed: Of the stream.
        split: Of the command, if any.
    """
    depth = MAX_DEPTH
    if split is not None and split.kind == "depth" and isinstance(split.value, int):
        depth = max(depth, split.value + 1)
    last = {True: 0, False: 0}
    for index, sample in enumerate(grammar.samples(seed=seed, split=part, max_depth=depth)):
        if split is not None:
            last[split.is_out_of_distribution(sample)] = index
            if index - min(last.values()) >= MOST:
                raise ValueError(
                    f"--split {split}: of {MOST} built-in pairs in a row none is on one side of it"
                )
        yield f"built-in sample {index}", sample


def held_out_samples(
    data: str | None, *, recipe: str | None, count: int | None, seed: int, split: Split | None
) -> list[tuple[str, dict[str, Any]]]:
    """The first samples of a source, or built-in ones without a source.

    Raises:
        ValueError: A sample is malformed, or there are none.
        OSError: A file is not there.
    """
    if data is None:
        return list(islice(built_in_samples("heldout", seed=seed, split=split), count))
    found = list(islice(located_chats(data, recipe=recipe), count))
    if not found:
        raise ValueError(f"--data {data} has no samples")
    return found


def chosen_rule(
    name: str | None, *, recipe: str | None, template: str, databases: str | None
) -> Rule:
    """The rule of that name; without one that of the recipe's dataset or of the template."""
    return answer_rule(name or default_rule(recipe, template), databases=databases)


def check_answers(
    located: Sequence[tuple[str, Mapping[str, Any]]], rule: Rule, split: Split | None = None
) -> None:
    """Raises a ValueError that names the first sample that a rule or split cannot judge."""
    for place, sample in located:
        try:
            rule.check(sample)
            if split is not None:
                split.is_out_of_distribution(sample)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if rule.name != "number" and all("####" in answer_of(sample) for _, sample in located):
        print(
            f"hint: all answers have a number after ####, which --rule number compares; this is "
            f"--rule {rule.name}",
            file=sys.stderr,
        )
