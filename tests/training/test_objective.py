"""llm_jepa_loss: its terms, their normalisation, its options, what it refuses."""

import pytest
import torch
from torch.nn import functional

from llmjepa_kernels import Example, PackedBatch, Segment, pack
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.ops.loss import METRICS, last_token_loss, pair_views
from llmjepa_kernels.ops.tubes import semantic_tube_loss
from llmjepa_kernels.training import objective
from llmjepa_kernels.training.objective import LLMJEPAOutput, llm_jepa_loss, supervised_positions
from tests.support.helpers import random_examples
from tests.support.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return patch_model(tiny_model("qwen3", dtype=torch.float64), impl="reference")


@pytest.fixture(scope="module")
def batch():
    return pack(random_examples(6, seed=7), 80)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def plain_terms(model, batch):
    """NTP loss through Transformers' own loss on all logits, and the last hidden states."""
    inputs = {key: value for key, value in batch.items() if key != "view_pairs"}
    outputs = model(**inputs, output_hidden_states=True, use_cache=False)
    return outputs.loss, outputs.hidden_states[-1]


@pytest.mark.parametrize("metric", METRICS)
def test_terms(model, batch, metric):
    """Each is what it says, whatever computes it."""
    output = llm_jepa_loss(model, batch, jepa_weight=0.3, metric=metric, temperature=0.5)
    actual = gradients(model, output.loss)

    ntp_loss, hidden = plain_terms(model, batch)
    options = {"metric": metric, "temperature": 0.5, "impl": "reference"}
    jepa_loss = last_token_loss(hidden, batch["view_pairs"], **options)
    expected = gradients(model, ntp_loss + 0.3 * jepa_loss)
    cosine = 1 - last_token_loss(hidden, batch["view_pairs"], impl="reference")

    assert isinstance(output, LLMJEPAOutput)
    # Transformers computes its loss in float32.
    torch.testing.assert_close(output.ntp_loss, ntp_loss.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(output.jepa_loss, jepa_loss)
    torch.testing.assert_close(output.cosine, cosine)
    torch.testing.assert_close(output.loss, output.ntp_loss + 0.3 * output.jepa_loss)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert output.num_items == (batch["labels"][:, 1:] != -100).sum()
    assert output.num_pairs == 6
    assert not output.cosine.requires_grad


@pytest.mark.parametrize("metric", ["cosine", "l2", "mse"])
def test_parts_of_an_accumulated_batch_add_up(model, metric):
    """Ragged micro-batches, normalised by the counts of all of them, as one large batch."""
    examples = random_examples(7, seed=11)
    whole = llm_jepa_loss(model, pack(examples), metric=metric)
    expected = gradients(model, whole.loss)

    micro = [pack(examples[:1]), pack(examples[1:6], 64), pack(examples[6:])]
    counts = {"num_items_in_batch": whole.num_items, "num_pairs_in_batch": 7}
    parts = [llm_jepa_loss(model, batch, metric=metric, **counts) for batch in micro]
    actual = gradients(model, sum(part.loss for part in parts))
    # Norms take gradients in float32.
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()
    for name in ("loss", "ntp_loss", "jepa_loss", "cosine", "num_items", "num_pairs"):
        total = sum(part[name].detach() for part in parts)
        torch.testing.assert_close(total, whole[name].detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_detached_target(model, batch, metric):
    """The same value; the gradient is that of a target which is a constant."""
    options = {"metric": metric, "jepa_weight": 2.0}
    output = llm_jepa_loss(model, batch, **options, detach_target=True)
    actual = gradients(model, output.jepa_loss)
    torch.testing.assert_close(output.loss, llm_jepa_loss(model, batch, **options).loss)

    _, hidden = plain_terms(model, batch)
    targets = batch["view_pairs"][..., 1]
    # Adding a second, constant copy of all rows leaves the predictors' gradient alone.
    both = torch.cat([hidden, hidden.detach()], dim=1)
    shifted = torch.where(targets < 0, -1, targets + hidden.shape[1])
    pairs = torch.stack([batch["view_pairs"][..., 0], shifted], dim=-1)
    expected = gradients(model, last_token_loss(both, pairs, metric=metric, impl="reference"))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


def test_no_supervised_tokens_or_no_pairs(model):
    """A term over nothing is 0, and the graph stays whole."""
    views = [Segment([5, 6, 7]), Segment([8, 9])]
    nothing_supervised = llm_jepa_loss(model, pack([Example(views, [(0, 1)])]))
    assert nothing_supervised.ntp_loss == 0
    assert nothing_supervised.num_items == 0
    assert nothing_supervised.loss == nothing_supervised.jepa_loss > 0
    assert torch.isfinite(gradients(model, nothing_supervised.loss)).all()

    no_pairs = llm_jepa_loss(model, pack([Example([Segment([5, 6, 7], labels=[5, 6, 7])])]))
    assert no_pairs.jepa_loss == 0
    assert no_pairs.num_pairs == 0
    assert no_pairs.cosine == 0
    assert no_pairs.loss == no_pairs.ntp_loss > 0
    assert torch.isfinite(gradients(model, no_pairs.loss)).all()

    neither = llm_jepa_loss(model, pack([Example([Segment([5])])]))
    assert neither.loss == 0
    assert not gradients(model, neither.loss).any()


def test_ragged_rows_count_no_token_twice(model):
    """The shorter row's padding of logits points at a supervised token."""
    runs = ([5, 6], [7, 8, 9, 10])
    batch = pack([Example([Segment(ids, labels=ids)]) for ids in runs], 4)
    assert batch["labels"].shape == (2, 4)
    output = llm_jepa_loss(model, batch)
    assert output.num_items == 1 + 3
    ntp_loss, _ = plain_terms(model, batch)
    torch.testing.assert_close(output.ntp_loss, ntp_loss.double(), rtol=1e-6, atol=0)


def test_errors_are_not_hidden(batch):
    """A model that overflows gives a loss that says so, even where no loss is asked for."""
    model = patch_model(tiny_model("llama"))
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    assert not torch.isfinite(llm_jepa_loss(model, batch).loss)


def test_head_runs_on_supervised_tokens_only(batch):
    model = patch_model(tiny_model("gemma2"))
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:2]))
    llm_jepa_loss(model, batch)
    most = int((batch["labels"][:, 1:] != -100).sum(dim=1).max())
    assert rows == [(len(batch["labels"]), most)]


