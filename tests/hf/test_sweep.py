"""Every causal language model of the installed Transformers: exact, or refused by name."""

import warnings

import pytest
import torch

from llmjepa_kernels import Example, Segment, pack
from llmjepa_kernels.hf.patch import patch_model, unpatch_model
from tests.support.sweep import Family, families

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

EXAMPLES = [
    Example([Segment([5, 6, 7, 8]), Segment([9, 10, 11], 0), Segment([12, 13, 14, 15, 16], 0)]),
    Example([Segment([5, 6, 7, 8]), Segment([17, 18, 19], 0), Segment([20, 21, 22, 23])]),
]


def separate_logits(model):
    """The logits of every context, each from a pass of its own."""
    logits = {}
    for example in EXAMPLES:
        paths = []
        for segment in example.segments:
            above = [] if segment.parent is None else paths[segment.parent]
            paths.append([*above, *segment.input_ids])
            found = model(input_ids=torch.tensor([paths[-1]]), use_cache=False).logits[0]
            logits |= {tuple(paths[-1][: i + 1]): x for i, x in enumerate(found)}
    return logits


@torch.no_grad()
def outcome(model_type):
    """(kind, why) of a family: unavailable, refused, exact or wrong."""
    try:
        model = Family(model_type).model().eval()
    except Exception as error:  # what a family lacks without us says nothing of us
        return "unavailable", f"{type(error).__name__}: {error}"
    try:
        patch_model(model)
    except (TypeError, ValueError) as error:  # before passes that take minutes and gigabytes
        return "refused", f"{type(error).__name__}: {error}"
    unpatch_model(model)
    try:
        expected = separate_logits(model)
    except Exception as error:
        return "unavailable", f"{type(error).__name__}: {error}"
    try:
        patch_model(model)
        batch = pack(EXAMPLES)
        logits = model(**batch, use_cache=False).logits[0]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        # The last by Gemma 3 of Transformers 5.5, which takes 2D masks alone beside labels.
        return "refused", f"{type(error).__name__}: {error}"
    ids, until = batch["input_ids"][0].tolist(), batch["visible_until"][0].tolist()
    scale = max(x.abs().max() for x in expected.values())
    error = 0.0
    for i in range(len(ids)):
        context = tuple(ids[j] for j in range(i + 1) if i < until[j])
        error = max(error, float((logits[i] - expected[context]).abs().max() / scale))
    return ("exact" if error < 1e-4 else "wrong"), f"relative error {error:.1e}"


def test_no_family_is_wrong():
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model_type in families():
            found[model_type] = outcome(model_type)
    for kind in ("exact", "refused", "unavailable"):
        print(kind, *(name for name, (k, _) in found.items() if k == kind))
    for name, (kind, why) in found.items():
        if kind != "exact":
            print(f"{name}: {kind}: {why}"[:300].replace("\n", " "))
    assert [name for name, (kind, _) in found.items() if kind == "wrong"] == []
    assert sum(kind == "exact" for kind, _ in found.values()) >= 60
