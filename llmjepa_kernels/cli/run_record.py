"""What is kept of a training run, so that an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmjepa_kernels.files import write_whole
from llmjepa_kernels.training.checkpoints import checkpoints, has_training_state, why_incomplete

RECORD = "run.json"
LENGTHS = ("epochs", "max_steps")


@dataclass
class RunRecord:
    """The options of a run from its beginning, and its result once it is finished.

    Attributes:
        directory: Of the run's checkpoints; gets ``run.json``.
        name: The objective.
        seed: Of weights and order.
        options: All that the result depends on; can be written as JSON.
        result: ``name``, ``seed`` and what `finish` was given; None before.
    """

    directory: Path
    name: str
    seed: int
    options: dict[str, Any]
    result: dict[str, Any] | None = field(default=None, init=False)

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"

    def check(self, *, resume: bool, overwrite: bool = False) -> None:
        """Reads the result of a finished run, or makes sure that nothing is overwritten.

        A run that is asked for more epochs or updates than before goes on from its last checkpoint.

        Raises:
            ValueError: Without `resume` and `overwrite`, there is an earlier run; with `resume`,
                that run had other options or was of a version with others, or is to be longer and
                has no checkpoint, or its record is corrupt.
        """
        if not resume:
            if not overwrite and (found := self._leftovers()):
                raise ValueError(
                    f"{self.directory} holds an earlier run ({found[0].name}): go on with it by "
                    "--resume, delete it by --overwrite, or choose another --output-dir"
                )
            return
        path = self.directory / RECORD
        if not path.is_file():
            if found := self._leftovers():
                raise ValueError(
                    f"--resume: {self.directory} holds {found[0].name}, but no {RECORD} with the "
                    "options of its run: delete it by --overwrite"
                )
            return
        try:
            record = json.loads(path.read_bytes())
            before, result = record["options"], record["result"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is no record of a run: {error!r}") from error
        now = json.loads(json.dumps(self.options, default=str))
        if unknown := sorted(before.keys() ^ now.keys()):
            raise ValueError(
                f"--resume: the run in {self.directory} is of another version of llmjepa_kernels, "
                f"with other options than this one: {', '.join(unknown)}; choose another "
                "--output-dir"
            )
        changed = sorted(k for k in now if before[k] != now[k])
        if not all(_is_longer(k, before[k], now[k]) for k in changed):
            raise ValueError(
                f"--resume: the run in {self.directory} had other options: "
                + ", ".join(f"{k} {before[k]!r}, now {now[k]!r}" for k in changed)
                + "; choose another --output-dir"
            )
        if result is not None and not changed:
            self.result = result
            return
        checkpoint, _ = self.checkpoint()
        if changed and checkpoint is None:
            raise ValueError(
                f"--resume: the run in {self.directory} has no checkpoint to go on from to "
                f"{changed[0]} {now[changed[0]]!r}: --save-steps or --save-strategy would have "
                "made some"
            )
        if checkpoint is not None and not has_training_state(checkpoint):
            raise ValueError(
                "--resume needs the state of the optimizer, which --save-only-model has kept out "
                f"of {checkpoint}: begin anew by --overwrite"
            )

    def checkpoint(self) -> tuple[Path | None, list[str]]:
        """The last complete checkpoint, and what is wrong with later ones."""
        faults: list[str] = []
        for checkpoint in checkpoints(self.directory):
            fault = why_incomplete(checkpoint)
            if fault is None:
                return checkpoint, faults
            faults.append(f"{checkpoint} is incomplete: {fault}")
        return None, faults

    def delete(self) -> None:
        """Deletes an earlier run, its record first: so nothing goes on with what is left of it."""
        for path in self._leftovers():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def begin(self) -> None:
        """Writes the options; an earlier result is gone."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write(None)

    def finish(self, values: dict[str, Any]) -> dict[str, Any]:
        """Writes the result, and returns it."""
        result = {"name": self.name, "seed": self.seed, **values}
        self._write(result)
        return result

    def _leftovers(self) -> list[Path]:
        """What an earlier run has left: its record, checkpoints and weights."""
        names = (RECORD, "adapter", "adapter_config.json", "*.safetensors", "*.index.json")
        found = [path for name in names for path in sorted(self.directory.glob(name))]
        return found + checkpoints(self.directory)

    def _write(self, result: dict[str, Any] | None) -> None:
        record = {"options": self.options, "result": result}
        write_whole(self.directory / RECORD, json.dumps(record, indent=1, default=str))


def _is_longer(name: str, before: Any, now: Any) -> bool:
    """Whether an option asks for more of the same training."""
    both = isinstance(before, int | float) and isinstance(now, int | float)
    return name in LENGTHS and both and now > before
