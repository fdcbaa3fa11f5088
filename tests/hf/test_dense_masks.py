"""Loops that pass a dense 4D mask: the block-sparse path where it is equivalent, else dense."""

import functools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjepa_kernels import pack
from llmjepa_kernels.hf import dense_mask, layer
from llmjepa_kernels.hf.dense_mask import visible_until_of
from llmjepa_kernels.hf.patch import patch_model, unpatch_model
from llmjepa_kernels.ops.dense import visible
from tests.support.helpers import random_examples, random_rows
from tests.support.models import VOCAB, checkpoint_activations, tiny_model
from tests.support.sweep import Family

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = ["bool", "lowest", "infinite"]


def as_form(seen, form, dtype=torch.float32):
    """(batch, seq, seq) bool as the 4D mask of a training loop."""
    if form == "bool":
        return seen[:, None]
    low = torch.finfo(dtype).min if form == "lowest" else -torch.inf
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, low)[:, None]


def prefix_mask(seq, prefix=6):
    index = torch.arange(seq)
    return (index <= index[:, None]) | (index[:, None] < prefix) & (index < prefix)


def sink_mask(seq, window=4):
    """A sliding window whose first token is forgotten, but comes back."""
    index = torch.arange(seq)
    seen = (index <= index[:, None]) & (index > index[:, None] - window)
    seen[10:, 0] = True
    return seen


@pytest.fixture
def counts(monkeypatch):
    """How often each path ran, and how often a mask was read."""
    calls = {"sparse": 0, "dense": 0, "read": 0}
    paths = {
        "sparse": (layer, "view_attention"),
        "dense": (layer, "_dense"),
        "read": (dense_mask, "visible_until_of"),
    }
    for name, (module, function) in paths.items():

        def spy(*args, name, original, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        spy = functools.partial(spy, name=name, original=getattr(module, function))
        monkeypatch.setattr(module, function, spy)
    return calls


def inputs_for(visible_until, position_ids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, visible_until.shape, generator=generator)
    return {"input_ids": ids, "position_ids": position_ids}


def run(model, inputs, weight=None):
    model.zero_grad(set_to_none=True)
    logits = model(**inputs).logits
    weight = torch.linspace(-1, 1, logits.shape[1])[None, :, None] if weight is None else weight
    (logits * weight).sum().backward()
    return logits.detach(), [p.grad for p in model.parameters()]


def assert_same(actual, expected, tolerance=1e-5):
    for a, e in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        assert (a - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "mistral_window"])
def test_recognised_mask(family, form, counts):
    """As unpatched eager attention under the additive mask, sliding layers included."""
    visible_until, position_ids = random_rows(2, 40, seed=0)
    inputs = inputs_for(visible_until, position_ids)
    seen = visible(visible_until)
    model = tiny_model(family)
    expected = run(model, {**inputs, "attention_mask": as_form(seen, "lowest")})
    patch_model(model)
    actual = run(model, {**inputs, "attention_mask": as_form(seen, form)})
    assert_same(actual, expected)
    assert counts == {"sparse": 2, "dense": 0, "read": 1}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral_window"])
def test_queries_that_see_nothing(family, counts):
    """Padding, whose states a loop may read by mistake: they are those of the dense mask.

    Gradients too, where nobody reads them; else the dense mask's reach queries and keys as well,
    though scores beside the mask change nothing.
    """
    visible_until, position_ids = random_rows(2, 40, seed=0)
    visible_until[:, 30:] = torch.arange(31, 41)
    seen = visible(visible_until)
    seen[0, :, 30:] = seen[0, 30:] = False
    seen[1, :, 37:] = seen[1, 37:] = False
    inputs = inputs_for(visible_until, position_ids)
    inputs["attention_mask"] = as_form(seen, "lowest")
    model = tiny_model(family)
    read = seen.any(-1)[..., None]
    expected = run(model, inputs, read)
    assert_same(run(patch_model(model), inputs, read), expected)
    assert counts == {"sparse": 2, "dense": 0, "read": 1}


