"""Collapse as the trainer logs it: the numbers, a run that collapses, and one that does not."""

import warnings

import pytest
import torch
from torch.nn.functional import normalize

from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.rank import rank_me
from llmjepa_kernels.training.telemetry import WINDOW, CollapseTelemetry
from llmjepa_kernels.training.trainer import LLMJEPATrainer
from tests.training.test_trainer import ROWS, arguments, build

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def random_views(seed, batch=2, num_pairs=5, hidden_size=7):
    """At length 1, with padding."""
    generator = torch.Generator().manual_seed(seed)
    views = normalize(torch.randn(2, batch, num_pairs, hidden_size, generator=generator), dim=-1)
    views[:, 0, 3:] = 0
    return views


def test_numbers_are_those_of_all_pairs_of_pairs():
    telemetry, others, targets_apart, targets = CollapseTelemetry(CPU), [], [], []
    for seed in range(3):
        views = random_views(seed)
        telemetry.add(views)
        x, y = (side[side.any(dim=1)] for side in views.flatten(1, 2))
        different = ~torch.eye(len(x), dtype=torch.bool)
        others.append((x @ y.T)[different])
        targets_apart.append((1 - y @ y.T)[different])
        targets.append(y)
    found = telemetry.logs(lambda x: x)
    assert found["other_cosine"] == pytest.approx(torch.cat(others).mean().item(), abs=1e-6)
    assert found["target_variance"] == pytest.approx(torch.cat(targets_apart).mean().item())
    assert found["target_rank"] == pytest.approx(rank_me(torch.cat(targets)))
    assert telemetry.logs(lambda x: x) == {}  # nothing since


def test_a_single_pair_has_no_other():
    telemetry = CollapseTelemetry(CPU)
    telemetry.add(random_views(0, batch=1, num_pairs=1))
    assert telemetry.logs(lambda x: x) == {}


def test_what_processes_add_up_is_on_their_device_even_without_views():
    """A collective of GPUs takes no tensors of the CPU."""

    def reduce(sums):
        assert sums.device.type == "meta"
        return torch.zeros(3)

    assert CollapseTelemetry(torch.device("meta")).logs(reduce) == {}


def test_rank_me():
    torch.manual_seed(0)
    assert rank_me(torch.ones(50, 8)) == pytest.approx(1)
    assert rank_me(torch.eye(6, 40)) == pytest.approx(6)
    states = torch.randn(30, 10)
    shares = torch.linalg.svdvals(states) / torch.linalg.svdvals(states).sum()
    expected = float((-(shares * shares.log()).sum()).exp())
    assert rank_me(states) == pytest.approx(expected, rel=1e-5)
    assert rank_me(torch.cat([states, torch.zeros(5, 10)])) == pytest.approx(expected)


def test_the_rank_is_that_of_the_last_targets():
    telemetry = CollapseTelemetry(CPU)
    telemetry.add(random_views(0, batch=1, num_pairs=2 * WINDOW))
    same = torch.zeros(2, 1, WINDOW, 7)
    same[..., 0] = 1
    telemetry.add(same)
    assert telemetry.logs(lambda x: x)["target_rank"] == pytest.approx(1)


@pytest.mark.parametrize("metric", ["cosine", "infonce"])
def test_a_run_that_collapses_warns_once_and_one_that_does_not_never(tmp_path, metric):
    """Without next-token loss nothing holds the views apart but the negatives of InfoNCE."""
    model, collator = build(train_tokenizer(ROWS, vocab_size=300))
    args = arguments(
        tmp_path, max_steps=60, optim="adamw_torch", learning_rate=1e-3, logging_steps=10
    )
    trainer = LLMJEPATrainer(
        model,
        args,
        collator,
        train_dataset=ROWS,
        metric=metric,
        temperature=0.3,
        ntp_weight=0.0,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    found = [w for w in caught if "the views collapse" in str(w.message)]
    logs = [log for log in trainer.state.log_history if "other_cosine" in log]
    assert len(logs) == 6
    first, last = logs[0], logs[-1]
    if metric == "cosine":
        assert len(found) == 1
        assert last["cosine"] > 0.95
        assert last["cosine"] - last["other_cosine"] < 0.05
        assert last["target_variance"] < 0.1 * first["target_variance"]
        assert last["target_rank"] < first["target_rank"]
    else:
        assert not found
        assert last["cosine"] - last["other_cosine"] > 0.3
        assert last["target_variance"] > 0.5
