"""Patching: what it changes, what it leaves as it was, what it refuses."""

import copy
import gc
import subprocess
import sys
import types
import warnings
import weakref

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaPreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicCache

from llmjepa_kernels import Example, Segment, pack
from llmjepa_kernels.hf import interface
from llmjepa_kernels.hf.interface import NAME, innermost
from llmjepa_kernels.hf.patch import patch_model, patched_impl, unpatch_model
from llmjepa_kernels.ops.block_mask import SCHEDULE_KEYS, BlockMask
from llmjepa_kernels.ops.choice import BACKENDS
from tests.hf.test_generation import left_padded
from tests.support.helpers import random_examples
from tests.support.models import FAMILIES, VOCAB, tiny_model
from tests.support.sweep import Family

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def batch():
    return pack(random_examples(4, seed=0), 96)


def test_patching_twice_and_back(batch):
    model = tiny_model("llama")
    assert patch_model(model) is model
    once = model(**batch).logits
    patch_model(model)
    assert model.config._attn_implementation == NAME
    assert len(model.model._forward_pre_hooks) == 1
    assert torch.equal(model(**batch).logits, once)

    patch_model(model, impl="reference")
    assert patched_impl(model) == "reference"
    assert unpatch_model(model) is model
    assert model.config._attn_implementation == "eager"
    assert not model.model._forward_pre_hooks
    unpatch_model(model)  # nothing left to do
    assert model.config._attn_implementation == "eager"


def test_configs_that_were_replaced_since_come_back():
    model = patch_model(tiny_model("llama"))
    config = copy.deepcopy(model.config)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = config
    unpatch_model(model)
    assert config._attn_implementation == "eager"


class Wrapped(LlamaForCausalLM):
    """With a second way to its inner model."""

    def __init__(self, config):
        super().__init__(config)
        self.wrapper = AnotherName(config, self.model)


class AnotherName(LlamaPreTrainedModel):
    def __init__(self, config, inner):
        super().__init__(config)
        self.inner = inner


def test_what_holds_a_shared_model_holds_no_layers(batch):
    model = Wrapped(tiny_model("llama").config)
    assert innermost(model) == [model.model]
    assert patch_model(model)(**batch).logits.isfinite().all()


def test_the_former_implementations_come_back():
    class WithTeacher(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.teacher = LlamaForCausalLM(copy.deepcopy(config))

    for own, other in (("eager", "sdpa"), ("sdpa", "eager")):
        model = WithTeacher(copy.deepcopy(tiny_model("llama").config))
        model.teacher.set_attn_implementation(other)
        model.config._attn_implementation = own
        patch_model(model.model)
        patch_model(model)
        unpatch_model(model)
        configs = model.config, model.teacher.config
        assert [config._attn_implementation for config in configs] == [own, other]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_layers_that_were_copied(family, batch, sparse_calls):
    """As PEFT's `layer_replication` does: each has a config of its own."""
    model = tiny_model(family).eval()
    model.set_attn_implementation("eager")
    same = patch_model(copy.deepcopy(model))(**batch).logits
    inputs = left_padded([9, 7])
    expected = model(**inputs).logits
    model.model.layers = nn.ModuleList(copy.deepcopy(one) for one in model.model.layers)
    patch_model(model)
    sparse_calls.clear()
    assert torch.equal(model(**batch).logits, same)
    assert len(sparse_calls) == 2
    real = inputs["attention_mask"][..., None].bool()
    torch.testing.assert_close(model(**inputs).logits * real, expected * real)
    assert torch.equal(unpatch_model(model)(**inputs).logits, expected)


def test_a_patched_model_is_freed_with_its_last_reference():
    model = patch_model(tiny_model("llama"))
    weight = weakref.ref(model.lm_head.weight)
    gc.disable()  # which would find a cycle in the end
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_a_window_that_hides_nothing(batch):
    wide = {"sliding_window": 128, "max_position_embeddings": 128}
    model = patch_model(AutoModelForCausalLM.from_config(Family("phimoe").config(**wide)))
    assert model(**batch).logits.isfinite().all()


def test_encoders_are_refused():
    config = T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(TypeError, match="has an encoder, whose attention is not causal"):
        patch_model(T5ForConditionalGeneration(config))


def test_impl_reaches_attention(batch, sparse_calls):
    model = patch_model(tiny_model("gemma2"), impl="reference")
    model(**batch)
    assert [call["impl"] for call in sparse_calls] == ["reference"] * 2
    assert [call["window"] for call in sparse_calls] == [5, None]
    with pytest.raises(ValueError, match=r"impl must be one of .*'nonsense'"):
        patch_model(model, impl="nonsense")


@pytest.mark.parametrize("impl", [None, *sorted(BACKENDS)])
def test_every_impl_leaves_generation_alone(impl):
    """Whether it can run here or not; one has a name that Transformers might claim."""
    model = tiny_model("llama").eval()
    prompts = left_padded([5, 2])
    expected = model.generate(**prompts, max_new_tokens=4, do_sample=False)
    patch_model(model, impl=impl)
    assert patched_impl(model) == impl
    assert torch.equal(model.generate(**prompts, max_new_tokens=4, do_sample=False), expected)


def test_models_that_share_a_config(batch):
    first = tiny_model("llama")
    second = LlamaForCausalLM(first.config)
    patch_model(first)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM is not patched"):
        patched_impl(second)
    patch_model(second)
    assert torch.isfinite(second(**batch).logits).all()
    unpatch_model(second)
    assert second.config._attn_implementation in ("sdpa", "eager")


def test_copies_stay_patched(batch):
    model = patch_model(tiny_model("llama"))
    twin = copy.deepcopy(model)
    unpatch_model(model)
    assert torch.equal(twin(**batch).logits, patch_model(model)(**batch).logits)
    unpatch_model(twin)
    assert not twin.model._forward_pre_hooks
    assert len(model.model._forward_pre_hooks) == 1


def test_patch_is_not_saved(tmp_path):
    model = patch_model(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


def test_base_model_and_wrapper_can_be_patched(batch):
    model = tiny_model("llama")
    logits = patch_model(model)(**batch).logits
    unpatch_model(model)

    wrapper = nn.ModuleDict({"inner": model})
    with pytest.warns(UserWarning, match="the first LlamaForCausalLM in ModuleDict is patched"):
        patch_model(nn.ModuleDict({"reference": model, "inner": tiny_model("llama")}))
    assert patch_model(wrapper) is wrapper
    assert torch.equal(wrapper["inner"](**batch).logits, logits)
    unpatch_model(wrapper)

    base = patch_model(model.model)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "visible_until")}
    hidden = base(**inputs).last_hidden_state
    assert torch.equal(model.lm_head(hidden), logits)


