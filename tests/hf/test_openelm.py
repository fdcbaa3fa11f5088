"""OpenELM through its adapter, on a miniature of its remote code."""

import copy
import pickle
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import TrainingArguments

from llmjepa_kernels import pack
from llmjepa_kernels.hf import layer
from llmjepa_kernels.hf.load import add_lora
from llmjepa_kernels.hf.patch import patch_model, patched_impl, unpatch_model
from llmjepa_kernels.training.collator import LLMJEPACollator
from llmjepa_kernels.training.objective import llm_jepa_loss
from llmjepa_kernels.training.trainer import LLMJEPATrainer
from tests.hf.test_families import LAYOUTS, assert_equal_passes
from tests.hf.test_patch import left_padded
from tests.hf.test_training import assert_same, loss_and_gradients, packed
from tests.support.helpers import random_examples
from tests.support.models import CHECKPOINTING, checkpoint_activations, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def layers(monkeypatch):
    """The heads of every call of view_attention."""
    calls = []
    view_attention = layer.view_attention

    def spy(q, k, v, visible_until, **options):
        calls.append((q.shape[1], k.shape[1]))
        return view_attention(q, k, v, visible_until, **options)

    monkeypatch.setattr(layer, "view_attention", spy)
    return calls


@pytest.mark.parametrize(("views", "share_prefixes"), LAYOUTS)
def test_one_pass_equals_separate_passes(views, share_prefixes, layers):
    examples = random_examples(5, seed=1, views=views)
    assert_equal_passes(
        "openelm", examples, torch.float32, 1e-5, max_length=96, share_prefixes=share_prefixes
    )
    assert layers == [(2, 1), (4, 2), (4, 2)] * 2


@pytest.mark.parametrize("impl", [None, "reference"])
def test_options_of_its_configuration(impl):
    """Without norms of q and k, and with a head of its own."""
    options = {"normalize_qk_projections": False, "share_input_output_layers": False}
    results = []
    for patched in (impl, "reference"):
        model = patch_model(tiny_model("openelm", **options), impl=patched)
        assert patched_impl(model) == patched
        results.append(loss_and_gradients(model, packed()))
    assert_same(*results, 1e-5)
    assert results[0][1]["lm_head.weight"].abs().max() > 0


def test_isolation_is_bitwise():
    model = patch_model(tiny_model("openelm"))
    batch = pack(random_examples(4, seed=3), 200)
    until = batch["visible_until"][0]
    index = torch.arange(len(until))

    def hidden(ids):
        outputs = model(**{**batch, "input_ids": ids}, output_hidden_states=True)
        return outputs.hidden_states[-1][0]

    before = hidden(batch["input_ids"])
    for j in (0, 8, 20, 40):
        ids = batch["input_ids"].clone()
        ids[0, j] = (ids[0, j] + 1) % 50 + 4
        touched = (hidden(ids) != before).any(dim=-1)
        assert touched[j]
        assert not touched[(index < j) | (index >= until[j])].any()


