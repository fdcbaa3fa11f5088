"""The losses of a batch, and of what each is a mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What is logged of a batch's outputs, and of what it is a mean if not of supervised tokens.
MEANS = ("ntp_loss", "jepa_loss", "cosine", "sigreg_loss", "vicreg_loss", "stp_loss", "aux_loss")
OF = dict.fromkeys(("jepa_loss", "cosine", "sigreg_loss", "vicreg_loss"), "pairs")
OF["stp_loss"] = "tubes"


def means_of(outputs: Any) -> dict[str, Tensor]:
    """What is logged of the outputs of a loss; 0 for terms that it has none of."""
    zero = torch.zeros_like(outputs.ntp_loss)
    means = {name: getattr(outputs, name) for name in MEANS}
    return {name: zero if mean is None else mean for name, mean in means.items()}