def test_schedule_is_built_once_per_forward(batch, monkeypatch, sparse_calls):
    model = patch_model(tiny_model("llama"))
    expected = model(**batch).logits
    built = []
    build = BlockMask.from_visible_until

    def spy(*args, **kwargs):
        built.append(args)
        return build(*args, **kwargs)

    monkeypatch.setattr(BlockMask, "from_visible_until", spy)
    model(**batch)
    assert not built
    bare = {key: batch[key] for key in ("input_ids", "position_ids", "visible_until")}
    torch.testing.assert_close(model(**bare).logits, expected)
    assert len(built) == 1
    assert len(sparse_calls) == 6


def test_positions_reach_the_layers_narrow(batch, sparse_calls):
    """So that none of them has to check and copy what its window needs."""
    patch_model(tiny_model("gemma3"))(**batch)
    given = [call["position_ids"] for call in sparse_calls]
    assert {x.dtype for x in given if x is not None} == {torch.int32}


@pytest.mark.parametrize(("window", "narrower"), [(5, True), (1000, False)])
def test_a_window_skips_tiles(window, narrower, sparse_calls):
    """One schedule per window, for all layers; one that hides nothing leaves full tiles full."""
    batch = pack(random_examples(4, seed=0), block_size=4)
    patch_model(
        tiny_model(
            "gemma3",
            num_hidden_layers=3,
            sliding_window=window,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    )(**batch)
    first, whole, second = [call["block_mask"] for call in sparse_calls]
    assert [mask.window for mask in (first, whole, second)] == [window, None, window]
    assert first.kv_indices is second.kv_indices
    counts = [(mask.num_tiles, mask.num_full_tiles) for mask in (first, whole)]
    assert counts[0] < counts[1] if narrower else counts[0] == counts[1]


def test_no_mask_is_built(batch, monkeypatch):
    """Neither by Transformers nor here."""
    model = patch_model(tiny_model("gemma3"))

    def fail(*args, **kwargs):
        raise AssertionError("a mask was built")

    monkeypatch.setitem(interface.AttentionMaskInterface._global_mapping, NAME, fail)
    model(**batch, use_cache=False)


# What cannot run is refused


def test_packed_batch_needs_what_belongs_to_it(batch):
    model = patch_model(tiny_model("llama"))

    def call(**changes):
        merged = {**batch, **changes}
        return model(**{key: value for key, value in merged.items() if value is not None})

    with pytest.raises(ValueError, match="position_ids must be given with visible_until"):
        call(position_ids=None)
    with pytest.raises(ValueError, match=r"position_ids must have the shape \(\d, \d+\)"):
        call(position_ids=batch["position_ids"][:, 1:])
    with pytest.raises(ValueError, match="differences must fit in int32, got 2147483648 to"):
        call(position_ids=batch["position_ids"] + 2**31)
    with pytest.raises(ValueError, match=r"visible_until must be int32 .* torch.int64"):
        call(visible_until=batch["visible_until"].long())
    with pytest.raises(ValueError, match="visible_until must be int32 of shape"):
        call(visible_until=batch["visible_until"][:, 1:])
    with pytest.raises(ValueError, match="attention_mask must not be given"):
        call(attention_mask=torch.ones_like(batch["input_ids"]))
    with pytest.raises(ValueError, match=r"(cache|past_key_values) must not be given"):
        call(past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match=r"incomplete, it lacks \['q_full_start'\]"):
        call(q_full_start=None)
    with pytest.raises(ValueError, match=r"visible_until.* must lie in"):
        call(
            visible_until=torch.zeros_like(batch["visible_until"]),
            **dict.fromkeys(SCHEDULE_KEYS),
        )


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_attention_dropout_is_refused_in_training(family, batch):
    model = patch_model(tiny_model(family, attention_dropout=0.1))
    with pytest.raises(ValueError, match="set attention_dropout of the model's config to 0"):
        model(**batch)
    assert torch.isfinite(model.eval()(**batch).logits).all()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_dropout_outside_the_block_sparse_path(family):
    inputs = left_padded([6, 6])
    model = patch_model(tiny_model(family, attention_dropout=0.5))
    torch.manual_seed(0)
    first, second = model(**inputs).logits, model(**inputs).logits
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_weights_are_those_of_the_unpatched_model(family):
    inputs = left_padded([6, 4])
    model = tiny_model(family).eval()
    expected = model(**inputs, output_attentions=True).attentions
    actual = patch_model(model)(**inputs, output_attentions=True).attentions
    for weights, own in zip(actual, expected, strict=True):
        real = inputs["attention_mask"][:, None, :, None].bool()
        torch.testing.assert_close(weights * real, own * real)


def test_a_dense_mask_of_views_where_no_kernel_has_the_head(batch):
    """Gemma 4's heads of 512: `impl=None` takes the plain path."""
    model = tiny_model("llama", head_dim=264).eval()
    hidden = patch_model(model)(**batch).logits
    reference = patch_model(model, impl="reference")(**batch).logits
    torch.testing.assert_close(hidden, reference)
    with pytest.raises(ValueError, match="head_dim must be at most 256"):
        patch_model(model, impl="cpu")(**batch)


def test_wrappers_that_cannot_carry_a_packed_row():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="DataParallel is not supported"):
        patch_model(nn.DataParallel(model))
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PROMPT_TUNING is not supported"):
        patch_model(peft.get_peft_model(model, config))
    config = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[2])
    with pytest.raises(ValueError, match="activated LoRA is not supported"):
        patch_model(peft.get_peft_model(tiny_model("llama"), config))


