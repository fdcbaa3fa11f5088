"""Predictions on disk as they are made, so that an evaluation goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmjepa_kernels.evaluation.predict import Prediction
from llmjepa_kernels.files import write_whole


class PredictionFile:
    """A JSONL file of predictions, and beside it a JSON file of what they were made with.

    A line is a `Prediction` and the name of its checkpoint. Lines are written as they are made;
    the last one may be torn when the process is killed, and is then dropped and made again.

    Args:
        path: Ends in ``.jsonl``; the other file ends in ``.report.json`` instead.
        settings: What all predictions depend on, such as the data; values that JSON keeps.
    Raises:
        ValueError: The path does not end so, the file holds predictions made with other settings,
            or such as are not known, or a line is corrupt; says which.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]):
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise ValueError(f"the file of predictions must end in .jsonl, got {str(path)!r}")
        self.report_path = self.path.with_suffix(".report.json")
        self._report: dict[str, Any] = {"settings": dict(settings), "checkpoints": {}}
        self._predictions: dict[str, dict[int, Prediction]] = {}
        if self.path.exists():
            self._report["checkpoints"] = self._read_report()["checkpoints"]
            self._read_predictions()

    def open_checkpoint(self, name: str, settings: Mapping[str, Any]) -> dict[int, Prediction]:
        """The predictions that a checkpoint has already.

        Args:
            name: Of the checkpoint.
            settings: What its predictions depend on, such as its weights.
        Raises:
            ValueError: They were made with other settings.
        """
        known = self._report["checkpoints"].get(name)
        if known is None:
            self._report["checkpoints"][name] = {"settings": dict(settings)}
            self._write_report()
        else:
            self._compare(known["settings"], settings, f"{name}: ")
        return dict(self._predictions.get(name, {}))

    def append(self, name: str, predictions: Iterable[Prediction]) -> None:
        """Writes predictions of a checkpoint, which survive a kill of the process at once."""
        lines = [json.dumps({"checkpoint": name, **asdict(p)}) + "\n" for p in predictions]
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(lines)

    def report(self, name: str, results: Mapping[str, Any]) -> None:
        """Writes what came out for a checkpoint beside its settings."""
        self._report["checkpoints"][name].update(results)
        self._write_report()

    def _read_report(self) -> dict[str, Any]:
        try:
            report = json.loads(self.report_path.read_bytes())
            self._compare(report["settings"], self._report["settings"])
            if not isinstance(report["checkpoints"], dict):
                raise TypeError
        except (FileNotFoundError, json.JSONDecodeError, LookupError, TypeError) as error:
            raise ValueError(
                f"{self.path} cannot be gone on with: {self.report_path} is missing or does not "
                "say what it was made with; delete it or choose another --output"
            ) from error
        return report

    def _compare(
        self, found: Mapping[str, Any], wanted: Mapping[str, Any], place: str = ""
    ) -> None:
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                raise ValueError(
                    f"{self.path} belongs to another evaluation, {place}its {key} is "
                    f"{found.get(key)!r}, not {wanted.get(key)!r}: delete it or choose another "
                    "--output"
                )

    def _read_predictions(self) -> None:
        good_bytes = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break  # torn
                try:
                    values = json.loads(line)
                    checkpoint = values.pop("checkpoint")
                    prediction = Prediction(**values)
                except (ValueError, LookupError, TypeError, AttributeError) as error:
                    raise ValueError(f"{self.path}:{number} is no prediction: {error}") from error
                if checkpoint not in self._report["checkpoints"]:
                    raise ValueError(
                        f"{self.path}:{number} is a prediction of {checkpoint}, which "
                        f"{self.report_path} does not say the settings of, as when two commands "
                        "write there at once: delete it or choose another --output"
                    )
                self._predictions.setdefault(checkpoint, {})[prediction.index] = prediction
                good_bytes += len(line)
        os.truncate(self.path, good_bytes)

    def _write_report(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.report_path, json.dumps(self._report, indent=2) + "\n")
