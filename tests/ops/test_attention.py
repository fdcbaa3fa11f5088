"""The public operation and its reference back end; the other back ends have their own files."""

import contextlib
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from llmjepa_kernels import BlockMask, view_attention
from llmjepa_kernels.ops import attention, choice, cpu, loss, registry, tubes
from llmjepa_kernels.ops.dense import visible
from tests.support.helpers import AttentionCase, random_rows

OPTIONS = [
    {},
    {"heads": 6, "kv_heads": 2},
    {"window": 5},
    {"softcap": 3.0},
    {"sinks": True},
    {"softmax_scale": 0.3},
    {"heads": 4, "kv_heads": 2, "window": 4, "softcap": 2.0, "sinks": True, "softmax_scale": 0.5},
]


def plain(q, k, v, seen, softcap=None, scale=None, sinks=None):
    """Attention written once more, by explicit loops over heads and plain softmax."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs = []
    for h in range(q.shape[1]):
        kv = h // (q.shape[1] // k.shape[1])
        scores = q[:, h] @ k[:, kv].mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, -math.inf)
        if sinks is not None:
            sink = sinks[h].expand(*scores.shape[:2], 1)
            scores = torch.cat([scores, sink], dim=-1)
        p = scores.softmax(dim=-1)[..., : k.shape[2]]
        outs.append(p @ v[:, kv])
    return torch.stack(outs, dim=1)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_reference_equals_plain_attention_and_its_autograd(options):
    case = AttentionCase.random(batch=2, seq=23, head_dim=7, seed=1, **options)
    actual = case.run("reference")

    names = ["q", "k", "v"] + (["sinks"] if case.sinks is not None else [])
    inputs = [getattr(case, name).detach().requires_grad_() for name in names]
    seen = visible(case.visible_until, case.position_ids, case.window)
    sinks = inputs[3] if case.sinks is not None else None
    out = plain(*inputs[:3], seen, case.softcap, case.softmax_scale, sinks)
    torch.testing.assert_close(actual["out"], out, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(out, inputs, case.dout)
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(actual[f"d{name}"], gradient, rtol=1e-11, atol=1e-11)


def test_reference_equals_sdpa_with_the_dense_mask():
    case = AttentionCase.random(batch=2, heads=4, kv_heads=2, seq=50, head_dim=16, seed=2)
    seen = visible(case.visible_until)[:, None]
    expected = functional.scaled_dot_product_attention(
        case.q, case.k, case.v, attn_mask=seen, enable_gqa=True
    )
    torch.testing.assert_close(case.run("reference")["out"], expected, rtol=1e-12, atol=1e-12)


def test_visible_is_ancestors_and_self():
    """Written from the forest's definition: walk up from each token."""
    parent_of_segment = {"S": None, "T": "S", "C": "T", "P": "T", "V": None}
    row = "SSTTTCCCPVV"
    ends = {"S": 9, "T": 9, "C": 8, "P": 9, "V": 11}
    visible_until = torch.tensor([[ends[s] for s in row]], dtype=torch.int32)
    seen = visible(visible_until)[0]
    for i, mine in enumerate(row):
        above = set()
        segment = mine
        while segment is not None:
            above.add(segment)
            segment = parent_of_segment[segment]
        assert seen[i].tolist() == [j <= i and row[j] in above for j in range(len(row))]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_opcheck(options):
    case = AttentionCase.random(batch=2, seq=9, head_dim=4, mean_length=3, **options)
    mask = BlockMask.from_visible_until(case.visible_until, (4, 4))
    inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    sinks = None if case.sinks is None else case.sinks.detach().requires_grad_()
    torch.library.opcheck(
        torch.ops.llmjepa_kernels.attention_forward,
        (
            *inputs,
            [mask.visible_until, *mask.schedule_tensors()],
            mask.block_size,
            None,
            [],
            case.position_ids,
            case.window,
            case.softcap,
            0.5,
            sinks,
            "reference",
        ),
    )


