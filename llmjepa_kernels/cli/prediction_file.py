"""Predictions on disk as they are made, so that an evaluation goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmjepa_kernels.evaluation.predict import Prediction
from llmjepa_kernels.evaluation.rules import Rule, answer_of
from llmjepa_kernels.files import only_process, write_whole


def read_verdicts(
    path: str | os.PathLike[str],
    checkpoint: str,
    samples: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Any] | None = None,
) -> list[bool | None]:
    """Whether a checkpoint's answer to each sample is right, as `PredictionFile` has written it.

    Args:
        path: Of the JSONL file.
        checkpoint: Its name there.
        samples: Of all answers.
        weights: The checkpoint's, as its fingerprint ``weights``, and ``dtype`` and ``load_in``, in
            which they were loaded; compared where the file beside knows the same of the latter.

    Returns:
        One per sample; None where there is no answer.

    Raises:
        ValueError: A line is corrupt or of another sample, or none is of the checkpoint, or they
            are of other weights.
        OSError: There is no such file.
    """
    verdicts: list[bool | None] = [None] * len(samples)
    names = set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                values = json.loads(line)
                name, index, correct = (values[k] for k in ("checkpoint", "index", "correct"))
                if not isinstance(correct, bool):
                    raise TypeError(f"correct must be a bool, got {correct!r}")
                names.add(name)
                if Path(name) != Path(checkpoint) or index >= len(samples):
                    continue
                if values["answer"] != answer_of(samples[index]):
                    raise ValueError(f"answer is not that of sample {index} of the data")
            except (ValueError, TypeError, LookupError, RecursionError) as error:
                raise ValueError(f"{path}:{number} is no prediction: {error}") from error
            verdicts[index] = correct
    if verdicts.count(None) == len(verdicts):
        raise ValueError(f"{path} has no answers of {checkpoint}, but of {sorted(names)}")
    report = Path(path).with_suffix(".report.json")
    if weights is not None and report.is_file():
        answered = {**weights, **_settings_of(report, checkpoint)}
        loaded = all(answered[key] == weights[key] for key in ("dtype", "load_in"))
        if loaded and answered["weights"] != weights["weights"]:
            raise ValueError(f"{path} has answers that {checkpoint} gave with other weights")
    return verdicts


def _settings_of(report: Path, checkpoint: str) -> dict[str, Any]:
    """What a checkpoint's answers were made with, as far as the report says."""
    try:
        content = json.loads(report.read_bytes())
        found = content["checkpoints"].items()
        own = [each["settings"] for name, each in found if Path(name) == Path(checkpoint)]
        return {**content.get("settings", {}), **(own[0] if own else {})}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{report} is no report of an evaluation: {error!r}") from error


class PredictionFile:
    """A JSONL file of predictions, and beside it a JSON file of what they were made with.

    A line is a `Prediction` and the name of its checkpoint. Lines are written as they are made;
    the last one may be torn when the process is killed, and is then dropped and made again. What
    is read is judged again: a line's word for being correct does not count. Inside ``with``, the
    files are read, and no other process has them open.

    Args:
        path: Of the JSONL file; the other one ends in ``.report.json`` instead.
        settings: What all predictions depend on, such as the data; values that JSON keeps.
        samples: What is predicted.
        rule: Judges.

    Raises:
        ValueError: On entering: the file holds predictions made with other settings, or such as
            are not known, or a line is corrupt; says which.
        OSError: On entering: another process has it open.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: Mapping[str, Any],
        samples: Sequence[Mapping[str, Any]],
        rule: Rule,
    ) -> None:
        self.path = Path(path)
        self.report_path = self.path.with_suffix(".report.json")
        self._samples, self._rule = samples, rule
        self._report: dict[str, Any] = {"settings": dict(settings), "checkpoints": {}}
        self._predictions: dict[str, dict[int, Prediction]] = {}
        self._open = ExitStack()

    def __enter__(self) -> PredictionFile:
        with ExitStack() as stack:
            stack.enter_context(only_process(self.path))
            if self.path.exists():
                self._report["checkpoints"] = self._read_report()["checkpoints"]
                self._read_predictions()
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

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
            parts = [report["settings"], report["checkpoints"]]
            parts += [checkpoint["settings"] for checkpoint in report["checkpoints"].values()]
            if not all(isinstance(part, dict) for part in parts):
                raise TypeError
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} cannot be gone on with: {self.report_path} is missing or does not "
                "say what it was made with; delete it or choose another --output"
            ) from error
        self._compare(report["settings"], self._report["settings"])
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
                    checkpoint, prediction = self._prediction(json.loads(line))
                except (ValueError, RecursionError) as error:
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

    def _prediction(self, values: Any) -> tuple[str, Prediction]:
        """Checkpoint and prediction of a line, judged by the rule."""
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, got {type(values).__name__}")
        index = values.get("index")
        if type(index) is not int or not 0 <= index < len(self._samples):
            raise ValueError(f"index must be in 0 .. {len(self._samples) - 1}, got {index!r}")
        keys = ("checkpoint", "prompt", "answer", "completion")
        texts: dict[str, Any] = {key: values.get(key) for key in keys}
        for key, text in texts.items():
            if not isinstance(text, str):
                raise ValueError(f"{key} must be a string, got {text!r}")
        sample = self._samples[index]
        if texts["answer"] != answer_of(sample):
            raise ValueError(f"answer must be that of sample {index}, got {texts['answer']!r}")
        finished = values.get("finished")
        if not isinstance(finished, bool):
            raise ValueError(f"finished must be true or false, got {finished!r}")
        correct = self._rule.is_correct(texts["completion"], sample)
        name = texts.pop("checkpoint")
        return name, Prediction(index=index, **texts, correct=correct, finished=finished)

    def _write_report(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.report_path, json.dumps(self._report, indent=2) + "\n")
