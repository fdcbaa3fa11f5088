"""semantic_tube_loss on all back ends: every CPU instruction set here, and Triton."""

import importlib.util

import pytest
import torch
from torch.nn import functional

from llmjepa_kernels import semantic_tube_loss
from llmjepa_kernels.ops import cpu
from llmjepa_kernels.ops import tubes as ops_tubes
from tests.support.helpers import check_tubes, random_tubes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ISAS = cpu.isas() if cpu.is_available() else []
TRITON = ["triton"] if importlib.util.find_spec("triton") else []
BACKENDS = ["reference", *(f"cpu-{isa}" for isa in ISAS), *TRITON]
NONE = [-1, -1]
# A step of three, two and one; rows named by many steps and by both vectors; one end to itself.
TUBES = torch.tensor(
    [
        [
            [[[0, 2], [3, 5], [6, 1]], [[2, 3], NONE, NONE]],
            [[[2, 0], NONE, [4, 4]], [[0, 2], [2, 6], NONE]],
            [[NONE] * 3, [NONE] * 3],
        ],
        [
            [[[5, 6], NONE, NONE], [[6, 4], [3, 2], [1, 0]]],
            [[NONE] * 3, [NONE] * 3],
            [[[1, 6], NONE, NONE], [[6, 5], NONE, NONE]],
        ],
    ]
)
REAL = torch.tensor([[True, True, False], [True, False, True]])

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


@pytest.fixture(params=BACKENDS)
def impl(request, monkeypatch):
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
    return name


@pytest.fixture
def device(impl):
    return DEVICE if impl == "triton" else "cpu"


def inputs(dtype=torch.float64, hidden_size=5, batch=2, seq=7):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, seq, hidden_size, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_()


def plain(hidden):
    """(real tubes,) step by step."""

    def vector(b, steps):
        return sum(hidden[b, end] - hidden[b, start] for start, end in steps if start >= 0)

    return torch.stack(
        [
            1 - functional.cosine_similarity(*(vector(b, steps) for steps in tube), dim=0)
            for b, row in enumerate(TUBES.tolist())
            for tube, real in zip(row, REAL[b], strict=True)
            if real
        ]
    )


def test_reference_equals_the_plain_expression():
    hidden = inputs()
    expected = plain(hidden)
    each = semantic_tube_loss(hidden, TUBES, reduction="none", impl="reference")
    assert each.shape == (2, 3)
    assert (each[~REAL] == 0).all()
    torch.testing.assert_close(each[REAL], expected, rtol=1e-12, atol=1e-12)
    for reduction in ("mean", "sum"):
        loss = semantic_tube_loss(hidden, TUBES, reduction=reduction, impl="reference")
        (dhidden,) = torch.autograd.grad(loss, hidden)
        reference = getattr(expected, reduction)()
        (dexpected,) = torch.autograd.grad(reference, hidden, retain_graph=True)
        torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dhidden, dexpected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_size", [5, 1027])
def test_matches_reference(impl, device, hidden_size, dtype):
    if impl == "triton" and dtype not in (torch.float32, torch.float16):
        pytest.skip("float64 is refused, and Triton's interpreter computes bfloat16 wrongly")
    check_tubes(inputs(hidden_size=hidden_size), TUBES, impl, dtype, device)
    hidden = inputs(hidden_size=hidden_size, batch=2, seq=30)
    check_tubes(hidden, random_tubes(2, 4, 30), impl, dtype, device)


def test_gradcheck(impl, device):
    if impl == "triton":
        pytest.skip("float64 is refused")
    options = {"reduction": "none", "impl": impl}
    assert torch.autograd.gradcheck(lambda x: semantic_tube_loss(x, TUBES, **options), inputs())


def test_opcheck(impl, device):
    if impl == "triton":
        pytest.skip("fakes and registration are the same for all back ends")
    torch.library.opcheck(torch.ops.llmjepa_kernels.tube_vectors, (inputs(), TUBES, impl))


def test_only_padding_gives_zero_and_a_gradient_of_zero(impl, device):
    hidden = torch.randn(2, 5, 8, device=device, requires_grad=True)
    for num_tubes in (0, 3):
        tubes = torch.full((2, num_tubes, 2, 3, 2), -1, device=device)
        loss = semantic_tube_loss(hidden, tubes, impl=impl)
        (dhidden,) = torch.autograd.grad(loss, hidden)
        assert loss == 0
        assert (dhidden == 0).all()