@pytest.mark.parametrize(("patched", "expected"), [("reference", "reference"), ("flash", None)])
def test_the_losses_run_on_the_back_end_of_the_model(batch, monkeypatch, patched, expected):
    """All of them; on the default one where that is of attention alone."""
    losses, found = (last_token_loss, semantic_tube_loss, pair_views), []

    def watch(loss):
        def spy(*args, impl, **options):
            found.append((loss, impl))
            return loss(*args, impl=impl, **options)

        monkeypatch.setattr(objective, loss.__name__, spy)

    for loss in losses:
        watch(loss)
    monkeypatch.setattr(objective, "patched_impl", lambda model: patched)
    model = patch_model(tiny_model("llama"))
    llm_jepa_loss(model, batch, metric="l2", stp_weight=1.0, return_views=True)
    assert len(found) == 4  # the distance of "l2", and that of the logged cosine
    assert set(found) == {(loss, expected) for loss in losses}


@pytest.mark.parametrize("kind", ["packed", "plain dict", "without schedule", "with supervised"])
def test_kinds_of_batches(model, batch, kind):
    expected = llm_jepa_loss(model, batch).loss
    if kind == "plain dict":
        batch = dict(batch)
    elif kind == "without schedule":
        keys = ("input_ids", "position_ids", "labels", "visible_until", "view_pairs")
        batch = {key: batch[key] for key in keys}
    elif kind == "with supervised":
        batch = PackedBatch(batch, supervised=supervised_positions(batch["labels"]))
    torch.testing.assert_close(llm_jepa_loss(model, batch).loss, expected)


