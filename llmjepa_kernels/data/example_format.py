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
    check_embedding_token,
    plain_example,
    plain_prompt,
)
from llmjepa_kernels.data.predictor_tokens import known_predictor_tokens, predictor_tokens
from llmjepa_kernels.example import Example
from llmjepa_kernels.files import file_of_checkpoint

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
        end_id: The token at the end, EOS if None; of "plain" only.
        embedding_token, add_special_tokens, template_kwargs: See `chat_example`; of "chat" only.

    Raises:
        ValueError: A value is unknown, or not one of the chosen template's.
    """

    template: str = "chat"
    layout: str = "shared"
    direction: str = "text_to_code"
    pred_position: str = "append"
    pred_ids: tuple[int, ...] = ()
    separator_id: int | None = None
    end_id: int | None = None
    supervise: str = "assistant"
    embedding_token: str | int = "content"
    add_special_tokens: bool = False
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
            check_embedding_token(self.embedding_token, self.layout)
            for name in ("separator_id", "end_id"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs template='plain', got {getattr(self, name)}")
            if self.supervise == "text":
                raise ValueError("supervise='text' needs template='plain'")
        elif not _is_id(self.separator_id):
            raise ValueError(
                f"template='plain' needs a token id as separator_id, got {self.separator_id!r}"
            )
        elif self.end_id is not None and not _is_id(self.end_id):
            raise ValueError(f"end_id must be a token id, got {self.end_id!r}")
        else:
            for name in ("layout", "embedding_token", "add_special_tokens", "template_kwargs"):
                value, expected = getattr(self, name), _DEFAULTS[name]
                if value != expected:
                    raise ValueError(
                        f"template='plain' needs {name}={expected!r}, got {name}={value!r}"
                    )

    def example(
        self,
        sample: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
    ) -> Example:
        """The segments and pairs of a sample.

        Args:
            sample: With ``messages`` and maybe ``text``, ``code``, ``views``, ``pairs`` and
                ``view_turn``, as `read_chats` yields them.
            tokenizer: A fast tokenizer; with a chat template for "chat".
            max_length: See `chat_example`.

        Raises:
            ValueError: The sample is malformed, or does not fit the tokenizer or `max_length`.
        """
        views = sample.get("views")
        if isinstance(views, Mapping):  # Arrow fills in None for those of other samples
            views = {name: view for name, view in views.items() if view is not None}
        options: dict[str, Any] = {
            "pred_ids": self.pred_ids,
            "text": sample.get("text"),
            "code": sample.get("code"),
            "views": views,
            "pairs": sample.get("pairs"),
            "direction": self.direction,
            "pred_position": self.pred_position,
            "supervise": self.supervise,
            "max_length": max_length,
        }
        messages = sample["messages"]
        view_turn = sample.get("view_turn")
        if self.separator_id is not None and view_turn is not None:
            raise ValueError(f"view_turn needs template='chat', got {view_turn!r}")
        if self.separator_id is not None:
            return plain_example(
                messages,
                tokenizer,
                separator_id=self.separator_id,
                end_id=self.end_id,
                **options,
            )
        return chat_example(
            messages,
            tokenizer,
            layout=self.layout,
            embedding_token=self.embedding_token,
            add_special_tokens=self.add_special_tokens,
            view_turn=-1 if view_turn is None else view_turn,
            template_kwargs=self.template_kwargs,
            **options,
        )

    def prompt(self, sample: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens before the answer, as `example` trains on them; an answer is ignored."""
        if self.separator_id is not None:
            return plain_prompt(sample["messages"], tokenizer, separator_id=self.separator_id)
        return chat_prompt(
            sample["messages"],
            tokenizer,
            add_special_tokens=self.add_special_tokens,
            template_kwargs=self.template_kwargs,
        )

    def save(self, directory: str | PathLike[str]) -> None:
        """Writes ``llm_jepa.json`` into a directory that exists."""
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"
        (Path(directory) / FORMAT_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(
        cls,
        directory: str | PathLike[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        num_pred_tokens: int | None = None,
        layout: str | None = None,
    ) -> ExampleFormat:
        """Reads what `save` wrote beside a checkpoint.

        Args:
            directory: Or the name of a model of the hub. Without the file, as for a model that was
                not trained here, the format is the default one but for what follows.
            tokenizer: The checkpoint's. Without it a model without the file has no [PRED] tokens,
                as is enough to make prompts.
            num_pred_tokens, layout: Those that a model without the file was trained with.

        Raises:
            ValueError: The file is corrupt or of another version; names it. Or there is none, and
                how many of the tokenizer's [PRED] tokens follow a view is not said.
        """
        path = file_of_checkpoint(directory, FORMAT_FILE)
        if path is None:
            known = 0 if tokenizer is None else known_predictor_tokens(tokenizer)
            if known and num_pred_tokens is None:
                raise ValueError(
                    f"there is no {Path(directory, FORMAT_FILE)}, but the tokenizer has {known} "
                    "[PRED] tokens: say how many of them follow a view and in which layout it was "
                    "trained (num_pred_tokens, layout), which for the authors' is official"
                )
            if num_pred_tokens is not None and not 0 <= num_pred_tokens <= known:
                raise ValueError(
                    f"num_pred_tokens of {directory} must be in 0 .. {known}, the [PRED] tokens of "
                    f"its tokenizer, got {num_pred_tokens}"
                )
            ids = {} if tokenizer is None else tokenizer.get_added_vocab()
            pred_ids = tuple(ids[token] for token in predictor_tokens(num_pred_tokens or 0))
            return cls(pred_ids=pred_ids, layout=layout or "shared")
        for name, given in (("num_pred_tokens", num_pred_tokens), ("layout", layout)):
            if given is not None:
                raise ValueError(
                    f"{name} is for checkpoints that do not say so: {path} does, got {given!r}"
                )
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


# Of the fields of "chat" only.
_DEFAULTS: dict[str, Any] = {
    "layout": "shared",
    "embedding_token": "content",
    "add_special_tokens": False,
    "template_kwargs": {},
}


def _is_id(token: Any) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and token >= 0
