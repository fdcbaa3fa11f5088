"""No kernel reads or writes beside its buffers: each stands between fences of NaN.

Whatever is read there would show in the results, which must be those of buffers without fences to
the bit; whatever is written there shows in the fences. In the interpreter only: on a GPU a fence
would lie in an allocation of its own.
"""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from llmjepa_kernels import BlockMask
from llmjepa_kernels.ops.common import AttentionOptions
from tests.support.helpers import random_rows

pytest.importorskip("triton")

from llmjepa_kernels.ops.triton import attention, loss, tubes
from llmjepa_kernels.ops.triton import configs as triton_configs
from llmjepa_kernels.ops.triton.configs import Config

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.skipif(not triton_configs.INTERPRETED, reason="for Triton's interpreter"),
]
FENCE = 4096  # elements on each side: several rows of the largest tile
FACTORIES = ("empty", "empty_like", "new_empty", "zeros_like", "new_zeros", "zeros", "clone")


class Fences(TorchDispatchMode):
    """Puts whatever a back end allocates between fences."""

    def __init__(self):
        super().__init__()
        self.buffers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in FACTORIES and out.numel():
            return self.around(out)
        return out

    def around(self, x):
        """A copy of x, with its strides, between two fences."""
        if x is None:
            return None
        poison = math.nan if x.is_floating_point() else 2**30
        steps = zip(x.shape, x.stride(), strict=True)
        extent = 1 + sum((n - 1) * stride for n, stride in steps)
        buffer = torch.full((extent + 2 * FENCE,), poison, dtype=x.dtype)
        self.buffers.append((buffer, extent))
        fenced = buffer.as_strided(x.shape, x.stride(), FENCE)
        fenced.copy_(x)
        return fenced

    def around_all(self, *values):
        return tree_map_only(torch.Tensor, self.around, values)

    def check(self):
        assert self.buffers
        for buffer, extent in self.buffers:
            for fence in (buffer[:FENCE], buffer[FENCE + extent :]):
                whole = fence.isnan() if buffer.is_floating_point() else fence == 2**30
                assert whole.all()


def both(run, *values):
    """What `run` makes of the values, and of the values and all that it allocates in fences."""
    expected = run(*values)
    fences = Fences()
    values = fences.around_all(*values)
    with fences:
        found = run(*values)
    fences.check()
    for a, b in zip(found, expected, strict=True):
        if a is not None:
            assert torch.equal(a, b)
            assert not a.isnan().any()


@pytest.mark.parametrize(
    ("seq", "head_dim", "block_size", "option"),
    [
        (1, 16, (16, 16), {}),
        (65, 24, (64, 64), {"window": 7}),
        (60, 16, (256, 256), {"softcap": 2.0}),
        (70, 24, (64, 64), {"sinks": True}),
        (70, 64, (64, 64), {"tile": Config(32, 64, 4, 1, tma=True)}),
        (70, 16, (64, 64), {"parts": 3}),
        (40, 160, (32, 32), {"tile": Config(32, 32, 4, 1, pieces=8)}),
    ],
)
def test_attention(seq, head_dim, block_size, option, monkeypatch):
    batch, heads, kv_heads = 2, 2, 1
    monkeypatch.setattr(triton_configs, "candidates", triton_configs.candidates)
    if "tile" in option:
        monkeypatch.setattr(triton_configs, "candidates", lambda *_, **__: (option["tile"],))
    if "parts" in option:
        parts = attention._parts
        monkeypatch.setattr(
            attention, "_parts", lambda *args: (option["parts"], 2 * parts(*args)[0] + 64)
        )
    generator = torch.Generator().manual_seed(seq)
    visible_until, positions = random_rows(batch, seq, mean_length=20, seed=seq)
    window = option.get("window")
    mask = BlockMask.from_visible_until(
        visible_until, block_size, position_ids=positions, window=window
    )

    def random(count):
        shape = (batch, seq, count, head_dim)
        return torch.randn(shape, generator=generator).transpose(1, 2)

    q, k, v, dout = random(heads), random(kv_heads), random(kv_heads), random(heads)
    sinks = torch.randn(heads, generator=generator) if option.get("sinks") else None
    lists = {f.name: getattr(mask, f.name) for f in fields(mask)}
    tensors = {name: x for name, x in lists.items() if isinstance(x, torch.Tensor)}

    def run(q, k, v, dout, positions, sinks, tensors):
        own = replace(mask, **tensors)
        options = AttentionOptions(
            head_dim**-0.5,
            position_ids=positions if window else None,
            window=window,
            softcap=option.get("softcap"),
            sinks=sinks,
        )
        out, lse = attention.attention_forward(q, k, v, own, options)
        gradients = attention.attention_backward(dout, q, k, v, out, lse, own, options)
        return out, lse, *gradients

    both(run, q, k, v, dout, positions, sinks, tensors)


PAIRS = torch.tensor([[[0, 3], [3, 5], [0, 5], [2, 1]], [[1, 6], [1, 0], [-1, -1], [-1, -1]]])


@pytest.mark.parametrize("hidden_size", [1, 33, 515])
@pytest.mark.parametrize("metric", ["cosine", "l2", "mse"])
def test_distances(metric, hidden_size):
    hidden = torch.randn(2, 7, hidden_size)

    def run(hidden, pairs, dloss):
        each, stats = loss.distance_forward(hidden, pairs, metric=metric, reduction="none")
        return each, stats, loss.distance_backward(dloss, hidden, pairs, stats, metric=metric)

    both(run, hidden, PAIRS, torch.randn(2, 4))


@pytest.mark.parametrize("hidden_size", [1, 33, 515])
def test_views_and_tubes(hidden_size):
    hidden = torch.randn(2, 7, hidden_size)

    def views(hidden, pairs, dviews):
        found, squares = loss.views_forward(hidden, pairs)
        return found, squares, loss.views_backward(dviews, hidden, pairs, found, squares)

    both(views, hidden, PAIRS, torch.randn(2, 2, 4, hidden_size))
    steps = torch.randint(7, (2, 5, 2, 3, 2))
    steps[0, 2:, :, 1:] = -1
    steps[1, 4] = -1

    def directions(hidden, steps, dvectors):
        vectors = tubes.tubes_forward(hidden, steps)
        return vectors, tubes.tubes_backward(dvectors, steps, 7, torch.float32)

    both(directions, hidden, steps, torch.randn(2, 5, 2, hidden_size))


def test_a_fence_shows_what_is_read_and_written_beside_a_buffer():
    """A kernel that reads and writes one element too far is found."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, out, size, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        tl.store(out + offsets, tl.load(x + offsets + 1, mask=offsets < size), offsets < size)

    def run(x):
        out = torch.empty_like(x)
        kernel[(1,)](x, out, 6, BLOCK=8)
        return (out,)

    fences = Fences()
    with fences:
        (out,) = run(fences.around(torch.zeros(6)))
    assert out[-1].isnan()

    def overrun(x):
        out = torch.empty_like(x)
        kernel[(1,)](x, out, 7, BLOCK=8)

    x = fences.around(torch.zeros(9))
    with fences:
        overrun(x[:6])
    with pytest.raises(AssertionError):
        fences.check()
