"""The next-token loss in parts: that of all logits at once, which never exist."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmjepa_kernels import pack
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.hf.head import Head
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.training import next_token_loss as next_token_module
from llmjepa_kernels.training.objective import llm_jepa_loss, supervised_positions
from llmjepa_kernels.training.trainer import LLMJEPATrainer
from tests.support.helpers import random_examples
from tests.support.models import VOCAB, tiny_model
from tests.training.test_trainer import ROWS as CHATS
from tests.training.test_trainer import arguments, build, parameters

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 7
HEADS = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
    "gemma2": {},  # a soft cap
    "cohere": {},  # a factor
    "granite": {},  # a divisor
}


@pytest.fixture(scope="module")
def batch():
    return pack(random_examples(6, seed=7), 80)


def patched(family, dtype=torch.float64, **options):
    return patch_model(tiny_model(family, dtype=dtype, **options), impl="reference")


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def watch_logits(model):
    """Sizes of what leaves the output embeddings, one for each of their calls."""
    sizes = []
    embeddings = model.get_output_embeddings()
    embeddings.register_forward_hook(lambda module, args, out: sizes.append(out.numel()))
    return sizes


@pytest.mark.parametrize("family", HEADS)
def test_parts_are_the_whole(family, batch):
    model = patched(family, **HEADS[family])
    whole = llm_jepa_loss(model, batch, max_logits=None)
    expected = gradients(model, whole.loss)
    sizes = watch_logits(model)
    for _ in range(2):
        sizes.clear()
        parts = llm_jepa_loss(model, batch, max_logits=ROWS * VOCAB)
        actual = gradients(model, parts.loss)
        # Once in the forward and once in the backward, and two tokens to see what the head does.
        count = -(-supervised_positions(batch["labels"]).numel() // ROWS)
        assert 2 * count <= len(sizes) <= 2 * count + 2
        assert max(sizes) == ROWS * VOCAB
        # Transformers' soft cap, factors and norms are in float32 in some families.
        torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert Head(model).is_exact


def test_few_logits_stay_whole(batch):
    model = patched("llama")
    sizes = watch_logits(model)
    llm_jepa_loss(model, batch)
    assert sizes == [supervised_positions(batch["labels"]).numel() * VOCAB]


def test_a_head_that_does_more_keeps_all_logits(batch):
    model = patched("llama")
    expected = llm_jepa_loss(model, batch, max_logits=None)
    model.config.logit_scale = 2.0  # which Llama does not know
    sizes = watch_logits(model)
    for _ in range(2):
        sizes.clear()
        output = llm_jepa_loss(model, batch, max_logits=ROWS * VOCAB)
        assert output.loss == expected.loss
        assert max(sizes) == supervised_positions(batch["labels"]).numel() * VOCAB
    assert len(sizes) == 1  # it is asked once
    assert Head(model).is_exact is False


class Masked(torch.nn.Linear):
    """Makes a part of the vocabulary impossible, and halves the other logits."""

    def forward(self, hidden):
        logits = super().forward(hidden) / 2
        return logits.index_fill(-1, torch.arange(50, VOCAB), float("-inf"))


class Capped(torch.nn.Linear):
    """Caps the logits, without a word in the config."""

    def forward(self, hidden):
        return 30 * torch.tanh(super().forward(hidden) / 30)


class Scaled(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) * 1.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Masked, Capped, Scaled])
def test_what_a_model_does_to_its_logits_is_noticed(batch, kind, dtype):
    """Also by a model whose rounding is coarse."""
    batch = {**batch, "labels": batch["labels"].clamp(max=49)}
    model = patched("llama", dtype)
    with torch.no_grad():
        model.lm_head.weight *= 4
    weight, inner = model.lm_head.weight, kind(32, VOCAB, bias=False, dtype=dtype)
    inner.weight = weight
    plain = model.lm_head.forward
    model.register_forward_pre_hook(lambda *x: setattr(model.lm_head, "forward", inner.forward))
    model.register_forward_hook(lambda *x: setattr(model.lm_head, "forward", plain))
    whole = llm_jepa_loss(model, batch, max_logits=None)
    parts = llm_jepa_loss(model, batch, max_logits=ROWS * VOCAB)
    assert Head(model).is_exact is False
    torch.testing.assert_close(parts.ntp_loss, whole.ntp_loss, rtol=1e-3, atol=0)


def test_a_cap_that_shows_later_is_noticed(batch):
    model = patched("llama", torch.float32)
    inner = Capped(32, VOCAB, bias=False)
    inner.weight = model.lm_head.weight
    plain = model.lm_head.forward
    model.register_forward_pre_hook(lambda *x: setattr(model.lm_head, "forward", inner.forward))
    model.register_forward_hook(lambda *x: setattr(model.lm_head, "forward", plain))
    with torch.no_grad():
        model.lm_head.weight *= 1e-3
        llm_jepa_loss(model, batch, max_logits=ROWS * VOCAB)
        assert Head(model).is_exact
        model.lm_head.weight *= 1e4
        parts = llm_jepa_loss(model, batch, max_logits=ROWS * VOCAB)
        assert Head(model).is_exact is False
        assert parts.loss == llm_jepa_loss(model, batch, max_logits=None).loss


def test_a_head_in_pieces_is_not_used(batch, monkeypatch):
    """As FSDP leaves it outside the model's forward, perhaps after a loss that saw all of it."""
    model = patched("llama", torch.float32)
    whole = llm_jepa_loss(model, batch, max_logits=None)
    assert llm_jepa_loss(model, batch, max_logits=ROWS * VOCAB).loss.isfinite()
    assert Head(model).is_exact
    monkeypatch.setattr(Head, "_is_whole", lambda *_: False)
    sizes = watch_logits(model)
    assert llm_jepa_loss(model, batch, max_logits=ROWS * VOCAB).loss == whole.loss
    assert max(sizes) == supervised_positions(batch["labels"]).numel() * VOCAB


