"""The JEPA term, forward and backward, against plain PyTorch."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from benchmarks.timing import synchronize
from llmjepa_kernels import last_token_loss


def plain(hidden, pairs):
    x, y = hidden[0, pairs[0]].float().unbind(1)
    return (1 - cosine_similarity(x, y)).mean()


LOSSES = {"ours": last_token_loss, "plain PyTorch": plain}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("seq", "pairs", "hidden_size"), [(2048, 32, 576), (2048, 32, 2048), (16384, 256, 2048)]
)
def test_last_token_loss(benchmark, loss, seq, pairs, hidden_size, device):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, seq, hidden_size, generator=generator).to(device).requires_grad_()
    chosen = torch.randperm(seq, generator=generator)[: 2 * pairs].view(1, pairs, 2).to(device)

    def run():
        value = LOSSES[loss](hidden, chosen)
        (gradient,) = torch.autograd.grad(value, hidden)
        synchronize(device)
        return value, gradient

    for result, expected in zip(run(), run_in_float64(hidden, chosen), strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-6)
    benchmark.group = f"last-token loss: N={seq} pairs={pairs} hidden={hidden_size}"
    benchmark(run)


def run_in_float64(hidden, pairs):
    hidden = hidden.detach().double().requires_grad_()
    x, y = hidden[0, pairs[0]].unbind(1)
    value = (1 - cosine_similarity(x, y)).mean()
    return value, *torch.autograd.grad(value, hidden)
