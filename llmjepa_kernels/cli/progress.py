"""What commands say while they work, on standard error: a line per phase, a bar per long one.

In a terminal of 80 columns all of it can be read; in a file it is lines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

from llmjepa_kernels.cli.say import say

T = TypeVar("T")
SECONDS_PER_LINE = 10.0  # in a file


def bars() -> Progress:
    """Bars with a name, a count and the field ``note``."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def counted(batches: Iterable[Sequence[T]], name: str, total: int) -> Iterator[Sequence[T]]:
    """The same batches, under a bar of their items."""
    with bars() as progress:
        task = progress.add_task(name, total=total, note="")
        for batch in batches:
            yield batch
            progress.advance(task, len(batch))


class TrainingBar(ProgressCallback):
    """Trainer's bar with the latest losses on it; in a file, a line with them now and then."""

    NAMES = (
        *(("ntp_loss", "ntp"), ("jepa_loss", "jepa"), ("stp_loss", "stp"), ("cosine", "cos")),
        *(("sigreg_loss", "sigreg"), ("vicreg_loss", "vicreg")),
    )
    FORMAT = "{n_fmt}/{total_fmt} {bar:5} {remaining}{postfix}"

    def __init__(self) -> None:
        super().__init__()
        self._is_terminal = sys.stderr.isatty()
        self._last_line = time.monotonic()

    def close(self) -> None:
        """Ends the line of a bar that an error has cut off."""
        if self.training_bar is not None:
            self.training_bar.close()

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = 0
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                bar_format=self.FORMAT,
                dynamic_ncols=True,
                disable=not self._is_terminal,
            )

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self._is_terminal:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description_str("held-out losses", refresh=False)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = [f"{short} {logs[key]:.3g}" for key, short in self.NAMES if key in logs]
        if "tokens_per_second" in logs:
            shown.append(f"{logs['tokens_per_second']:.0f} tok/s")
        if not shown:
            return
        self.training_bar.set_postfix_str(" ".join(shown), refresh=False)
        is_due = time.monotonic() - self._last_line >= SECONDS_PER_LINE
        if not self._is_terminal and (is_due or state.global_step in (1, state.max_steps)):
            self._last_line = time.monotonic()
            say(" ".join([f"{state.global_step}/{state.max_steps}", *shown]))
