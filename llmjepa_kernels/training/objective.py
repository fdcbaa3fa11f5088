"""llm_jepa_loss: next-token, JEPA and tube losses of packed rows, for any training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from transformers.utils.generic import ModelOutput

from llmjepa_kernels.checks import check_finite, check_whole
from llmjepa_kernels.example import IGNORE
from llmjepa_kernels.hf.experts import aux_weight_of, returns_aux_loss
from llmjepa_kernels.hf.patch import patched_impl, pretrained_model
from llmjepa_kernels.ops.common import count_pairs, count_tubes
from llmjepa_kernels.ops.loss import BACKENDS as LOSS_BACKENDS
from llmjepa_kernels.ops.loss import last_token_loss, pair_views
from llmjepa_kernels.ops.schedule import schedule_of
from llmjepa_kernels.ops.tubes import semantic_tube_loss
from llmjepa_kernels.training.next_token_loss import MAX_LOGITS, is_distributed, next_token_loss
from llmjepa_kernels.training.regularizers import sigreg, vicreg
from llmjepa_kernels.training.view_head import rows_of, view_head_of

if TYPE_CHECKING:  # builds of torch without distributed lack it
    from torch.distributed import ProcessGroup

REQUIRED_KEYS = ("input_ids", "position_ids", "labels", "visible_until", "view_pairs")


@dataclass
class LLMJEPAOutput(ModelOutput):
    """Losses of one batch, float32 scalars (float64 for a float64 model).

    Attributes:
        loss: The sum of ``ntp_weight * ntp_loss`` and the same for jepa, stp, sigreg, vicreg and
            aux, where there is one: what to call backward on.
        ntp_loss: Sum over the supervised tokens divided by `num_items`, or by
            `num_items_in_batch` where that was given.
        jepa_loss: Sum over the pairs divided by `num_pairs`, or by `num_pairs_in_batch`.
        stp_loss: Sum over the tubes divided by `num_tubes`, or by `num_tubes_in_batch`.
        sigreg_loss, vicreg_loss: Of predictions and targets, the mean of the two, times the share
            of `num_pairs` in `num_pairs_in_batch`; None at weight 0.
        aux_loss: What a mixture of experts adds to balance their load, over all tokens but padding,
            times the share of `num_items` in `num_items_in_batch`; None if the model returns none.
        cosine: Cosine similarity of the pairs, normalised like `jepa_loss`, without gradient.
        num_items: Supervised tokens of this batch, an integer scalar.
        num_pairs: Pairs of this batch, an integer scalar.
        num_tubes: Tubes of this batch, an integer scalar.
        views: With `return_views`: (2, batch, num_pairs, hidden_size), predictors and targets at
            length 1, 0 for padding, without gradient.
    """

    loss: Tensor | None = None
    ntp_loss: Tensor | None = None
    jepa_loss: Tensor | None = None
    stp_loss: Tensor | None = None
    sigreg_loss: Tensor | None = None
    vicreg_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    cosine: Tensor | None = None
    num_items: Tensor | None = None
    num_pairs: Tensor | None = None
    num_tubes: Tensor | None = None
    views: Tensor | None = None


def llm_jepa_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    jepa_weight: float = 1.0,
    stp_weight: float = 0.0,
    sigreg_weight: float = 0.0,
    vicreg_weight: float = 0.0,
    ntp_weight: float = 1.0,
    aux_weight: float | None = None,
    metric: str = "cosine",
    temperature: float = 0.07,
    num_items_in_batch: int | Tensor | None = None,
    num_pairs_in_batch: int | Tensor | None = None,
    num_tubes_in_batch: int | Tensor | None = None,
    detach_target: bool = False,
    gather_negatives: bool | ProcessGroup = True,
    slices_seed: int = 0,
    return_views: bool = False,
    max_logits: int | None = MAX_LOGITS,
    head_impl: str | None = None,
) -> LLMJEPAOutput:
    """Next-token, LLM-JEPA and tube losses of packed rows from one forward pass.

    ``L = ntp_weight · L_NTP + jepa_weight · d(Pred(Enc(Text)), Enc(Code)) + stp_weight · L_STP``,
    where the second term is over the pairs of the batch and the third over its tubes; and, against
    collapse, two terms of the distribution of what the pairs compare. A `ViewHead` that the model
    has been given by `add_view_head` stands between states and pairs, or tubes.

    The language model head runs on the supervised tokens only. For gradient accumulation, pass
    the counts of the whole accumulated batch: the losses of its parts then add up to the means
    over it. A term with nothing to average over is 0.

    Args:
        model: A causal language model after `patch_model`; PEFT, DDP, FSDP and torch.compile may
            wrap it.
        batch: A `PackedBatch` or any mapping with its keys, on the model's device. `supervised`
            of `supervised_positions` spares a GPU one synchronisation, and a schedule another.
        jepa_weight: λ of LLM-JEPA.
        stp_weight: λ of Semantic Tube Prediction.
        sigreg_weight: Of `sigreg`, LeJEPA's; its paper takes 0.05 beside 0.95 of the distance.
        vicreg_weight: Of `vicreg`, variance and covariance.
        ntp_weight: γ.
        aux_weight: Of the loss that balances the experts' load, which the model returns if its
            config has ``output_router_logits=True``. Default: the config's own factor.
        metric: "cosine", "l2", "mse" or "infonce", see `last_token_loss`.
        temperature: Of "infonce" only.
        num_items_in_batch: Divides the sum over supervised tokens. Default: their number here.
        num_pairs_in_batch: Divides the sum over pairs. Default: their number here.
        num_tubes_in_batch: Divides the sum over tubes. Default: their number here.
        detach_target: Let no gradient flow into the target views.
        gather_negatives: With "infonce" under torch.distributed, contrast with the targets of all
            processes, or of a group of them: that of data parallelism, where processes share
            batches otherwise. All must call this together, with any number of pairs each. The
            negatives are those of this forward, not of a whole accumulated batch. In the same way
            the terms against collapse are of the pairs of these processes, in this forward.
        slices_seed: Of the directions of `sigreg`, see there.
        return_views: Also return what the pairs compare.
        max_logits: Keep at most so many logits at once, where there are more: the head then runs
            on a part of the tokens after the other, and again in the backward, for a third more of
            its time. None: keep all. Heads that Transformers puts more behind than a known factor
            and soft cap, that FSDP has sharded by themselves, and compiled losses keep all.
        head_impl: "liger" for the head and its loss in Liger's fused kernels, which decide
            themselves how many logits exist at once. Default: PyTorch's, as `max_logits` says.

    Raises:
        ValueError: The batch lacks a key, an option is out of range, or `aux_weight` is needed.
        RuntimeError: The model is not patched, or does not return the logits or states asked for;
            or its head does not fit `head_impl`.

    Source: LLM-JEPA, arXiv:2509.14252; Semantic Tube Prediction, arXiv:2602.22617.
    """
    impl = patched_impl(model)
    if impl not in LOSS_BACKENDS:  # a back end of attention alone
        impl = None
    missing = [key for key in REQUIRED_KEYS if batch.get(key) is None]
    if missing:
        raise ValueError(f"batch must have the keys of a PackedBatch, it lacks {missing}")

    weights = {
        "jepa_weight": jepa_weight,
        "stp_weight": stp_weight,
        "sigreg_weight": sigreg_weight,
        "vicreg_weight": vicreg_weight,
        "ntp_weight": ntp_weight,
        "aux_weight": aux_weight,
    }
    for name, weight in weights.items():
        if torch.compiler.is_compiling() or weight is None or isinstance(weight, Tensor):
            continue  # a compiler must not make a graph for each number
        check_finite(name, weight)
    if max_logits is not None:
        check_whole("max_logits", max_logits, least=1)

    positions, targets = _supervised(batch)
    tensors = {key: batch[key] for key in ("input_ids", "position_ids", "visible_until")}
    tensors |= schedule_of(batch)
    pretrained = pretrained_model(model)
    if returns_aux_loss(pretrained.config):
        tensors["attention_mask"] = real_tokens(batch)
    outputs, ntp_sum = next_token_loss(model, tensors, positions, targets, max_logits, head_impl)
    hidden = outputs.hidden_states[-1]

    num_items = (targets != IGNORE).sum()
    ntp_loss = _divide(ntp_sum, num_items_in_batch, num_items)
    aux_loss = getattr(outputs, "aux_loss", None)
    if aux_loss is not None:
        if not isinstance(aux_loss, Tensor):  # Transformers' 0
            raise RuntimeError(
                f"{type(pretrained).__name__} must return the logits of its routers, which this "
                "version of Transformers does not: set output_router_logits=False in its config"
            )
        # Of no sum over tokens: parts of a batch count by their supervised tokens.
        aux_loss = _divide(aux_loss.to(ntp_sum) * num_items, num_items_in_batch, num_items)

    head = view_head_of(model)
    stp_sum, num_tubes = ntp_sum.new_zeros(()), num_items.new_zeros(())
    tubes = batch.get("tubes")
    tube_predictor = None if head is None else head.tube_predictor
    # What trains a matrix uses it in every step, as DistributedDataParallel expects.
    if tubes is not None and (tubes.shape[1] or tube_predictor is not None):
        num_tubes = count_tubes(tubes)
        states = hidden
        if tube_predictor is not None:
            states, tubes = _apart(hidden, tubes)
            first, second = states.chunk(2, dim=1)
            states = torch.cat([tube_predictor(first), second], dim=1)
        stp_sum = semantic_tube_loss(states, tubes, reduction="sum", impl=impl)
    stp_loss = _divide(stp_sum, num_tubes_in_batch, num_tubes)

    pairs = batch["view_pairs"]
    num_pairs = count_pairs(pairs)
    group = _group(gather_negatives)
    against_collapse = {}
    regularizers = {"sigreg": sigreg_weight, "vicreg": vicreg_weight}
    wanted = [name for name, weight in regularizers.items() if isinstance(weight, Tensor) or weight]
    if head is not None or detach_target or wanted:
        real = pairs[..., 0].flatten() >= 0
        predictors, targets = rows_of(hidden, pairs).unbind(dim=2)
        if head is not None:
            predictors, targets = head(predictors, targets)
        for name in wanted:
            both = (_regularizer(name, x, real, slices_seed, group) for x in (predictors, targets))
            share = sum(both) / 2 * num_pairs
            against_collapse[name] = _divide(share, num_pairs_in_batch, num_pairs)
        hidden = torch.cat([predictors, targets.detach() if detach_target else targets], dim=1)
        pairs = _places_of(pairs)
    jepa_sum = last_token_loss(
        hidden,
        pairs,
        metric=metric,
        reduction="sum",
        temperature=temperature,
        group=group,
        impl=impl,
    )
    jepa_loss = _divide(jepa_sum, num_pairs_in_batch, num_pairs)

    with torch.no_grad():
        distance = jepa_sum
        if metric != "cosine":
            distance = last_token_loss(hidden, pairs, reduction="sum", impl=impl)
        cosine = _divide(num_pairs - distance, num_pairs_in_batch, num_pairs)
        views = pair_views(hidden, pairs, impl=impl) if return_views else None
    loss = ntp_weight * ntp_loss + jepa_weight * jepa_loss + stp_weight * stp_loss
    for name, term in against_collapse.items():
        loss = loss + regularizers[name] * term
    if aux_loss is not None:
        if aux_weight is None:
            aux_weight = aux_weight_of(pretrained.config)
        loss = loss + aux_weight * aux_loss
    return LLMJEPAOutput(
        loss=loss,
        ntp_loss=ntp_loss,
        jepa_loss=jepa_loss,
        stp_loss=stp_loss,
        sigreg_loss=against_collapse.get("sigreg"),
        vicreg_loss=against_collapse.get("vicreg"),
        aux_loss=aux_loss,
        cosine=cosine,
        num_items=num_items,
        num_pairs=num_pairs,
        num_tubes=num_tubes,
        views=views,
    )


def supervised_positions(labels: Tensor) -> Tensor:
    """The tokens whose successor is supervised: those that need logits.

    Args:
        labels: (batch, seq) int64, −100 where there is no loss.

    Returns:
        positions: (batch, most of any row, but at least 2, since torch.compile makes a graph of its
            own for 1) int64, ascending, padded with −1.
    """
    wanted = labels[:, 1:] != IGNORE
    count = wanted.sum(dim=1)
    most = max(int(count.max()), 2)
    # A stable sort brings the wanted positions to the front in order.
    order = wanted.int().argsort(dim=1, descending=True, stable=True)
    order = functional.pad(order, (0, most), value=-1)[:, :most]
    slot = torch.arange(most, device=labels.device)
    return order.masked_fill(slot >= count[:, None], -1)


def real_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """(batch, seq) bool: which tokens of packed rows are no padding, without a wait for a GPU.

    A lone token that is in no pair and under no other passes for padding: nothing depends on it.
    """
    visible_until = batch["visible_until"]
    own_end = torch.arange(1, visible_until.shape[1] + 1, device=visible_until.device)
    alone = (visible_until == own_end) & (batch["position_ids"] == 0)
    ends = batch["view_pairs"].flatten(1)
    # One column more takes the padding of the pairs.
    paired = torch.zeros_like(functional.pad(alone, (0, 1)))
    paired.scatter_(1, torch.where(ends < 0, visible_until.shape[1], ends), True)
    return ~alone | paired[:, :-1]


def _supervised(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Positions to compute logits at, and the label of each: −100 for padding."""
    labels = batch["labels"]
    positions = batch.get("supervised")
    if positions is None:
        positions = supervised_positions(labels)
    successors = (positions + 1).clamp(max=labels.shape[1] - 1)
    targets = labels.gather(1, successors).masked_fill(positions < 0, IGNORE)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wanted, found = int((labels[:, 1:] != IGNORE).sum()), int((targets != IGNORE).sum())
        if found < wanted:
            raise ValueError(
                f"batch['supervised'] has the places of {found} labels, but there are {wanted}: "
                "without it they are taken from labels that were changed"
            )
    return positions, targets


