"""Patched models whose parts, masks, positions or layers are not those of a plain decoder."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from llmjepa_kernels import pack
from llmjepa_kernels.hf.patch import patch_model, unpatch_model
from tests.hf.test_patch import left_padded
from tests.support.helpers import random_examples
from tests.support.models import VOCAB, tiny_model
from tests.support.sweep import Family

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def batch():
    return pack(random_examples(4, seed=0), 96)


def causal(seq):
    return torch.ones(1, 1, seq, seq, dtype=torch.bool).tril()


def test_weights_are_there_under_a_dense_mask_of_views():
    model = tiny_model("llama").eval()
    mask = torch.zeros(1, 1, 6, 6).masked_fill(~causal(6), torch.finfo(torch.float32).min)
    inputs = {"input_ids": left_padded([6])["input_ids"], "attention_mask": mask}
    model.set_attn_implementation("eager")
    expected = model(**inputs, output_attentions=True).attentions
    actual = patch_model(model)(**inputs, output_attentions=True).attentions
    assert len(actual) == len(expected) > 0
    for weights, own in zip(actual, expected, strict=True):
        torch.testing.assert_close(weights, own)


def test_positions_of_three_dimensions_keep_their_dense_mask():
    if "qwen2_5_vl_text" not in CONFIG_MAPPING:
        pytest.skip("this version of Transformers has no Qwen2.5-VL of its own")
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = Family("qwen2_5_vl_text").config(rope_parameters=rope)
    model = AutoModel.from_config(config).eval()
    inputs = {"input_ids": left_padded([6])["input_ids"], "attention_mask": causal(6)}
    inputs["position_ids"] = torch.arange(6).expand(3, 1, 6)
    expected = model(**inputs).last_hidden_state
    torch.testing.assert_close(patch_model(model)(**inputs).last_hidden_state, expected)


def test_queries_that_are_cut_off_before_shared_layers():
    """Gemma 4 does so for the last tokens, where it knows that the mask is not left out."""
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("this version of Transformers has no Gemma 4")
    torch.manual_seed(0)
    config = Family("gemma4_text").config(
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = left_padded([12])["input_ids"]
    expected = model(ids, logits_to_keep=4).logits
    torch.testing.assert_close(patch_model(model)(ids, logits_to_keep=4).logits, expected)


def test_layers_of_cross_attention_that_text_leaves_out(batch):
    small = Family("mllama").config().text_config.to_dict()
    small |= {"num_hidden_layers": 4, "cross_attention_layers": [1, 3], "vocab_size": VOCAB}
    model = MllamaForCausalLM(MllamaTextConfig(**small)).eval()
    assert patch_model(model)(**batch).logits.shape == (*batch["input_ids"].shape, VOCAB)


def test_a_decoder_that_its_config_makes_bidirectional(batch):
    model = patch_model(tiny_model("llama"))
    model.config.is_causal = False
    with pytest.raises(ValueError, match="needs causal attention, LlamaAttention is bidirectional"):
        model(**batch)


def test_a_position_bias_is_not_left_out(batch):
    """As the attention of Inkling passes one."""
    model = patch_model(tiny_model("llama"))
    with pytest.raises(ValueError, match="no position_bias, which LlamaAttention passes"):
        model(**batch, position_bias=torch.zeros(1))


@pytest.mark.parametrize("name", ["pixel_values", "pixel_values_videos", "input_features"])
def test_rows_are_packed_of_text_alone(batch, name):
    model = patch_model(Family("gemma3").model()).eval()
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "visible_until")}
    with pytest.raises(ValueError, match=f"{name} must not be given with visible_until"):
        model(**inputs, **{name: torch.zeros(1, 3, 8, 8)})
    assert model(**inputs, pixel_values=None).logits.shape[:2] == batch["input_ids"].shape


def test_each_part_gets_its_own_implementation_back():
    model = Family("gemma3").model()
    before = {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}
    model.set_attn_implementation(before)
    unpatch_model(patch_model(patch_model(model)))
    parts = {"": model.config, "text_config": model.config.text_config}
    parts["vision_config"] = model.config.vision_config
    assert {name: part._attn_implementation for name, part in parts.items()} == before
