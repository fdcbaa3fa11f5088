"""Bad arguments of the operations and of packing: errors in plain words, and nothing silent."""

import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from llmjepa_kernels import (
    BlockMask,
    Example,
    Segment,
    last_token_loss,
    pack,
    semantic_tube_loss,
    view_attention,
)
from llmjepa_kernels.ops import cpu, registry

Q = torch.randn(1, 2, 8, 16)
UNTIL = torch.full((1, 8), 8, dtype=torch.int32)
POSITIONS = torch.arange(8)[None]
HIDDEN = torch.randn(1, 8, 16)
PAIRS = torch.tensor([[[1, 2]]])
TUBES = torch.full((1, 1, 2, 3, 2), -1)
TUBES[0, 0, :, 0] = torch.tensor([[1, 2], [3, 5]])

OPERATIONS = {
    "attention": (lambda q, **options: view_attention(q, q, q, UNTIL, **options), Q),
    "loss": (lambda h, **options: last_token_loss(h, PAIRS, **options), HIDDEN),
    "infonce": (
        lambda h, **options: last_token_loss(h, PAIRS, metric="infonce", **options),
        HIDDEN,
    ),
    "tubes": (lambda h, **options: semantic_tube_loss(h, TUBES, **options), HIDDEN),
}


def refuses(message, function, *arguments, error=ValueError, **options):
    with pytest.raises(error, match=re.escape(message)):
        function(*arguments, **options)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_derivative_is_silently_zero(name):
    function, x = OPERATIONS[name]
    refused = {"error": RuntimeError}
    tangent = torch.ones_like(x)
    refuses("no forward-mode derivatives", torch.func.jvp, function, (x,), (tangent,), **refused)
    refuses("no forward-mode derivatives", torch.func.jacfwd(function), x, **refused)
    refuses("use backward()", torch.func.grad(lambda x: function(x).sum()), x, **refused)
    with forward_ad.dual_level():
        refuses("no forward-mode", function, forward_ad.make_dual(x, tangent), **refused)
        assert torch.equal(function(x), function(x))  # what has no tangent is computed


@pytest.mark.parametrize("name", OPERATIONS)
def test_vmap_says_what_to_do(name):
    function, x = OPERATIONS[name]
    message = "make the mapped dimension part of the batch"
    refuses(message, torch.vmap(function), x[None], error=RuntimeError)


def test_export_says_what_to_do():
    function, x = OPERATIONS["attention"]

    class Model(torch.nn.Module):
        def forward(self, x):
            return function(x)

    refuses("block_mask must be given to export", torch.export.export, Model(), (x,))


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_of_a_batch_of_gradients_are_refused(name):
    function, x = OPERATIONS[name]
    x = x.clone().requires_grad_()
    out = function(x)
    with pytest.raises(RuntimeError, match="make the mapped dimension part of the batch"):
        torch.autograd.grad(out, x, torch.ones(3, *out.shape), is_grads_batched=True)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("where", ["forward", "backward", "both"])
def test_checkpoints_under_a_mode_that_is_not_there_all_the_time(name, where):
    """As a counter of operations, which sees the operation instead of autograd's function."""
    function, x = OPERATIONS[name]
    x = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    mode = FlopCounterMode(display=False)
    with mode if where != "backward" else nullcontext():
        loss = checkpoint(function, x, use_reentrant=False).sum()
    with mode if where != "forward" else nullcontext():
        loss.backward()
    torch.testing.assert_close(x.grad, expected)


