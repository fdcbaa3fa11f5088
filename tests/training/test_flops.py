"""FlopCount against torch's counter of the operations that run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmjepa_kernels import Example, Segment, pack
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.training.flops import FlopCount
from llmjepa_kernels.training.objective import llm_jepa_loss
from tests.support.helpers import random_examples
from tests.support.models import FAMILIES, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)  # of weights; attention's are bmm


def counted(model, batch):
    with FlopCounterMode(display=False) as counter:
        output = llm_jepa_loss(model, batch)
        output.loss.backward()
    found = counter.get_flop_counts()["Global"]
    return sum(found.get(product, 0) for product in PRODUCTS), output


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "cohere"])
@pytest.mark.parametrize("frozen", [False, True])
def test_weights_and_head(family, frozen):
    model = patch_model(tiny_model(family), impl="reference")
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed" in name or "mlp" not in name)
    batch = pack(random_examples(5, seed=3))
    found, output = counted(model, batch)
    count = FlopCount(model)
    # The head runs on a padded rectangle of positions, here one row without padding.
    expected = count.per_token * batch["input_ids"].numel() + count.per_label * output.num_items
    assert found == expected
    causal = pack([Example([Segment([5] * 10, labels=[5] * 10)])])
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads * config.num_hidden_layers * width
    attention = count(causal, torch.tensor(0)) - count.per_token * 10
    assert attention.item() == pytest.approx(12 * queries * 55)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_counted(family):
    model = tiny_model(family)
    batch = pack(random_examples(2, seed=3))
    flops = FlopCount(patch_model(model, impl="reference"))(batch, torch.tensor(9))
    assert flops > 4 * batch["input_ids"].numel() * 100
