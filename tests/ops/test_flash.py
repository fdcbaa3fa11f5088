"""The flash-attn back end over stand-ins for flash-attn 2 and 3, and over the real ones."""

import importlib.util
import inspect

import pytest
import torch

from llmjepa_kernels import FlashPlan, llm_jepa_example, pack
from llmjepa_kernels.ops import attention
from llmjepa_kernels.ops import flash as attention_flash
from llmjepa_kernels.ops.dense import visible
from tests.support.helpers import AttentionCase, check_attention
from tests.support.varlen_stand_in import FlashAttention2StandIn, FlashAttention3StandIn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[FlashAttention2StandIn, FlashAttention3StandIn], ids=["v2", "v3"])
def kernels(request, monkeypatch):
    kernels = request.param()
    monkeypatch.setattr(attention_flash, "find_kernels", lambda device, head_dim: kernels)
    return kernels


OPTIONS = [
    {},
    {"heads": 6, "kv_heads": 2},
    {"softcap": 3.0},
    {"sinks": True},
    {"softmax_scale": 0.3},
    {"window": 200},
    {"batch": 3, "heads": 4, "kv_heads": 2, "softcap": 2.0, "sinks": True, "softmax_scale": 0.5},
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def check_exact(case):
    """In float64 the reference is no better than what it checks: equal up to rounding."""
    expected, actual = case.run("reference"), case.run("flash")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_matches_the_reference(kernels, options, dtype):
    case = AttentionCase.random(
        **{"batch": 2, "seq": 60, "head_dim": 16, "mean_length": 3, **options}
    )
    case.visible_until[0, 45:] = torch.arange(46, 61)  # some padding in one row
    case.visible_until[0, :45].clamp_(max=45)
    plan = FlashPlan.from_visible_until(case.visible_until)
    assert plan.calls[1].slots.shape[1] > 0
    assert len(plan.calls) >= 5
    if dtype == torch.float64:
        check_exact(case)
    else:
        check_attention(case, "flash", dtype)
    assert kernels.calls.count("forward") == kernels.calls.count("backward") == len(plan.calls)


@pytest.mark.parametrize("head_dim", [8, 40, 96, 128, 256])
def test_head_dims(kernels, head_dim):
    check_exact(AttentionCase.random(seq=20, head_dim=head_dim, mean_length=3, softmax_scale=0.1))


@pytest.mark.parametrize("mean_length", [0.5, 3.0, 30.0])
@pytest.mark.parametrize("seed", range(4))
def test_matches_the_reference_on_many_forests(kernels, mean_length, seed):
    options = {"heads": 4, "kv_heads": 2, "head_dim": 8, "sinks": True, "softcap": 4.0}
    case = AttentionCase.random(
        batch=1 + seed % 3, seq=20 + 23 * seed, seed=seed, mean_length=mean_length, **options
    )
    check_exact(case)


def test_a_window_within_runs_matches_the_reference(kernels):
    case = AttentionCase.random(seq=40, head_dim=8, batch=2, heads=4, kv_heads=2, window=6)
    case.visible_until = torch.tensor([[25] * 25 + [40] * 15, [40] * 40], dtype=torch.int32)
    case.position_ids = torch.stack([torch.arange(40) % 25, torch.arange(40)])
    check_exact(case)


def test_single_pred_tokens_with_grouped_heads(kernels):
    """flash-attn 2 misreads a maximum of one query per sequence where some have none."""
    examples = [llm_jepa_example([i] * 5, [i] * 4, [i] * 3, pred_ids=[1]) for i in range(2, 6)]
    batch = pack(examples, share_prefixes=False)
    seq = batch["visible_until"].shape[1]
    case = AttentionCase.random(seq=seq, heads=4, kv_heads=2, head_dim=8)
    case.visible_until = batch["visible_until"]
    assert FlashPlan.from_visible_until(case.visible_until).calls[2].max_seqlen_q == 1
    check_exact(case)


def test_takes_heads_before_tokens_and_strided_inputs(kernels):
    case = AttentionCase.random(seq=30, heads=4, kv_heads=4, head_dim=8)
    expected = case.run("flash")
    qkv = torch.cat([case.q, case.k, case.v], dim=-1)
    case.q, case.k, case.v = qkv.contiguous().split(8, dim=-1)
    actual = case.run("flash")
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    case.q, case.k, case.v = (x.contiguous() for x in (case.q, case.k, case.v))
    for name, value in case.run("flash").items():
        assert torch.equal(value, expected[name]), name
        assert value.transpose(1, 2).is_contiguous(), name


def test_repeats_bit_by_bit(kernels):
    case = AttentionCase.random(batch=2, seq=50, heads=4, kv_heads=2, head_dim=8, sinks=True)
    first, second = (case.run("flash", torch.bfloat16) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_nothing_a_query_may_not_see_changes_it(kernels):
    case = AttentionCase.random(seq=60, head_dim=8, seed=3)
    before = case.run("flash")
    hidden = ~visible(case.visible_until)[0]
    token = int(hidden.tril().any(0).nonzero()[0])
    case.k[:, :, token] += 5.0
    case.v[:, :, token] -= 5.0
    after = case.run("flash")
    for name in ("out", "dq"):
        same = before[name][:, :, hidden[:, token]], after[name][:, :, hidden[:, token]]
        assert torch.equal(*same), name
    assert not torch.equal(before["out"], after["out"])


def test_opcheck(kernels):
    case = AttentionCase.random(batch=2, seq=9, head_dim=8, mean_length=3, sinks=True)
    plan = FlashPlan.from_visible_until(case.visible_until)
    inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    sinks = case.sinks.detach().requires_grad_()
    options = ([], (0, 0), None, plan.tensors(), None, None, None, 0.5, sinks, "flash")
    torch.library.opcheck(torch.ops.llmjepa_kernels.attention_forward, (*inputs, *options))


@pytest.fixture
def plans(monkeypatch):
    """How many plans are made from here on."""
    made = []
    make = FlashPlan.from_visible_until

    def counted(*args, **options):
        made.append(options.get("window"))
        return make(*args, **options)

    monkeypatch.setattr(FlashPlan, "from_visible_until", counted)
    return made


def test_layers_share_a_plan(kernels, plans):
    case = AttentionCase.random(seq=30, head_dim=8)
    plan = FlashPlan.from_visible_until(case.visible_until, position_ids=case.position_ids)
    options = {"position_ids": case.position_ids, "flash_plan": plan, "impl": "flash"}
    x = case.q.detach().requires_grad_()
    out = x
    for window in (None, plan.reach):
        out = attention.view_attention(
            out, case.k, case.v, case.visible_until, window=window, **options
        )
    out.sum().backward()
    assert len(plans) == 1


def test_a_shorter_window_than_the_plan_reaches_is_planned_or_refused(kernels, plans):
    case = AttentionCase.random(seq=15, head_dim=8)
    case.visible_until = torch.tensor([[15] * 6 + [13] * 7 + [15] * 2], dtype=torch.int32)
    case.position_ids = torch.tensor([[*range(13), 30, 31]])  # the window hides 6 from the last 2
    plan = FlashPlan.from_visible_until(case.visible_until, position_ids=case.position_ids)
    tensors = (case.q, case.k, case.v, case.visible_until)
    for given in (plan, FlashPlan.from_visible_until(case.visible_until)):
        options = {"position_ids": case.position_ids, "flash_plan": given}
        flash = attention.view_attention(*tensors, window=9, impl="flash", **options)
        expected = attention.view_attention(*tensors, window=9, impl="reference", **options)
        torch.testing.assert_close(flash, expected, rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match="window=28 cuts into queries 13 : 15"):
            attention.view_attention(*tensors, window=28, impl="flash", **options)
    assert plans == [None, None, 9, 28, 9, 28]


def test_a_plan_of_something_else_is_refused(kernels):
    case = AttentionCase.random(batch=2, seq=15, head_dim=8)
    tensors = (case.q, case.k, case.v, case.visible_until)
    options = {"position_ids": case.position_ids, "window": 50, "impl": "flash"}
    for rows, seq in ((1, 15), (2, 14)):
        other = FlashPlan.from_visible_until(case.visible_until[:rows, :seq].clamp(max=seq))
        message = rf"flash_plan must be made .* \(2, 15\) on cpu, got \({rows}, {seq}\) on cpu"
        with pytest.raises(ValueError, match=message):
            attention.view_attention(*tensors, flash_plan=other, **options)
    other = FlashPlan.from_visible_until(
        case.visible_until, position_ids=case.position_ids, window=60
    )
    with pytest.raises(ValueError, match="flash_plan was made for window=60, but window=50"):
        attention.view_attention(*tensors, flash_plan=other, **options)


def test_refuses_what_the_kernels_do_not_take(kernels, monkeypatch):
    def run(dtype=torch.float32, **options):
        AttentionCase.random(**{"seq": 20, "head_dim": 8, **options}).run("flash", dtype)

    with pytest.raises(ValueError, match=r"multiple of 8 up to 256 .* got 12"):
        run(head_dim=12)
    with pytest.raises(ValueError, match=r"multiple of 8 up to 256 .* got 264"):
        run(head_dim=264)
    with pytest.raises(ValueError, match=r"softmax_scale must be positive .* got -1"):
        run(softmax_scale=-1.0)
    with pytest.raises(ValueError, match="use impl='triton'"):
        run(window=2, mean_length=3)
    monkeypatch.setattr(type(kernels), "dtypes", attention_flash.FlashAttention2.dtypes)
    with pytest.raises(ValueError, match=r"q must be float16 or bfloat16 .* got torch\.float32"):
        run()
    monkeypatch.setattr(attention_flash, "MAX_SEQUENCES", 3)
    with pytest.raises(ValueError, match="at most 3 sequences"):
        run(torch.float16, mean_length=1)


class Packages:
    """importlib where only some packages are installed."""

    def __init__(self, *names):
        self.names = names

    def import_module(self, name):
        if name not in self.names:
            raise ImportError(name)
        return name


V2, V3 = "flash_attn.flash_attn_interface", "flash_attn_3._C"


@pytest.mark.parametrize(
    ("installed", "capability", "head_dim", "expected"),
    [
        ((V2, V3), (9, 0), 128, attention_flash.FlashAttention3),
        ((V3,), (9, 0), 192, attention_flash.FlashAttention3),
        ((V2, V3), (9, 0), 256, attention_flash.FlashAttention2),
        ((V2, V3), (8, 0), 128, attention_flash.FlashAttention2),
        ((V2,), (9, 0), 128, attention_flash.FlashAttention2),
        ((V3,), (8, 0), 128, None),
        ((), (9, 0), 128, None),
    ],
)
def test_chooses_what_is_installed(monkeypatch, installed, capability, head_dim, expected):
    monkeypatch.setattr(attention_flash, "importlib", Packages(*installed))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    find_kernels = attention_flash.find_kernels.__wrapped__
    if expected is not None:
        assert type(find_kernels(torch.device("cuda"), head_dim)) is expected
    else:
        with pytest.raises(RuntimeError, match=r"pip install 'llmjepa_kernels\[flash\]'"):
            find_kernels(torch.device("cuda"), head_dim)


def test_runs_on_gpus_only():
    with pytest.raises(RuntimeError, match="impl='flash' runs on CUDA GPUs, q is on cpu"):
        AttentionCase.random(seq=20, head_dim=8).run("flash")


# The real thing


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_flash_attn_on_a_gpu(options, head_dim, dtype):
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    case = AttentionCase.random(**{"batch": 2, "seq": 300, "head_dim": head_dim, **options})
    case.visible_until[0, 250:] = torch.arange(251, 301)
    case.visible_until[0, :250].clamp_(max=250)
    check_attention(case, "flash", dtype, "cuda")
    first, second = (case.run("flash", dtype, "cuda") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("package", ["flash_attn", "flash_attn_3"])
def test_stand_ins_have_the_signatures_of_flash_attn(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "flash_attn":
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
            real = getattr(interface, name)
            real = inspect.signature(getattr(real, "_init_fn", real)).parameters.values()
            own = inspect.signature(getattr(FlashAttention2StandIn(), name)).parameters.values()
            assert [(p.name, p.default) for p in own] == [(p.name, p.default) for p in real]
    else:
        importlib.import_module("flash_attn_3._C")
        for name in ("fwd", "bwd"):
            real = getattr(torch.ops.flash_attn_3, name).default._schema.arguments
            own = inspect.signature(getattr(FlashAttention3StandIn(), name)).parameters
            assert list(own) == [argument.name for argument in real]
