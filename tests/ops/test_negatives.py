"""infonce contrasts with the targets of all processes, as if one of them held the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from llmjepa_kernels import last_token_loss, pack
from llmjepa_kernels.example import without_views
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.training.objective import llm_jepa_loss
from tests.support.helpers import random_examples
from tests.support.models import tiny_model

WORLD = 2


def check_loss(rank, parts, group):
    """`parts` are the pairs of each process, of any number; their rows stand in one tensor."""
    hidden = torch.randn(WORLD, 2, 9, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    most = max(part.shape[1] for part in parts)
    padded = [
        torch.nn.functional.pad(part, (0, 0, 0, most - part.shape[1]), value=-1) for part in parts
    ]
    whole = hidden.flatten(0, 1).requires_grad_()
    expected = last_token_loss(whole, torch.cat(padded), metric="infonce", reduction="sum")
    (gradient,) = torch.autograd.grad(expected, whole)

    own = hidden[rank].clone().requires_grad_()
    options = {"metric": "infonce", "reduction": "sum", "group": group}
    loss = last_token_loss(own, parts[rank], **options)
    (dhidden,) = torch.autograd.grad(loss, own)
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        dhidden, gradient.unflatten(0, (WORLD, 2))[rank], rtol=1e-11, atol=1e-12
    )
    assert any((part >= 0).any() for part in parts) == bool(dhidden.any() or gradient.any())


def check_model(rank, parts, group):
    """The gradients of a model under DDP, each process with its own part of the examples."""
    model = patch_model(tiny_model("llama"))
    options = {"metric": "infonce", "temperature": 0.5, "jepa_weight": 2.0}
    whole = llm_jepa_loss(model, pack([*parts[0], *parts[1]]), gather_negatives=False, **options)
    whole.loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    counts = {"num_items_in_batch": whole.num_items, "num_pairs_in_batch": whole.num_pairs}
    wrapped = DistributedDataParallel(model)
    output = llm_jepa_loss(
        wrapped, pack(parts[rank], 64), gather_negatives=group, **counts, **options
    )
    (output.loss * WORLD).backward()  # gradients are averaged over the processes
    losses = torch.stack([output.loss, output.jepa_loss]).detach()
    dist.all_reduce(losses)
    torch.testing.assert_close(losses, torch.stack([whole.loss, whole.jepa_loss]).detach())
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= 1e-5, (name, error)


def process(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    group = dist.new_group([0, 1])
    pairs = torch.tensor([[[0, 3], [3, 5], [0, 5]], [[1, 6], [-1, -1], [-1, -1]]])
    nobody = torch.full((2, 2, 2), -1)
    none = torch.empty(2, 0, 2, dtype=torch.int64)
    for parts in ([pairs, pairs[:, :1] + 2], [nobody, pairs], [pairs, none], [none, none]):
        check_loss(rank, parts, group)

    examples = random_examples(6, seed=1)
    for gather in (True, group):
        check_model(rank, [examples[:2], examples[2:]], gather)
    viewless = [without_views(example) for example in examples[:2]]
    check_model(rank, [viewless, examples[2:]], True)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_contrast_like_one(tmp_path):
    torch.multiprocessing.spawn(process, args=(tmp_path / "store",), nprocs=WORLD)
