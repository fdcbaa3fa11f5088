"""A step of a patched model waits for no device: on meta tensors any look at a value raises."""

from contextlib import nullcontext

import pytest
import torch

from llmjepa_kernels import TubeSampler, llm_jepa_example, llm_jepa_loss, pack, patch_model
from llmjepa_kernels.example import with_tubes
from llmjepa_kernels.training.objective import supervised_positions
from llmjepa_kernels.tubes import TokenPath
from tests.support.models import BEFORE_5_17, FAMILIES, MIXTURES, tiny_model


@pytest.fixture(autouse=True)
def no_autocast_of_meta(monkeypatch):
    """Torch knows none of that device, and says so by an error."""
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda *device: device != ("meta",) and enabled(*device)
    )
    monkeypatch.setattr(torch, "autocast", lambda *device, **options: nullcontext())


@pytest.fixture
def batch():
    """Two rows, which a collator has completed."""
    examples = []
    for i in range(4):
        ids = range(3 + i, 24 + i)
        example = llm_jepa_example(ids, [5, 6, 7 + i], [8, 9, 10], pred_ids=[11])
        example = example.__class__(example.segments, example.pairs, TokenPath(1, [(2, 20)]))
        examples.append(with_tubes(example, TubeSampler()))
    batch = pack(examples, max_length=80)
    assert len(batch["input_ids"]) == 2
    batch["supervised"] = supervised_positions(batch["labels"])
    return batch


@pytest.mark.parametrize("metric", ["cosine", "infonce"])
@pytest.mark.parametrize("family", [*dict.fromkeys([*FAMILIES, *MIXTURES]), "openelm"])
def test_no_value_is_looked_at(family, metric, batch):
    if family == "granitemoe" and BEFORE_5_17:
        pytest.skip("its own router looks at values there")
    model = tiny_model(family).to("meta")
    if family in MIXTURES or family == "gpt_oss":
        # Transformers' own loop over the experts asks which of them have tokens.
        model.set_experts_implementation("batched_mm")
    patch_model(model)
    options = {"metric": metric, "stp_weight": 0.1, "return_views": True}
    out = llm_jepa_loss(model, batch.to("meta"), **options)
    out.loss.backward()
    assert out.loss.is_meta
    assert all(p.grad is None or p.grad.is_meta for p in model.parameters())
    assert any(p.grad is not None for p in model.parameters())


def test_what_a_collator_spares(batch):
    """The count of supervised tokens is looked at where it is not in the batch."""
    model = patch_model(tiny_model("llama").to("meta"))
    del batch["supervised"]
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        llm_jepa_loss(model, batch.to("meta"))
