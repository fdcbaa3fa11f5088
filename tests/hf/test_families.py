"""One packed pass equals separate passes, for every family, layout and way of packing."""

import pytest
import torch
from torch.nn import functional

from llmjepa_kernels import Example, Segment, pack
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.training.objective import llm_jepa_loss
from llmjepa_kernels.tubes import TokenPath
from tests.support.helpers import random_examples
from tests.support.models import FAMILIES, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = [("shared", True), ("shared", False), ("official", True), ("official", False)]


@pytest.fixture
def all_float64(monkeypatch):
    """Models take norms and softmax in float32 whatever their dtype; here they may not."""
    softmax, to = functional.softmax, torch.Tensor.to

    def exact_to(x, *args, **kwargs):
        lower = torch.float32 in (*args[:1], kwargs.get("dtype"))
        return x if lower and x.dtype == torch.float64 else to(x, *args, **kwargs)

    monkeypatch.setattr(functional, "softmax", lambda x, dim=None, dtype=None: softmax(x, dim=dim))
    monkeypatch.setattr(torch.Tensor, "to", exact_to)
    # Positions are multiplied with frequencies, which older versions do not round before.
    monkeypatch.setattr(
        torch.Tensor,
        "float",
        lambda x: exact_to(x, torch.float32) if x.is_floating_point() else to(x, torch.float64),
    )


def separate_passes(model, examples):
    """Every segment in a pass of its own behind what it continues, through unpatched attention.

    Returns the hidden state of each context (a token with all it sees), and the mean losses.
    """
    states, ntp, jepa, stp, num_items, num_pairs, num_tubes = {}, 0, 0, 0, 0, 0, 0
    for example in examples:
        paths, passes = [], []
        for segment in example.segments:
            above = [] if segment.parent is None else paths[segment.parent]
            path = above + list(segment.input_ids)
            paths.append(path)
            outputs = model(
                input_ids=torch.tensor([path]), output_hidden_states=True, use_cache=False
            )
            hidden = outputs.hidden_states[-1][0]
            passes.append(hidden)
            states |= {tuple(path[: i + 1]): hidden[i].detach() for i in range(len(path))}
            labels = [-100] * len(path)
            if segment.labels is not None:
                labels[len(above) :] = segment.labels
            labels = torch.tensor(labels[1:], dtype=torch.int64)
            ntp = ntp + functional.cross_entropy(outputs.logits[0, :-1], labels, reduction="sum")
            num_items += int((labels != -100).sum())
        for predictor, target in example.pairs:
            ends = passes[predictor][-1], passes[target][-1]
            jepa = jepa + 1 - functional.cosine_similarity(*ends, dim=0)
            num_pairs += 1
        for tube in example.tubes:
            hidden = passes[example.path.segment]
            vectors = [sum(hidden[end] - hidden[start] for start, end in steps) for steps in tube]
            stp = stp + 1 - functional.cosine_similarity(*vectors, dim=0)
            num_tubes += 1
    return states, ntp / num_items, jepa / num_pairs, stp / num_tubes


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_passes(family, examples, dtype, tolerance, impl=None, **packing):
    """Hidden states, losses and gradients, each relative to its own largest value."""
    model = tiny_model(family, dtype=dtype)
    states, ntp_loss, jepa_loss, stp_loss = separate_passes(model, examples)
    expected = gradients(model, ntp_loss + 0.7 * jepa_loss + 0.3 * stp_loss)

    patch_model(model, impl=impl)
    batch = pack(examples, **packing)
    output = llm_jepa_loss(model, batch, jepa_weight=0.7, stp_weight=0.3)
    actual = gradients(model, output.loss)

    def compare(actual, expected, name):
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"

    compare(output.ntp_loss, ntp_loss, "ntp_loss")
    compare(output.jepa_loss, jepa_loss, "jepa_loss")
    compare(output.stp_loss, stp_loss, "stp_loss")
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        compare(actual[name], gradient, f"gradient of {name}")

    with torch.no_grad():
        outputs = model(**batch, use_cache=False, output_hidden_states=True)
    hidden = outputs.hidden_states[-1]
    seen = set()
    for b, (ids, until) in enumerate(
        zip(batch["input_ids"].tolist(), batch["visible_until"].tolist(), strict=True)
    ):
        for i in range(len(ids)):
            context = tuple(ids[j] for j in range(i + 1) if i < until[j])
            if context == (0,):  # padding
                continue
            seen.add(context)
            compare(hidden[b, i], states[context], f"hidden state of token {i} of row {b}")
    assert seen == states.keys()


