"""The Triton back end of attention against the float64 reference.

Without a GPU, Triton's interpreter runs the kernels, in float32 and float16; with one, the same
tests run natively and those marked `gpu` add what only a GPU can show.
"""

import json
import weakref

import pytest
import torch
from triton.runtime.errors import OutOfResources

from llmjepa_kernels import BlockMask, view_attention
from llmjepa_kernels.ops import autotune
from llmjepa_kernels.ops.dense import visible
from llmjepa_kernels.ops.triton import attention as triton_attention
from llmjepa_kernels.ops.triton import configs as triton_configs
from llmjepa_kernels.ops.triton.configs import Config
from tests.support.helpers import AttentionCase, check_attention, random_rows

pytest.importorskip("triton")

# Rows past the end of the sequence hold no number; they are never stored.
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.float32]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)  # which the interpreter computes wrongly

OPTIONS = [
    {},
    {"heads": 6, "kv_heads": 2, "batch": 2},
    {"heads": 3, "kv_heads": 3},
    {"heads": 5, "kv_heads": 1},
    {"window": 5},
    {"softcap": 3.0},
    {"sinks": True},
    {"softmax_scale": 0.3},
    {"softmax_scale": -0.2},
    {"softmax_scale": 0.0},
    {"heads": 4, "kv_heads": 2, "window": 9, "softcap": 2.0, "sinks": True, "softmax_scale": 0.5},
]


def check(case, dtype=torch.float16, **options):
    check_attention(case, "triton", dtype, DEVICE, **options)


def use_tile(monkeypatch, **tile):
    """Makes every kernel run in one configuration."""
    monkeypatch.setattr(triton_configs, "candidates", lambda *_, **__: [Config(**tile)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(map(str, o)) or "plain")
def test_options(options, dtype):
    case = AttentionCase.random(seq=50, head_dim=32, seed=1, **options)
    check(case, dtype, block_size=(32, 32))


@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 80, 96, 112, 128, 160, 256])
def test_head_dims(head_dim):
    case = AttentionCase.random(seq=37, head_dim=head_dim, mean_length=12, seed=2)
    check(case, block_size=(16, 16))


@pytest.mark.parametrize("seq", [1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 193])
def test_lengths_around_the_tile(seq):
    check(AttentionCase.random(seq=seq, head_dim=16, mean_length=20, seed=seq))


@pytest.mark.parametrize("block_size", [(16, 64), (64, 16), (128, 64), (128, 128)])
@pytest.mark.parametrize("mean_length", [3, 40])
def test_mask_blocks(block_size, mean_length):
    case = AttentionCase.random(heads=1, seq=150, head_dim=16, mean_length=mean_length, seed=3)
    check(case, block_size=block_size)


@pytest.mark.parametrize("tile", [(16, 64), (64, 16), (32, 32)])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("seq", [65, 130])
def test_tiles_that_subdivide_the_mask_block(tile, window, seq, monkeypatch):
    use_tile(monkeypatch, block_m=tile[0], block_n=tile[1])
    case = AttentionCase.random(
        heads=1, seq=seq, head_dim=16, mean_length=30, window=window, seed=4
    )
    check(case, block_size=(64, 64))


@pytest.mark.parametrize(
    ("seq", "block", "window"), [(60, 256, None), (130, 512, None), (600, 256, 100)]
)
def test_nothing_past_the_statistics_of_a_row_is_read(seq, block, window, monkeypatch):
    statistics = triton_attention._row_statistics

    def with_nan_behind(*arguments):
        *statistics_of_rows, dsinks = statistics(*arguments)
        buffers = [x.new_full((x.numel() + 4096,), torch.nan) for x in statistics_of_rows]
        for buffer, x in zip(buffers, statistics_of_rows, strict=True):
            buffer[: x.numel()] = x.flatten()
        return *(
            b[:-4096].view(x.shape) for b, x in zip(buffers, statistics_of_rows, strict=True)
        ), dsinks

    monkeypatch.setattr(triton_attention, "_row_statistics", with_nan_behind)
    case = AttentionCase.random(
        heads=1, seq=seq, head_dim=16, mean_length=1000, window=window, seed=10
    )
    if window is not None:  # the mask's last block of queries is seen in parts, others whole
        case.visible_until[:] = torch.cat([torch.full((550,), 550), torch.full((50,), 600)])
    # A mask that knows of no window lists its partial tiles before the whole ones.
    check(case, torch.float32, block_size=(block, block), mask_window=window is None)