def test_out_is_stored_with_heads_inside():
    case = AttentionCase.random(batch=2, heads=4, kv_heads=2, seq=10, head_dim=8)
    results = case.run("reference")
    for name in ("out", "dq", "dk", "dv"):
        assert results[name].transpose(1, 2).is_contiguous(), name


def test_nothing_a_query_may_not_see_changes_it():
    case = AttentionCase.random(batch=1, seq=40, head_dim=8, seed=3)
    before = case.run("reference")
    hidden = ~visible(case.visible_until)[0]
    token = int(hidden.tril().any(0).nonzero()[0])
    case.k[:, :, token] += 5.0
    case.v[:, :, token] -= 5.0
    after = case.run("reference")
    assert torch.equal(before["out"][:, :, hidden[:, token]], after["out"][:, :, hidden[:, token]])
    assert not torch.equal(before["out"], after["out"])


def test_torch_compile_traces_through():
    case = AttentionCase.random(seq=20, head_dim=8)
    mask = BlockMask.from_visible_until(case.visible_until)

    def attend(q):
        return view_attention(
            q, case.k, case.v, case.visible_until, block_mask=mask, impl="reference"
        ).sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    q = case.q.detach().requires_grad_()
    (expected,) = torch.autograd.grad(attend(q), q)
    (actual,) = torch.autograd.grad(compiled(q), q)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_mask_that_comes_out_of_a_graph_knows_its_block_size():
    case = AttentionCase.random(seq=40, head_dim=8)
    mask = BlockMask.from_visible_until(case.visible_until, (16, 16))

    def put_together(visible_until, schedule):
        return BlockMask.from_schedule(visible_until, schedule)

    compiled = torch.compile(put_together, backend="aot_eager")
    found = compiled(case.visible_until, mask.schedule())
    found.check()
    assert found.resolved().block_size == (16, 16)
    assert str(found) == str(mask)
    q, k, v = (x.float() for x in (case.q, case.k, case.v))
    expected = view_attention(q, k, v, case.visible_until, block_mask=mask)
    assert torch.equal(view_attention(q, k, v, case.visible_until, block_mask=found), expected)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_call_takes_the_mask_of_an_equal_tensor():
    case = AttentionCase.random(seq=20, head_dim=8)
    mask = BlockMask.from_visible_until(case.visible_until.clone())
    compiled = torch.compile(view_attention, fullgraph=True, backend="aot_eager")
    out = compiled(case.q, case.k, case.v, case.visible_until, block_mask=mask)
    expected = view_attention(case.q, case.k, case.v, case.visible_until, block_mask=mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_may_change_the_path(first):
    """Between autograd alone and the operation, as where FLOPs are counted in one half."""
    case = AttentionCase.random(seq=40, head_dim=8, window=8)
    positions = case.position_ids.long()
    q = case.q.detach().requires_grad_()

    def attend(q):
        out = view_attention(
            q, case.k, case.v, case.visible_until, position_ids=positions, window=8
        )
        return out.sin()

    expected = torch.autograd.grad(attend(q).sum(), q)[0]
    with FlopCounterMode(display=False) if first else contextlib.nullcontext():
        out = checkpoint(attend, q, use_reentrant=False)
    with contextlib.nullcontext() if first else FlopCounterMode(display=False):
        out.sum().backward()
    torch.testing.assert_close(q.grad, expected, rtol=0, atol=0)


def test_autocast_does_not_reach_the_reference():
    case = AttentionCase.random(seq=40, head_dim=320)  # which no kernel takes
    inputs = [x.float().requires_grad_() for x in (case.q, case.k, case.v)]

    def gradients():
        return torch.autograd.grad(
            view_attention(*inputs, case.visible_until), inputs, case.dout.float()
        )

    expected = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_what_is_hidden_may_overflow(impl):
    """In a product of float16 that none of its sums takes."""
    if impl == "cpu" and not cpu.is_available():
        pytest.skip("the CPU kernels are not built")
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, 1, 16, 16, generator=generator).half().requires_grad_() for _ in range(4)
    )
    visible_until = torch.full((1, 16), 16, dtype=torch.int32)
    visible_until[0, :8] = 8
    large = v.detach().clone()
    large[0, 0, 3] = 300.0
    dout = dout.detach() * 256
    out = view_attention(q, k, large.requires_grad_(), visible_until, impl=impl)
    dq, dk, _ = torch.autograd.grad(out, (q, k, large), dout)
    expected = torch.autograd.grad(view_attention(q, k, v, visible_until, impl=impl), (q, k), dout)
    assert torch.equal(dq[:, :, 8:], expected[0][:, :, 8:])
    assert torch.equal(dk[:, :, 8:], expected[1][:, :, 8:])


