"""The JEPA term, forward, and with its backward, against plain PyTorch."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from benchmarks.timing import synchronize
from llmjepa_kernels import last_token_loss


def plain(hidden, pairs):
    x, y = hidden[0, pairs[0]].float().unbind(1)
    return (1 - cosine_similarity(x, y)).mean()


LOSSES = {"ours": last_token_loss, "plain PyTorch": plain}


def pytest_generate_tests(metafunc):
    shapes = [(2048, 32, 576), (2048, 32, 2048), (16384, 256, 2048)]
    dtypes = ["float32"]
    if metafunc.config.option.full:
        shapes += [(65536, 1024, 2048), (65536, 1024, 4096)]
        dtypes += ["bfloat16"]
    metafunc.parametrize(("seq", "pairs", "hidden_size"), shapes)
    metafunc.parametrize("dtype", dtypes)


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("loss", LOSSES)
def test_last_token_loss(benchmark, loss, direction, seq, pairs, hidden_size, dtype, device):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, seq, hidden_size, generator=generator)
    hidden = hidden.to(device, getattr(torch, dtype)).requires_grad_()
    chosen = torch.randperm(seq, generator=generator)[: 2 * pairs].view(1, pairs, 2).to(device)

    def forward():
        with torch.no_grad():
            LOSSES[loss](hidden, chosen)
        synchronize(device)

    def both():
        value = LOSSES[loss](hidden, chosen)
        (gradient,) = torch.autograd.grad(value, hidden)
        synchronize(device)
        return value, gradient

    rtol = max(1e-4, 4 * torch.finfo(hidden.dtype).eps)
    for result, expected in zip(both(), in_float64(hidden, chosen), strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=1e-6)
    benchmark.group = (
        f"last-token loss {direction}: N={seq} pairs={pairs} hidden={hidden_size} {dtype}"
    )
    benchmark(forward if direction == "forward" else both)


def in_float64(hidden, pairs):
    hidden = hidden.detach().double().requires_grad_()
    x, y = hidden[0, pairs[0]].unbind(1)
    value = (1 - cosine_similarity(x, y)).mean()
    return value, *torch.autograd.grad(value, hidden)