@pytest.mark.parametrize(("part_size", "heads", "kv_heads"), [(1, 2, 2), (7, 4, 1)])
def test_long_lists_are_divided(part_size, heads, kv_heads, monkeypatch):
    """Rows of one segment, of a prefix of all, and of many segments, in parts or whole."""
    monkeypatch.setattr(triton_attention, "MIN_PART", part_size)
    monkeypatch.setattr(triton_attention, "_multiprocessors", lambda _: 1000)
    case = AttentionCase.random(
        batch=3, heads=heads, kv_heads=kv_heads, seq=43, head_dim=16, mean_length=12.0, seed=11
    )
    case.visible_until[0] = 43
    case.visible_until[1, :5] = 43
    check(case, torch.float16, block_size=(16, 16))
    check(case, torch.float32, block_size=(16, 32))
    first, second = (case.run("triton", torch.float16, DEVICE, (16, 16)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_parts_of_lists():
    """Their size follows the share of a multiprocessor, and short lists have none."""

    def parts(batch, tiles, query_blocks):
        indices = torch.empty(batch, tiles, dtype=torch.int32)
        blocks = torch.empty(batch, query_blocks, dtype=torch.int32)
        mask = BlockMask(indices, (64, 64), blocks, blocks, indices, blocks, blocks, indices)
        return triton_attention._parts(mask, num_kv_heads=8, group_size=4, multiprocessors=132)

    assert parts(1, 538, 128) == (33, 130)
    assert parts(1, 8256, 128) == (501, 131)
    assert parts(64, 538, 128) == (2087, 0)
    assert parts(1, 3, 2) == (triton_attention.MIN_PART, 0)


@pytest.mark.parametrize(
    ("head_dim", "pieces", "tma"),
    [(16, 1, True), (64, 2, True), (64, 4, True), (48, 4, False), (80, 8, False)],
)
def test_tensor_descriptors_and_pieces(head_dim, pieces, tma, monkeypatch):
    use_tile(monkeypatch, block_m=32, block_n=16, tma=tma, pieces=pieces)
    case = AttentionCase.random(batch=2, heads=4, kv_heads=2, seq=71, head_dim=head_dim, seed=5)
    check(case, block_size=(32, 32))


@pytest.mark.parametrize("seed", range(6))
def test_random_forests(seed):
    case = AttentionCase.random(
        batch=2, heads=1, seq=50 + 13 * seed, head_dim=16, mean_length=2.0**seed, seed=seed
    )
    check(case, torch.float32, block_size=(32, 32))


def test_a_window_unknown_to_the_mask_is_applied_to_full_tiles():
    case = AttentionCase.random(seq=110, head_dim=16, mean_length=60, window=11, seed=6)
    check(case, torch.float32, block_size=(32, 32), mask_window=False)


@pytest.mark.parametrize("layout", ["heads first", "fused qkv", "offset", "one head expanded"])
def test_strides(layout):
    case = AttentionCase.random(batch=2, heads=2, kv_heads=2, seq=40, head_dim=16, seed=7)
    case = case.rounded(torch.float32)
    q, k, v = (x.float().to(DEVICE) for x in (case.q, case.k, case.v))
    if layout == "heads first":
        q, k, v = (x.contiguous() for x in (q, k, v))
    elif layout == "fused qkv":
        fused = torch.cat([q, k, v], dim=1).transpose(1, 2).contiguous().transpose(1, 2)
        q, k, v = fused.split(2, dim=1)
    elif layout == "offset":  # rows that no vector load, and no descriptor, may assume aligned
        buffers = [torch.zeros(2, 40, 2, 19, device=DEVICE) for _ in range(3)]
        q, k, v = (
            b[..., 1:17].transpose(1, 2).copy_(x) for b, x in zip(buffers, (q, k, v), strict=True)
        )
    else:
        k, v = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
    visible_until = case.visible_until[:1].expand(2, -1).to(DEVICE)
    out = view_attention(q, k, v, visible_until, impl="triton").cpu()
    expected = view_attention(
        *(x.double().cpu() for x in (q, k, v)), visible_until.cpu(), impl="reference"
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_a_query_may_not_see_changes_no_bit():
    case = AttentionCase.random(seq=150, head_dim=16, mean_length=20, sinks=True, seed=8)
    before = case.run("triton", torch.float32, DEVICE, block_size=(32, 32))
    seen = visible(case.visible_until)[0]
    token = int((~seen).tril().any(0).nonzero()[-1])
    blind = ~seen[:, token]
    for x in (case.q, case.k, case.v, case.dout):
        x[:, :, token] *= -1e4
    after = case.run("triton", torch.float32, DEVICE, block_size=(32, 32))
    for name in ("out", "dq"):  # queries that do not see the token
        assert torch.equal(before[name][:, :, blind], after[name][:, :, blind]), name
    unrelated = blind & ~seen[token]
    for name in ("dk", "dv"):  # keys that share no query with it
        shared = (seen & seen[:, token][:, None]).any(0)
        assert torch.equal(before[name][:, :, ~shared], after[name][:, :, ~shared]), name
    assert unrelated.any()
    assert not torch.equal(before["out"], after["out"])


def test_the_same_input_gives_the_same_bits():
    case = AttentionCase.random(heads=4, seq=100, head_dim=16, sinks=True, seed=9)
    first = case.run("triton", torch.float16, DEVICE)
    second = case.run("triton", torch.float16, DEVICE)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float64}, "q must be float16, bfloat16 or float32 .* got torch.float64"),
        ({"head_dim": 264}, "head_dim must be at most 256, got 264"),
        ({"block_size": (8, 16)}, r"block_size .* at least 16 .* got \(8, 16\)"),
        ({"block_size": (48, 48)}, r"block_size .* powers of two .* got \(48, 48\)"),
    ],
)
def test_what_it_cannot_do_is_refused(arguments, message):
    arguments = {"dtype": torch.float32, "head_dim": 16, "block_size": (16, 16)} | arguments
    q = torch.zeros(1, 1, 20, arguments["head_dim"], dtype=arguments["dtype"], device=DEVICE)
    visible_until = torch.full((1, 20), 20, dtype=torch.int32, device=DEVICE)
    mask = BlockMask.from_visible_until(visible_until, arguments["block_size"])
    with pytest.raises(ValueError, match=message):
        view_attention(q, q, q, visible_until, block_mask=mask, impl="triton")