def test_second_derivatives_are_refused():
    case = AttentionCase.random(seq=20, head_dim=8)
    q = case.q.detach().requires_grad_()
    out = view_attention(q, case.k, case.v, case.visible_until)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    penalty = dq.square().sum() + q.square().sum()  # which has a derivative of its own
    with pytest.raises(RuntimeError, match=r"view_attention and .* have no second derivatives"):
        penalty.backward()


def change(**arguments):
    return arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (change(q=torch.zeros(2, 8, 4)), r"q must have shape .* got \(2, 8, 4\)"),
        (change(k=torch.zeros(1, 1, 7, 4)), r"k and v must have shape .* got \(1, 1, 7, 4\)"),
        (change(v=torch.zeros(1, 2, 8, 4)), "k and v must have shape"),
        (change(v=torch.zeros(1, 1, 8, 4).half()), "share one floating-point dtype.*float16"),
        (change(q=torch.zeros(1, 2, 8, 8)[..., ::2]), "q must have unit stride"),
        (change(k=torch.zeros(1, 3, 8, 4), v=torch.zeros(1, 3, 8, 4)), "must divide num_heads"),
        (change(visible_until=torch.full((1, 8), 8)), "visible_until must be int32.*int64"),
        (change(visible_until=torch.full((1, 9), 9).int()), r"of shape \(1, 8\).*\(1, 9\)"),
        (change(visible_until=torch.full((1, 8), 7).int()), r"visible_until\[0, 7\] = 7"),
        (change(window=3), "position_ids must be given"),
        (
            change(window=0, position_ids=torch.zeros(1, 8).int()),
            "window must be an integer, at least 1",
        ),
        (
            change(window=3, position_ids=torch.arange(8)[None] + 2**31 - 5),
            "and their differences must fit in int32, got 2147483643 to 2147483650",
        ),
        (change(softcap=0.0), "softcap must be a number, positive and finite in float32, got 0.0"),
        (change(sinks=torch.zeros(3)), r"sinks must be floating point of shape \(2,\)"),
        (change(q=torch.zeros(1, 0, 8, 4)), "q must not be empty"),
        (change(impl="fast"), "impl must be one of .* got 'fast'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = {
        "q": torch.zeros(1, 2, 8, 4),
        "k": torch.zeros(1, 1, 8, 4),
        "v": torch.zeros(1, 1, 8, 4),
        "visible_until": torch.full((1, 8), 8, dtype=torch.int32),
        "impl": "reference",
    }
    with pytest.raises(ValueError, match=message):
        view_attention(**{**good, **arguments})


