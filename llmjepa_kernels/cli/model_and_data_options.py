"""The options of `llmjepa train` about the model and the data that it starts from."""

from __future__ import annotations

from dataclasses import dataclass

from llmjepa_kernels.cli.option_parser import COUNT, NOT_NEGATIVE, Options, Range, option
from llmjepa_kernels.cli.shared_options import (
    EVAL_SAMPLES,
    databases_option,
    dtype_option,
    load_in_option,
    recipe_option,
    rule_option,
    split_option,
    trust_option,
)
from llmjepa_kernels.cli.training_defaults import SMALL_LLAMA, TRAIN_SAMPLES, VOCAB_MULTIPLE
from llmjepa_kernels.hf.dtypes import TRAINABLE_DTYPES

POLICIES = ("refuse", "skip", "truncate")
# Headings of the help. The first has what most runs are about.
MAIN, MODEL, DATA = "options that matter most", "model", "data"


@dataclass(frozen=True)
class ModelAndData(Options):
    """What is trained, and on what; see `Options`."""

    model: str | None = option(
        None,
        "model of the Hugging Face hub, directory or .gguf file",
        group=MAIN,
        metavar="NAME",
        default_is="a small Llama from random weights, with a tokenizer trained on the data",
    )
    data: str | None = option(
        None,
        'JSONL, a line being {"messages": [{"role": "system", "content": …}, user, assistant]}; '
        '"text" and "code" may give other views, "views": {"name": "content", …} further ones, '
        'which Text predicts too unless "pairs": [["text", "name"], …] says which view predicts '
        "which. Also CSV, TSV or Parquet, - for standard input, a directory of src.txt and "
        "targ.txt or saved by the datasets library, or hub:NAME:SPLIT, see --recipe; .gz is "
        "unpacked",
        group=MAIN,
        metavar="SOURCE",
        default_is="built-in pairs of English and regular expressions",
    )
    eval_data: str | None = option(None, "the same, held out", group=MAIN, metavar="SOURCE")
    eval_split: float | None = option(
        None,
        "hold this fraction of --data out, the one that train_test_split of the datasets library "
        "draws, as the authors' scripts do",
        group=DATA,
        metavar="F",
        range=Range(above=0, at_most=0.99),
    )
    eval_split_seed: int = option(
        42, "of that draw", group=DATA, metavar="SEED", range=NOT_NEGATIVE
    )
    from_scratch: bool = option(
        False,
        "take the architecture of --model, or of a config.json, with random weights",
        group=MODEL,
    )
    hidden_size: int | None = option(
        None,
        "of the small Llama, whose heads are 32 wide, two of q to one of k and v",
        group=MODEL,
        metavar="N",
        range=Range(at_least=64, multiple_of=64),
        default_is=f"{SMALL_LLAMA['hidden_size']}",
    )
    num_layers: int | None = option(
        None,
        "of the small Llama",
        group=MODEL,
        metavar="N",
        range=COUNT,
        default_is=f"{SMALL_LLAMA['num_layers']}",
    )
    vocab_size: int | None = option(
        None,
        "train a tokenizer of N tokens on the data",
        group=MODEL,
        metavar="N",
        range=COUNT,
        default_is="the one of --model, else 512",
    )
    pad_vocab_to_multiple_of: int | None = option(
        None,
        "rows of the embeddings, which grow by those that are no token and never generated",
        group=MODEL,
        metavar="N",
        range=COUNT,
        default_is=f"{VOCAB_MULTIPLE} on a GPU, else no padding",
    )
    dtype: str = dtype_option(TRAINABLE_DTYPES, MODEL)
    load_in: str | None = load_in_option(MODEL)
    trust_remote_code: bool = trust_option(MODEL)
    recipe: str | None = recipe_option(DATA)
    rule: str | None = rule_option(DATA)
    databases: str | None = databases_option(DATA)
    split: str | None = split_option(
        "train without the samples out of distribution, and evaluate on them apart", DATA
    )
    train_samples: int | None = option(
        None,
        "train on the first N",
        group=DATA,
        metavar="N",
        range=COUNT,
        default_is=f"all of --data, {TRAIN_SAMPLES} built-in ones",
    )
    eval_samples: int = option(
        EVAL_SAMPLES,
        "evaluate on the first N held-out ones",
        group=DATA,
        metavar="N",
        range=COUNT,
    )
    max_length: int | None = option(
        None,
        "tokens in a packed row at most",
        group=DATA,
        metavar="N",
        range=COUNT,
        default_is="one row per batch, without padding",
    )
    max_sequence_length: int | None = option(
        None,
        "tokens of a chat, and of a view, at most",
        group=DATA,
        metavar="N",
        range=COUNT,
        default_is="the positions of the model",
    )
    max_length_policy: str = option(
        "refuse",
        "for samples that are longer, or do not fit in a row. refuse: end with an error; skip: "
        "leave them out and count them; truncate: cut the ends of chat and views off, as the "
        "authors' code",
        group=DATA,
        choices=POLICIES,
    )
    streaming: bool = option(
        False,
        "read --data again and again during training, needs --max-steps: for data larger than "
        "memory; --dataloader-num-workers tokenize",
        group=DATA,
    )
    shuffle_buffer: int = option(
        10_000,
        "samples of a stream in memory, from which the next is drawn",
        group=DATA,
        metavar="N",
        range=COUNT,
    )
    skip_bad_lines: bool = option(False, "leave malformed samples out and count them", group=DATA)
    share_prefixes: bool = option(
        True,
        "store equal prefixes, such as the system prompt, once per row",
        group=DATA,
    )

    def check(self) -> None:
        if self.from_scratch and self.model is None:
            raise ValueError("--from-scratch needs --model, whose architecture it takes")
        for name in SMALL_LLAMA:
            if self.model is not None and getattr(self, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} is for the small Llama, without --model")
        if self.vocab_size is not None and not self.random_weights:
            raise ValueError("--vocab-size is for a model --from-scratch")
        if self.eval_split is not None:
            if self.data is None or self.streaming:
                raise ValueError("--eval-split needs --data that is read as a whole")
            if self.eval_data is not None:
                raise ValueError("--eval-split holds out a part of --data: --eval-data is another")

    @property
    def random_weights(self) -> bool:
        """Whether training begins with random weights, of whatever architecture."""
        return self.from_scratch or self.model is None
