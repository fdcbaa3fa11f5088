"""The geometry of the views: where a model puts Text and Code, in numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llmjepa_kernels.ops.schedule import schedule_of
from llmjepa_kernels.rank import rank_me

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POOLINGS = ("last", "mean")
# What `view_geometry` returns, a row of every matrix being an example.
DEFINITIONS = {
    "singular_values": "the 100 largest singular values of Enc(Text) - Enc(Code), not centred",
    "pred_singular_values": "the same of Pred(Enc(Text)) - Enc(Code), of every pair that training "
    "compares; null without [PRED] tokens or linear predictor",
    "relative_difference": "|Enc(Text) - Enc(Code)| / |Enc(Code)|, Frobenius norms: the size of "
    "the singular values whatever the scale of the states",
    "text_code_cosines": "cosine of Enc(Text) and Enc(Code) of every example",
    "pred_code_cosines": "cosine of every pair that training compares, Pred(Enc(Text)) and "
    "Enc(Code) unless the checkpoint was trained in another direction or the sample lists other "
    "pairs; null without [PRED] tokens or linear predictor",
    "text_code_cosine": "mean of text_code_cosines",
    "pred_code_cosine": "mean of pred_code_cosines; null without [PRED] tokens or linear predictor",
    "other_text_code_cosine": "mean cosine of the Text of an example and the Code of another: "
    "as high as text_code_cosine where the views collapse towards one direction",
    "other_pred_code_cosine": "the same for predictors and the targets of other pairs",
    "text_rank": "effective rank of Enc(Text): the participation ratio (sum v)^2 / sum v^2 of the "
    "eigenvalues v of the states' covariance; 0 where all states are equal",
    "code_rank": "effective rank of Enc(Code)",
    "code_variance": "the variance of Enc(Code) at length 1, the sum over all dimensions: from 0, "
    "all in one direction, to 1; what training logs as target_variance",
    "code_rankme": "RankMe of Enc(Code) at length 1, the exponential of the entropy of its "
    "singular values' shares in their sum; what training logs as target_rank",
    "linear_residual": "the fraction of the variance of Enc(Code) that is left by the best affine "
    "map of Enc(Text), fitted by ridge regression to all other examples (leave-one-out, strength "
    "chosen by the same error): 0 where Code is a linear function of Text, 1 where the map is no "
    "better than the mean Code; null where all Codes are equal",
}


@torch.no_grad()
def view_states(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    layer: int = -1,
    pooling: str = "last",
) -> tuple[Tensor, Tensor]:
    """The hidden states that the pairs of packed batches compare.

    To see the views themselves rather than a prediction, pack examples without [PRED] tokens.

    Args:
        model: A causal language model after `patch_model`.
        batches: `PackedBatch`es, on any device.
        layer: Index into ``hidden_states`` of Transformers: 0 is the embeddings, i the output of
            the i-th layer, −1 the last one after the final norm, which training compares.
        pooling: One of ``POOLINGS``: the state of the token that is compared, or the mean of those
            of all tokens that it sees, which are the view's with what is in front of it.

    Returns:
        predictors, targets: (pairs, hidden_size) float32 on the CPU, in the order of the batches'
            ``view_pairs``.

    Raises:
        ValueError: The model has no such layer, or pooling is unknown.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}")
    # A mixture's loss that balances its experts would be of padding too.
    configs = model.config, model.config.get_text_config()
    mixes = any(hasattr(config, "output_router_logits") for config in configs)
    options = {"output_router_logits": False} if mixes else {}
    was_training = model.training
    model.eval()
    states = []
    try:
        for batch in batches:
            keys = ("input_ids", "position_ids", "visible_until")
            tensors = {key: batch[key] for key in keys} | schedule_of(batch)
            # A patched model then returns the last hidden state, and few logits.
            tensors["head_positions"] = torch.zeros(len(batch["input_ids"]), 1, dtype=torch.int64)
            outputs = model(
                **{key: value.to(model.device) for key, value in tensors.items()},
                **options,
                output_hidden_states=True if layer != -1 else None,
                use_cache=False,
            )
            found = outputs.hidden_states
            if not -len(found) <= layer < len(found):
                raise ValueError(
                    f"layer must be from {-len(found)} to {len(found) - 1}, got {layer}"
                )
            hidden = found[layer].float().cpu()
            pairs = batch["view_pairs"].cpu()
            row, pair = (pairs[..., 0] >= 0).nonzero(as_tuple=True)
            tokens = pairs[row, pair]
            if pooling == "last":
                states.append(hidden[row[:, None], tokens])
            else:
                states.append(_mean_of_seen(hidden, batch["visible_until"].cpu(), row, tokens))
    finally:
        model.train(was_training)
    predictors, targets = torch.cat(states).unbind(dim=1)
    return predictors, targets


def _mean_of_seen(hidden: Tensor, visible_until: Tensor, row: Tensor, tokens: Tensor) -> Tensor:
    """(pairs, 2, hidden_size): for each of (pairs, 2) tokens the mean state of those it sees."""
    tokens = tokens[..., None]
    seen = (torch.arange(hidden.shape[1]) <= tokens) & (tokens < visible_until[row, None])
    weights = seen / seen.sum(dim=-1, keepdim=True)
    return torch.einsum("ptj,pjh->pth", weights, hidden[row])