@pytest.mark.parametrize("does_more", [False, True])
@pytest.mark.parametrize("max_logits", [ROWS * VOCAB, 2**20])
def test_processes_find_out_together_what_the_head_does(batch, monkeypatch, max_logits, does_more):
    """Those with few logits too: with FSDP all must run a second forward where one needs it."""
    monkeypatch.setattr(next_token_module, "is_distributed", lambda: True)
    model, forwards = patched("llama"), []
    model.register_forward_hook(lambda *_: forwards.append("forward"))
    if does_more:
        model.config.logit_scale = 2.0  # which Llama does not know
    llm_jepa_loss(model, batch, max_logits=max_logits)
    assert len(forwards) == (2 if does_more else 1)
    assert Head(model).is_exact is not does_more
    llm_jepa_loss(model, batch, max_logits=max_logits)
    assert len(forwards) == (3 if does_more else 2)


def test_a_process_that_alone_needs_another_forward_stops(batch, monkeypatch):
    monkeypatch.setattr(next_token_module, "is_distributed", lambda: True)
    model = patched("llama")
    llm_jepa_loss(model, batch, max_logits=ROWS * VOCAB)
    monkeypatch.setattr(Head, "gives", lambda *_: False)
    with pytest.raises(RuntimeError, match="the head gives other logits than the model does"):
        llm_jepa_loss(model, batch, max_logits=ROWS * VOCAB)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora_on_the_head(batch, dropout):
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, lora_dropout=dropout
    )
    model = get_peft_model(patched("llama"), config)
    model.eval()
    whole = llm_jepa_loss(model, batch, max_logits=None)
    expected = gradients(model, whole.loss)
    parts = llm_jepa_loss(model, batch, max_logits=ROWS * VOCAB)
    torch.testing.assert_close(gradients(model, parts.loss), expected)
    assert any("lm_head" in name for name in expected)
    model.train()
    gradients(model, llm_jepa_loss(model, batch, max_logits=ROWS * VOCAB).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(batch, dtype):
    model = patched("llama", dtype)
    whole = llm_jepa_loss(model, batch, max_logits=None)
    parts = llm_jepa_loss(model, batch, max_logits=ROWS * VOCAB)
    torch.testing.assert_close(parts.ntp_loss, whole.ntp_loss, rtol=1e-3, atol=0)
    assert parts.ntp_loss.dtype == torch.float32
    assert Head(model).is_exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_runs_in_parts_under_accelerates_autocast(tmp_path, dtype, monkeypatch):
    """Which is around the model's forward alone, and takes float32 out of it."""
    results = []
    for max_logits in (None, 3 * 300):
        model, collator = build(train_tokenizer(CHATS, vocab_size=300))
        model.to(dtype)
        start, sizes = parameters(model).float(), []
        model.lm_head.register_forward_hook(lambda *x, sizes=sizes: sizes.append(x[-1].numel()))
        trainer = LLMJEPATrainer(
            model,
            arguments(tmp_path, bf16=True, max_steps=2),
            collator,
            train_dataset=CHATS,
            max_logits=max_logits,
        )
        trainer.train()
        results.append((trainer.state.log_history[0]["loss"], parameters(model).float() - start))
    assert max(sizes) <= 3 * 300
    (whole, update), (parts, update_in_parts) = results
    assert parts == pytest.approx(whole, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(update, update_in_parts, dim=0) > 0.999
