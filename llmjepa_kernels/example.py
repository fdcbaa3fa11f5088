"""One example: a tree of segments, and the pairs of them that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmjepa_kernels.tubes import TokenPath, Tube, TubeSampler

IGNORE = -100  # the label of a token that nobody supervises, as in Hugging Face


@dataclass(frozen=True)
class Segment:
    """A run of tokens that sees itself causally, and all segments above it.

    Attributes:
        input_ids: At least one token.
        parent: Index, within the example, of the earlier segment that this one continues;
            None for a root, which sees only itself.
        labels: One per token, −100 where there is no loss. As in Hugging Face a label names its
            own token: it is predicted by the token before, which for a segment's first token is
            the parent's last one. A root's first token has none before it, so its label is
            ignored. Default: no loss on any token.
    """

    input_ids: Sequence[int]
    parent: int | None = None
    labels: Sequence[int] | None = None


@dataclass(frozen=True)
class Example:
    """A forest of segments, and the pairs of them whose last tokens are compared.

    Attributes:
        segments: Parents before children.
        pairs: (predictor, target) indices into `segments`, each of which may be in several pairs.
        path: The tokens that tubes are drawn from, see `TubeSampler`.
        tubes: Two vectors each, see `semantic_tube_loss`: up to three steps (start, end), token
            indices within the sequence of `path`.
    """

    segments: Sequence[Segment]
    pairs: Sequence[tuple[int, int]] = ()
    path: TokenPath | None = None
    tubes: Sequence[Tube] = ()


def llm_jepa_example(
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    target_ids: Sequence[int],
    *,
    pred_ids: Sequence[int] = (),
    completion_labels: Sequence[int] | None = None,
) -> Example:
    """One LLM-JEPA example in the shared layout: the Text view is the prompt itself.

    Args:
        prompt_ids: Everything up to the end of the Text.
        completion_ids: What follows it, ending with the Code; seen with the prompt.
        target_ids: The Code view, seen alone.
        pred_ids: ``[PRED]`` tokens that follow the Text, unseen by the completion; if there are
            none, the prompt's last token predicts.
        completion_labels: −100 where a completion token is not supervised. Default: all are.
    """
    labels = completion_ids if completion_labels is None else completion_labels
    segments = [Segment(prompt_ids), Segment(completion_ids, parent=0, labels=labels)]
    predictor = 0
    if len(pred_ids):
        predictor = len(segments)
        segments.append(Segment(pred_ids, parent=0))
    segments.append(Segment(target_ids))
    return Example(segments, pairs=[(predictor, len(segments) - 1)])


def without_views(example: Example) -> Example:
    """The example for next-token loss alone: no pairs, and no segment without supervised tokens.

    A segment stays if a later one that stays continues it.
    """
    kept: set[int] = set()
    for i in reversed(range(len(example.segments))):
        segment = example.segments[i]
        supervised = segment.labels is not None and any(y != IGNORE for y in segment.labels)
        if supervised or i in kept:
            kept |= {i} if segment.parent is None else {i, segment.parent}
    if not kept:
        raise ValueError(
            "the example has no supervised token, so nothing is left without its views"
        )
    index = {old: new for new, old in enumerate(sorted(kept))}
    path = example.path if example.path is not None and example.path.segment in index else None
    return Example(
        [
            Segment(s.input_ids, s.parent if s.parent is None else index[s.parent], s.labels)
            for s in (example.segments[i] for i in index)
        ],
        path=path and replace(path, segment=index[path.segment]),
        tubes=example.tubes if path else (),
    )


def with_tubes(example: Example, sampler: TubeSampler, epoch: int = 0) -> Example:
    """The example with the tubes that a sampler draws from its path in an epoch."""
    if example.path is None:
        raise ValueError(
            "tubes are drawn from a path, which chat_example and plain_example give their "
            "examples; the example has path=None"
        )
    ids = sequence_ids(example, example.path.segment)
    return replace(example, tubes=sampler.draw(example.path, ids, epoch))


def sequence_ids(example: Example, segment: int) -> list[int]:
    """The tokens of a segment after those of all segments above it."""
    ids: list[int] = []
    above: int | None = segment
    while above is not None:
        ids = [*example.segments[above].input_ids, *ids]
        above = example.segments[above].parent
    return ids


def segment_ends(example: Example) -> list[int]:
    """How many tokens the last one of each segment sees: those above it, and its own."""
    ends: list[int] = []
    for segment in example.segments:
        above = 0 if segment.parent is None else ends[segment.parent]
        ends.append(above + len(segment.input_ids))
    return ends