def view_geometry(
    text: Tensor, code: Tensor, predicted: tuple[Tensor, Tensor] | None = None
) -> dict[str, Any]:
    """The numbers of `DEFINITIONS`, computed in float64.

    Args:
        text, code: (examples, hidden_size); a row is the same example in both, at least two.
        predicted: Predictors and targets, (pairs, hidden_size) each, at least two. Default: the
            model has no [PRED] tokens.

    Returns:
        Lists of floats, floats, and None where a number is not defined; ready for JSON.

    Raises:
        ValueError: Shapes differ, there are fewer than two rows, or a state is not finite.

    Source: LLM-JEPA, arXiv:2509.14252 (singular values, linear map); effective rank as in
        Gao et al., "A theory of multineuronal dimensionality", bioRxiv 2017; RankMe,
        arXiv:2210.02885.
    """
    text, code = _checked("text", text, "code", code)
    difference = text - code
    cosines, other = _cosines(text, code)
    directions = normalize(code)
    numbers = {
        "singular_values": torch.linalg.svdvals(difference)[:100].tolist(),
        "pred_singular_values": None,
        "relative_difference": (difference.norm() / code.norm()).item(),
        "text_code_cosines": cosines.tolist(),
        "pred_code_cosines": None,
        "text_code_cosine": cosines.mean().item(),
        "pred_code_cosine": None,
        "other_text_code_cosine": other,
        "other_pred_code_cosine": None,
        "text_rank": effective_rank(text),
        "code_rank": effective_rank(code),
        "code_variance": directions.var(dim=0).sum().item(),
        "code_rankme": rank_me(directions),
        "linear_residual": linear_residual(text, code),
    }
    if predicted is not None:
        pred, target = _checked("predictors", predicted[0], "targets", predicted[1])
        cosines, other = _cosines(pred, target)
        numbers |= {
            "pred_singular_values": torch.linalg.svdvals(pred - target)[:100].tolist(),
            "pred_code_cosines": cosines.tolist(),
            "pred_code_cosine": cosines.mean().item(),
            "other_pred_code_cosine": other,
        }
    return numbers


def effective_rank(states: Tensor) -> float:
    """The participation ratio of the eigenvalues of the covariance of (examples, hidden_size)."""
    variances = torch.linalg.svdvals(states - states.mean(dim=0)).square()
    total = variances.sum()
    return (total.square() / variances.square().sum()).item() if total > 0 else 0.0


def linear_residual(text: Tensor, code: Tensor) -> float | None:
    """The fraction of Code's variance that no linear map of Text explains, see `DEFINITIONS`.

    The paper fits the map to the examples it is measured on. That residual is zero whenever there
    are no more examples than dimensions, so this one leaves the measured example out.
    """
    from sklearn.linear_model import RidgeCV

    examples = len(code)
    variance = code.var(dim=0, correction=0).mean().item() * (examples / (examples - 1)) ** 2
    if variance == 0:  # about the mean of the other examples, which is what that factor is for
        return None
    centred = text - text.mean(dim=0)
    scale = centred.norm() or 1.0  # the strengths are relative to the squared norm
    ridge = RidgeCV(alphas=[10.0**-i for i in range(10)])
    ridge.fit((centred / scale).numpy(), code.numpy())
    return float(-ridge.best_score_) / variance


def embed_views(text: Tensor, code: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """t-SNE of both views together in the plane, the same at every call.

    Args:
        text, code: (examples, hidden_size).
        seed: Of scikit-learn's TSNE.

    Returns:
        text, code: (examples, 2) float32; all zero if all states are equal.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    states = torch.cat([text, code]).float()
    if (states == states[0]).all():  # which TSNE does not survive
        return torch.zeros(len(text), 2), torch.zeros(len(code), 2)
    perplexity = min(30.0, (len(states) - 1) / 3)
    # Sums of several threads differ in their last bits, and t-SNE amplifies them.
    with threadpool_limits(1):
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
        places = torch.from_numpy(tsne.fit_transform(states.numpy()))
    return places[: len(text)], places[len(text) :]


def _checked(name: str, first: Tensor, other_name: str, second: Tensor) -> tuple[Tensor, Tensor]:
    if first.dim() != 2 or first.shape != second.shape or len(first) < 2:
        raise ValueError(
            f"{name} and {other_name} must have the same shape (at least 2, hidden_size), got "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    for label, states in ((name, first), (other_name, second)):
        finite = states.isfinite().all(dim=1)
        if not finite.all():
            index = int((~finite).nonzero()[0])
            raise ValueError(f"{label} must be finite, row {index} holds NaN or infinity")
    return first.double(), second.double()


def _cosines(first: Tensor, second: Tensor) -> tuple[Tensor, float]:
    """The cosine of every row with its own, and the mean with those of all other rows."""
    first, second = normalize(first), normalize(second)
    own = (first * second).sum(dim=1)
    every = first.sum(dim=0) @ second.sum(dim=0)
    return own.clamp(-1, 1), ((every - own.sum()) / (len(own) * (len(own) - 1))).item()