@pytest.mark.parametrize(("views", "share_prefixes"), LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family, views, share_prefixes):
    assert_equal_passes(
        family,
        random_examples(5, seed=1, views=views),
        torch.float32,
        1e-5,
        max_length=96,
        share_prefixes=share_prefixes,
    )


@pytest.mark.parametrize(("views", "share_prefixes"), LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("all_float64")
def test_float64(family, views, share_prefixes):
    assert_equal_passes(
        family,
        random_examples(5, seed=2, views=views),
        torch.float64,
        1e-12,
        impl="reference",
        share_prefixes=share_prefixes,
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.usefixtures("all_float64")
def test_deep_trees_and_shared_ends(family):
    """Several views below a view, a segment that is both predictor and target, one-token views."""
    examples = [
        Example(
            [
                Segment([5, 6, 7]),
                Segment([8, 9], 0, [8, 9]),
                Segment([10], 1),
                Segment([11, 12, 13, 14], 0, [-100, 12, -100, 14]),
                Segment([15], 3, [15]),
                Segment([16, 17], 3, [16, -100]),
                Segment([18]),
            ],
            pairs=[(2, 6), (6, 4), (0, 6), (5, 5)],
            path=TokenPath(5, ()),
            tubes=[([(0, 8), (3, 1)], [(2, 5), (6, 8), (4, 0)]), ([(7, 8)], [(0, 7)])],
        ),
        Example([Segment([5, 6]), Segment([5, 6, 7, 8])], pairs=[(0, 1)]),
        Example([Segment([40])], pairs=[(0, 0)]),
    ]
    assert_equal_passes(family, examples, torch.float64, 1e-12, impl="reference")


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma2", "gpt_oss"])
def test_isolation_is_bitwise(family):
    """Other tokens in one segment leave every token that may not see it exactly as it was."""
    model = patch_model(tiny_model(family))
    if family == "gpt_oss":
        # Other experts multiply as many tokens at once as chose them, which may round otherwise.
        model.set_experts_implementation("batched_mm")
    batch = pack(random_examples(4, seed=3), 200)

    def run(ids):
        outputs = model(**{**batch, "input_ids": ids}, use_cache=False, output_hidden_states=True)
        return outputs.hidden_states[-1]

    before = run(batch["input_ids"])
    until = batch["visible_until"][0]
    index = torch.arange(len(until))
    starts = until.diff(prepend=until.new_zeros(1)).nonzero()[:, 0]
    changes = starts[:12].tolist()
    assert len(changes) > 6
    for j in changes:
        ids = batch["input_ids"].clone()
        ids[0, j] = (ids[0, j] + 1) % 50 + 4
        after = run(ids)
        touched = (before != after).any(dim=-1)[0]
        may_see = (index >= j) & (index < until[j])
        assert touched[j]
        assert not touched[~may_see].any()

        # What these tokens ask of the embeddings is the same, too.
        embeddings = model.get_input_embeddings().weight
        pieces = [
            torch.autograd.grad(run(x)[0, ~may_see].sum(), embeddings)[0]
            for x in (batch["input_ids"], ids)
        ]
        others = [
            t for t in range(len(embeddings)) if t not in (batch["input_ids"][0, j], ids[0, j])
        ]
        assert torch.equal(pieces[0][others], pieces[1][others])
