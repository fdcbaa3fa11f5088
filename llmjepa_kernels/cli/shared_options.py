"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING
from typing import Any

from llmjepa_kernels.cli.option_parser import NOT_NEGATIVE, option
from llmjepa_kernels.data.chat import LAYOUTS
from llmjepa_kernels.data.recipes import RECIPES
from llmjepa_kernels.evaluation.rules import RULES
from llmjepa_kernels.hf.dtypes import QUANTIZATIONS

EVAL_SAMPLES = 200  # held-out ones
BUILT_IN_SEED = 42


def checkpoint_option() -> Any:
    return option(
        MISSING,
        "directory of a model or LoRA adapter, model of the Hugging Face hub, or .gguf file",
        metavar="CHECKPOINT",
    )


def num_pred_tokens_option() -> Any:
    return option(
        None,
        "[PRED] tokens behind a view, of checkpoints that llmjepa train did not make",
        metavar="K",
        range=NOT_NEGATIVE,
        default_is="none, unless the tokenizer has some, which then needs this option",
    )


def layout_option() -> Any:
    return option(
        None,
        "that such checkpoints were trained with; the authors' is official",
        choices=LAYOUTS,
        default_is="shared",
    )


def data_option(group: str | None = None) -> Any:
    return option(
        None,
        "as for llmjepa train",
        group=group,
        metavar="SOURCE",
        default_is="its built-in held-out pairs",
    )


def recipe_option(group: str | None = None) -> Any:
    return option(
        None,
        "makes chats of data with the columns of this dataset",
        group=group,
        choices=sorted(RECIPES),
        default_is="they are chats",
    )


def rule_option(group: str | None = None) -> Any:
    return option(
        None,
        "which answers are correct",
        group=group,
        choices=RULES,
        default_is="that of the --recipe's dataset, else exact, or startswith in the plain format",
    )


def databases_option(group: str | None = None) -> Any:
    return option(
        None, "of Spider, with DB_ID/DB_ID.sqlite; for --rule sql", group=group, metavar="DIR"
    )


def split_option(what_it_does: str, group: str | None = None) -> Any:
    return option(
        None,
        f"{what_it_does}: depth:N, regexes nested deeper than N; length:N, answers of more than N "
        "characters; pairs:F, regexes with one of the fraction F of all operator pairs, or "
        "'pairs:outer>inner,…', with one of these",
        group=group,
        metavar="SPEC",
    )


def device_option(group: str | None = None) -> Any:
    return option(
        None,
        "such as cuda:1",
        group=group,
        metavar="DEVICE",
        default_is="a GPU if there is one",
    )


def dtype_option(choices: Iterable[str], group: str | None = None) -> Any:
    return option("float32", "of the weights", group=group, choices=choices)


def load_in_option(group: str | None = None) -> Any:
    return option(
        None,
        "quantise the weights with bitsandbytes; --dtype is then that of products",
        group=group,
        choices=QUANTIZATIONS,
        default_is="they stay whole",
    )


def trust_option(group: str | None = None) -> Any:
    return option(False, "run the Python code that comes with some models", group=group)


def needs_gguf(*names: str) -> list[str]:
    """The package that reads .gguf files, if one of the models is one."""
    return ["gguf"] if any(name.endswith(".gguf") for name in names) else []
