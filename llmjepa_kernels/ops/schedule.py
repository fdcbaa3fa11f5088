"""How the mask travels with a batch, so that no layer has to make it or to wait for the device.

It is made once per batch in the form that the back end takes, a `BlockMask` or, for "flash", a
`FlashPlan`, and travels as batch-first int32 tensors among the arguments of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from llmjepa_kernels.ops.block_mask import BlockMask
from llmjepa_kernels.ops.flash_plan import FlashPlan

if TYPE_CHECKING:
    from typing_extensions import Self


class Form(Protocol):
    """The mask as some back ends take it."""

    @classmethod
    def from_visible_until(
        cls,
        visible_until: Tensor,
        *,
        position_ids: Tensor | None = None,
        window: int | None = None,
    ) -> Self:
        """Made of the mask itself; `position_ids` may be left out where there is no window."""
        ...

    def schedule(self) -> dict[str, Tensor]:
        """The tensors to travel, by their keys."""
        ...

    @classmethod
    def has_key(cls, key: str) -> bool:
        """Whether `schedule` may have a tensor of this key."""
        ...

    @classmethod
    def from_schedule(
        cls, visible_until: Tensor, schedule: Mapping[str, Tensor], window: int | None = None
    ) -> Self:
        """Put together again from a mapping that holds `schedule()`, for layers with `window`.

        Raises:
            ValueError: A tensor is missing or does not fit `visible_until`; says which.
        """
        ...

    def check(self) -> None:
        """Raises ValueError unless kernels may read what the tensors name.

        Elsewhere than on a CPU it is asserted, without waiting for the device.
        """
        ...


# By the names under which `view_attention` takes them.
FORMS: dict[str, type[Form]] = {"block_mask": BlockMask, "flash_plan": FlashPlan}


def forms_of(impl: str | None) -> tuple[str, ...]:
    """The forms that ``impl`` may take, the one that it needs first."""
    if impl is None:  # which may come to mean "flash"
        return ("block_mask", "flash_plan")
    return ("flash_plan",) if impl == "flash" else ("block_mask",)


def is_given(form: str, arguments: Mapping[str, Any]) -> bool:
    """Whether any tensor of that form is among the arguments of a model."""
    return any(FORMS[form].has_key(key) for key, value in arguments.items() if value is not None)


def schedule_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What attention needs precomputed, of the tensors of a batch."""
    return {
        key: value
        for key, value in batch.items()
        if value is not None and any(form.has_key(key) for form in FORMS.values())
    }


def masks_for(
    impl: str | None, visible_until: Tensor, arguments: Mapping[str, Any], window: int | None
) -> dict[str, Any]:
    """The arguments of `view_attention` that hold the mask, as far as ``impl`` may take them."""
    return {
        form: FORMS[form].from_schedule(visible_until, arguments, window)
        for form in forms_of(impl)
        if is_given(form, arguments)
    }