def test_a_class_that_is_written_in_a_notebook(batch, monkeypatch):
    """Of which Transformers reads no source, and so sets no attention."""
    model = tiny_model("llama")
    expected = patch_model(tiny_model("llama"))(**batch).logits
    notebook = types.ModuleType("__notebook__")  # without a file
    monkeypatch.setitem(sys.modules, "__notebook__", notebook)
    notebook.Llama = type(model)
    exec("class Mine(Llama): _can_set_attn_implementation_cached_value = None", vars(notebook))
    mine = notebook.Mine(model.config)
    mine.load_state_dict(model.state_dict())
    before = mine.config._attn_implementation
    assert torch.equal(patch_model(mine)(**batch).logits, expected)
    assert unpatch_model(mine).config._attn_implementation == before


def test_replicas_of_data_parallel_are_refused(batch):
    model = patch_model(tiny_model("llama"))
    model.model._is_replica = True  # as torch.nn.parallel.replicate marks them
    with pytest.raises(ValueError, match="DataParallel is not supported"):
        model(**batch)


def test_models_without_the_attention_interface():
    with pytest.raises(TypeError, match="must be a Transformers model or wrap one, got Linear"):
        patch_model(nn.Linear(2, 2))
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(TypeError, match="BloomModel does not call attention through"):
        patch_model(bloom)


@pytest.mark.parametrize(
    ("model_type", "field"), [("phimoe", "router_jitter_noise"), ("seed_oss", "residual_dropout")]
)
def test_noise_in_training_is_said(model_type, field):
    family = Family(model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(family.model())  # without any
    model = family.model()
    setattr(model.config, field, 0.125)
    with pytest.warns(UserWarning, match=f"adds noise in training .*{field}': 0.125"):
        patch_model(model)


@pytest.mark.parametrize("model_type", interface.DEVIATING)
def test_models_that_deviate_from_the_attention_interface(model_type):
    model = Family(model_type).model()
    with pytest.raises(TypeError, match=interface.DEVIATING[model_type]):
        patch_model(model)


def test_models_that_mix_tokens_in_other_ways():
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
    )
    with pytest.raises(ValueError, match=r"Lfm2ForCausalLM has layers of type \['conv'\]"):
        patch_model(Lfm2ForCausalLM(config))


