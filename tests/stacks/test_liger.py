"""Models that Liger has patched, before or after patch_model, give the same loss and gradients.

Liger's own kernels of norms, rotations and activations need a GPU; its forward does not, which
replaces the head and the loss. Its fused head and loss, which ``head_impl="liger"`` takes, is seen
in Triton's interpreter.
"""

import sys

import pytest
import torch
import triton.language as tl

pytest.importorskip("liger_kernel")

from liger_kernel.ops import cross_entropy
from liger_kernel.transformers import (
    apply_liger_kernel_to_llama,
    apply_liger_kernel_to_qwen3,
)
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from llmjepa_kernels import pack
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.ops.triton import configs
from llmjepa_kernels.training.objective import llm_jepa_loss
from llmjepa_kernels.training.trainer import LLMJEPATrainer
from tests.support.helpers import random_examples
from tests.support.models import tiny_model

APPLY = {"llama": apply_liger_kernel_to_llama, "qwen3": apply_liger_kernel_to_qwen3}
WITHOUT_KERNELS = {"rope": False, "rms_norm": False, "swiglu": False}


def loss_and_gradients(model, batch, **options):
    model.zero_grad(set_to_none=True)
    loss = llm_jepa_loss(model, batch, **options).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("max_logits", [None, 200])
@pytest.mark.parametrize("length", [None, 90])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("family", APPLY)
def test_same_loss_and_gradients(family, first, length, max_logits):
    batch = pack(random_examples(5, seed=1), length)
    expected = loss_and_gradients(patch_model(tiny_model(family)), batch)
    model = tiny_model(family)
    forward = model.forward
    if first:
        APPLY[family](model=model, **WITHOUT_KERNELS)
        patch_model(model)
    else:
        patch_model(model)
        APPLY[family](model=model, **WITHOUT_KERNELS)
    assert model.forward != forward
    for actual, wanted in zip(
        loss_and_gradients(model, batch, max_logits=max_logits), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


def test_trainer(tmp_path):
    """``use_liger_kernel=True`` patches in Trainer's own constructor."""
    losses = []
    for options in ({}, {"use_liger_kernel": True, "liger_kernel_config": WITHOUT_KERNELS}):
        args = TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            max_steps=2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        examples = random_examples(16, seed=2)
        trainer = LLMJEPATrainer(tiny_model("llama"), args, pack, train_dataset=examples)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class Cap(float):
    """A number that the interpreter hands to Liger's kernel as it is, which calls `to` of it."""

    def to(self, dtype):
        return self


HEADS = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
    "gemma2": {"final_logit_softcapping": Cap(3)},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "phi": {},  # a bias
}


@pytest.fixture(scope="module")
def batch():
    return pack(random_examples(5, seed=1), 90)


def patched(family="llama", **options):
    return patch_model(tiny_model(family, **options), impl="reference")


@pytest.mark.triton
@pytest.mark.parametrize("family", HEADS)
def test_fused_head(family, batch, monkeypatch):
    """Also where later factors reach its gradients, which it makes in its forward."""
    if configs.INTERPRETED:  # which knows no tanh of a GPU's library
        monkeypatch.setattr(cross_entropy, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)
    model = patched(family, **HEADS[family])
    counts = {"num_items_in_batch": 7, "num_pairs_in_batch": 2}
    expected = loss_and_gradients(model, batch, **counts)
    for actual, wanted in zip(
        loss_and_gradients(model, batch, head_impl="liger", **counts), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        loss = llm_jepa_loss(model, batch, head_impl="liger", **counts).loss
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)


@pytest.mark.triton
def test_fused_head_keeps_few_logits(batch):
    model = patched()
    sizes = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: sizes.append(out[..., 0].numel()))
    llm_jepa_loss(model, batch, head_impl="liger").loss.backward()
    # Two of each row and again for the comparison, of a first forward alone.
    assert sizes == [2 * len(batch["labels"])] * 2


@pytest.mark.triton
@pytest.mark.parametrize("trained", ["body", "head"])
def test_fused_head_of_frozen_parts(trained, batch):
    model = patched("qwen3", tie_word_embeddings=False)
    head = model.get_output_embeddings()
    for p in model.parameters():
        p.requires_grad_((p is head.weight) == (trained == "head"))

    def gradients(**options):
        model.zero_grad(set_to_none=True)
        llm_jepa_loss(model, batch, **options).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert ("lm_head.weight" in expected) == (trained == "head")
    torch.testing.assert_close(gradients(head_impl="liger"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.triton
def test_fused_head_under_autocast(batch):
    """Within the rounding of float16, against the head in float64."""
    exact = patched(dtype=torch.float64)
    model = patched()
    exact.load_state_dict(model.state_dict())
    _, wanted = loss_and_gradients(exact, batch)
    errors = []
    for options in ({}, {"head_impl": "liger"}):
        with torch.autocast("cpu", torch.float16):
            _, found = loss_and_gradients(model, batch, **options)
        errors.append((found - wanted).abs().max())
    assert 0 < errors[1] <= 2 * errors[0] + torch.finfo(torch.float16).eps * wanted.abs().max()


@pytest.mark.triton
def test_fused_head_in_trainer(tmp_path):
    losses = []
    for options in ({}, {"head_impl": "liger"}):
        args = TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            max_steps=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        examples = random_examples(32, seed=2)
        trainer = LLMJEPATrainer(patched(), args, pack, train_dataset=examples, **options)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def adapted():
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    return patch_model(get_peft_model(tiny_model("qwen3"), config), impl="reference")


def capped():
    """A model that puts more behind its head than its config says."""
    model = patched()
    forward = model.forward

    def with_cap(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits.tanh()
        return outputs

    model.forward = with_cap
    return model


@pytest.mark.parametrize(
    ("model", "head_impl", "error", "message"),
    [
        (
            patched,
            "apple",
            ValueError,
            r"head_impl must be one of \['liger'\] or None, got 'apple'",
        ),
        (adapted, "liger", ValueError, "head that is a plain nn.Linear, got peft.tuners.lora"),
        (lambda: patched(dtype=torch.float64), "liger", ValueError, "got a head in float64"),
        (capped, "liger", RuntimeError, "head_impl='liger' needs the whole head"),
    ],
)
def test_refusals(model, head_impl, error, message, batch):
    with pytest.raises(error, match=message):
        llm_jepa_loss(model(), batch, head_impl=head_impl)


def test_what_is_missing_is_named(batch, monkeypatch):
    model = patched()
    monkeypatch.setattr(configs, "can_launch", lambda: False)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="head_impl='liger' runs on GPU tensors"):
            llm_jepa_loss(model, batch, head_impl="liger")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError, match=r"pip install 'llmjepa_kernels\[stacks\]'"):
        llm_jepa_loss(model, batch, head_impl="liger")


def test_not_in_a_compiled_loss(batch):
    model = patched()
    compiled = torch.compile(llm_jepa_loss, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="cannot be part of a compiled loss"):
        compiled(model, batch, head_impl="liger")
