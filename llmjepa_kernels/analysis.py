"""The geometry of the views: where a model puts Text and Code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from llmjepa_kernels.block_mask import SCHEDULE_KEYS


@torch.no_grad()
def view_states(model, batches: Iterable[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """The last hidden states that the pairs of packed batches compare.

    To see the views themselves rather than a prediction, pack examples without [PRED] tokens.

    Args:
        model: A causal language model after `patch_model`.
        batches: `PackedBatch`es, on any device.

    Returns:
        predictors, targets: (pairs, hidden_size) float32 on the CPU, in the order of the batches'
            ``view_pairs``.
    """
    was_training = model.training
    model.eval()
    states = []
    for batch in batches:
        keys = ("input_ids", "position_ids", "visible_until", *SCHEDULE_KEYS)
        outputs = model(
            **{key: batch[key].to(model.device) for key in keys},
            logits_to_keep=1,
            output_hidden_states=-1,
            use_cache=False,
        )
        hidden = outputs.hidden_states[-1].float().cpu()
        pairs = batch["view_pairs"].cpu()
        row, pair = (pairs[..., 0] >= 0).nonzero(as_tuple=True)
        states.append(hidden[row[:, None], pairs[row, pair]])
    model.train(was_training)
    predictors, targets = torch.cat(states).unbind(dim=1)
    return predictors, targets