def test_autotune_times_once_and_remembers(monkeypatch, tmp_path):
    options = [Config(32, 32), Config(64, 64), Config(64, 32)]
    monkeypatch.setattr(triton_configs, "candidates", lambda *_, **__: options)
    monkeypatch.setattr(triton_configs, "current_arch", lambda: "sm_90")
    monkeypatch.setattr(autotune, "_device_name", lambda: "device")
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runs, timed = [], []

    def fake_time(run):
        run()
        timed.append(runs[-1])
        return {32: 3.0, 64: 2.0}[runs[-1].block_m] - (runs[-1].block_n == 32)

    monkeypatch.setattr(autotune, "_time", fake_time)

    def launch(head_dim=64):
        kind = {"dtype": torch.float16, "block_size": (64, 64), "allow_tma": True}
        triton_configs.launch("forward", runs.append, head_dim=head_dim, **kind)
        return runs[-1]

    assert launch() == options[0]
    assert timed == []
    monkeypatch.setenv("LLMJEPA_AUTOTUNE", "1")
    assert launch() == options[2]
    assert timed == options
    assert launch() == options[2]
    assert len(timed) == 3
    autotune._chosen.clear()  # as another process would start
    assert launch() == options[2]
    assert len(timed) == 3
    assert launch(head_dim=128) == options[2]
    assert len(timed) == 6
    stored = json.loads((tmp_path / "llmjepa_kernels" / "autotune.json").read_text())
    assert list(stored.values()) == [str(options[2])] * 2


def test_where_a_configuration_has_no_room_a_smaller_one_runs_and_is_remembered(monkeypatch):
    monkeypatch.setattr(triton_configs, "candidates", lambda *_, **__: [Config(128, 64, 8, 2)])
    monkeypatch.setattr(triton_configs, "_too_large", {})
    tried = []

    def run(config):
        tried.append((config.block_m, config.block_n, config.num_stages))
        if config.block_m * config.block_n > 32 * 32:
            raise OutOfResources(config.block_m * config.block_n, 32 * 32, "shared memory")

    kind = {"head_dim": 64, "dtype": torch.float16, "block_size": (128, 64), "allow_tma": False}
    triton_configs.launch("forward", run, **kind)
    assert tried == [(128, 64, 2), (128, 64, 1), (64, 64, 1), (32, 64, 1), (32, 32, 1)]
    tried.clear()
    triton_configs.launch("forward", run, **kind)
    assert tried == [(32, 32, 1)]

    def never_fits(config):
        raise OutOfResources(2, 1, "shared memory")

    with pytest.raises(OutOfResources):
        triton_configs.launch("dq", never_fits, **kind)
    with pytest.raises(OutOfResources):
        triton_configs.launch("dq", never_fits, **kind)


def test_what_does_not_fit_is_remembered_without_its_tensors(monkeypatch):
    monkeypatch.setattr(triton_configs, "_too_large", {})
    q = torch.zeros(3)
    alive = weakref.ref(q)

    def run(config, q=q):
        if config.num_stages > 1 or config.block_m > 16:
            raise OutOfResources(2, 1, "shared memory")

    kind = {"head_dim": 64, "dtype": torch.float16, "block_size": (64, 64), "allow_tma": False}
    triton_configs.launch("forward", run, **kind)
    assert triton_configs._too_large
    del q, run
    assert alive() is None


