"""Patched models on the flash-attn back end, over a stand-in for flash-attn's kernels."""

import pytest
import torch

from llmjepa_kernels import FlashPlan, LLMJEPACollator, pack
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.ops import autotune
from llmjepa_kernels.ops import flash as attention_flash
from llmjepa_kernels.training.objective import llm_jepa_loss
from tests.support.helpers import random_examples
from tests.support.models import checkpoint_activations, tiny_model
from tests.support.varlen_stand_in import FlashAttention2StandIn

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {"llama": {}, "gemma3": {"sliding_window": 64}, "gpt_oss": {"sliding_window": 64}}


@pytest.fixture
def kernels(monkeypatch):
    kernels = FlashAttention2StandIn()
    monkeypatch.setattr(attention_flash, "find_kernels", lambda device, head_dim: kernels)
    return kernels


@pytest.fixture
def no_planning(monkeypatch):
    """Whoever makes a plan while this is in use is told off."""

    def plan(*args, **options):
        raise AssertionError("a plan was made")

    monkeypatch.setattr(FlashPlan, "from_visible_until", plan)


def packed(seed=0, flash_plan=True, **options):
    return pack(random_examples(5, seed=seed), 96, flash_plan=flash_plan, **options)


def loss_and_gradients(model, batch, wrapped=None):
    model.zero_grad(set_to_none=True)
    output = llm_jepa_loss(model if wrapped is None else wrapped, batch)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_close(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=1e-9)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, rtol=1e-9, atol=1e-9, msg=name)


def both_models(family):
    options = {"dtype": torch.float64, **FAMILIES[family]}
    reference = patch_model(tiny_model(family, **options), impl="reference")
    return reference, patch_model(tiny_model(family, **options), impl="flash")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_travels_with_the_batch(family, kernels, request):
    batch = packed()
    reference, model = both_models(family)
    assert len(batch["input_ids"]) > 1
    assert batch.flash_plan.reach <= 64
    expected = loss_and_gradients(reference, batch)
    request.getfixturevalue("no_planning")
    assert_close(loss_and_gradients(model, batch), expected)
    calls = [call for call in batch.flash_plan.calls[1:] if call.slots.shape[1]]
    made = 2 * (1 + len(calls))  # by two layers
    assert kernels.calls.count("forward") == kernels.calls.count("backward") == made

    checkpoint_activations(model)
    assert_close(loss_and_gradients(model, batch), expected)
    assert kernels.calls.count("forward") == 3 * made
    for b in range(len(batch["input_ids"])):
        row = {key: value[b : b + 1] for key, value in batch.items()}
        torch.testing.assert_close(model(**row).logits, model(**batch).logits[b : b + 1])


def test_a_batch_without_a_plan_gets_one_per_forward(kernels, monkeypatch):
    plans = []
    make = FlashPlan.from_visible_until
    monkeypatch.setattr(
        FlashPlan, "from_visible_until", lambda *a, **o: plans.append(make(*a, **o)) or plans[-1]
    )
    batch = packed(flash_plan=False)
    reference, model = both_models("gemma3")
    assert_close(loss_and_gradients(model, batch), loss_and_gradients(reference, batch))
    assert len(plans) == 1
    seq = batch["input_ids"].shape[1]
    dense = torch.ones(seq, seq, dtype=torch.bool).tril().expand(1, 1, -1, -1)
    ids = batch["input_ids"][:1]
    out, expected = (m(ids, attention_mask=dense).logits for m in (model, reference))
    torch.testing.assert_close(out, expected)
    assert len(plans) == 2


def test_a_window_that_cuts_is_refused(kernels):
    model = patch_model(tiny_model("mistral_window"), impl="flash")
    with pytest.raises(ValueError, match=r"window=5 cuts into .* use impl='triton'"):
        model(**packed())


@pytest.mark.slow
def test_compile(kernels, request):
    """One graph; a second one takes any lengths of as many calls."""
    batches = [packed(seed, pad_to_multiple_of=96) for seed in range(5)]
    assert len({len(batch.flash_plan.calls) for batch in batches}) == 1
    assert len({batch["flash_rows"].shape for batch in batches}) > 2
    request.getfixturevalue("no_planning")
    model = patch_model(tiny_model("llama", dtype=torch.float64, num_hidden_layers=1), impl="flash")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in batches:
        expected = loss_and_gradients(model, batch)
        assert_close(loss_and_gradients(model, batch, compiled), expected)
    torch._dynamo.reset()
    assert len(graphs) <= 3


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """LLMJEPA_AUTOTUNE=1 with a clock that says how long the back ends take."""
    seconds, timed = {}, []

    def time(run):
        run()
        timed.append(run.args[0])
        return seconds[run.args[0]]

    monkeypatch.setenv("LLMJEPA_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_time", time)
    monkeypatch.setattr(autotune, "_device_name", lambda: "device")
    monkeypatch.setattr(autotune, "_chosen", {})
    return seconds, timed


@pytest.mark.parametrize("flash", [1.0, 3.0])
def test_autotune_takes_the_faster_back_end(flash, kernels, tuned):
    pytest.importorskip("triton")  # names the cache
    seconds, timed = tuned
    seconds |= {"cpu": 2.0, "flash": flash}
    reference, _ = both_models("gemma3")
    model = patch_model(tiny_model("gemma3", dtype=torch.float64, sliding_window=64))
    expected = loss_and_gradients(reference, packed())
    assert_close(loss_and_gradients(model, packed()), expected)
    assert timed == ["cpu", "flash"] * 2  # layers with a window and without
    kernels.calls.clear()
    assert_close(loss_and_gradients(model, packed()), expected)
    assert ("backward" in kernels.calls) == ("forward" in kernels.calls) == (flash < 2)
    assert len(timed) == 4
    autotune._chosen.clear()  # as another process would start
    model(**packed())
    assert len(timed) == 4


def test_autotune_leaves_out_what_flash_attn_cannot_do(kernels, tuned):
    _, timed = tuned
    model = patch_model(tiny_model("mistral_window", dtype=torch.float64))
    model(**packed())  # a window that cuts
    model = patch_model(tiny_model("llama", dtype=torch.float64))
    model(**packed(flash_plan=False))
    kernels.dtypes = (torch.float16,)
    model(**packed())
    assert timed == kernels.calls == []


def test_nothing_is_chosen_without_autotune(kernels):
    model = patch_model(tiny_model("llama"))
    model(**packed())
    assert kernels.calls == []


def test_the_collator_plans_where_a_choice_is_to_be_made(monkeypatch):
    def plans(**options):
        batch = LLMJEPACollator(**options)(random_examples(3, 0))
        return any(map(FlashPlan.has_key, batch))

    packages = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in packages else None)
    assert not plans()
    assert plans(flash_plan=True)
    monkeypatch.setenv("LLMJEPA_AUTOTUNE", "1")
    assert not plans()
    packages.append("flash_attn")
    assert plans()
    assert not plans(flash_plan=False)
    monkeypatch.setenv("LLMJEPA_AUTOTUNE", "0")
    assert not plans()