def test_window_that_only_a_dense_mask_would_apply(batch):
    from transformers import PhimoeConfig, PhimoeForCausalLM

    config = PhimoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        sliding_window=4,
        pad_token_id=0,
    )
    with pytest.raises(ValueError, match="PhimoeAttention leaves its sliding window"):
        patch_model(PhimoeForCausalLM(config))(**batch)


class DeafAttention(nn.Module):
    """Attention whose layer drops the keyword arguments of the model."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
        return self.attention(hidden_states, position_embeddings, attention_mask)


class OwnAttention(DeafAttention):
    """Attention that never asks the interface."""

    def forward(self, hidden_states, attention_mask, **kwargs):
        scores = hidden_states @ hidden_states.mT
        if attention_mask is not None:
            scores = scores + attention_mask[:, 0]
        return scores.softmax(-1) @ hidden_states, None


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (DeafAttention, TypeError, "LlamaAttention is not given the keyword arguments"),
        (OwnAttention, RuntimeError, "must match the size"),
    ],
)
def test_no_layer_can_ignore_the_mask(kind, error, message, batch):
    model = patch_model(tiny_model("llama"))
    model.model.layers[1].self_attn = kind(model.model.layers[1].self_attn)
    with pytest.raises(error, match=message):
        model(**batch)


class CausalAttention(DeafAttention):
    """Attention that sees all before it, whatever it is told, as some fast forwards do."""

    def forward(self, hidden_states, **kwargs):
        q = hidden_states[:, None]
        out = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return out[:, 0], None


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_layer_that_attends_by_itself_is_noticed(batch):
    model = patch_model(tiny_model("llama"))
    model.model.layers[0].compile(backend="eager")  # calls of compiled code are not counted
    expected = model(**batch).logits
    assert torch.equal(model(**batch).logits, expected)
    model = patch_model(tiny_model("llama"))
    attention = model.model.layers[1].self_attn
    model.model.layers[1].self_attn = CausalAttention(attention)
    with pytest.raises(RuntimeError, match="only 1 of the 2 layers of LlamaModel attended through"):
        model(**batch)
    model(**left_padded([4, 2]))  # without views, nothing is lost
    model.model.layers[1].self_attn = attention
    torch.testing.assert_close(model(**batch).logits, expected)


def test_another_attention_after_patching(batch):
    model = patch_model(tiny_model("llama"))
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"LlamaModel .* implementation is 'sdpa': call patch_"):
        model(**batch)
    with pytest.raises(RuntimeError, match=r"not patched .its attention implementation is 'sdpa'"):
        patched_impl(model)
    index = torch.arange(8)
    mask = (index <= index[:, None])[None, None]
    ids = batch["input_ids"][:1, :8]
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, model(ids).logits)
    assert torch.isfinite(patch_model(model)(**batch).logits).all()


def test_another_process_needs_no_patch(batch, tmp_path):
    """A spawned one unpickles the model, and torch.load does likewise."""
    model = patch_model(tiny_model("llama"), impl="reference")
    torch.save((model, dict(batch), model(**batch).logits), tmp_path / "model")
    code = (
        "import sys, torch; model, batch, logits = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.equal(model(**batch).logits, logits)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model"], check=True)


def test_layers_of_an_unpatched_model_that_shares_the_config(batch):
    """The config alone makes a model use the attention function, but not the hook."""
    first = tiny_model("llama")
    second = LlamaForCausalLM(first.config)
    patch_model(first)
    bare = {key: batch[key] for key in ("input_ids", "position_ids", "visible_until")}
    with pytest.raises(RuntimeError, match="not patched: call patch_model"):
        second(**bare)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_batch_never_runs_under_another_attention(family, implementation, batch):
    """Its empty mask does not fit: without it the views would see each other unnoticed."""
    model = tiny_model(family)
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip("has no SDPA path")
    model.set_attn_implementation(implementation)
    with pytest.raises(RuntimeError, match="size"):
        model(**batch)


def test_config_is_untouched_by_a_failed_patch():
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    model = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="impl"):
        patch_model(model, impl="cuda")
    assert config._attn_implementation == "sdpa"
    assert not model.model._forward_pre_hooks


@pytest.mark.parametrize("window", [7, 8])
def test_a_window_about_as_long_as_the_row(window):
    batch = pack([Example([Segment(list(range(4, 12)))])], block_size=4)  # positions 0 to 7
    found, expected = (
        patch_model(tiny_model("mistral_window", sliding_window=window), impl=impl)(**batch).logits
        for impl in (None, "reference")
    )
    torch.testing.assert_close(found, expected)