@pytest.fixture
def matmul_precision():
    """Precision settings, put back as they were."""
    before = torch.get_float32_matmul_precision()
    own = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = own
    torch.set_float32_matmul_precision(before)
    torch.backends.cuda.matmul.fp32_precision = own


def test_tf32_where_torch_allows_it_by_either_setting(matmul_precision):
    def found():
        return triton_configs.dot_precision(torch.float32, "sm_90", 64)

    for legacy, expected in (("high", "tf32x3"), ("medium", "tf32"), ("highest", "ieee")):
        torch.set_float32_matmul_precision(legacy)
        assert found() == expected
    # As TrainingArguments(tf32=True) does; then torch refuses to tell the older setting.
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert found() == "tf32x3"
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert found() == "ieee"
    torch.set_float32_matmul_precision("medium")
    assert triton_configs.dot_precision(torch.float32, "sm_75", 64) == "ieee"
    assert triton_configs.dot_precision(torch.float32, "sm_90", 80) == "ieee"
    assert triton_configs.dot_precision(torch.float16, "sm_90", 64) == "ieee"


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_shipped_configuration_natively(dtype, block_size, head_dim, monkeypatch):
    """Each candidate of the table that this device can be given, on a long row."""
    chosen = triton_configs.candidates
    case = AttentionCase.random(
        batch=2, heads=4, kv_heads=2, seq=1500, head_dim=head_dim, mean_length=90
    )
    for pick in range(4):
        monkeypatch.setattr(
            triton_configs, "candidates", lambda *a, p=pick, **k: [(chosen(*a, **k) * 4)[p]]
        )
        check(case, dtype, block_size=block_size)


@pytest.mark.gpu
def test_two_hundred_and_fifty_runs_give_the_same_bits():
    case = AttentionCase.random(
        batch=2, heads=16, kv_heads=4, seq=4096, head_dim=128, mean_length=200, sinks=True
    )
    first = case.run("triton", torch.bfloat16, "cuda")
    for _ in range(250):
        again = case.run("triton", torch.bfloat16, "cuda")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_results_depend_on_no_other_program_and_no_other_kernel():
    """Two writers, or a reader before its writer, show as different bits on a crowded device.

    Programs run in another order when a second stream takes multiprocessors away from them, and
    what nobody wrote holds what the memory held before, which is NaN here.
    """
    case = AttentionCase.random(
        batch=2, heads=16, kv_heads=4, seq=3001, head_dim=64, mean_length=60, sinks=True
    )
    alone = case.run("triton", torch.bfloat16, "cuda")
    crowd, matrix = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(50):
        torch.cuda.synchronize()
        poison = torch.full((1 << 28,), torch.nan, device="cuda")
        del poison  # its blocks are what the next outputs are allocated from
        with torch.cuda.stream(crowd):
            for _ in range(8):
                matrix @ matrix
        crowded = case.run("triton", torch.bfloat16, "cuda")
        assert all(torch.equal(alone[name], crowded[name]) for name in alone)


@pytest.mark.gpu
def test_memory_grows_with_the_row_not_with_its_square():
    seq, heads, head_dim = 32768, 4, 64
    shape = (1, heads, seq, head_dim)
    q, k, v = (
        torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for _ in range(3)
    )
    visible_until, _ = random_rows(1, seq, 0, mean_length=400)
    visible_until = visible_until.cuda()
    mask = BlockMask.from_visible_until(visible_until)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = view_attention(q, k, v, visible_until, block_mask=mask)
    out.backward(out)
    used = torch.cuda.max_memory_allocated() - before
    # out, dq, dk, dv and dout, and three float32 statistics per query
    assert used < 6 * q.numel() * 2 + 4 * heads * seq * 4


@pytest.mark.parametrize("softcap", [1e4, 1e6, 1e9])
def test_a_cap_that_hardly_bends(softcap):
    check(AttentionCase.random(seq=70, head_dim=16, softcap=softcap))


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes a range of addresses of a CPU")
def test_gradients_whose_rows_lie_far_apart():
    """Tiles of padding are as far from the last row as the first are."""
    stride, seq, dim = 34_000_000, 10, 16
    dense = torch.randn(1, 1, seq, dim).half()
    far = torch.empty(stride * (seq - 1) + dim, dtype=torch.float16)
    far = far.as_strided((1, 1, seq, dim), (stride * seq, dim, stride, 1)).copy_(dense)
    inputs = [torch.randn(1, 1, seq, dim).half().requires_grad_() for _ in range(3)]
    visible_until = torch.full((1, seq), seq, dtype=torch.int32)
    found, expected = (
        torch.autograd.grad(view_attention(*inputs, visible_until, impl="triton"), inputs, dout)
        for dout in (far, dense)
    )
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