def _places_of(pairs: Tensor) -> Tensor:
    """The pairs among rows of all predictors, then of all targets."""
    place = torch.arange(pairs.shape[1], device=pairs.device)
    place = torch.stack([place, place + pairs.shape[1]], dim=-1)
    return torch.where(pairs < 0, -1, place)


def _apart(hidden: Tensor, tubes: Tensor) -> tuple[Tensor, Tensor]:
    """The states of all first vectors' steps, then of all second ones', and the tubes of them.

    So a matrix can map the first: of a sum of steps it makes the sum of what it makes of each.
    """
    by_vector = tubes.transpose(1, 2)
    states = rows_of(hidden, by_vector.flatten(1))
    places = torch.arange(by_vector[0].numel(), device=tubes.device).view(by_vector.shape[1:])
    return states, torch.where(tubes < 0, -1, places.transpose(0, 1))


def _regularizer(
    name: str, states: Tensor, real: Tensor, seed: int, group: ProcessGroup | None
) -> Tensor:
    states = states.flatten(0, 1)
    if name == "vicreg":
        return vicreg(states, real, group=group)
    return sigreg(states, real, seed=seed, group=group)


def _group(gather_negatives: bool | ProcessGroup) -> ProcessGroup | None:
    if gather_negatives is True:
        return distributed.group.WORLD if is_distributed() else None
    return gather_negatives or None


def _divide(total: Tensor, given: int | Tensor | None, counted: Tensor) -> Tensor:
    if given is None:
        given = counted
    if isinstance(given, Tensor):
        return total / given.to(total.device).clamp(min=1)
    if not isinstance(given, int | float) or not given >= 0:
        raise ValueError(f"counts of a batch must be numbers of at least 0, got {given!r}")
    return total / max(given, 1)  # as a tensor it would be copied, which waits for the device
