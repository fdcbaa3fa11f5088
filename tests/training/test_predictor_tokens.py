"""[PRED] tokens: their rows, who holds and who trains them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.grammar import generate
from llmjepa_kernels.data.predictor_tokens import add_predictor_tokens, add_tokens
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.hf.load import add_lora
from llmjepa_kernels.training.collator import LLMJEPACollator
from llmjepa_kernels.training.trainer import LLMJEPATrainer
from tests.support.models import tiny_model
from tests.training.test_trainer import tiny_llama


@pytest.fixture
def tokenizer():
    return train_tokenizer(generate(24, seed=3), vocab_size=300)


@pytest.mark.parametrize("tied", [True, False])
def test_predictor_rows_are_near_the_others_but_distinct(tokenizer, tied):
    model = tiny_llama(tokenizer, tied=tied)
    before, known = model.get_input_embeddings().weight.detach().clone(), len(tokenizer)
    ids = add_predictor_tokens(model, tokenizer, 3)
    assert ids == [known, known + 1, known + 2]
    # The last one is the first behind a view, as in the authors' code.
    assert tokenizer.convert_ids_to_tokens(ids) == [f"<|predictor_{i}|>" for i in (3, 2, 1)]
    assert tokenizer("<|predictor_2|>", add_special_tokens=False)["input_ids"] == [ids[1]]
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embeddings) == tied
    for weight in (head, embeddings):
        assert weight.shape[0] == model.config.vocab_size == known + 3
        rows, std = weight[ids], weight[:known].std(dim=0)
        assert torch.pdist(rows).min() > 0.1 * std.norm()
        assert ((rows - weight[:known].mean(dim=0)).abs() < std).all()
    assert torch.equal(embeddings[:known], before)


def test_rows_that_are_added_later_are_others(tokenizer):
    model = tiny_llama(tokenizer)
    ids = add_tokens(model, tokenizer, ["<|sep|>"])
    ids += add_predictor_tokens(model, tokenizer, 1)
    ids += add_predictor_tokens(model, tokenizer, 3)[:2]
    weight = model.get_input_embeddings().weight
    assert torch.pdist(weight[ids]).min() > 0.1 * weight.std(dim=0).norm()


def test_spare_rows_are_used_and_embeddings_never_shrink(tokenizer):
    model = tiny_llama(tokenizer, spare_rows=5)
    before = model.get_input_embeddings().weight.detach().clone()
    ids = add_predictor_tokens(model, tokenizer, 2)
    weight = model.get_input_embeddings().weight
    assert weight.shape == before.shape
    changed = (weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == ids


def test_a_head_with_fewer_rows_than_the_embeddings(tokenizer):
    """Mllama's has none for the spare rows, in which the predictors then are."""
    model = tiny_llama(tokenizer, spare_rows=5, tied=False)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, len(tokenizer), bias=False)
    before = model.lm_head.weight.detach().clone()
    ids = add_predictor_tokens(model, tokenizer, 2)
    assert torch.equal(model.lm_head.weight, before)
    assert model.get_input_embeddings().weight[ids].any(dim=1).all()


@pytest.mark.parametrize("family", ["llama", "phi"])  # the head of phi has a bias
@pytest.mark.parametrize("tied", [True, False])
def test_an_optimizer_may_be_made_before_the_predictors_are_added(tokenizer, family, tied):
    model = tiny_model(family, vocab_size=len(tokenizer), tie_word_embeddings=tied)
    held = {id(parameter) for parameter in model.parameters()}
    add_predictor_tokens(model, tokenizer, 1)
    assert {id(parameter) for parameter in model.parameters()} == held
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (weights[0] is weights[1]) == tied
    assert all(len(weight) == len(tokenizer) for weight in weights)
    logits = model(torch.tensor([[1, 2]])).logits
    assert logits.shape[-1] == len(tokenizer)
    logits.sum().backward()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare_rows", [0, 3])
