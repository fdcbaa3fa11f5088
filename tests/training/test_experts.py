"""The loss that balances the load of experts, as the models define it, over packed rows."""

import pytest
import torch
from transformers import TrainingArguments

from llmjepa_kernels import Example, Segment, pack
from llmjepa_kernels.evaluation.geometry import view_states
from llmjepa_kernels.example import sequence_ids
from llmjepa_kernels.hf.patch import patch_model, unpatch_model
from llmjepa_kernels.training.objective import llm_jepa_loss, real_tokens
from llmjepa_kernels.training.trainer import LLMJEPATrainer
from tests.support.helpers import random_examples
from tests.support.models import MIXTURES, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # routers compute in float32


def model_of(family, **options):
    factors = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    model = tiny_model(family, dtype=torch.float64, **factors, **options)
    return patch_model(model, impl="reference")


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([grad.flatten() for grad in grads])


def load_balance(routers, num_experts=4, top_k=2):
    """Of the logits (tokens, num_experts) of all layers. Source: arXiv:2101.03961, eq. 4 to 6."""
    logits = torch.cat(routers)
    chosen = logits.topk(top_k).indices.flatten()
    share = torch.bincount(chosen, minlength=num_experts) / len(logits)
    return num_experts * (share * logits.softmax(-1).mean(0)).sum()


def routers_of_segments(model, example):
    """The logits of each token once, from a forward of its own for the sequence of a segment."""
    for i, segment in enumerate(example.segments):
        ids = torch.tensor([sequence_ids(example, i)])
        for logits in model(input_ids=ids, use_cache=False).router_logits:
            yield logits.view(ids.shape[1], -1)[-len(segment.input_ids) :]


@pytest.mark.parametrize("family", MIXTURES)
def test_equals_the_loss_over_separate_sequences(family):
    """Rows of several lengths: each token counts once, and no padding does."""
    model = model_of(family)
    examples = random_examples(5, seed=3)
    if model(torch.tensor([[5, 6]])).router_logits is None:  # of Granite in Transformers 5.17
        with pytest.raises(RuntimeError, match="must return the logits of its routers"):
            llm_jepa_loss(model, pack(examples))
        return
    batch = pack(examples, 90, share_prefixes=False)
    assert not real_tokens(batch).all()
    with_aux, without = (
        llm_jepa_loss(model, batch, jepa_weight=0.5, **weight)
        for weight in ({}, {"aux_weight": 0.0})
    )
    actual = gradients(model, with_aux.loss) - gradients(model, without.loss)
    torch.testing.assert_close(with_aux.loss, without.loss + 0.3 * with_aux.aux_loss)

    unpatch_model(model)
    routers = [x for example in examples for x in routers_of_segments(model, example)]
    expected = load_balance(routers)
    torch.testing.assert_close(with_aux.aux_loss, expected.double(), **TOLERANCE)
    torch.testing.assert_close(actual, gradients(model, 0.3 * expected), **TOLERANCE)


@pytest.mark.parametrize("max_logits", [None, 200])
def test_parts_count_by_their_supervised_tokens(max_logits):
    model = model_of("mixtral")
    examples = random_examples(6, seed=5)
    whole = llm_jepa_loss(model, pack(examples))
    parts = [pack(examples[:2]), pack(examples[2:])]
    counts = {"num_items_in_batch": whole.num_items, "num_pairs_in_batch": 6}
    alone = [llm_jepa_loss(model, part, max_logits=max_logits) for part in parts]
    shares = [llm_jepa_loss(model, part, max_logits=max_logits, **counts) for part in parts]
    for one, share in zip(alone, shares, strict=True):
        expected = one.aux_loss * one.num_items / whole.num_items
        torch.testing.assert_close(share.aux_loss, expected)


@pytest.mark.parametrize("family", MIXTURES)
def test_states_of_views_need_no_loss(family):
    model, batch = model_of(family), pack(random_examples(2, seed=5))
    predictors, targets = view_states(model, [batch])
    found = torch.nn.functional.normalize(torch.stack([predictors, targets]), dim=-1)
    model.config.output_router_logits = False
    views = llm_jepa_loss(model, batch, return_views=True).views
    torch.testing.assert_close(found, views.detach().float().view_as(found))


def test_none_unless_the_model_is_asked_for_it():
    model = patch_model(tiny_model("mixtral"), impl="reference")
    batch = pack(random_examples(2, seed=5))
    assert llm_jepa_loss(model, batch).aux_loss is None


def test_a_factor_that_the_config_does_not_have(monkeypatch):
    model = model_of("mixtral")
    monkeypatch.setattr("llmjepa_kernels.hf.experts.FACTORS", ("its_own",))
    batch = pack(random_examples(2, seed=5))
    with pytest.raises(ValueError, match=r"aux_weight must be given.* MixtralConfig has no factor"):
        llm_jepa_loss(model, batch)
    assert llm_jepa_loss(model, batch, aux_weight=0.1).aux_loss > 0


def test_real_tokens():
    """A token alone is padding, unless it is in a pair or under another."""
    one_token = Example([Segment([5]), Segment([6]), Segment([7], 1)], pairs=[(0, 2)])
    batch = pack([one_token, Example([Segment([8]), Segment([8, 9])])], pad_to_multiple_of=8)
    expected = {5: True, 6: True, 7: True, 8: True, 9: True, 0: False}
    found = dict(zip(batch["input_ids"][0].tolist(), real_tokens(batch)[0].tolist(), strict=True))
    assert found == expected


def test_refused_where_no_expert_needs_it():
    model = patch_model(tiny_model("mixtral"), impl="reference")
    batch = dict(pack(random_examples(2, seed=5)))
    batch["attention_mask"] = real_tokens(batch)
    with pytest.raises(ValueError, match="attention_mask must not be given with visible_until"):
        model(**batch)


def test_trainer_trains_and_logs_it(tmp_path):
    examples = random_examples(8, seed=9)
    model = model_of("mixtral").float()
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = LLMJEPATrainer(
        model,
        TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            max_steps=2,
            learning_rate=0.0,
            **options,
        ),
        data_collator=pack,
        train_dataset=examples,
        eval_dataset=examples,
        jepa_weight=0.5,
    )
    trainer.train()
    metrics = trainer.evaluate()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in [*logs, {name.removeprefix("eval_"): value for name, value in metrics.items()}]:
        assert log["aux_loss"] > 1
        expected = log["ntp_loss"] + 0.5 * log["jepa_loss"] + 0.3 * log["aux_loss"]
        assert log["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_packed_row_without_its_padding_named_is_refused():
    model = model_of("mixtral")
    with pytest.raises(ValueError, match=r"balances its experts .*: call llm_jepa_loss"):
        model(**pack(random_examples(3, seed=1)))
