"""A patched model under what training loops wrap around it."""

import warnings

import pytest
import torch
from torch import nn

from llmjepa_kernels import pack
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.ops.block_mask import SCHEDULE_KEYS
from llmjepa_kernels.training.objective import llm_jepa_loss
from tests.support.helpers import random_examples
from tests.support.models import checkpoint_activations, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def packed(seed=0, count=5, **options):
    options = {"max_length": 96, "block_size": 16, **options}
    return pack(random_examples(count, seed=seed), **options)


def loss_and_gradients(model, batch, wrapped=None):
    model.zero_grad(set_to_none=True)
    output = llm_jepa_loss(model if wrapped is None else wrapped, batch)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return output.loss.detach(), gradients


def assert_same(actual, expected, tolerance=0.0):
    assert abs(actual[0] - expected[0]) <= tolerance * abs(expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error = (actual[1][name] - gradient).abs().max()
        assert error <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral_window"])
def test_gradient_checkpointing(family, reentrant):
    batch = packed()
    model = patch_model(tiny_model(family))
    expected = loss_and_gradients(model, batch)
    checkpoint_activations(model, reentrant=reentrant)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(loss_and_gradients(model, batch), expected, 1e-6)


def test_two_forwards_before_one_backward():
    """Each recomputes with the mask of its own batch."""
    first, second = packed(seed=1), packed(seed=2)
    model = patch_model(tiny_model("llama"))
    _, a = loss_and_gradients(model, first)
    _, b = loss_and_gradients(model, second)
    checkpoint_activations(model)
    model.zero_grad(set_to_none=True)
    losses = [llm_jepa_loss(model, batch).loss for batch in (first, second)]
    sum(losses).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, a[name] + b[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3_window", "gemma2", "gpt_oss", "phi"])
def test_autocast(family):
    """float32 weights in bfloat16: q and k of rotary embeddings arrive in float32."""
    batch = packed()
    model = patch_model(tiny_model(family))
    loss, gradients = loss_and_gradients(model, batch)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = llm_jepa_loss(model, batch)
        generated = model.eval().generate(batch["input_ids"][:, :5], max_new_tokens=2)
    assert generated.shape[1] > 5
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert abs(output.loss - loss) < 0.005 * loss
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all()
        similarity = nn.functional.cosine_similarity(
            parameter.grad.flatten(), gradients[name].flatten(), dim=0
        )
        assert similarity > 0.99, name


def test_low_precision_weights():
    batch = packed()
    expected = llm_jepa_loss(patch_model(tiny_model("llama")), batch)
    for dtype in (torch.bfloat16, torch.float16):
        output = llm_jepa_loss(patch_model(tiny_model("llama", dtype=dtype)), batch)
        assert output.loss.dtype == torch.float32
        assert abs(output.loss - expected.loss) < 0.002 * expected.loss


def test_lora():
    """Patched before or after PEFT wraps it, only the adapter learns, and as in plain layers."""
    peft = pytest.importorskip("peft")
    batch = packed()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        lora_dropout=0.0,
    )
    results = []
    for before in (True, False):
        model = tiny_model("qwen3")
        if before:
            patch_model(model)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        if not before:
            assert patch_model(model) is model
        results.append(loss_and_gradients(model, batch))
        assert all("lora" in name for name in results[-1][1])
    assert_same(*results)

    merged = patch_model(model.merge_and_unload())
    assert abs(llm_jepa_loss(merged, batch).loss - results[0][0]) < 1e-4


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {}, {"tied": True}])
def test_adapters_of_the_head(options):
    """LoRA, a copy of its own or tied weights: the head takes the rows that it is given."""
    peft = pytest.importorskip("peft")
    batch = packed()
    model = patch_model(tiny_model("llama", tie_word_embeddings=options.pop("tied", False)))
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], **options}
    if "lm_head" in options["target_modules"]:
        options.pop("modules_to_save")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **options)
    model = peft.get_peft_model(model, config)
    torch.testing.assert_close(llm_jepa_loss(model, batch).ntp_loss, model(**batch).loss)