def test_supervised_positions():
    labels = torch.tensor(
        [
            [7, -100, 7, 7, -100, -100, 7],
            [-100, 7, -100, -100, -100, -100, -100],
            [-100, -100, -100, -100, -100, -100, -100],
        ]
    )
    expected = [[1, 2, 5], [0, -1, -1], [-1, -1, -1]]
    assert supervised_positions(labels).tolist() == expected
    assert supervised_positions(labels[1:]).tolist() == [[0, -1], [-1, -1]]
    assert supervised_positions(labels[:1, :1]).tolist() == [[-1, -1]]
    full = torch.zeros(1, 5, dtype=torch.int64)
    assert supervised_positions(full).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    "key", ["input_ids", "position_ids", "labels", "visible_until", "view_pairs"]
)
def test_missing_key(model, batch, key):
    rest = {name: value for name, value in batch.items() if name != key}
    with pytest.raises(ValueError, match=rf"it lacks \['{key}'\]"):
        llm_jepa_loss(model, rest)


def test_unpatched_model(batch):
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM is not patched.*call patch_model"):
        llm_jepa_loss(tiny_model("llama"), batch)


def test_data_parallel(batch):
    model = torch.nn.DataParallel(patch_model(tiny_model("llama")))
    with pytest.raises(ValueError, match="DataParallel is not supported"):
        llm_jepa_loss(model, batch)


def test_unknown_metric(model, batch):
    with pytest.raises(ValueError, match=r"metric must be one of .*'euclid'"):
        llm_jepa_loss(model, batch, metric="euclid")


def test_labels_that_were_changed_after_the_collator(model, batch):
    batch = {**batch, "supervised": supervised_positions(batch["labels"])}
    labels = batch["labels"].clone()
    labels[:, 1:] = batch["input_ids"][:, 1:]
    with pytest.raises(ValueError, match=r"the places of \d+ labels, but there are \d+"):
        llm_jepa_loss(model, {**batch, "labels": labels})

    # Fewer are found where they were.
    labels = batch["labels"].clone()
    labels[0, (labels[0] >= 0).nonzero()[:3]] = -100
    fewer = {**batch, "labels": labels}
    found = llm_jepa_loss(model, fewer)
    expected = llm_jepa_loss(model, {**fewer, "supervised": None})
    assert found.num_items == expected.num_items == (labels >= 0).sum()
    torch.testing.assert_close(found.loss, expected.loss)


def test_pair_outside_the_row(model, batch):
    pairs = batch["view_pairs"].clone()
    pairs[0, 0, 1] = batch["input_ids"].shape[1]
    with pytest.raises(IndexError, match="pairs must hold indices"):
        llm_jepa_loss(model, {**batch, "view_pairs": pairs})


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("head_positions", r"must return logits of shape .* got \(\d, \d+, 64\)"),
        ("hidden_states", "must hand on the hidden_states"),
    ],
)
def test_models_that_do_not_hand_on_what_is_asked_for(batch, lost, message):
    model = patch_model(tiny_model("llama"))
    forward = model.forward

    def lossy(**kwargs):
        outputs = forward(**{key: value for key, value in kwargs.items() if key != lost})
        outputs.hidden_states = None
        return outputs

    model.forward = lossy
    with pytest.raises(RuntimeError, match=message):
        llm_jepa_loss(model, batch)


def test_tied_weights_and_final_softcap():
    """The head is the model's own, with all it does to logits."""
    examples = random_examples(3, seed=2)
    model = patch_model(tiny_model("gemma2", tie_word_embeddings=True))
    output = llm_jepa_loss(model, pack(examples))
    ntp_loss, hidden = plain_terms(model, pack(examples))
    torch.testing.assert_close(output.ntp_loss, ntp_loss, rtol=1e-5, atol=0)
    uncapped = model.lm_head(hidden)[:, :-1].flatten(0, 1)
    labels = pack(examples)["labels"][:, 1:].flatten()
    assert abs(functional.cross_entropy(uncapped, labels) - output.ntp_loss) > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({f"num_{kind}_in_batch": count}, "counts of a batch must be numbers of at least 0")
            for kind in ("items", "pairs")
            for count in (-3, float("nan"), "a")
        ),
        *(
            ({f"{name}_weight": value}, f"{name}_weight must be a number, finite in float32")
            for name in ("ntp", "jepa", "stp", "aux")
            for value in (float("nan"), float("inf"), "a")
        ),
        *(({"max_logits": count}, "max_logits must be an integer") for count in (0, -1, 2.5)),
    ],
)
def test_numbers_out_of_range(model, batch, options, message):
    with pytest.raises(ValueError, match=message):
        llm_jepa_loss(model, batch, **options)
