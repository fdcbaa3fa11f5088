"""What a trainer of packed rows cannot do, and would otherwise ignore."""

from __future__ import annotations

from typing import Any

from llmjepa_kernels.training.view_head import view_head_of

# Of TRL's SFTConfig, what its own collator and loss would do, and the values that ask for nothing.
SFT_OPTIONS = {
    "loss_type": ("nll", "chunked_nll"),
    "completion_only_loss": (None,),
    "assistant_only_loss": (False,),
    "packing": (False,),
    "padding_free": (False,),
}


def check_supported(trainer: Any) -> None:
    """Raises ValueError if a trainer is asked for what does not fit a packed row."""
    unsupported = {
        "DataParallel (start one process per GPU with torchrun)": trainer.args.n_gpu > 1,
        "label_smoothing_factor": trainer.args.label_smoothing_factor,
        "compute_loss_func": trainer.compute_loss_func,
        "compute_metrics": trainer.compute_metrics,
        "dispatch_batches": trainer.accelerator.dispatch_batches,
        # Its noise is by the length of a row, here that of many examples.
        "neftune_noise_alpha": trainer.args.neftune_noise_alpha,
    }
    for name, usual in SFT_OPTIONS.items():
        given = getattr(trainer.args, name, usual[0])
        if given not in usual:
            raise ValueError(
                f"LLMJEPATrainer does not support {name} of SFTConfig (see LLMJEPACollator and "
                f"ExampleFormat), got {given!r}"
            )
    head = view_head_of(trainer.model)
    if head is not None:
        unsupported["a ViewHead under FSDP"] = trainer.is_fsdp_enabled
        unsupported["a ViewHead under DeepSpeed"] = trainer.is_deepspeed_enabled
        frozen = [name for name, p in head.named_parameters() if not p.requires_grad]
        unsupported["a frozen ViewHead (call get_peft_model before add_view_head)"] = frozen
    for name, given in unsupported.items():
        if given:
            raise ValueError(f"LLMJEPATrainer does not support {name}, got {given!r}")