class Recorder:
    """A back end of torch.compile that counts graphs."""

    def __init__(self, backend):
        self.backend, self.graphs = backend, 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        if self.backend == "eager":
            return graph.forward
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_compile(backend):
    """One graph, forward and backward, the same results."""
    batch = packed()
    model = patch_model(tiny_model("llama"))
    expected = loss_and_gradients(model, batch)
    recorder = Recorder(backend)
    compiled = torch.compile(model, fullgraph=True, backend=recorder)
    assert_same(loss_and_gradients(model, batch, compiled), expected, 1e-6)
    assert recorder.graphs == 1


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mistral_window"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_other_families(family):
    batch = packed()
    model = patch_model(tiny_model(family))
    if family == "gpt_oss":  # its eager loop over experts breaks the graph
        model.set_experts_implementation("grouped_mm")
    expected = loss_and_gradients(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(loss_and_gradients(model, batch, compiled), expected, 1e-6)


@pytest.mark.usefixtures("fresh_dynamo")
def test_packings_of_one_shape_do_not_recompile():
    """Tile lists and supervised tokens vary in length, and tiles in size."""
    model = patch_model(tiny_model("llama"))
    recorder = Recorder("eager")
    compiled = torch.compile(model, fullgraph=True, backend=recorder)
    lengths = set()
    for seed in range(100):
        size = 32 if seed % 10 == 9 else 16  # as where `pack` chooses the block size
        batch = packed(seed, count=3, max_length=None, pad_to_multiple_of=128, block_size=size)
        assert batch["input_ids"].shape == (1, 128)
        lengths.add(batch["kv_indices"].shape[1])
        expected = loss_and_gradients(model, batch)
        assert_same(loss_and_gradients(model, batch, compiled), expected, 1e-6)
    assert len(lengths) > 5
    assert recorder.graphs == 1


@pytest.mark.parametrize(
    ("backend", "rows", "part", "family"),
    [
        ("eager", "one", "model", "llama"),
        pytest.param("eager", "any", "model", "llama", marks=pytest.mark.slow),
        pytest.param("eager", "one", "layer", "mistral_window", marks=pytest.mark.slow),
        pytest.param("inductor", "any", "model", "mistral_window", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("fresh_dynamo")
def test_rows_of_any_length_share_two_graphs(backend, rows, part, family):
    """One of batches of a row, and one of more, cold: of fewer tokens than a block, or of many."""
    model = patch_model(tiny_model(family, num_hidden_layers=1))
    recorder = Recorder(backend)
    compiled = torch.compile(model, fullgraph=True, backend=recorder)
    if part == "layer":
        compiled = model
        model.model.layers[0].compile(fullgraph=True, backend=recorder)
    shapes, seed = set(), 0
    while len(shapes) < (6 if backend == "inductor" else 24):
        seed += 1
        size = 16 << seed % 4  # `pack` chooses between two
        if rows == "one" or seed % 3 == 0:
            batch = packed(seed, count=1 + seed % 9, max_length=None, block_size=size)
        else:
            batch = packed(seed, count=4, max_length=60 + seed, block_size=size)
        shapes.add(tuple(batch["input_ids"].shape))
        actual = loss_and_gradients(model, batch, compiled)
        if seed < 3:
            with torch.compiler.set_stance("force_eager"):
                assert_same(actual, loss_and_gradients(model, batch), 1e-5)
    assert len({length <= 64 for _, length in shapes}) == 2
    assert len({batch for batch, _ in shapes}) >= (1 if rows == "one" else 3)
    # A layer alone is compiled once for the first hidden states, and once for others.
    assert recorder.graphs == len({batch > 1 for batch, _ in shapes}) + (part == "layer")


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_with_checkpointing():
    batch = packed()
    model = patch_model(tiny_model("llama"))
    expected = loss_and_gradients(model, batch)
    checkpoint_activations(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(loss_and_gradients(model, batch, compiled), expected, 1e-6)


def test_batch_passes_through_wrappers_row_by_row():
    """Every tensor has the batch dimension first, so a batch may be cut into its rows."""
    batch = packed(count=8, max_length=64)
    rows = len(batch["input_ids"])
    assert rows > 1
    model = patch_model(tiny_model("llama"))
    whole = model(**batch).logits
    for b in range(rows):
        row = {key: value[b : b + 1] for key, value in batch.items()}
        torch.testing.assert_close(model(**row).logits, whole[b : b + 1])


def test_schedule_keys_are_integers():
    """Mixed precision wrappers cast floating-point arguments."""
    assert not any(value.is_floating_point() for value in packed().values())
    assert set(SCHEDULE_KEYS) <= packed().keys()
