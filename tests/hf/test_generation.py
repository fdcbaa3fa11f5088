"""Forwards without a packed row, and generation: as if the model were not patched."""

import copy
import pickle

import pytest
import torch
from transformers import (
    GenerationConfig,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from llmjepa_kernels.hf.patch import patch_model, patched_impl, unpatch_model
from tests.support.models import FAMILIES, VOCAB, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def left_padded(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (len(lengths), max(lengths)), generator=generator)
    index = torch.arange(max(lengths))
    mask = (index >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_as_before(family, sparse_calls):
    model = tiny_model(family).eval()
    prompts = left_padded([9, 3, 1])
    options = {
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    runs = []
    for _ in range(2):
        cached = model.generate(**prompts, **options)
        recomputed = model.generate(**prompts, **options, use_cache=False)
        runs.append((cached, recomputed))
        patch_model(model)
    for before, after in zip(*runs, strict=True):
        assert torch.equal(before.sequences, after.sequences)
        for a, b in zip(before.logits, after.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch.equal(runs[1][0].sequences, runs[1][1].sequences)
    assert not sparse_calls


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_generation_with_a_static_cache(family):
    model = tiny_model(family).eval()
    prompts = left_padded([7, 4])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(**prompts, **options)
    patch_model(model)
    options |= {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(**prompts, **options), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inputs", ["plain", "right padded", "left padded", "two documents"])
def test_ordinary_forwards_are_as_before(family, inputs):
    model = tiny_model(family)
    arguments = left_padded([14, 14] if inputs in ("plain", "two documents") else [14, 6])
    mask = arguments.pop("attention_mask")
    if inputs == "right padded":
        mask = mask.flip(1)
    if "padded" in inputs:
        arguments["attention_mask"] = mask
    if inputs == "two documents":  # Transformers splits rows where positions start anew
        arguments["position_ids"] = torch.tensor([[*range(6), *range(8)]] * 2)
        arguments["use_cache"] = False
    expected = model(**arguments).logits[mask.bool()]
    actual = patch_model(model)(**arguments).logits[mask.bool()]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [False, True])
def test_continuous_batching_is_as_before(copied):
    model = tiny_model("llama").eval()
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=3, pad_token_id=0)
    cache = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)

    def generated(model):
        prompts = [[4, 5, 6], [7, 8, 9, 10]]
        outputs = model.generate_batch(prompts, config, continuous_batching_config=cache)
        return [outputs[name].generated_tokens for name in sorted(outputs)]

    model.set_attn_implementation("sdpa")
    expected = generated(model)
    assert len(expected) == 2
    patched = patch_model(model)
    patched = copy.deepcopy(patched) if copied else patched
    assert generated(patched) == expected
    assert patched_impl(patched) is None
    assert generated(unpatch_model(patched)) == expected
    assert "generate_batch" not in vars(patched)


def test_a_shallow_copy_whose_original_is_gone():
    patched = patch_model(tiny_model("llama"))
    shallow = copy.copy(patched)
    del patched
    for one in (shallow, copy.deepcopy(shallow), pickle.loads(pickle.dumps(shallow))):
        with pytest.raises(RuntimeError, match=r"is gone: call patch_model\(model\) on the copy"):
            one.generate_batch([[1, 2, 3]])
