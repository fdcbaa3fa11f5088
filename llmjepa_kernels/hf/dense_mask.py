"""Dense masks of training loops: recognising those that a vector describes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from llmjepa_kernels.ops.dense import visible

# The types of layers that Transformers takes a mask for.
MASK_TYPES = {"full_attention", "sliding_attention"}

# Additive masks hide a pair by a score this low or lower.
HIDDEN = -1e4
# Beside a score this low, and finite, others vanish: if all are, softmax gives all keys one weight.
UNIFORM = -1e30

MUCH_PADDING = 0.2  # of the tokens
IGNORED = nn.CrossEntropyLoss().ignore_index  # as a label, by Transformers' losses too


def recognise(
    given: Any, batch: int, seq: int, *, position_ids: Tensor | None, window: int | None
) -> dict[str, Any] | None:
    """What takes the place of a dense mask among a model's arguments, if that can be replaced.

    Args:
        given: A model's `attention_mask`: a 4D tensor, or one for each type of layer, or else.
        batch, seq: Of the tokens.
        position_ids: Those among the arguments.
        window: That of the model's layers of type "sliding_attention".

    Returns:
        `visible_until`, and `position_ids` where the masks depend on them; or `ignore_window`
        where layers with a window are given a mask that knows of none, and `blind` where some
        queries see nothing. None for any other mask.
    """
    per_layer_type = isinstance(given, dict) and given.keys() <= MASK_TYPES
    mask = given
    if per_layer_type:
        mask = given.get("full_attention", given.get("sliding_attention"))
    if not isinstance(mask, Tensor) or mask.shape[1:] != (1, seq, seq) or mask.requires_grad:
        return None
    visible_until = visible_until_of(mask[:, 0])
    if visible_until is None:
        return None
    visible_until = visible_until.expand(batch, -1).contiguous()
    # A composite model hands the user's one mask on as that of each type of layer.
    if not per_layer_type or given.get("sliding_attention") is mask:
        _warn_of_padding(mask[:, 0])
        # Transformers applies one 4D mask as it is, also in layers with a sliding window.
        found = {"visible_until": visible_until, "ignore_window": True}
        blind = blind_queries(mask[:, 0])
        return found if blind is None else {**found, "blind": blind.expand(batch, -1)}

    if position_ids is None:
        position_ids = torch.arange(seq, device=mask.device)
    position_ids = position_ids.expand(batch, -1)
    if "sliding_attention" in given:
        seen = seen_pairs(given["sliding_attention"])
        within = visible(visible_until, position_ids, window)
        if seen is None or seen.shape != mask.shape or not _same(within, seen[:, 0]):
            return None
    return {"visible_until": visible_until, "position_ids": position_ids}


def visible_until_of(mask: Tensor) -> Tensor | None:
    """The vector that describes a dense mask, or None if no vector does.

    Args:
        mask: (batch, seq, seq), queries before keys: bool, True where visible, or floating
            point, 0 where visible and −10⁴ or less where not.

    Returns:
        visible_until: (batch, seq) int32.
    """
    seen = seen_pairs(mask)
    if seen is None:
        return None
    viewers = seen.sum(dim=1)
    padding = viewers == 0
    index = torch.arange(mask.shape[-1], device=mask.device)
    visible_until = (index + viewers + padding).clamp(max=mask.shape[-1]).int()
    return visible_until if _same(visible(visible_until), seen) else None


def blind_queries(mask: Tensor) -> Tensor | None:
    """(batch, seq) bool: the queries that an additive mask shows no key; None if there are none.

    Softmax gives them the mean of all values, and whoever reads their states depends on that.
    """
    if mask.dtype == torch.bool:
        return None
    blind = ((mask <= UNIFORM) & mask.isfinite()).all(dim=-1)
    return blind if blind.any() else None


def _warn_of_padding(mask: Tensor) -> None:
    """Says, once, what share of the tokens of a batch nobody sees."""
    if _warned:
        return
    share = float(_hidden_from_itself(mask).float().mean())
    if share >= MUCH_PADDING:
        _warned.append(True)
        warnings.warn(
            f"{share:.0%} of the tokens of this batch are padding, which outside attention take as "
            "long as any others: packed rows, as LLMJEPACollator makes them, have none",
            stacklevel=2,
        )


_warned: list[bool] = []


def warn_of_lost_labels(given: Any, labels: Any) -> None:
    """Says, once, that the token before a supervised one sees nothing, so its state is arbitrary.

    As in a mask that ends a token too early: there a label is predicted from what is masked.

    Args:
        given: A model's `attention_mask`.
        labels: (batch, seq), or else.
    """
    dense = isinstance(given, Tensor) and given.ndim == 4 and isinstance(labels, Tensor)
    if _warned_of_labels or not dense or given.shape[1:] != (1, *labels.shape[1:] * 2):
        return
    lost = _hidden_from_itself(given[:, 0])[:, :-1] & (labels[:, 1:] != IGNORED).to(given.device)
    if lost.any():
        _warned_of_labels.append(True)
        row, position = lost.nonzero()[0].tolist()
        warnings.warn(
            f"{int(lost.sum())} labels of this batch are predicted by tokens that the dense mask "
            f"hides from all, themselves included, as token {position} of row {row}: what such a "
            "token sees is arbitrary; let the mask show the token to itself and its row, or give "
            f"the next one the label {IGNORED}",
            stacklevel=3,
        )


_warned_of_labels: list[bool] = []


def _hidden_from_itself(mask: Tensor) -> Tensor:
    """(batch, seq) bool: the tokens that a dense (batch, seq, seq) mask hides from themselves."""
    own = mask.diagonal(dim1=1, dim2=2)
    return ~own if mask.dtype == torch.bool else own <= HIDDEN


def seen_pairs(mask: Tensor) -> Tensor | None:
    """A dense mask as bool, or None if it does more than to hide pairs."""
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    return seen if (seen | (mask <= HIDDEN)).all() else None


def _same(expected: Tensor, seen: Tensor) -> bool:
    """Whether two masks agree, but for the queries of tokens that `seen` shows to nobody."""
    padding = ~seen.any(dim=1)
    return bool(((expected == seen) | padding[:, :, None]).all())