def test_rows_that_are_no_token_are_never_generated(tokenizer, tied, spare_rows, tmp_path):
    model = tiny_llama(tokenizer, tied=tied, spare_rows=spare_rows)
    before, known = model.get_input_embeddings().weight.detach().clone(), len(tokenizer)
    model.generation_config.suppress_tokens = [7]
    ids = add_predictor_tokens(model, tokenizer, 2, pad_to_multiple_of=64)
    weight = model.get_input_embeddings().weight
    assert len(weight) == model.config.vocab_size == 320
    rest = [*range(known), *range(known + 2, known + spare_rows)]
    assert torch.equal(weight[rest], before[rest])  # spare rows of the model's own are its own
    padding = list(range(max(known + 2, known + spare_rows), 320))
    assert model.generation_config.suppress_tokens == [7, *padding]
    with torch.no_grad():  # the padding would win
        model.get_output_embeddings().weight[padding] *= 1e4
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for each in (model, loaded):
        logits = each(torch.tensor([[1, 2]])).logits[0, -1]
        assert int(logits.abs().argmax()) in padding
        generated = each.generate(torch.tensor([[1, 2]]), max_new_tokens=20, do_sample=False)
        assert int(generated.max()) < padding[0]
    # What was padding may become a token.
    more = add_predictor_tokens(model, tokenizer, 4, pad_to_multiple_of=64)
    assert more[2:] == ids
    assert model.generation_config.suppress_tokens == [
        7,
        *(i for i in padding if i not in more[:2]),
    ]
    assert len(model.get_input_embeddings().weight) == 320
    with pytest.raises(ValueError, match="pad_to_multiple_of must be an integer, at least 1"):
        add_predictor_tokens(model, tokenizer, 1, pad_to_multiple_of=0)


def test_predictor_rows_of_a_checkpoint_are_kept(tokenizer):
    model = tiny_llama(tokenizer)
    ids = add_predictor_tokens(model, tokenizer, 1, seed=1)
    before = model.get_input_embeddings().weight.detach().clone()
    assert add_predictor_tokens(model, tokenizer, 2, seed=2) == [ids[0] + 1, *ids]
    assert torch.equal(model.get_input_embeddings().weight[: len(before)], before)
    assert add_predictor_tokens(model, tokenizer, 0) == []


def test_predictor_tokens_that_nothing_trains_are_named(tokenizer, tmp_path):
    model = tiny_llama(tokenizer)
    ids = add_predictor_tokens(model, tokenizer, 2)
    collator = LLMJEPACollator(tokenizer, ExampleFormat(pred_ids=ids))
    args = TrainingArguments(tmp_path, use_cpu=True, report_to=[])
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    plain = get_peft_model(copy.deepcopy(model), config)
    with pytest.warns(RuntimeWarning, match=rf"the embeddings .* frozen.*\[{ids[0]}, {ids[1]}\]"):
        LLMJEPATrainer(plain, args, collator)
    with pytest.warns(RuntimeWarning, match=r"frozen.*trainable_token_indices"):
        add_predictor_tokens(plain, tokenizer, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        LLMJEPATrainer(add_lora(copy.deepcopy(model), 2, new_ids=ids), args, collator)
        LLMJEPATrainer(model, args, collator)


def test_a_collator_that_leaves_out_known_predictor_tokens_says_so(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LLMJEPACollator(tokenizer)
        ids = add_predictor_tokens(tiny_llama(tokenizer), tokenizer, 2)
        LLMJEPACollator(tokenizer, ExampleFormat(pred_ids=ids))
        LLMJEPACollator(tokenizer, with_views=False)
    with pytest.warns(UserWarning, match=r"has 2 \[PRED\] tokens, but example_format has none"):
        LLMJEPACollator(tokenizer)


def test_predictor_tokens_refuse_what_does_not_fit(tokenizer):
    model = tiny_llama(tokenizer, spare_rows=-4)
    with pytest.raises(ValueError, match=r"the tokenizer has 300 tokens, .* for 296 only"):
        add_predictor_tokens(model, tokenizer, 1)
    with pytest.raises(ValueError, match="num_tokens must be 0 or more, got -1"):
        add_predictor_tokens(model, tokenizer, -1)
