"""How a sample becomes tokens and views; kept beside a checkpoint for all that follows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjepa_kernels.data.chat import (
    DIRECTIONS,
    LAYOUTS,
    PRED_POSITIONS,
    SUPERVISE,
    chat_example,
    chat_prompt,
    plain_example,
    plain_prompt,
)
from llmjepa_kernels.data.predictor_tokens import known_predictor_tokens
from llmjepa_kernels.packing import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = ("chat", "plain")
FORMAT_FILE = "llm_jepa.json"


@dataclass(frozen=True)
class ExampleFormat:
    """Makes the `Example` or the prompt of a sample, the same in training and in evaluation.

    Attributes:
        template: "chat", the tokenizer's chat template; or "plain", see `plain_example`.
        layout: "shared" or "official"; of "chat" only.
        direction, pred_position, supervise: See `chat_example`.
        pred_ids: The [PRED] tokens, from `add_predictor_tokens`.
        separator_id: The token between Text and Code; of "plain" only.
        template_kwargs: Passed to ``apply_chat_template``; of "chat" only.

    Raises:
        ValueError: A value is unknown, or not one of the chosen template's.
    """

    template: str = "chat"
    layout: str = "shared"
    direction: str = "text_to_code"
    pred_position: str = "append"
    pred_ids: tuple[int, ...] = ()
    separator_id: int | None = None
    supervise: str = "assistant"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        object.__setattr__(self, "pred_ids", tuple(self.pred_ids))
        for name, allowed in (
            ("template", TEMPLATES),
            ("layout", LAYOUTS),
            ("direction", DIRECTIONS),
            ("pred_position", PRED_POSITIONS),
            ("supervise", SUPERVISE),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if not all(_is_id(token) for token in self.pred_ids):
            raise ValueError(f"pred_ids must be token ids, got {self.pred_ids}")
        if not isinstance(self.template_kwargs, Mapping):
            raise ValueError(f"template_kwargs must be a mapping, got {self.template_kwargs!r}")
        if self.template == "chat":
            if self.separator_id is not None:
                raise ValueError(f"separator_id needs template='plain', got {self.separator_id}")
        elif not _is_id(self.separator_id):
            raise ValueError(
                f"template='plain' needs a token id as separator_id, got {self.separator_id!r}"
            )
        elif self.layout != "shared" or self.template_kwargs:
            raise ValueError(
                "template='plain' has the shared layout and no template_kwargs, got "
                f"layout={self.layout!r}, template_kwargs={dict(self.template_kwargs)}"
            )

    def example(self, sample: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        """The segments and pairs of a sample.

        Args:
            sample: With ``messages`` and maybe ``text``, ``code``, ``views`` and ``pairs``, as
                `read_chats` yields them.
            tokenizer: A fast tokenizer; with a chat template for "chat".

        Raises:
            ValueError: The sample is malformed, or does not fit the tokenizer.
        """
        options: dict[str, Any] = {
            "pred_ids": self.pred_ids,
            "text": sample.get("text"),
            "code": sample.get("code"),
            "views": sample.get("views"),
            "pairs": sample.get("pairs"),
            "direction": self.direction,
            "pred_position": self.pred_position,
            "supervise": self.supervise,
        }
        messages = sample["messages"]
        if self.separator_id is not None:
            return plain_example(messages, tokenizer, separator_id=self.separator_id, **options)
        return chat_example(
            messages,
            tokenizer,
            layout=self.layout,
            template_kwargs=self.template_kwargs,
            **options,
        )

    def prompt(self, sample: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens before the answer, as `example` trains on them; an answer is ignored."""
        if self.separator_id is not None:
            return plain_prompt(sample["messages"], tokenizer, separator_id=self.separator_id)
        return chat_prompt(sample["messages"], tokenizer, template_kwargs=self.template_kwargs)

    def save(self, directory: str | PathLike[str]) -> None:
        """Writes ``llm_jepa.json`` into a directory that exists."""
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"
        (Path(directory) / FORMAT_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(
        cls, directory: str | PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> ExampleFormat:
        """Reads what `save` wrote beside a checkpoint.

        Args:
            directory: Or the name of a model of the hub. Without the file, as for a model that was
                not trained here, the format is the default one, with the [PRED] tokens that the
                tokenizer has.
            tokenizer: The checkpoint's.

        Raises:
            ValueError: The file is corrupt or of another version; names it.
        """
        local = Path(directory)
        path = local / FORMAT_FILE if local.exists() else _of_hub(str(directory))
        if path is None or not path.is_file():
            return cls(pred_ids=tuple(known_predictor_tokens(tokenizer)) if tokenizer else ())
        try:
            values = json.loads(path.read_bytes())
            if not isinstance(values, dict):
                raise ValueError(f"expected an object, got {type(values).__name__}")
            names = {field.name for field in dataclasses.fields(cls)}
            if unknown := sorted(values.keys() - names):
                raise ValueError(f"unknown keys {unknown}, expected {sorted(names)}")
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no example format: {error}") from error


def _of_hub(name: str) -> Path | None:
    """The file in a model of the Hugging Face hub; None without it, or offline."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, FORMAT_FILE))
    except EntryNotFoundError:
        return None


def _is_id(token: Any) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and token >= 0