def test_a_vector_of_zeros_has_the_clamped_cosine(impl, device):
    """It leads to itself: its gradients cancel, however large. The other one's are zero."""
    tubes = torch.tensor([[[[[1, 1], NONE, NONE], [[2, 3], NONE, NONE]]]], device=device)
    hidden = torch.randn(1, 4, 8, device=device, requires_grad=True)
    loss = semantic_tube_loss(hidden, tubes, impl=impl)
    (dhidden,) = torch.autograd.grad(loss, hidden)
    assert loss == 1
    assert (dhidden == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_reaches_all_of_its_tubes_and_nothing_else(impl, device):
    hidden = inputs(torch.float32, hidden_size=20).detach()
    hidden[1, 5, 3] = torch.nan
    hidden = hidden.to(device).requires_grad_()
    each = semantic_tube_loss(hidden, TUBES.to(device), reduction="none", impl=impl)
    (dhidden,) = torch.autograd.grad(each.sum(), hidden)
    assert each.isnan().tolist() == [[False] * 3, [True, False, True]]
    assert dhidden[1].isnan().any(dim=1).all()
    assert dhidden[0].isfinite().all()


def test_rows_without_a_step_change_no_bit(impl, device):
    hidden = inputs(torch.float32, hidden_size=20, seq=12).detach().to(device)

    def run(hidden):
        hidden = hidden.detach().requires_grad_()
        each = semantic_tube_loss(hidden, TUBES.to(device), reduction="none", impl=impl)
        return each.detach(), torch.autograd.grad(each.sum(), hidden)[0]

    changed = hidden.clone()
    changed[:, 7:] = torch.nan
    before, after = run(hidden), run(changed)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert not after[1][:, 7:].any()


def test_strided_hidden(impl, device):
    wide = torch.randn(2, 10, 40, device=device)
    results = []
    for x in (wide[:, 2:9, 8:24], wide[:, 2:9, 8:24].contiguous()):
        x = x.detach().requires_grad_()
        loss = semantic_tube_loss(x, TUBES.to(device), impl=impl)
        results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("wrong", [[5, 7], [7, 5], [-2, 3], [3, -1], [-1, 3], [-2, -2]])
def test_a_step_outside_the_row_is_never_read(impl, device, wrong):
    if device != "cpu":
        pytest.skip("asserted on the device, which it would leave unusable")
    tubes = TUBES.clone()
    tubes[1, 0, 1, 2] = torch.tensor(wrong)
    message = rf"0 \.\. 6.*tubes\[1, 0, 1, 2\] = \[{wrong[0]}, {wrong[1]}\]"
    with pytest.raises(IndexError, match=message):
        semantic_tube_loss(inputs(torch.float32), tubes, impl=impl)


@pytest.mark.skipif(not ISAS, reason="the library was not compiled")
def test_cpu_threads_do_not_change_a_bit():
    hidden = inputs(torch.float32, hidden_size=512, seq=900)
    tubes = random_tubes(2, 300, 900)
    before = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            loss = semantic_tube_loss(hidden, tubes, impl="cpu")
            runs.append([loss, *torch.autograd.grad(loss, hidden)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_eager_calls_and_the_operation_of_torch_give_the_same_bits(monkeypatch):
    results = []
    for eager in (True, False):
        monkeypatch.setattr(ops_tubes, "runs_eagerly", lambda *tensors, eager=eager: eager)
        hidden = inputs()
        loss = semantic_tube_loss(hidden, TUBES)
        results.append((loss, *torch.autograd.grad(loss, hidden)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_torch_compile_traces_through():
    def loss(hidden):
        return semantic_tube_loss(hidden, TUBES)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    hidden = inputs()
    expected, actual = loss(hidden), compiled(hidden)
    assert torch.equal(actual, expected)
    gradients = [torch.autograd.grad(x, hidden)[0] for x in (expected, actual)]
    assert torch.equal(*gradients)


def test_second_derivatives_are_refused():
    hidden = inputs()
    (gradient,) = torch.autograd.grad(semantic_tube_loss(hidden, TUBES), hidden, create_graph=True)
    penalty = gradient.square().sum() + hidden.square().sum()  # which has a derivative of its own
    with pytest.raises(RuntimeError, match="the losses have no second derivatives"):
        penalty.backward()


@pytest.mark.skipif(not TRITON, reason="needs triton")
def test_triton_refuses_float64():
    with pytest.raises(ValueError, match=r"hidden must be float16, .* got torch.float64"):
        semantic_tube_loss(inputs().to(DEVICE), TUBES.to(DEVICE), impl="triton")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.zeros(7, 5)}, r"hidden must .* got .* \(7, 5\)"),
        ({"tubes": TUBES.int()}, "tubes must be int64.*int32"),
        ({"tubes": TUBES[:1]}, r"batch = 2.*\(1, 3, 2, 3, 2\)"),
        ({"tubes": TUBES[..., 0]}, r"num_tubes, 2, 3, 2\), got .* \(2, 3, 2, 3\)"),
        ({"reduction": "max"}, "reduction must be one of .* got 'max'"),
        ({"impl": "fast"}, "impl must be one of .* got 'fast'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = {"hidden": torch.zeros(2, 7, 5), "tubes": TUBES, "impl": "reference"}
    with pytest.raises(ValueError, match=message):
        semantic_tube_loss(**{**good, **arguments})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_model_sized_batch_natively(dtype):
    hidden = inputs(hidden_size=2048, batch=8, seq=4096)
    check_tubes(hidden, random_tubes(8, 120, 4096), "triton", dtype, "cuda")


@pytest.mark.gpu
def test_fifty_runs_on_a_gpu_give_the_same_bits():
    hidden = inputs(torch.bfloat16, hidden_size=2048, batch=4, seq=100).detach().cuda()
    hidden.requires_grad_()
    tubes = random_tubes(4, 300, 100).cuda()

    def run():
        loss = semantic_tube_loss(hidden, tubes)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    first = run()
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
