"""Head and cross entropy in Liger's fused kernels, which keep few logits and their gradients.

Source: Liger Kernel, arXiv:2410.10989.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmjepa_kernels.example import IGNORE
from llmjepa_kernels.hf.head import Head
from llmjepa_kernels.ops.registry import check_can_launch, on_device_of


def check(head: Head, device: torch.device) -> None:
    """Raises what is wrong before a forward pass is paid for.

    Raises:
        ImportError: Liger is not installed.
        RuntimeError: Triton does not run on `device`.
        ValueError: The head is more than one matrix, or in float64.
    """
    try:
        import liger_kernel  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "head_impl='liger' needs Liger: pip install 'llmjepa_kernels[stacks]'"
        ) from error
    check_can_launch("head_impl='liger'", device)
    linear = head.embeddings
    # Quantized, adapted, or moved by hooks that stand in its forward.
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
        raise ValueError(
            f"head_impl='liger' needs a head that is a plain nn.Linear, got {kind}: leave it out "
            "of LoRA, quantization and offloading"
        )
    if linear.weight.dtype == torch.float64:
        raise ValueError("head_impl='liger' computes in float32, got a head in float64")


def cross_entropy(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross entropies of ``head(hidden)``.

    Args:
        head: Which passed `check`.
        hidden: (…, hidden_size).
        targets: (…) int64, −100 where there is no loss.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    weight, bias = head.embeddings.weight, head.embeddings.bias
    # Liger knows no factor of logits; one of states and bias is the same.
    factor = 1.0 if head.factor is None else head.factor
    if head.divisor is not None:
        factor /= head.divisor
    if factor != 1:
        hidden, bias = hidden * factor, None if bias is None else bias * factor
    if weight.requires_grad and not hidden.requires_grad:
        # It makes gradients where those of the states are wanted.
        hidden = hidden.detach().requires_grad_(torch.is_grad_enabled())
    with on_device_of(hidden):
        return liger_fused_linear_cross_entropy(
            hidden.flatten(0, -2),
            weight,
            targets.flatten(),
            bias,
            ignore_index=IGNORE,
            reduction="sum",
            softcap=head.softcap,
            accum_dtype=torch.float32,
        )
