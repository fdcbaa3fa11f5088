"""Two processes that each hold part of a batch compute the gradients of one that holds it all."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from llmjepa_kernels import pack
from llmjepa_kernels.hf.head import Head
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.ops import flash as attention_flash
from llmjepa_kernels.training.objective import llm_jepa_loss
from tests.support.helpers import random_examples
from tests.support.models import VOCAB, checkpoint_activations, tiny_model
from tests.support.varlen_stand_in import FlashAttention2StandIn

WORLD = 2
FAMILIES = {"gemma3": None, "openelm": None, "llama": "flash"}


def wrap(model, kind):
    if kind == "ddp":
        # Gemma 3 of Transformers 5.5 has its frequencies in another order in each process, where
        # this would exchange them.
        return DistributedDataParallel(model, broadcast_buffers=False)
    if kind == "fsdp checkpointed":
        checkpoint_activations(model)
    dtype = torch.bfloat16 if kind == "fsdp bfloat16" else None
    for layer in model.base_model.layers:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    if model.get_output_embeddings() is None:  # as Accelerate does, which takes them for untied
        fully_shard(model.get_input_embeddings(), mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    return fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))


def process(rank, kinds, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    examples = random_examples(6, seed=1)
    # Mixed precision of FSDP casts what floats on its way into the model.
    assert not any(
        tensor.is_floating_point() for tensor in pack(examples, flash_plan=True).values()
    )
    attention_flash.find_kernels = lambda device, head_dim: FlashAttention2StandIn()
    for (family, impl), (kind, tolerance) in product(FAMILIES.items(), kinds.items()):
        model = patch_model(tiny_model(family), impl=impl)
        whole = llm_jepa_loss(model, pack(examples))
        whole.loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)

        counts = {"num_items_in_batch": whole.num_items, "num_pairs_in_batch": whole.num_pairs}
        part = examples[:2] if rank == 0 else examples[2:]
        part = pack(part, 64, flash_plan=impl == "flash")
        wrapped = wrap(model, kind)  # DDP reduces gradients as long as it lives
        logits = 3 * VOCAB if kind in ("ddp", "fsdp") else None  # in parts
        output = llm_jepa_loss(wrapped, part, **counts, max_logits=logits)
        (output.loss * WORLD).backward()  # gradients are averaged over the processes
        total = output.loss.detach().clone()
        dist.all_reduce(total)
        assert abs(total - whole.loss) <= tolerance * whole.loss, (family, kind)
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            error = (gradient - expected[name]).abs().max() / expected[name].abs().max()
            assert error <= tolerance, (family, kind, name, error)
        if logits:  # OpenELM ties its head in its forward
            assert Head(model).is_exact == (family != "openelm"), (family, kind)
    dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_and_fsdp(tmp_path):
    kinds = {"ddp": 1e-5, "fsdp": 1e-5, "fsdp checkpointed": 1e-5, "fsdp bfloat16": 0.2}
    torch.multiprocessing.spawn(process, args=(kinds, tmp_path / "store"), nprocs=WORLD)
