"""FlopCount against torch's counter of the operations that run."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
)

from llmjepa_kernels import Example, Segment, pack
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.training.flops import FlopCount
from llmjepa_kernels.training.objective import llm_jepa_loss
from tests.support.helpers import random_examples
from tests.support.models import FAMILIES, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    **{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
}
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


def test_embeddings_of_positions_do_not_count():
    config = CONFIG_MAPPING["gpt2"](vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config)
    layers = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() > 1)
    assert FlopCount(model).per_token == 6 * layers
    assert FlopCount(model).per_label == 6 * 50 * 32


def test_a_head_that_peft_keeps_the_original_of():
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model("llama", tie_word_embeddings=False), config)
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert FlopCount(model).per_label == 6 * head.numel()


def test_only_the_language_model_of_a_model_of_images_counts():
    text = {**SMALL, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForImageTextToText.from_config(config)
    alone = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma3_text"](**text))
    assert FlopCount(model).per_token == FlopCount(alone).per_token
    assert FlopCount(model).per_label == FlopCount(alone).per_label


def test_layers_of_different_heads():
    if not hasattr(LlamaConfig(), "per_layer_config"):
        pytest.skip("this version of Transformers does not say where layers differ")
    config = CONFIG_MAPPING["gemma4_text"](
        **SMALL,
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        vocab_size_per_layer_input=50,
        hidden_size_per_layer_input=8,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert FlopCount(model).per_seen == 12 * 4 * (8 + 16)


def test_experts_by_another_name():
    config = CONFIG_MAPPING["aria_text"](
        **SMALL,
        moe_num_experts=8,
        moe_topk=2,
        moe_num_shared_experts=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    apart = {id(p) for p in (*model.lm_head.parameters(), *model.model.embed_tokens.parameters())}
    weights = [p for p in model.parameters() if p.dim() > 1 and id(p) not in apart]
    experts = sum(p.numel() for p in weights if p.dim() == 3)
    others = sum(p.numel() for p in weights if p.dim() == 2)
    assert experts > 0
    assert FlopCount(model).per_token == 6 * (others + experts / 4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_counted(family):
    model = tiny_model(family)
    batch = pack(random_examples(2, seed=3))
    flops = FlopCount(patch_model(model, impl="reference"))(batch, torch.tensor(9))
    assert flops > 4 * batch["input_ids"].numel() * 100
