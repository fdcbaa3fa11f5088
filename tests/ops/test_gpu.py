"""What surrounds the kernels on a GPU: graphs, streams, other devices, rows of all lengths."""

import pytest
import torch

from llmjepa_kernels import BlockMask, last_token_loss, view_attention
from tests.support.helpers import AttentionCase, check_attention, random_rows

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu


def inputs(seq=300, device="cuda", head_dim=64, heads=4, kv_heads=2):
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(
            *(2, seq, n, head_dim), generator=generator, device=device, dtype=torch.bfloat16
        )
        .transpose(1, 2)
        .requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    return q, k, v, random_rows(2, seq, 0, 30.0)[0].to(device)


def forward_and_backward(q, k, v, visible_until, mask):
    out = view_attention(q, k, v, visible_until, block_mask=mask)
    gradients = torch.autograd.grad(out, (q, k, v), out.detach())
    return out.detach(), *gradients  # a graph that lives on would tie a capture to its stream


def test_cuda_graphs_replay_the_same_bits():
    q, k, v, visible_until = inputs()
    mask = BlockMask.from_visible_until(visible_until)
    eager = forward_and_backward(q, k, v, visible_until, mask)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # as torch asks for before a capture
        forward_and_backward(q, k, v, visible_until, mask)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(q, k, v, visible_until, mask)
    for result in captured:
        result.detach().fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
    with torch.no_grad():  # it reads its inputs anew
        q.mul_(2)
    graph.replay()
    doubled = forward_and_backward(q, k, v, visible_until, mask)
    assert all(torch.equal(a, b) for a, b in zip(captured, doubled, strict=True))


def test_a_second_device_while_another_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    results = []
    for device in ("cuda:0", "cuda:1"):
        q, k, v, visible_until = (x.detach().to(device) for x in inputs(device="cuda:0"))
        qkv = [x.requires_grad_() for x in (q, k, v)]
        mask = BlockMask.from_visible_until(visible_until)
        pairs = torch.tensor([[[3, 9], [4, 7]]] * 2, device=device)
        out = forward_and_backward(*qkv, visible_until, mask)
        loss = last_token_loss(out[0].flatten(2), pairs)
        results.append([x.cpu() for x in (*out, loss)])
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("seq", [1, 15, 64, 65, 127, 129, 1000, 8191])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lengths_in_bfloat16(seq, head_dim):
    case = AttentionCase.random(seq=seq, head_dim=head_dim, mean_length=40, seed=seq)
    check_attention(case, "triton", torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mean_length", [8, 200, 4000])
def test_long_rows_with_every_option(mean_length, dtype):
    case = AttentionCase.random(
        heads=8,
        kv_heads=2,
        seq=4096,
        head_dim=64,
        mean_length=mean_length,
        sinks=True,
        window=700,
        softcap=20.0,
        softmax_scale=0.2,
    )
    check_attention(case, "triton", dtype, "cuda")
