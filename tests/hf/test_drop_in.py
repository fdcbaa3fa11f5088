"""An existing Trainer that knows nothing of this package, before and after one line."""

import pytest
import torch
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from llmjepa_kernels.hf import layer
from llmjepa_kernels.hf.patch import patch_model
from tests.support.helpers import random_examples
from tests.support.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 48


class AdditiveMaskTrainer(Trainer):
    """LLM-JEPA over 2B padded rows, as published: row B + i holds both views of example i.

    Each row has a dense additive mask of its own, built in a loop, in which padding sees nothing.
    Positions are left to the model.
    """

    losses: list

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = len(inputs["chat"])
        ids = torch.cat([inputs["chat"], torch.zeros_like(inputs["chat"])])
        mask = torch.full((2 * batch, 1, LENGTH, LENGTH), -torch.inf)
        for i in range(batch):
            chat, user, code = (int(inputs[f"{name}_length"][i]) for name in VIEWS)
            mask[i, 0, :chat, :chat] = self.causal(chat)
            ids[batch + i, :user] = inputs["user"][i, :user]
            ids[batch + i, user : user + code] = inputs["code"][i, :code]
            mask[batch + i, 0, :user, :user] = self.causal(user)
            mask[batch + i, 0, user : user + code, user : user + code] = self.causal(code)
        labels = torch.cat([inputs["labels"], torch.full_like(inputs["labels"], -100)])
        outputs = model(
            input_ids=ids, labels=labels, attention_mask=mask, output_hidden_states=True
        )
        hidden = outputs.hidden_states[-1][batch:]
        rows = torch.arange(batch)
        last_user = hidden[rows, inputs["user_length"] - 1]
        last_code = hidden[rows, inputs["user_length"] + inputs["code_length"] - 1]
        jepa_loss = 1 - functional.cosine_similarity(last_user, last_code).mean()
        self.losses.append((outputs.loss.item(), jepa_loss.item()))
        return outputs.loss + jepa_loss

    @staticmethod
    def causal(length):
        mask = torch.zeros(length, length)
        mask[torch.triu(torch.ones(length, length), diagonal=1) == 1] = -torch.inf
        return mask


VIEWS = ("chat", "user", "code")


def features(count):
    def padded(tokens, value=0):
        return list(tokens) + [value] * (LENGTH - len(tokens))

    for example in random_examples(count, seed=9, views="official"):
        views = dict(zip(VIEWS, example.segments, strict=True))
        feature = {name: padded(segment.input_ids) for name, segment in views.items()}
        feature |= {f"{name}_length": len(segment.input_ids) for name, segment in views.items()}
        feature["labels"] = padded(views["chat"].labels, -100)
        yield feature


def train(model, directory):
    arguments = TrainingArguments(
        output_dir=directory,
        per_device_train_batch_size=3,
        max_steps=6,
        learning_rate=1e-2,
        optim="sgd",
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = AdditiveMaskTrainer(model, arguments, train_dataset=list(features(9)))
    trainer.losses = []
    trainer.train()
    return trainer.losses


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gemma3"])
def test_one_line_turns_dense_masks_into_tiles(family, tmp_path, monkeypatch):
    plain = tiny_model(family)
    plain.set_attn_implementation("sdpa")
    expected = train(plain, tmp_path / "plain")

    calls = {"view_attention": 0, "_dense": 0}
    for name in calls:
        original = getattr(layer, name)

        def spy(*args, name=name, original=original, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(layer, name, spy)

    patched = tiny_model(family)
    patch_model(patched)
    actual = train(patched, tmp_path / "patched")

    assert calls == {"view_attention": 2 * 6, "_dense": 0}
    assert len({loss for loss, _ in expected}) == 6
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(patched.get_parameter(name), weight, rtol=1e-3, atol=1e-5)
    assert any(
        not torch.equal(weight, tiny_model(family).get_parameter(name))
        for name, weight in patched.named_parameters()
    )