def test_logits_and_states_that_are_asked_for():
    model = patch_model(tiny_model("openelm"))
    batch = packed()
    whole = model(**batch, output_hidden_states=True)
    assert len(whole.hidden_states) == 4
    positions = torch.tensor([[3, 1]] * len(batch["input_ids"]))
    bare = {key: value for key, value in batch.items() if key != "labels"}
    some = model(**bare, head_positions=positions)
    assert torch.equal(some.hidden_states[-1], whole.hidden_states[-1])
    torch.testing.assert_close(some.logits, whole.logits[:, [3, 1]])
    expected = torch.nn.functional.cross_entropy(
        whole.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    torch.testing.assert_close(whole.loss, expected)
    assert torch.equal(model.transformer(**bare).last_hidden_state, whole.hidden_states[-1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_two_forwards(reentrant):
    first, second = packed(seed=1), packed(seed=2)
    model = patch_model(tiny_model("openelm"))
    _, a = loss_and_gradients(model, first)
    _, b = loss_and_gradients(model, second)
    checkpoint_activations(model, reentrant=reentrant)
    model.zero_grad(set_to_none=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sum(llm_jepa_loss(model, batch).loss for batch in (first, second)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, a[name] + b[name], rtol=1e-4, atol=1e-5)


def test_compiles_as_one_graph():
    batch = packed()
    model = patch_model(tiny_model("openelm"))
    expected = loss_and_gradients(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(loss_and_gradients(model, batch, compiled), expected, 1e-5)


def test_autocast():
    batch = packed()
    model = patch_model(tiny_model("openelm"))
    loss, _ = loss_and_gradients(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = llm_jepa_loss(model, batch)
    assert abs(output.loss - loss) < 0.05 * loss


def test_low_precision_weights():
    """Positions keep float32 where the buffer of their frequencies does not."""
    batch = packed()
    expected = llm_jepa_loss(patch_model(tiny_model("openelm")), batch).loss
    actual = llm_jepa_loss(patch_model(tiny_model("openelm", dtype=torch.bfloat16)), batch).loss
    assert abs(actual - expected) < 0.05 * expected


def test_generation_and_plain_forwards_are_as_before(layers):
    model = tiny_model("openelm").eval()
    prompts = left_padded([9, 3, 1])
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    runs = []
    for change in (lambda model: model, patch_model, unpatch_model):
        change(model)
        cached = model.generate(**prompts, **options)
        recomputed = model.generate(**prompts, **options, use_cache=False)
        outputs = model(
            **prompts, labels=prompts["input_ids"], output_hidden_states=True, use_cache=True
        )
        states = torch.stack(outputs.hidden_states)
        assert outputs.past_key_values.get_seq_length() == 9
        assert torch.equal(cached, recomputed)
        runs.append((cached, recomputed, outputs.logits, outputs.loss, states))
    for before, *after in zip(*runs, strict=True):
        assert all(torch.equal(before, x) for x in after)
    assert not layers


def test_a_dense_mask_of_views_takes_the_tiles_and_others_are_refused(layers):
    batch = packed(max_length=None)
    model = patch_model(tiny_model("openelm"))
    ids, until = batch["input_ids"], batch["visible_until"][0]
    index = torch.arange(len(until))
    mask = (index[:, None] >= index) & (index[:, None] < until)
    positions = {"input_ids": ids, "position_ids": batch["position_ids"]}
    dense = model(**positions, attention_mask=mask[None, None])
    assert len(layers) == 3
    torch.testing.assert_close(dense.logits, model(**batch).logits)

    mask[5, 3] = False
    with pytest.raises(ValueError, match="attention_mask must have 2 dimensions"):
        model(**positions, attention_mask=mask[None, None])


def test_patching_twice_copies_and_back():
    batch = packed()
    model = patch_model(patch_model(tiny_model("openelm")), impl="reference")
    assert patched_impl(model) == "reference"
    assert len(model.transformer._forward_pre_hooks) == 1
    expected = llm_jepa_loss(model, batch).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            model.transformer.token_embeddings.weight.add_(0.1)
            assert torch.equal(llm_jepa_loss(twin, batch).loss, expected)
            model.transformer.token_embeddings.weight.sub_(0.1)
    unpatch_model(unpatch_model(model))
    assert not model.transformer._forward_pre_hooks
    assert "forward" not in {name for module in model.modules() for name in vars(module)}
    with pytest.raises(RuntimeError, match="OpenELMForCausalLM is not patched"):
        patched_impl(model)
    with pytest.raises(TypeError, match="visible_until"):
        model(**batch)


class Counter(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("part", ["", "transformer.layers.1.attn"])
def test_a_forward_that_someone_else_replaced_stays(part):
    """As Accelerate does for a device_map, and for mixed precision."""
    model, counter = tiny_model("openelm"), Counter()
    module = model.get_submodule(part)
    add_hook_to_module(module, counter)
    with pytest.raises(ValueError, match=f"{type(module).__name__} has a forward of its own"):
        patch_model(model)
    assert not model.transformer._forward_pre_hooks
    unpatch_model(model)
    model(**left_padded([3]))
    assert counter.calls == 1


def test_what_a_packed_row_lacks_is_named():
    model = patch_model(tiny_model("openelm"))
    batch = packed()
    with pytest.raises(ValueError, match="position_ids must be given with visible_until"):
        model(**{**batch, "position_ids": None})


def test_other_remote_code_is_refused():
    model = tiny_model("openelm")
    del model.transformer.layers[1].attn.qkv_proj
    with pytest.raises(TypeError, match="OpenELMModel does not call attention through"):
        patch_model(model)
    model = tiny_model("openelm")
    model.config.model_type = "closedelm"
    with pytest.raises(TypeError, match="OpenELMModel does not call attention through"):
        patch_model(model)


@pytest.mark.parametrize("lora", [False, True])
def test_trainer(lora, tmp_path):
    """Under Accelerate's own changes to forward, with autocast and checkpointing."""
    model = tiny_model("openelm")
    if lora:
        model = add_lora(model, 4, new_ids=[2])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        per_device_train_batch_size=4,
        bf16=True,
        **{CHECKPOINTING: True},
    )
    trainer = LLMJEPATrainer(
        model, args, LLMJEPACollator(), train_dataset=random_examples(8, seed=4)
    )
    trainer.train()
    assert all(log["jepa_loss"] > 0 for log in trainer.state.log_history[:2])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