def test_the_reference_stays_in_the_dtype_of_its_inputs_under_autocast():
    function, x = OPERATIONS["attention"]
    x = x.clone().requires_grad_()
    expected = function(x, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        out = function(x, impl="reference")
    assert torch.equal(out, expected)
    out.sum().backward()


def test_masks_are_compared_by_identity():
    mask, same = (BlockMask.from_visible_until(UNTIL) for _ in range(2))
    assert mask == mask != same


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_whole_graph_needs_a_block_mask():
    function, x = OPERATIONS["attention"]
    with pytest.raises(Exception, match="pass a block_mask to view_attention"):
        torch.compile(function, fullgraph=True, backend="eager")(x)
    broken = torch.compile(function, backend="eager")(x)
    assert torch.equal(broken, function(x))
    mask = BlockMask.from_visible_until(UNTIL)
    whole = torch.compile(lambda x: function(x, block_mask=mask), fullgraph=True, backend="eager")(
        x
    )
    assert torch.equal(whole, function(x))


@pytest.mark.parametrize("name", OPERATIONS)
def test_triton_needs_a_gpu_or_its_interpreter(name, monkeypatch):
    function, x = OPERATIONS[name]
    configs = pytest.importorskip(registry.CONFIGS)
    monkeypatch.setattr(configs, "can_launch", lambda: False)
    refuses("impl='triton' runs on GPU tensors", function, x, impl="triton", error=RuntimeError)


@pytest.mark.parametrize("value", [float("inf"), 1e39, 1e-46, float("nan"), -1, 0, "a", True])
def test_softcap_and_temperature(value):
    message = "must be a number, positive and finite in float32, got"
    refuses(f"softcap {message}", OPERATIONS["attention"][0], Q, softcap=value)
    refuses(f"temperature {message}", OPERATIONS["infonce"][0], HIDDEN, temperature=value)


@pytest.mark.parametrize("impl", ["cpu", "reference", "triton"])
def test_numbers_of_numpy(impl):
    function, x = OPERATIONS["attention"]
    if impl == "triton" and not pytest.importorskip(registry.CONFIGS).can_launch():
        pytest.skip("Triton does not interpret")
    if impl == "cpu" and not cpu.is_available():
        pytest.skip("the library was not compiled")
    options = {"window": 3, "softcap": 2.5, "softmax_scale": 0.25}
    kinds = {"window": np.int64, "softcap": np.float32, "softmax_scale": np.array}
    others = {name: kinds[name](value) for name, value in options.items()}
    found, expected = (
        function(x, position_ids=POSITIONS, impl=impl, **given) for given in (others, options)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("value", [float("inf"), -1e39, float("nan"), "a", True, torch.tensor(0.5)])
def test_softmax_scale(value):
    message = "softmax_scale must be a number, finite in float32, got"
    refuses(message, OPERATIONS["attention"][0], Q, softmax_scale=value)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_sinks(value):
    function, q = OPERATIONS["attention"]
    refuses("sinks must be numbers below infinity", function, q, sinks=torch.tensor([0, value]))
    none = torch.full((2,), -torch.inf)
    torch.testing.assert_close(function(q, sinks=none), function(q))


@pytest.mark.parametrize("value", [2.5, 2**63, 0, -1, True, "a"])
def test_window(value):
    message = "window must be an integer, at least 1, got"
    refuses(message, OPERATIONS["attention"][0], Q, window=value, position_ids=POSITIONS)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("window", [1, 4, 2**31 - 1, 2**31, 2**40])
@pytest.mark.parametrize(
    "positions",
    [
        [*range(7), 2**31 - 1],
        [*range(2**31 - 8, 2**31)],
        [*range(-4, 4)],
        [0, 2**31 - 1, *range(5, 11)],
        [-(2**30), *range(6), 2**30 - 1],
    ],
)
def test_windows_and_positions_at_the_edge_of_int32(positions, window, impl):
    if impl == "cpu" and not cpu.is_available():
        pytest.skip("the CPU kernels are not built")
    positions = torch.tensor([positions])
    index, distance = torch.arange(8), positions[0, :, None] - positions[0]
    seen = (index[:, None] >= index) & (distance < window)
    scores = (Q @ Q.mT / 4).masked_fill(~seen, -torch.inf)
    out = OPERATIONS["attention"][0](Q, window=window, position_ids=positions, impl=impl)
    torch.testing.assert_close(out, scores.softmax(-1) @ Q)


@pytest.mark.parametrize(
    ("positions", "dtype"),
    [
        ([*range(7), 2**31], torch.int64),
        ([-(2**31), *range(7)], torch.int64),
        ([-(2**31), *range(7)], torch.int32),
    ],
)
def test_positions_beyond_int32(positions, dtype):
    positions = torch.tensor([positions], dtype=dtype)
    message = "position_ids and their differences must fit in int32, got"
    refuses(message, OPERATIONS["attention"][0], Q, window=4, position_ids=positions)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (64, "must be (BLOCK_M, BLOCK_N), got 64"),
        ((64,), "must be (BLOCK_M, BLOCK_N), got (64,)"),
        ((4.5, 4), "must be an integer, from 1 to 65536, got 4.5"),
        ((2**40, 4), "must be an integer, from 1 to 65536"),
        ((0, 4), "must be an integer, from 1 to 65536, got 0"),
    ],
)
def test_block_size(size, message):
    refuses(f"block_size {message}", BlockMask.from_visible_until, UNTIL, size)


ONE = [Example([Segment([1, 2])])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 100.5}, "max_length must be an integer, at least 1, got 100.5"),
        ({"max_length": "a"}, "max_length must be an integer, at least 1, got 'a'"),
        ({"pad_to_multiple_of": 1.5}, "pad_to_multiple_of must be an integer"),
        ({"pad_token_id": 0.5}, "pad_token_id must be an integer, at least 0, got 0.5"),
        ({"pad_token_id": 2**63}, "pad_token_id must be an integer"),
        ({"block_size": 64.5}, "block_size must be an integer, from 1 to 65536, got 64.5"),
        ({"block_size": 2**40}, "block_size must be an integer, from 1 to 65536"),
    ],
)
def test_options_of_pack(options, message):
    refuses(message, pack, ONE, **options)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (ONE[0], "examples must be a sequence of Examples, got one: put it in a list"),
        ([[1, 2]], "example 0: must be an Example, got list"),
        ([Example([Segment(None)])], "input_ids must be a flat sequence of integers, got None"),
        ([Example([Segment([True])])], "must be a flat sequence of integers, got True in it"),
        ([Example([Segment([2**63])])], f"input_ids must fit in int64, got {2**63}"),
        ([Example([Segment([1], 0)])], "segment 0: parent must be None for the first one, got 0"),
        (
            [Example([Segment([1]), Segment([2], 0.0)])],
            "segment 1: parent must be None or an earlier segment (0 .. 0), got 0.0",
        ),
        ([Example([Segment([1])], pairs=[1])], "pairs must be (predictor, target) indices"),
        ([Example([Segment([1])], pairs=[(0.0, 0)])], "indices of its 1 segments, got (0.0, 0)"),
    ],
)
def test_examples(examples, message):
    refuses(message, pack, examples)


def test_integers_of_numpy_are_integers():
    segments = [Segment(list(np.arange(3))), Segment(np.arange(4), np.int64(0))]
    given = pack([Example(segments, pairs=np.array([[0, 1]]))])
    assert given["input_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert given["view_pairs"].tolist() == [[[2, 6]]]
