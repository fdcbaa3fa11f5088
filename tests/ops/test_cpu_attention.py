"""The C++ attention kernels, on every instruction set that this machine runs."""

import ctypes
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjepa_kernels import BlockMask, view_attention
from llmjepa_kernels.ops import cpu, reference
from llmjepa_kernels.ops.common import AttentionOptions
from llmjepa_kernels.ops.dense import visible
from tests.support.helpers import AttentionCase, check_attention, random_rows

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the library was not compiled")
ISAS = cpu.isas() if cpu.is_available() else ["none"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# One of each way to sum products: by numbers, and where the processor can, by pairs of bfloat16.
SUMMED = [torch.float32, torch.bfloat16]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv(cpu.ISA_VARIABLE, request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [3, 33, 64, 80, 96, 128, 256])
def test_head_dims(isa, head_dim, dtype):
    case = AttentionCase.random(
        batch=3, heads=6, kv_heads=2, seq=93, head_dim=head_dim, seed=head_dim
    )
    check_attention(case, "cpu", dtype)


OPTIONS = {
    "softcap": {"softcap": 4.0},
    "sinks": {"sinks": True},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "negative scale": {"softmax_scale": -0.3},
    "all": {"softcap": 2.5, "sinks": True, "window": 9, "softmax_scale": 0.5},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(isa, options, dtype):
    # Many heads, since there is one gradient of a sink for each.
    case = AttentionCase.random(heads=12, kv_heads=4, seq=100, head_dim=40, seed=3, **options)
    check_attention(case, "cpu", dtype)


@pytest.mark.parametrize("dtype", SUMMED, ids=str)
@pytest.mark.parametrize("mask_window", [True, False])
@pytest.mark.parametrize("block_size", [(16, 16), (128, 32), (5, 11), (64, 64), (256, 512)])
def test_any_block_size(isa, block_size, mask_window, dtype):
    case = AttentionCase.random(
        batch=2, heads=3, seq=200, head_dim=32, window=20, mean_length=30, seed=5
    )
    check_attention(case, "cpu", dtype, block_size=block_size, mask_window=mask_window)


@pytest.mark.parametrize("dtype", SUMMED, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (8, 2), (5, 1), (7, 7), (40, 1)])
def test_head_groups(isa, heads, dtype):
    case = AttentionCase.random(
        heads=heads[0], kv_heads=heads[1], seq=130, head_dim=48, mean_length=20, seed=heads[0]
    )
    check_attention(case, "cpu", dtype)


@pytest.mark.parametrize("dtype", SUMMED, ids=str)
@pytest.mark.parametrize("seq", [1, 2, 15, 17, 47, 49, 64, 65, 191, 193])
def test_ragged_ends(isa, seq, dtype):
    case = AttentionCase.random(batch=3, heads=4, kv_heads=4, seq=seq, head_dim=24, mean_length=seq)
    check_attention(case, "cpu", dtype)


def visible_until_of(*segments):
    """From (start, end of segment, end of subtree) triples."""
    row = torch.zeros(max(end for _, end, _ in segments), dtype=torch.int32)
    for start, end, subtree in segments:
        row[start:end] = subtree
    return row[None]


SHAPES = {
    "one huge segment": visible_until_of((0, 700, 700)),
    "single tokens": torch.arange(1, 401, dtype=torch.int32)[None],
    "a chain of single tokens": torch.full((1, 400), 400, dtype=torch.int32),
    "a prefix and many leaves": torch.cat(
        [torch.full((1, 100), 500), torch.arange(101, 501)[None]], dim=1
    ).int(),
    "a huge segment between small ones": visible_until_of(
        (0, 3, 3), (3, 10, 700), (10, 400, 400), (400, 700, 700), (700, 701, 701)
    ),
}


@pytest.mark.parametrize("dtype", SUMMED, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_extreme_forests(isa, shape, dtype):
    check_forest(SHAPES[shape], dtype, heads=3, head_dim=16)


@pytest.mark.parametrize("dtype", SUMMED, ids=str)
def test_thousands_of_tiny_segments(dtype):
    visible_until = (torch.arange(3000, dtype=torch.int32) // 2 * 2 + 2)[None]
    check_forest(visible_until, dtype, heads=1, head_dim=8)


def check_forest(visible_until, dtype, **shape):
    seq = visible_until.shape[1]
    case = AttentionCase.random(seq=seq, **shape)
    case.visible_until = visible_until
    case.position_ids = torch.arange(seq)[None]
    check_attention(case, "cpu", dtype)


@st.composite
def forests(draw):
    """visible_until (1, seq) of a forest given by segment lengths and how many parents close."""
    lengths = draw(st.lists(st.sampled_from([1, 1, 2, 3, 7, 15, 16, 17, 40, 70]), min_size=1))
    row, above, start = [0] * sum(lengths), [], 0

    def close(count):
        for _ in range(count):
            begin, end = above.pop()
            row[begin:end] = [start] * (end - begin)

    for length in lengths:
        close(draw(st.integers(0, len(above))))
        above.append((start, start + length))
        start += length
    close(len(above))
    # A segment to itself at the end: in a row of a few tokens plain PyTorch may make no error.
    return torch.tensor([row + [start + 60] * 60], dtype=torch.int32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    forests(),
    st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    st.sampled_from([16, 40, 64]),
    st.sampled_from(SUMMED),
)
def test_random_forests(visible_until, heads, head_dim, dtype):
    check_forest(visible_until, dtype, heads=heads[0], kv_heads=heads[1], head_dim=head_dim)


def test_strides(isa):
    """Heads-first tensors, and slices of one fused projection."""
    generator = torch.Generator().manual_seed(0)
    visible_until, _ = random_rows(2, 70, seed=1)
    fused = torch.randn(2, 70, 5 * 24, generator=generator)
    heads = fused.unflatten(-1, (5, 24)).transpose(1, 2)
    views = heads[:, :3], heads[:, 3:4], heads[:, 4:]
    outputs = []
    for tensors in (views, [x.contiguous() for x in views]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = view_attention(*leaves, visible_until, impl="cpu")
        assert out.transpose(1, 2).is_contiguous()
        outputs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_gradcheck(isa):
    case = AttentionCase.random(
        heads=3, seq=11, head_dim=3, mean_length=4, sinks=True, softcap=3.0, window=6
    )
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v, case.sinks)]

    def attend(q, k, v, sinks):
        return view_attention(
            q,
            k,
            v,
            case.visible_until,
            position_ids=case.position_ids,
            window=case.window,
            softcap=case.softcap,
            sinks=sinks,
            impl="cpu",
        )

    assert torch.autograd.gradcheck(attend, inputs)


LONG = {
    # Cut into slices whose dk and dv are summed afterwards.
    "one segment": {"seq": 1700, "heads": 2, "kv_heads": 1, "mean_length": 1e9},
    "a forest": {"batch": 3, "seq": 900, "heads": 6, "kv_heads": 2, "mean_length": 60.0},
    "options": {
        "seq": 800,
        "heads": 4,
        "mean_length": 40.0,
        "sinks": True,
        "window": 31,
        "softcap": 5.0,
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LONG)
def test_threads_do_not_change_a_bit(threads, shape, dtype):
    case = AttentionCase.random(head_dim=40, **LONG[shape])
    runs = []
    for count in (1, 2, 4, 2):
        threads(count)
        runs.append(case.run("cpu", dtype))
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


def test_without_an_openmp_runtime(threads):
    case = AttentionCase.random(seq=900, heads=4, kv_heads=2, head_dim=32)
    expected = case.run("cpu", torch.float32)
    threads(4)
    library = cpu._library()
    library.lk_set_parallel(None)
    try:
        actual = case.run("cpu", torch.float32)
    finally:
        library.lk_set_parallel(cpu._torch_parallel())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_threads_come_from_torch():
    script = """
import torch
from llmjepa_kernels import view_attention
from llmjepa_kernels.ops import cpu
torch.set_num_threads(3)
x = torch.randn(1, 2, 500, 16)
torch.mm(x[0, 0], x[0, 0].T)
until = torch.arange(1, 501, dtype=torch.int32)[None]
count = lambda: sum(line.startswith("Threads:") and int(line.split()[1])
                    for line in open("/proc/self/status"))
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
before = count()
view_attention(x, x, x, until, impl="cpu")
assert cpu._torch_parallel() is not None
assert count() == before, (before, count())
paths = {line.split()[-1] for line in open("/proc/self/maps")}
runtimes = [path for path in paths if "gomp" in path or "iomp" in path or "libomp" in path]
assert len(runtimes) <= 1, runtimes
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.fixture(scope="module")
def isolated():
    """A forest that spans several tiles, and which pairs of its tokens see each other."""
    case = AttentionCase.random(heads=3, seq=150, head_dim=24, mean_length=12, seed=7)
    seen = visible(case.visible_until)[0]
    return case, seen


@pytest.mark.parametrize("dtype", SUMMED, ids=str)
@pytest.mark.parametrize("value", [3.0, float("nan"), float("inf")])
@pytest.mark.parametrize("token", [5, 36, 100])
def test_isolation_is_exact(isa, isolated, token, value, dtype):
    case, seen = isolated
    before = case.run("cpu", dtype)

    def changed(*names):
        tensors = {name: getattr(case, name).clone() for name in names}
        for tensor in tensors.values():
            tensor[:, :, token] = value
        return AttentionCase(**{**case.__dict__, **tensors}).run("cpu", dtype)

    def same(after, name, tokens):
        assert torch.equal(after[name][:, :, tokens], before[name][:, :, tokens]), name

    # As a key, the token reaches the queries that see it, and the keys that those see.
    after = changed("k", "v")
    blind = ~seen[:, token]
    apart = ~(seen & seen[:, token, None]).any(dim=0)
    for name, tokens in (("out", blind), ("dq", blind), ("dk", apart), ("dv", apart)):
        same(after, name, tokens)
    # As a query, it reaches itself and the keys it sees.
    after = changed("q", "dout")
    others = torch.arange(len(seen)) != token
    unseen = ~seen[token]
    for name, tokens in (("out", others), ("dq", others), ("dk", unseen), ("dv", unseen)):
        same(after, name, tokens)


def test_what_the_scale_makes_infinite_stays_isolated(isa, isolated):
    case, seen = isolated
    before = AttentionCase(**{**case.__dict__, "softmax_scale": 10.0}).run("cpu", torch.float32)
    q = case.q.clone()
    q[:, :, 100] = 1e38
    changed = {**case.__dict__, "q": q, "softmax_scale": 10.0}
    after = AttentionCase(**changed).run("cpu", torch.float32)
    unseen = ~seen[100]
    assert torch.equal(after["dk"][:, :, unseen], before["dk"][:, :, unseen])
    assert torch.equal(after["dv"][:, :, unseen], before["dv"][:, :, unseen])


@pytest.mark.parametrize("dtype", SUMMED, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(isa, isolated, value, dtype):
    case, seen = isolated
    token = 100
    v = case.v.clone()
    v[:, :, token] = value
    out = AttentionCase(**{**case.__dict__, "v": v}).run("cpu", dtype)["out"]
    assert not out[:, :, seen[:, token]].isfinite().any()
    assert out[:, :, ~seen[:, token]].isfinite().all()
    q = case.q.clone()
    q[:, :, token] = float("nan")
    run = AttentionCase(**{**case.__dict__, "q": q}).run("cpu", dtype)
    assert run["out"][:, :, token].isnan().all()
    assert run["dk"][:, :, seen[token]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_only_key_has_its_value_and_no_gradient(isa, dtype):
    """Rounding may not leave a rest of dP - delta."""
    case = AttentionCase.random(heads=2, kv_heads=2, seq=50, head_dim=200, seed=4)
    case.visible_until = torch.arange(1, 51, dtype=torch.int32)[None]
    run = case.run("cpu", dtype)
    assert torch.equal(run["out"], case.v.to(dtype))
    assert torch.equal(run["dv"], case.dout.to(dtype))
    assert not run["dq"].any()
    assert not run["dk"].any()


def test_scale_of_zero_is_a_mean(isa):
    case = AttentionCase.random(heads=1, seq=40, head_dim=8, softmax_scale=0.0)
    check_attention(case, "cpu", torch.float32)


def test_lse(isa):
    case = AttentionCase.random(heads=2, seq=300, head_dim=32, mean_length=500, sinks=True)
    mask = BlockMask.from_visible_until(case.visible_until)
    options = AttentionOptions(0.2, sinks=case.sinks)
    _, expected = reference.attention_forward(case.q, case.k, case.v, mask, options)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 5e-15)):
        q, k, v, sinks = (x.to(dtype) for x in (case.q, case.k, case.v, case.sinks))
        _, lse = cpu.attention_forward(q, k, v, mask, replace(options, sinks=sinks))
        assert lse.dtype == dtype
        torch.testing.assert_close(lse.double(), expected, rtol=tolerance, atol=tolerance)


def test_an_unknown_isa_is_an_error(monkeypatch):
    monkeypatch.setenv(cpu.ISA_VARIABLE, "mmx")
    with pytest.raises(ValueError, match="LLMJEPA_CPU_ISA must be one of"):
        AttentionCase.random(seq=4, head_dim=4).run("cpu", torch.float32)


def test_too_large_a_head_is_an_error():
    with pytest.raises(ValueError, match="head_dim must be at most 256"):
        AttentionCase.random(seq=4, head_dim=257).run("cpu", torch.float32)


def call(mask, visible_until=None, positions=None, window=None):
    """Forward and backward under a mask, whatever it is."""
    visible_until = mask.visible_until if visible_until is None else visible_until
    q = torch.ones(*visible_until.shape, 2, 8).transpose(1, 2).requires_grad_()
    view_attention(
        *(q, q, q, visible_until),
        position_ids=positions,
        window=window,
        block_mask=mask,
        impl="cpu",
    ).sum().backward()


def packed(seq=300, **options):
    visible_until, positions = random_rows(2, seq, 3, 40.0)
    options = options and {"position_ids": positions, **options}
    return BlockMask.from_visible_until(visible_until, (16, 32), **options), positions


def edited(mask, name, change):
    values = getattr(mask, name).clone()
    change(values)
    return replace(mask, **{name: values})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("kv_indices", lambda x: x[0, 0].fill_(10**8)),
        ("kv_indices", lambda x: x[1, 3].fill_(-1)),
        ("kv_indices", lambda x: x[0].fill_(0)),  # tiles twice, others not at all
        ("kv_offsets", lambda x: x[0, -1].fill_(10**8)),
        ("kv_offsets", lambda x: x[1, 4].fill_(-5)),
        ("kv_offsets", lambda x: x[0, 0].fill_(1)),
        ("kv_full_start", lambda x: x[0, 2].fill_(10**8)),
        ("kv_full_start", lambda x: x.copy_(0 * x)),
    ],
)
@pytest.mark.parametrize("window", [None, 20])
def test_lists_that_are_none_of_the_mask_are_refused(name, change, window):
    options = {} if window is None else {"window": window}
    mask, positions = packed(**options)
    call(mask, positions=positions, window=window)
    with pytest.raises(ValueError, match="block_mask is not the schedule"):
        call(edited(mask, name, change), positions=positions, window=window)


@pytest.mark.parametrize("until", [torch.arange(1, 301), torch.tensor(300)])
def test_a_mask_that_changed_in_place_is_refused(until):
    """Neither the identity of the tensor nor the range of its values tell."""
    mask, _ = packed()
    mask.visible_until[:] = until  # what was full is not, and what was invisible is visible
    with pytest.raises(ValueError, match="block_mask is not the schedule"):
        call(mask)


@pytest.mark.parametrize("value", [10**8, 301, 5, -7])
def test_visible_until_out_of_range_is_refused_beside_a_block_mask(value):
    mask, _ = packed()
    mask.visible_until[1, 5] = value
    with pytest.raises(ValueError, match=rf"got visible_until\[1, 5\] = {value}"):
        call(mask)


def test_a_schedule_of_a_window_belongs_to_its_positions():
    mask, positions = packed(window=20)
    assert mask.num_tiles < packed()[0].num_tiles
    call(mask, positions=positions, window=20)
    with pytest.raises(ValueError, match="these positions and this window"):
        call(mask, positions=torch.zeros_like(positions), window=20)
    # Lists that know of no window take any positions.
    call(packed()[0], positions=torch.zeros_like(positions), window=20)


def test_the_last_position_of_int32_sees_itself(isa):
    case = AttentionCase.random(seq=70, head_dim=16, window=9)
    case.position_ids += 2**31 - 1 - case.position_ids.max()
    check_attention(case, "cpu", torch.float32)


def test_structures_are_those_of_the_header():
    header = (Path(__file__).parents[2] / "csrc/api.h").read_text()
    types = {
        "LkTensor": cpu._TensorArgument,
        "int64_t": ctypes.c_int64,
        "int32_t": ctypes.c_int32,
        "double": ctypes.c_double,
    }
    mirrors = {"LkAttention": cpu._AttentionArguments, "LkPairs": cpu._PairsArguments}
    mirrors |= {"LkTubes": cpu._TubesArguments, "LkTensor": cpu._TensorArgument}
    for name, mirror in mirrors.items():
        body = re.search(rf"struct {name} {{(.*?)}};", header, re.DOTALL)[1]
        expected = []
        for kind, names in re.findall(r"^ +(?:const )?(\w+)([^;/]+);", body, re.MULTILINE):
            for field in names.split(","):
                pointer = "*" in field
                expected.append((field.strip(" *"), ctypes.c_void_p if pointer else types[kind]))
        assert list(mirror._fields_) == expected
