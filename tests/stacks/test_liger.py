"""Models that Liger has patched, before or after patch_model, give the same loss and gradients.

Liger's own kernels of norms, rotations and activations need a GPU; its forward does not, which
replaces the head and the loss.
"""

import pytest
import torch

pytest.importorskip("liger_kernel")

from liger_kernel.transformers import (
    apply_liger_kernel_to_llama,
    apply_liger_kernel_to_qwen3,
)
from transformers import TrainingArguments

from llmjepa_kernels import pack
from llmjepa_kernels.hf.patch import patch_model
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
