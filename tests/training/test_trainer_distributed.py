"""Two processes under torchrun make the updates of one, with DDP and with FSDP2.

Every case runs in both: here in one process, and in this file as a script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.example import without_views
from llmjepa_kernels.training.loss_dropout import LossDropout
from llmjepa_kernels.training.trainer import LLMJEPATrainer
from llmjepa_kernels.training.view_head import add_view_head
from llmjepa_kernels.tubes import TubeSampler
from tests.support.models import BEFORE_5_17
from tests.training.test_trainer import ROWS, arguments, build, relative

datasets = pytest.importorskip("datasets")

NAMES = {"loss", "ntp_loss", "jepa_loss", "stp_loss", "cosine", "epoch"}
NAMES |= {"sigreg_loss", "vicreg_loss"}
UPDATES, EXAMPLES = 4, 8  # in an update; there are sixteen in all
# And the loss dropout of each; "apart" is cosine with the terms against collapse, and a linear
# predictor where that can be.
METRICS = {"cosine": None, "l2": "example", "mse": "step", "infonce": "example", "apart": "example"}
# Before Transformers 5.17 its trainer wants to see an accelerator for FSDP.
KINDS = ("ddp",) if BEFORE_5_17 else ("ddp", "fsdp")
RESUMED = ("mse", "apart")


def whole(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def train(
    directory: Path, kind: str, metric: str, *, resume: Path | None = None, **options
) -> dict:
    """The parameters after some updates of two batches per process, and the logs."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if kind == "fsdp":
        layers = {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
        options |= {"fsdp": True, "fsdp_config": layers}
    model, collator = build(train_tokenizer(ROWS, vocab_size=300))
    collator.tubes = TubeSampler(count=2, seed=1)
    data = [collator.example(row) for row in ROWS[:16]]
    # Supervised tokens, pairs and lengths differ between the processes.
    data = [without_views(example) if i % 3 == 0 else example for i, example in enumerate(data)]
    if METRICS[metric]:
        data = LossDropout(data, 0.5, per=METRICS[metric], seed=1)
    args = arguments(
        directory,
        per_device_train_batch_size=EXAMPLES // 2 // processes,
        gradient_accumulation_steps=2,
        max_steps=UPDATES,
        learning_rate=0.01,
        per_device_eval_batch_size=2,
        **options,
    )
    if processes > 1 and kind == "fsdp":
        # Accelerate offers FSDP on accelerators only, but nothing in it needs one.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    more = {}
    if metric == "apart":
        more = {"sigreg_weight": 0.1, "vicreg_weight": 0.3}
        if kind == "ddp":
            add_view_head(model, projector_size=24, predictor=True, tube_predictor=True)
    stream = datasets.IterableDataset.from_generator(lambda: iter(ROWS[16:24]))
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    trainer = LLMJEPATrainer(
        model,
        args,
        collator,
        train_dataset=data,
        eval_dataset=stream,
        jepa_weight=2.0,
        stp_weight=0.5,
        weight_warmup=0.5,
        metric="cosine" if metric == "apart" else metric,
        **more,
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    result = {
        "start": start,
        "parameters": torch.cat([whole(p).flatten() for p in model.parameters()]),
        "logs": trainer.state.log_history[:UPDATES],
        "sharded": any(isinstance(p, DTensor) for p in model.parameters()),
    }
    if kind == "ddp" and metric == "cosine":
        result["evaluation"] = trainer.evaluate()
    return result


def main(directory: Path) -> None:
    results = {
        (kind, metric): train(directory, kind, metric) for kind in KINDS for metric in METRICS
    }
    saving = {"save_strategy": "steps", "save_steps": 3}  # in the middle of an epoch
    for metric in RESUMED:
        train(directory / metric, "ddp", metric, **saving)
        last = directory / metric / "checkpoint-3"
        results["resumed", metric] = train(directory, "ddp", metric, resume=last)
    if PartialState().is_main_process:
        torch.save(results, directory / "results.pt")
    torch.distributed.barrier()  # one that ends earlier can take the other down with it
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # past the destructors, of which one of torch's may find its thread running


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command += ["-m", "tests.training.test_trainer_distributed", directory]
    subprocess.run(command, check=True, env=environment, timeout=300)
    return torch.load(directory / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one")
    found: dict = {metric: train(directory, "ddp", metric) for metric in METRICS}
    return found | {("apart", "no head"): train(directory, "one", "apart")}


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_those_of_one_process(two_processes, one_process, kind, metric):
    one, two = one_process[metric], two_processes[kind, metric]
    if metric == "apart" and kind == "fsdp":  # which has no view head
        one = one_process["apart", "no head"]
    start = one["start"]
    assert two["sharded"] == (kind == "fsdp")
    assert relative(two["parameters"] - start, one["parameters"] - start) <= 1e-5
    for a, b in zip(one["logs"], two["logs"], strict=True):
        assert ("jepa_loss" in a) == ("jepa_loss" in b)
        for name in NAMES & a.keys():
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-5), name
        assert b["relative_cost"] > a["relative_cost"]  # shorter rows share less
        # All tokens of all processes: those of the chats alone are the same.
        alone = [log["tokens_per_step"] / log["relative_cost"] for log in (a, b)]
        assert alone[1] == pytest.approx(alone[0], rel=1e-3)
        assert a["flops_per_step"] < b["flops_per_step"] < 1.5 * a["flops_per_step"]


@pytest.mark.slow
def test_evaluation_is_that_of_one_process(two_processes, one_process):
    one, two = one_process["cosine"]["evaluation"], two_processes["ddp", "cosine"]["evaluation"]
    for name in ("eval_loss", "eval_ntp_loss", "eval_jepa_loss", "eval_stp_loss", "eval_cosine"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("metric", RESUMED)
def test_a_resume_in_the_middle_of_an_epoch_changes_nothing(two_processes, metric):
    resumed, through = two_processes["resumed", metric], two_processes["ddp", metric]
    assert torch.equal(resumed["parameters"], through["parameters"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
