"""The options of `llmjepa train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llmjepa_kernels.cli.model_and_data_options import MAIN, ModelAndData
from llmjepa_kernels.cli.objectives import OBJECTIVES
from llmjepa_kernels.cli.option_parser import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    option,
)
from llmjepa_kernels.cli.shared_options import (
    BUILT_IN_SEED,
    needs_gguf,
)
from llmjepa_kernels.cli.training_defaults import (
    AUTHORS,
    COMMON,
    FINE_TUNE,
    SCRATCH,
    SEPARATOR,
)
from llmjepa_kernels.data.chat import (
    DIRECTIONS,
    LAYOUTS,
    PRED_POSITIONS,
    SUPERVISE,
    check_embedding_token,
)
from llmjepa_kernels.data.example_format import TEMPLATES
from llmjepa_kernels.ops.loss import METRICS
from llmjepa_kernels.training.loss_dropout import PER
from llmjepa_kernels.tubes import FORMS

MATCHES = ("steps", "tokens")
# Of Transformers, those that no result depends on, or that are secret.
NOT_RECORDED = ("--hub-token", "--report-to", "--run-name")
OBJECTIVE, TRAINING = "objective", "training"


def _by_start(key: str) -> str:
    return f"{FINE_TUNE[key]:g} for trained weights, {SCRATCH[key]:g} for random ones"


# The terms of objectives, one of which an option is for.
NEEDED = {
    **dict.fromkeys(("jepa_weight", "metric", "detach_target", "loss_dropout"), "jepa"),
    **dict.fromkeys(("stp_weight", "tube_form", "tube_count", "tube_max_length"), "stp"),
    "sigreg_weight": "sigreg",
    "vicreg_weight": "vicreg",
    "projector_size": "jepa",
    **dict.fromkeys(("linear_predictor", "weight_warmup"), "jepa or stp"),
}
# Options that say nothing but beside others.
BESIDE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "temperature": ("--metric infonce", lambda options: options.metric == "infonce"),
    "gather_negatives": (
        "--metric infonce, or an --objective with sigreg or vicreg",
        lambda options: options.metric == "infonce" or options.terms & {"sigreg", "vicreg"},
    ),
    "loss_dropout_per": ("--loss-dropout", lambda options: options.loss_dropout),
    "eval_split_seed": ("--eval-split", lambda options: options.eval_split is not None),
    "shuffle_buffer": ("--streaming", lambda options: options.streaming),
    **dict.fromkeys(
        ("tube_count", "tube_max_length"),
        ("another --tube-form", lambda options: options.tube_form != "turns"),
    ),
}


def _default(name: str) -> Any:
    return TrainOptions.__dataclass_fields__[name].default


def _flag(name: str) -> str:
    no = "no-" if getattr(TrainOptions, name) is True else ""
    return f"--{no}{name.replace('_', '-')}"


@dataclass(frozen=True)
class TrainOptions(ModelAndData):
    """What ``llmjepa train`` is asked for; see `Options`."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"authors": AUTHORS}
    summary: ClassVar[str] = "train with LLM-JEPA"
    description: ClassVar[str] = """\
Trains a language model with next-token loss + λ · JEPA loss, or that of Semantic Tube Prediction
(STP), in one forward pass per batch.

Without options it makes pairs of English and regular expressions, trains a small Llama from random
weights on them, once with next-token loss alone and once with LLM-JEPA, and compares the two on
held-out pairs: about three minutes on two cores.
"""
    epilog: ClassVar[str] = """\
Every other option of transformers.TrainingArguments is accepted as well, for example
--weight-decay 0.01 --lr-scheduler-type linear --max-grad-norm 0.5.

examples:
  llmjepa train
  llmjepa train --model meta-llama/Llama-3.2-1B-Instruct --data train.jsonl --eval-data test.jsonl
  llmjepa train --model SmolLM2-135M-Instruct.Q4_1.gguf --data train.jsonl --lora-rank 64
  llmjepa train --seeds 1 2 3 --split depth:2
  llmjepa train --objective ntp jepa stp --stp-weight 0.05
  torchrun --nproc-per-node 8 -m llmjepa_kernels train --model Qwen/Qwen3-1.7B --data a.jsonl
"""

    when_interrupted: ClassVar[str] = (
        "interrupted: the same command with --resume (in place of --overwrite) keeps the runs that "
        "are finished, and goes on from the last checkpoint, if --save-steps or --save-strategy "
        "made any"
    )

    output_dir: Path = option(  # noqa: RUF009
        Path("outputs/train"),
        "gets a checkpoint per run, report.txt, report.png and report.json",
        group=MAIN,
        metavar="DIR",
        recorded=False,
    )
    preset: str | None = option(
        None,
        "defaults of another recipe; authors: that of their finetune.py, see the documentation",
        group=OBJECTIVE,
        choices=tuple(presets),
        default_is="those of this page",
        recorded=False,
    )
    objective: tuple[str, ...] = option(
        ("jepa",),
        "what is added to the next-token loss; a model is trained for each that is named, on the "
        "same data",
        group=MAIN,
        choices=OBJECTIVES,
        recorded=False,
    )
    jepa_weight: float = option(
        1.0,
        "λ, the weight of the JEPA loss",
        group=MAIN,
        metavar="WEIGHT",
        range=NOT_NEGATIVE,
    )
    stp_weight: float = option(
        0.02,
        "λ, the weight of the loss of STP",
        group=MAIN,
        metavar="WEIGHT",
        range=NOT_NEGATIVE,
    )
    lora_rank: int | None = option(
        None,
        "train LoRA of all attention and MLP projections, alpha 2R",
        group=MAIN,
        metavar="R",
        range=COUNT,
        default_is="all weights",
    )
    epochs: float | None = option(
        None,
        "passes over the data",
        group=MAIN,
        metavar="N",
        range=POSITIVE,
        default_is=_by_start("num_train_epochs"),
        alias="--num-train-epochs",
    )
    batch_size: int | None = option(
        None,
        "examples of a batch, on each process",
        group=MAIN,
        metavar="N",
        range=COUNT,
        default_is=_by_start("per_device_train_batch_size"),
        alias="--per-device-train-batch-size",
    )
    learning_rate: float | None = option(
        None,
        "the greatest one, see --lr-scheduler-type",
        group=MAIN,
        metavar="LR",
        range=NOT_NEGATIVE,
        default_is=_by_start("learning_rate"),
    )
    resume: bool = option(
        False,
        "go on from the last checkpoints in --output-dir, if there are any, and keep the results "
        "of runs that are finished, unless --epochs or --max-steps has grown",
        group=MAIN,
        recorded=False,
    )
    dry_run: bool = option(
        False,
        "write nothing: say what would be trained on, how many tokens that takes beside plain "
        "fine-tuning, about how much memory, and draw the first row",
        group=MAIN,
        recorded=False,
    )
    overwrite: bool = option(
        False, "delete the earlier runs in --output-dir", group=MAIN, recorded=False
    )
    template: str = option(
        "chat",
        "chat: the tokenizer's chat template; plain: user content, a separator token, assistant "
        "content",
        group=OBJECTIVE,
        flag="--format",
        choices=TEMPLATES,
    )
    separator: str | None = option(
        None,
        "of --format plain, added to the tokenizer if it is none of its tokens",
        group=OBJECTIVE,
        metavar="TOKEN",
        default_is=SEPARATOR,
    )
    end_token: str | None = option(
        None,
        "at the end of --format plain, added to the tokenizer if it is none of its tokens",
        group=OBJECTIVE,
        metavar="TOKEN",
        default_is="the tokenizer's EOS",
    )
    supervise: str = option(
        "assistant",
        "next-token loss on: assistant: the answer and the end of its turn; content: the answer "
        "alone; all: all tokens; released: those that are not the pad token, as the authors' code; "
        "text: in --format plain, the text alone, which then ends without separator and answer",
        group=OBJECTIVE,
        choices=SUPERVISE,
    )
    layout: str = option(
        "shared",
        "shared: the Text view is the prefix of the chat; official: the authors' three sequences",
        group=OBJECTIVE,
        choices=LAYOUTS,
    )
    embedding_token: str = option(
        "content",
        "the token of a view that is compared. content: its last one, or the last [PRED]; OFFSET: "
        "the one so far from the end of the turn, as --last_token of the authors' code; -1 is the "
        "last, needs --layout official",
        group=OBJECTIVE,
        metavar="content|OFFSET",
    )
    add_special_tokens: bool = option(
        False,
        "let the tokenizer add its special tokens to what the template writes, as the authors' "
        "code does: with Llama a second begin-of-sequence token",
        group=OBJECTIVE,
    )
    direction: str = option(
        "text_to_code", "which view predicts which", group=OBJECTIVE, choices=DIRECTIONS
    )
    num_pred_tokens: int = option(
        1,
        "[PRED] tokens of a predicting view",
        group=OBJECTIVE,
        metavar="K",
        range=NOT_NEGATIVE,
    )
    pred_position: str = option(
        "append",
        "[PRED] tokens behind the view, or in front of a copy",
        group=OBJECTIVE,
        choices=PRED_POSITIONS,
    )
    metric: str = option(
        "cosine", "distance of prediction and Code view", group=OBJECTIVE, choices=METRICS
    )
    temperature: float = option(0.07, "of infonce", group=OBJECTIVE, metavar="T", range=POSITIVE)
    detach_target: bool = option(
        False, "let no gradient flow into the predicted view", group=OBJECTIVE
    )
    gather_negatives: bool = option(
        True,
        "infonce contrasts with the targets of all processes, SIGReg and VICReg are of the pairs "
        "of all",
        group=OBJECTIVE,
    )
    sigreg_weight: float = option(
        0.05,
        "of SIGReg, which keeps the states that are compared apart, see --objective",
        group=OBJECTIVE,
        metavar="WEIGHT",
        range=NOT_NEGATIVE,
    )
    vicreg_weight: float = option(
        1.0,
        "of VICReg's variance and covariance, which do the same, see --objective",
        group=OBJECTIVE,
        metavar="WEIGHT",
        range=NOT_NEGATIVE,
    )
    linear_predictor: bool = option(
        False,
        "train a matrix that maps a prediction, and of STP the rest of the path, before it is "
        "compared; saved beside the checkpoint",
        group=OBJECTIVE,
    )
    projector_size: int | None = option(
        None,
        "train a perceptron of N units, behind which both views are compared and kept apart; saved "
        "beside the checkpoint",
        group=OBJECTIVE,
        metavar="N",
        range=COUNT,
        default_is="none",
    )
    loss_dropout: float = option(
        0.0,
        "fraction of the examples, drawn anew every epoch, that go without views and so without "
        "their cost",
        group=OBJECTIVE,
        metavar="RATE",
        range=FRACTION,
    )
    loss_dropout_per: str = option(
        "example",
        "draw for every example, or as the paper for all examples of an update at once",
        group=OBJECTIVE,
        choices=PER,
    )
    tube_form: str = option(
        "released",
        "of STP. released: a random span of the path of contents against the rest of it; paper: "
        "the two steps between three random tokens; turns: the user content against the answer",
        group=OBJECTIVE,
        choices=FORMS,
    )
    tube_count: int = option(
        1,
        "tubes of an example, drawn anew every epoch",
        group=OBJECTIVE,
        metavar="N",
        range=COUNT,
    )
    tube_max_length: int | None = option(
        None,
        "tokens of a tube's span at most",
        group=OBJECTIVE,
        metavar="N",
        range=Range(at_least=2),
        default_is="any",
    )
    ntp_weight: float = option(
        1.0,
        "the weight of the next-token loss",
        group=OBJECTIVE,
        metavar="WEIGHT",
        range=NOT_NEGATIVE,
    )
    weight_warmup: float = option(
        0.0,
        "fraction of the updates over which λ of JEPA and of STP grow linearly from 0",
        group=OBJECTIVE,
        metavar="RATE",
        range=FRACTION,
    )
    compare: bool | None = option(
        None,
        "train with next-token loss alone as well",
        group=OBJECTIVE,
        default_is="without --model or with --seeds",
        recorded=False,
    )
    max_steps: int | None = option(
        None,
        "stop after N updates, whatever --epochs says",
        group=TRAINING,
        metavar="N",
        range=COUNT,
    )
    match: str = option(
        "steps",
        "what all objectives get alike: steps, the same updates on the same examples; tokens, as "
        "many tokens through the model as the first objective: more updates where packing saves",
        group=TRAINING,
        choices=MATCHES,
    )
    gradient_accumulation_steps: int = option(
        1, "batches that make up an update", group=TRAINING, metavar="N", range=COUNT
    )
    save_steps: float | None = option(
        None,
        "updates between checkpoints, or their share of all updates, for --resume",
        group=TRAINING,
        metavar="N",
        range=POSITIVE,
        default_is=f"{FINE_TUNE['save_steps']} for trained weights, none for random ones",
        recorded=False,
    )
    bf16: bool = option(False, "bfloat16 autocast, of weights as --dtype says", group=TRAINING)
    seed: int = option(
        BUILT_IN_SEED,
        "of weights, data order and built-in data",
        group=TRAINING,
        metavar="SEED",
        range=Range(at_least=0, at_most=2**32 - 1),
    )
    seeds: tuple[int, ...] | None = option(
        None,
        "train once for each of these, on the same data, and report mean ± standard deviation",
        group=TRAINING,
        metavar="SEED",
        range=Range(at_least=0, at_most=2**32 - 1),
        recorded=False,
    )
    other: tuple[str, ...] = ()  # of TrainingArguments

    def check(self) -> None:
        super().check()
        if self.lora_rank is not None and self.random_weights:
            raise ValueError("--lora-rank adapts a trained --model, not random weights")
        if self.load_in is not None and self.lora_rank is None:
            raise ValueError("--load-in needs --lora-rank: quantised weights are not trained")
        if self.template == "plain" and self.layout != "shared":
            raise ValueError(f"--format plain has the shared --layout only, got {self.layout}")
        for flag, changed in (
            ("--embedding-token", self.embedding_token != "content"),
            ("--add-special-tokens", self.add_special_tokens),
        ):
            if changed and self.template != "chat":
                raise ValueError(f"{flag} is for --format chat")
        try:
            check_embedding_token(self.compared_token, self.layout)
        except ValueError as error:
            raise ValueError(f"--embedding-token {self.embedding_token}: {error}") from error
        for flag, token in (("--separator", self.separator), ("--end-token", self.end_token)):
            if token is not None and self.template != "plain":
                raise ValueError(f"{flag} is for --format plain")
            if token == "":
                raise ValueError(f"{flag} must not be empty")
        if self.end_token is not None and self.end_token == (self.separator or SEPARATOR):
            raise ValueError(f"--separator and --end-token must differ, got {self.end_token}")
        if self.output_dir == Path():
            raise ValueError("--output-dir must be a directory of its own, got '.'")
        if self.supervise == "text" and self.template != "plain":
            raise ValueError("--supervise text is for --format plain")
        if self.streaming:
            for flag, given in (("--data", self.data), ("--max-steps", self.max_steps)):
                if given is None:
                    raise ValueError(f"--streaming needs {flag}")
            if self.match == "tokens":
                raise ValueError("--match tokens does not go with --streaming")
            if self.train_samples is not None:
                raise ValueError("--train-samples does not go with --streaming: see --max-steps")
            if self.loss_dropout_per == "step":
                raise ValueError("--loss-dropout-per step does not go with --streaming")
        preset = self.presets[self.preset] if self.preset else {}
        unusual = {
            name
            for name in (*NEEDED, *BESIDE)
            if getattr(self, name) not in (_default(name), preset.get(name))
        }
        for name, (needed, is_there) in BESIDE.items():
            if name in unusual and not is_there(self):
                raise ValueError(f"{_flag(name)} says nothing without {needed}")
        for name, needed in NEEDED.items():
            if name in unusual and not self.terms & set(needed.split(" or ")):
                raise ValueError(
                    f"{_flag(name)} needs an --objective with {needed}, got "
                    f"{' '.join(self.objectives)}"
                )
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on with what --overwrite deletes: give one of them")
        if self.seeds and len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds must differ, got {list(self.seeds)}")

    def packages(self) -> dict[str, list[str]]:
        packages = ["transformers", "accelerate", "tokenizers", "matplotlib", "rich", "scipy"]
        packages += ["peft"] * (self.lora_rank is not None) + needs_gguf(self.model or "")
        return {"train": packages, "data": ["datasets"] * (self.eval_split is not None)}

    def recorded(self) -> dict[str, Any]:
        other, is_recorded = [], True
        for word in self.other:
            if word.startswith("--"):
                is_recorded = word.partition("=")[0] not in NOT_RECORDED
            other += [word] if is_recorded else []
        return {**super().recorded(), "other": other}

    @property
    def compared_token(self) -> str | int:
        """`embedding_token`, as `ExampleFormat` takes it."""
        try:
            return int(self.embedding_token)
        except ValueError:
            return self.embedding_token

    @property
    def objectives(self) -> list[str]:
        """What is trained for every seed, out of `OBJECTIVES`."""
        compare = self.compare
        if compare is None:
            compare = self.model is None or self.seeds is not None
        chosen = [*["ntp"] * compare, *self.objective]
        return list(dict.fromkeys(chosen))

    @property
    def terms(self) -> set[str]:
        """Of all of them: ntp, jepa, stp, sigreg, vicreg."""
        return {term for objective in self.objectives for term in objective.split("+")}

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return self.seeds or (self.seed,)

    @property
    def training_arguments(self) -> dict[str, Any]:
        """What TrainingArguments are to be, unless `other` says otherwise."""
        given: dict[str, Any] = {
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "max_steps": self.max_steps,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "bf16": self.bf16,
        }
        if self.save_steps is not None:
            given |= {"save_strategy": "steps", "save_steps": self.save_steps}
        start = SCRATCH if self.random_weights else FINE_TUNE
        return {**COMMON, **start, **{k: v for k, v in given.items() if v is not None}}
