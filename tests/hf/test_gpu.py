"""Models of every family on Triton's kernels, and what surrounds them on a GPU."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from llmjepa_kernels import pack
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.training.objective import llm_jepa_loss, supervised_positions
from tests.support.helpers import random_examples
from tests.support.models import FAMILIES, tiny_model

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def loss_and_gradient(model, batch, wrapped=None):
    """The loss and all gradients as one vector, in float64 on the CPU."""
    model.zero_grad(set_to_none=True)
    loss = llm_jepa_loss(model if wrapped is None else wrapped, batch).loss
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([loss.detach().flatten(), *gradients]).double().cpu()


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def check_family(family, dtype):
    """At most twice the error of plain PyTorch in that dtype, plus its rounding."""
    batch = pack(random_examples(2, seed=3))
    rounded = tiny_model(family, dtype=dtype)
    exact = tiny_model(family, dtype=torch.float64)
    exact.load_state_dict(rounded.state_dict())
    expected = loss_and_gradient(patch_model(exact, impl="reference"), batch)
    model, batch = rounded.to(DEVICE), batch.to(DEVICE)
    plain = loss_and_gradient(patch_model(model, impl="reference"), batch)
    actual = loss_and_gradient(patch_model(model, impl="triton"), batch)
    allowed = 2 * error(plain, expected) + torch.finfo(dtype).eps
    assert error(actual, expected) <= allowed


@pytest.mark.triton
def test_a_family_in_float32():
    check_family("llama", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, dtype):
    check_family(family, dtype)


@pytest.mark.gpu
def test_inductor_compiles_a_step_for_all_lengths():
    """Eager and compiled steps agree, and new lengths bring no more than a second graph."""
    model = patch_model(tiny_model("llama", dtype=torch.float32)).to(DEVICE)
    graphs = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for count in range(3, 11):
        batch = pack(random_examples(count, seed=count)).to(DEVICE)
        expected = loss_and_gradient(model, batch)
        assert error(loss_and_gradient(model, batch, compiled), expected) < 1e-5
    assert graphs.frame_count <= 2


@pytest.mark.gpu
def test_a_model_over_two_devices():
    """As device_map="auto" lays it: layers run where their weights are, not where torch is."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    batch = pack(random_examples(4, seed=3), max_length=64)
    model = patch_model(tiny_model("llama"))
    expected = loss_and_gradient(model.to("cuda:0"), batch.to("cuda:0"))
    torch.cuda.set_device(0)
    actual = loss_and_gradient(model.to("cuda:1"), batch.to("cuda:1"))
    assert torch.equal(actual, expected)


@pytest.mark.gpu
def test_a_step_waits_for_the_device_nowhere():
    batch = pack(random_examples(4, seed=3), max_length=64)
    batch["supervised"] = supervised_positions(batch["labels"])  # as the collator does
    batch = batch.to(DEVICE)
    model = patch_model(tiny_model("llama", dtype=torch.bfloat16)).to(DEVICE)

    def step():
        llm_jepa_loss(model, batch).loss.backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
