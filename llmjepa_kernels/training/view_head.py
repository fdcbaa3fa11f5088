"""What stands between a model's states and what the losses compare; trained along, kept beside."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmjepa_kernels.checks import check_whole
from llmjepa_kernels.files import file_of_checkpoint, write_whole
from llmjepa_kernels.hf.patch import pretrained_model

HEAD_FILE = "view_head.safetensors"
NAME = "view_head"  # of the model's attribute


class ViewHead(nn.Module):
    """Maps that are trained with a model, for the losses alone: generation needs none of them.

    Attributes:
        projector: Of both sides of a pair, before they are compared: two layers with GELU between
            them, as wide as `projector_size`; or None.
        predictor: One matrix, of the predicting side behind that; or None.
        tube_predictor: One matrix, of the first vector of a tube; or None.

    Args:
        hidden_size: Of the model.
        projector_size: Default: no projector.
        predictor, tube_predictor: Whether there is one.

    Source: the linear predictor of the authors' ``stp.py``, whose first weights it has as well
        (Glorot and Bengio, uniform); VICReg's expander, arXiv:2105.04906.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        projector_size: int | None = None,
        predictor: bool = False,
        tube_predictor: bool = False,
    ) -> None:
        super().__init__()
        if projector_size is not None:
            check_whole("projector_size", projector_size, least=1)
        compared = hidden_size if projector_size is None else projector_size
        self.projector = (
            None
            if projector_size is None
            else nn.Sequential(
                nn.Linear(hidden_size, compared), nn.GELU(), nn.Linear(compared, compared)
            )
        )
        self.predictor = _matrix(compared) if predictor else None
        self.tube_predictor = _matrix(hidden_size) if tube_predictor else None

    def forward(self, predictors: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What is compared of the states of pairs, (…, hidden_size) each."""
        if self.projector is not None:
            predictors, targets = self.projector(predictors), self.projector(targets)
        if self.predictor is not None:
            predictors = self.predictor(predictors)
        return predictors, targets

    def save(self, directory: str | PathLike[str]) -> None:
        """Writes ``view_head.safetensors`` into a directory that exists."""
        weights = {key: value.detach().contiguous() for key, value in self.state_dict().items()}
        write_whole(Path(directory) / HEAD_FILE, serialize(weights))


def add_view_head(
    model: nn.Module,
    *,
    projector_size: int | None = None,
    predictor: bool = False,
    tube_predictor: bool = False,
    seed: int = 0,
) -> ViewHead:
    """Gives a model a `ViewHead`, which `llm_jepa_loss` then uses and an optimizer trains.

    The model's own ``save_pretrained`` leaves it out; see `ViewHead.save`. With PEFT, wrap the
    model first, as it freezes what is there. The loss uses it after the model's forward, so
    DistributedDataParallel needs ``find_unused_parameters=False``; FSDP and DeepSpeed, which cut
    parameters apart, do not gather these.

    Args:
        model: A causal language model, or a wrapper of one.
        projector_size, predictor, tube_predictor: As in `ViewHead`.
        seed: Of its first weights.

    Raises:
        ValueError: None of the three is asked for, `projector_size` is below 1, or the model has no
            language model head.
    """
    if projector_size is None and not predictor and not tube_predictor:
        raise ValueError(
            "one of projector_size, predictor and tube_predictor must be given, got none of them"
        )
    pretrained = pretrained_model(model)
    if pretrained.base_model is pretrained:
        raise ValueError(
            f"model must be a causal language model, got {type(pretrained).__name__}, which is the "
            "part of one that llm_jepa_loss does not look at"
        )
    reads_states: Any = pretrained.get_output_embeddings() or pretrained.get_input_embeddings()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        head = ViewHead(
            reads_states.weight.shape[-1],
            projector_size=projector_size,
            predictor=predictor,
            tube_predictor=tube_predictor,
        )
    head.to(reads_states.weight.device, pretrained.dtype)
    _attach(pretrained, head)
    return head


def view_head_of(model: nn.Module) -> ViewHead | None:
    """The one that a model was given, if any."""
    return getattr(pretrained_model(model), NAME, None)


def remove_view_head(model: nn.Module) -> None:
    """Takes it away again, if there is one."""
    pretrained = pretrained_model(model)
    if view_head_of(pretrained) is not None:
        delattr(pretrained, NAME)


def load_view_head(model: nn.Module, directory: str | PathLike[str]) -> ViewHead | None:
    """Gives a model the `ViewHead` that was saved beside it; None if none was.

    Args:
        model: As in `add_view_head`; one that it has already takes the weights.
        directory: Of the checkpoint, or the name of a model of the hub.

    Raises:
        ValueError: The file is corrupt, or of a model of another size; names it.
    """
    path = file_of_checkpoint(directory, HEAD_FILE)
    if path is None:
        return None
    try:
        with safe_open(path, "pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping
        head = view_head_of(model)
        if head is None:
            projected = weights.get("projector.2.bias")
            head = add_view_head(
                model,
                projector_size=None if projected is None else len(projected),
                predictor="predictor.weight" in weights,
                tube_predictor="tube_predictor.weight" in weights,
            )
        head.load_state_dict(weights)
    except Exception as error:  # of safetensors, or of keys and shapes
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no view head of this model: {reason}") from error
    return head


def rows_of(hidden: Tensor, index: Tensor) -> Tensor:
    """The states of tokens, of which some may be named often.

    A look-up of embeddings, whose backward adds repeated rows in the same order every time; that of
    `gather_tokens` does so only where none is repeated, as in the head.

    Args:
        hidden: (batch, seq, hidden_size).
        index: (batch, …) int64, row-local; −1 takes the first token.

    Returns:
        (batch, …, hidden_size).
    """
    batch, seq, hidden_size = hidden.shape
    starts = torch.arange(batch, device=index.device).view(-1, *[1] * (index.dim() - 1)) * seq
    return functional.embedding(index.clamp(min=0) + starts, hidden.reshape(-1, hidden_size))


def _attach(pretrained: PreTrainedModel, head: ViewHead) -> None:
    setattr(pretrained, NAME, head)
    own = {f"{NAME}.{key}" for key in head.state_dict()}
    before: Any = pretrained._keys_to_ignore_on_save
    # What Transformers leaves out of checkpoints, and does not miss in them.
    pretrained._keys_to_ignore_on_save = {*(before or ()), *own}


def _matrix(size: int) -> nn.Linear:
    matrix = nn.Linear(size, size, bias=False)
    nn.init.xavier_uniform_(matrix.weight)
    return matrix
