"""Where models run."""

from __future__ import annotations

import torch


def chosen_device(name: str | None) -> torch.device:
    """The device of that name; without one a GPU, if there is one.

    Raises:
        ValueError: It cannot be used.
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        probe = torch.ones(1, device=name)
        probe.add(1).item()  # the meta device can be named but computes nothing
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from error