@pytest.mark.parametrize("form", FORMS)
def test_much_padding_is_said_once(form, monkeypatch):
    monkeypatch.setattr(dense_mask, "_warned", [])
    visible_until = torch.arange(1, 41)[None].int()
    visible_until[:, :30] = 30
    seen = visible(visible_until)
    seen[0, :, 30:] = seen[0, 30:] = False
    inputs = inputs_for(visible_until, torch.arange(40)[None])
    inputs["attention_mask"] = as_form(seen, form)
    model = patch_model(tiny_model("llama"))
    with pytest.warns(UserWarning, match="25% of the tokens of this batch are padding"):
        model(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)


@pytest.mark.parametrize("form", FORMS)
def test_labels_predicted_from_hidden_tokens_are_said_once(form, monkeypatch):
    monkeypatch.setattr(dense_mask, "_warned", [True])
    monkeypatch.setattr(dense_mask, "_warned_of_labels", [])
    visible_until = torch.full((2, 12), 12, dtype=torch.int32)
    seen = visible(visible_until)
    seen[1, :, 9:] = seen[1, 9:] = False
    inputs = inputs_for(visible_until, torch.arange(12).expand(2, -1))
    inputs["attention_mask"] = as_form(seen, form)
    labels = torch.arange(24).view(2, 12) % 7
    labels[1, 10:] = -100  # the one at 9 is predicted from 8, which is seen
    model = patch_model(tiny_model("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs, labels=labels)
        model(**inputs)
        labels[1, 10:] = 3
        model(input_ids=inputs["input_ids"], labels=labels)
        unpatch_model(model)
        model(**inputs, labels=labels)
    with pytest.warns(UserWarning, match="2 labels of this batch are .* as token 9 of row 1"):
        patch_model(model)(**inputs, labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs, labels=labels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_other_masks_are_applied_exactly(family, form, counts):
    """A bidirectional prefix and attention sinks have no visible_until."""
    seen = torch.stack([prefix_mask(24), sink_mask(24)])
    inputs = inputs_for(seen[:, 0], torch.arange(24).expand(2, -1))
    model = tiny_model(family)
    expected = run(model, {**inputs, "attention_mask": as_form(seen, "lowest")})
    patch_model(model)
    actual = run(model, {**inputs, "attention_mask": as_form(seen, form)})
    assert_same(actual, expected)
    assert counts == {"sparse": 0, "dense": 2, "read": 1}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_bias_is_not_a_mask(family, counts):
    index = torch.arange(10)
    causal = as_form((index <= index[:, None])[None], "infinite")
    bias = causal - 0.1 * (index[:, None] - index).abs()
    inputs = inputs_for(torch.zeros(1, 10), index[None])
    model = tiny_model(family)
    expected = run(model, {**inputs, "attention_mask": bias})
    patch_model(model)
    assert_same(run(model, {**inputs, "attention_mask": bias}), expected)
    assert counts["sparse"] == 0


def official_batch(examples):
    """The published layout: B rows of chats, B rows of user then assistant turn, one 4D mask."""
    rows, blocks = [], []
    for example in examples:
        chat, user, code = (list(segment.input_ids) for segment in example.segments)
        rows.append((chat, [len(chat)]))
        blocks.append((user + code, [len(user), len(user) + len(code)]))
    rows += blocks
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    seen = torch.zeros(len(rows), length, length, dtype=torch.bool)
    for r, (tokens, ends) in enumerate(rows):
        ids[r, : len(tokens)] = torch.tensor(tokens)
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            seen[r, start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
            positions[r, start:end] = torch.arange(end - start)
    return {"input_ids": ids, "position_ids": positions}, seen


@pytest.mark.parametrize("form", FORMS)
def test_official_layout(form, counts):
    """2B padded rows with a block-diagonal mask: padding sees nothing."""
    inputs, seen = official_batch(random_examples(4, seed=1, views="official"))
    real = (inputs["input_ids"] != 0).float()[..., None]
    assert (~real.bool()).any()
    model = tiny_model("llama")
    logits, gradients = run(model, {**inputs, "attention_mask": as_form(seen, "lowest")}, real)
    patch_model(model)
    actual, actual_gradients = run(model, {**inputs, "attention_mask": as_form(seen, form)}, real)
    assert_same((actual * real, actual_gradients), (logits * real, gradients))
    assert counts == {"sparse": 2, "dense": 0, "read": 1}


def test_mask_equals_packed_batch(counts):
    batch = pack(random_examples(5, seed=4), 120)
    model = patch_model(tiny_model("llama"))
    expected = model(**batch).logits
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    mask = as_form(visible(batch["visible_until"]), "bool")
    assert torch.equal(model(**inputs, attention_mask=mask).logits, expected)
    assert counts == {"sparse": 4, "dense": 0, "read": 1}


def test_one_mask_for_all_rows_and_a_mask_changed_in_place(counts):
    index = torch.arange(12)
    mask = (index <= index[:, None])[None, None].clone()
    model = patch_model(tiny_model("llama"))
    ids = inputs_for(torch.zeros(3, 12), None)["input_ids"]
    causal = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(causal, model(input_ids=ids).logits)
    mask[..., 6:, :6] = False
    split = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(split[:, :6], causal[:, :6])
    assert not torch.isclose(split[:, 6:], causal[:, 6:]).all()
    assert counts["read"] == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_mask_is_read_once_under_checkpointing(reentrant, counts):
    visible_until, position_ids = random_rows(2, 30, seed=3)
    inputs = inputs_for(visible_until, position_ids)
    inputs["attention_mask"] = as_form(visible(visible_until), "infinite")
    model = patch_model(tiny_model("llama"))
    expected = run(model, inputs)
    checkpoint_activations(model, reentrant=reentrant)
    counts.update(sparse=0, read=0)
    assert_same(run(model, inputs), expected, 0)
    assert counts == {"sparse": 4, "dense": 0, "read": 1}


def test_dropout_stays_with_a_dense_mask(counts):
    visible_until, position_ids = random_rows(1, 16, seed=2)
    inputs = inputs_for(visible_until, position_ids)
    inputs["attention_mask"] = as_form(visible(visible_until), "bool")
    model = patch_model(tiny_model("llama", attention_dropout=0.5))
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    assert counts == {"sparse": 0, "dense": 4, "read": 0}
    model.eval()(**inputs)
    assert counts["sparse"] == 2


@pytest.mark.parametrize(
    ("dtype", "mask_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float64),
    ],
)
def test_mask_in_another_dtype_than_the_model(dtype, mask_dtype, counts):
    """PyTorch's attention refuses it; eager attention, as most such loops use, takes it."""
    seen = prefix_mask(16)[None]
    inputs = inputs_for(seen[:, 0], torch.arange(16)[None])
    model = patch_model(tiny_model("llama", dtype=dtype))
    logits = [
        model(**inputs, attention_mask=as_form(seen, form, mask_dtype)).logits
        for form in ("lowest", "bool")
    ]
    assert torch.isfinite(logits[0]).all()
    assert torch.equal(*logits)
    assert counts["dense"] == 4


def test_mask_that_learns(counts):
    """It looks like a mask while its biases are still 0."""
    index = torch.arange(10)
    bias = as_form((index <= index[:, None])[None], "infinite").requires_grad_()
    inputs = inputs_for(torch.zeros(1, 10), index[None])
    run(patch_model(tiny_model("llama")), {**inputs, "attention_mask": bias})
    assert bias.grad[0, 0].tril().any()
    assert counts["sparse"] == 0


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_oss"])
def test_mask_per_layer_type(family, counts):
    """Models with sliding layers take a mask for each type: sparse if the window is by position."""
    visible_until, position_ids = random_rows(2, 30, seed=5)
    inputs = inputs_for(visible_until, position_ids)
    model = tiny_model(family)
    full = visible(visible_until)
    window = model.config.sliding_window
    sliding = visible(visible_until, position_ids, window)
    index = torch.arange(30)
    other = full & (index > index[:, None] - window)  # by packed index
    assert not torch.equal(other, sliding)

    def masks(form, sliding):
        types = {"full_attention": full, "sliding_attention": sliding}
        return {name: as_form(seen, form) for name, seen in types.items()}

    for seen, path in ((sliding, "sparse"), (other, "dense")):
        unpatch_model(model)
        expected = run(model, {**inputs, "attention_mask": masks("lowest", seen)})
        patch_model(model)
        counts.update(sparse=0, dense=0, read=0)
        actual = run(model, {**inputs, "attention_mask": masks("bool", seen)})
        assert_same(actual, expected)
        assert counts == {"sparse": 0, "dense": 0, "read": 1, path: 2}


def test_one_mask_through_a_composite_model(counts):
    """Which hands it on as that of each type of layer."""
    visible_until, position_ids = random_rows(2, 30, seed=5)
    inputs = inputs_for(visible_until, position_ids)
    mask = as_form(visible(visible_until), "bool")
    model = Family("gemma3").model().eval()
    expected = model(**inputs, attention_mask=mask).logits
    patch_model(model)
    counts.update(sparse=0, dense=0, read=0)
    actual = model(**inputs, attention_mask=mask).logits
    assert counts == {"sparse": 2, "dense": 0, "read": 1}
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_mask_per_layer_type_without_positions(counts):
    """Positions default to indices, as in the model."""
    index = torch.arange(20)
    causal = (index <= index[:, None])[None].expand(2, -1, -1)
    masks = {
        "full_attention": as_form(causal, "bool"),
        "sliding_attention": as_form(causal & (index > index[:, None] - 5), "infinite"),
    }
    ids = inputs_for(torch.zeros(2, 20), None)["input_ids"]
    model = patch_model(tiny_model("gemma3"))
    actual = model(input_ids=ids, attention_mask=masks).logits
    assert counts["sparse"] == 2
    torch.testing.assert_close(actual, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(0, 10**6), st.sampled_from(FORMS), st.integers(0, 5))
def test_visible_until_is_recovered_or_there_is_none(seq, seed, form, flips):
    """Exactly when a vector gives the mask is one found, and then it is that vector."""
    visible_until, _ = random_rows(2, seq, seed=seed)
    seen = visible(visible_until)
    assert torch.equal(visible_until_of(as_form(seen, form)[:, 0]), visible_until)

    generator = torch.Generator().manual_seed(seed)
    for _ in range(flips):
        b, i, j = (int(torch.randint(n, (), generator=generator)) for n in (2, seq, seq))
        seen[b, i, j] ^= True
    found = visible_until_of(as_form(seen, form)[:, 0])
    nobody = ~seen.any(dim=1)  # padding: the diagonal is free, its queries' rows as well
    if found is None:
        # No vector could do: the runs of viewers are not contiguous from the token itself on.
        runs = [
            seen[b, :, j].nonzero()[:, 0].tolist() == list(range(j, j + int(seen[b, :, j].sum())))
            for b in range(2)
            for j in range(seq)
            if not nobody[b, j]
        ]
        assert not all(runs)
    else:
        rows = ~nobody
        assert torch.equal(visible(found)[rows], seen[rows])


def test_biases_that_hide_nothing_are_no_mask():
    index = torch.arange(6)
    hidden = (index > index[:, None])[None]
    assert visible_until_of(torch.zeros(1, 6, 6).masked_fill(hidden, -9000.0)) is None
    assert visible_until_of(torch.zeros(1, 6, 6).masked_fill(hidden, -1e4)) is not None


def test_padding_under_the_lowest_numbers_of_float16_stays_finite():
    seen = prefix_mask(16)[None].clone()
    seen[:, 12:] = False
    seen[:, :, 12:] = False
    inputs = inputs_for(seen[:, 0], torch.arange(16)[None])
    model = patch_model(tiny_model("llama", dtype=torch.float16))
    assert torch.isfinite(model(**inputs, attention_mask=as_form(seen, "lowest")).logits).all()