def test_a_mask_of_another_batch_is_refused():
    visible_until, position_ids = random_rows(1, 8, 0)
    q = torch.zeros(1, 1, 8, 4)
    other = BlockMask.from_visible_until(torch.full((1, 9), 9, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"block_mask .* expected shape \(1, 8\)"):
        view_attention(q, q, q, visible_until, block_mask=other, impl="reference")
    swapped = BlockMask.from_visible_until(torch.arange(1, 9, dtype=torch.int32)[None])
    with pytest.raises(ValueError, match="built from another visible_until"):
        view_attention(q, q, q, visible_until, block_mask=swapped, impl="reference")
    windowed = BlockMask.from_visible_until(visible_until, position_ids=position_ids, window=2)
    with pytest.raises(ValueError, match="built for window=2, but window=None"):
        view_attention(q, q, q, visible_until, block_mask=windowed, impl="reference")


def test_back_ends_run_on_the_device_of_their_inputs(monkeypatch):
    """Triton launches where the process currently is, which may be another GPU."""
    entered, seen = [], []

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)

        def __exit__(self, *_):
            entered.pop()

    results = {"attention_backward": 4, "distance_backward": 1, "views_backward": 1}
    results |= {"tubes_forward": 1, "tubes_backward": 1}

    class Backend:
        def __getattr__(self, name):
            def run(x, *_, **__):
                seen.append((name, *entered))
                count = results.get(name, 2)
                return x if count == 1 else (x,) * count

            return run

    monkeypatch.setattr(torch.accelerator, "device_index", Guard)
    for module in (choice, loss):
        monkeypatch.setitem(module.BACKENDS, "triton", "fake")
    monkeypatch.setitem(tubes.BACKENDS, "triton", "fake")
    monkeypatch.setattr(registry, "_module", {"fake": Backend()}.__getitem__)
    with FakeTensorMode():
        q = torch.empty(1, 1, 4, 8, device="cuda:1")
        mask = [torch.empty(1, 4, dtype=torch.int32, device="cuda:1")] * 7
        flat = (mask, (4, 4), None, [], None, None, None, 1.0, None, None)
        attention._attention_forward(q, q, q, *flat)
        attention._attention_backward(q, q, q, q, q, q, *flat)
        pairs = torch.empty(1, 2, 2, dtype=torch.int64, device="cuda:1")
        steps = torch.empty(1, 2, 2, 3, 2, dtype=torch.int64, device="cuda:1")
        each = torch.empty(1, 2, device="cuda:1")
        loss._pair_distance(q, pairs, "cosine", "sum", None)
        loss._pair_distance_backward(each, q, pairs, q, "cosine", "none", None)
        loss._pair_views(q, pairs, None)
        loss._pair_views_backward(q, q, pairs, q, q, None)
        tubes._tube_vectors(q, steps, None)
        tubes._tube_vectors_backward(q, steps, 4, torch.float32, None)
    passes = ("forward", "backward")
    kinds = ("attention", "distance", "views", "tubes")
    assert seen == [(f"{kind}_{each}", 1) for kind in kinds for each in passes]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_eager_calls_and_the_operation_of_torch_give_the_same_bits(monkeypatch, options):
    case = AttentionCase.random(batch=2, seq=33, head_dim=8, **options)
    eager = case.run("reference", torch.float32)
    monkeypatch.setattr(attention, "runs_eagerly", lambda *tensors: False)
    for name, value in case.run("reference", torch.float32).items():
        assert torch.equal(value, eager[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reference_is_exact_where_the_softmax_is_peaked(dtype):
    """The yardstick of all tolerances must not be worse than plain autograd."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        (scale * torch.randn(1, 1, 16, 16, generator=generator)).to(dtype).requires_grad_()
        for scale in (50, 50, 1)
    )
    until = torch.full((1, 16), 16, dtype=torch.int32)
    view_attention(q, k, v, until, impl="reference").sum().backward()
    assert q.grad.abs().max() < 1e-6
    assert k.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", ["visible_until", "position_ids"])
def test_what_says_who_sees_whom_must_not_change_before_the_backward(name):
    """As by a loop that fills the buffers of its next batch too early."""
    row = {
        "visible_until": torch.tensor([[3, 2, 3, 5, 5]], dtype=torch.int32),
        "position_ids": torch.tensor([[0, 1, 1, 0, 1]], dtype=torch.int32),
    }
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    out = view_attention(q, q, q, **row, window=2)
    row[name].copy_(row[name].clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("eager", [True, False])
def test_gradients_of_a_sum(eager, monkeypatch):
    """Whose gradient is one number, with strides of 0."""
    if not eager:
        monkeypatch.setattr(attention, "runs_eagerly", lambda *_: False)
    q = torch.randn(1, 2, 20, 16, requires_grad=True)
    until = torch.full((1, 20), 20, dtype=torch.int32)
    out = view_attention(q, q, q, until)
    (found,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    (expected,) = torch.autograd.grad(out, q, torch.ones_like(out).contiguous())
    torch.testing.assert_close(found, expected)
