"""LLM-JEPA in Hugging Face's Trainer: the JEPA term, exact means, and what is logged and saved."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import RandomSampler, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints

from llmjepa_kernels.data.predictor_tokens import warn_if_frozen
from llmjepa_kernels.example import IGNORE, Example, without_views
from llmjepa_kernels.files import share_as_umask_says
from llmjepa_kernels.hf.experts import aux_weight_of, returns_aux_loss
from llmjepa_kernels.hf.patch import patch_model, patched_impl, pretrained_model
from llmjepa_kernels.ops.common import real_tubes
from llmjepa_kernels.training.checkpoints import MANIFEST, mark_complete, saving
from llmjepa_kernels.training.collator import LLMJEPACollator
from llmjepa_kernels.training.epochs import SetEpoch
from llmjepa_kernels.training.flops import FlopCount
from llmjepa_kernels.training.loss_dropout import LossDropout
from llmjepa_kernels.training.means import MEANS, OF, means_of
from llmjepa_kernels.training.next_token_loss import MAX_LOGITS
from llmjepa_kernels.training.objective import REQUIRED_KEYS, llm_jepa_loss, real_tokens
from llmjepa_kernels.training.sampler import UpdateSampler, example_work
from llmjepa_kernels.training.supported import check_supported
from llmjepa_kernels.training.telemetry import CollapseTelemetry
from llmjepa_kernels.training.view_head import HEAD_FILE, NAME, load_view_head, view_head_of

if TYPE_CHECKING:  # builds of torch without distributed lack it
    from torch.distributed import ProcessGroup


SUMS = (*MEANS, "pairs", "tubes", "tokens", "sft_tokens", "flops")


class LLMJEPATrainer(Trainer):
    """Trains with `llm_jepa_loss`, one forward pass per batch.

    Its means are exact under gradient accumulation and across processes: they are taken over the
    supervised tokens, the pairs and the tubes of all batches that make up an update, so 1 x 8 and
    4 x 2 examples give the same one. At the end of a stream too few batches for an update are left
    out. With ``average_tokens_across_devices=False`` they are taken
    per process, as in Transformers.

    Besides ``loss`` it logs, as means over the updates since the last log,

    - ``ntp_loss``; ``jepa_loss`` and ``cosine``, the mean cosine similarity of the pairs, over the
      updates that have any; ``stp_loss`` over the updates that have tubes; ``sigreg_loss`` and
      ``vicreg_loss`` where they have a weight; ``aux_loss`` of a model that balances its experts;
    - ``other_cosine``, ``target_variance`` and ``target_rank``, by which collapse shows, see
      `CollapseTelemetry`, which warns of it once;
    - ``tokens_per_step``, all tokens through the model, padding included, ``tokens_per_second``
      and ``flops_per_step`` by `FlopCount`, all over all processes;
    - ``relative_cost``, tokens through the model over the tokens of the same chats alone, packed
      without padding or prefix sharing: what plain fine-tuning on them takes.

    With several processes the examples of an update are dealt to them by work, see
    `UpdateSampler`, where ``train_dataset`` is a sequence of `Example`s, or `LossDropout` of one,
    and sampling is random or sequential.

    Evaluation gives ``eval_loss``, ``eval_ntp_loss``, ``eval_jepa_loss``, ``eval_cosine``,
    ``eval_stp_loss`` and so on as means over the whole set, in which Accelerate repeats its first
    samples where several processes leave their last batches unfilled. Without any pair there is
    neither ``jepa_loss`` nor ``cosine``, without any tube no ``stp_loss``. Rows differ in
    shape and the head runs on supervised tokens only, so there are no predictions: `predict`
    returns the same metrics.

    Args:
        model, args, data_collator, *other, **more: As in `Trainer`. A model that is not patched
            yet is patched here. The collator defaults to ``LLMJEPACollator(processing_class)``;
            one around it should hand on its `set_epoch` and `for_evaluation`.
        jepa_weight: λ of LLM-JEPA.
        stp_weight: λ of Semantic Tube Prediction, for which the collator draws `tubes`.
        sigreg_weight, vicreg_weight: Of the terms against collapse, see `llm_jepa_loss`. They are
            of the pairs of a micro-batch, over all processes, and no sums: fewer and larger
            micro-batches estimate them better, and an update has the mean of theirs.
        ntp_weight: γ.
        aux_weight: Of a loss that balances experts, see `llm_jepa_loss`.
        weight_warmup: Share of the updates over which λ of LLM-JEPA and of STP grow linearly from
            0.
        metric: "cosine", "l2", "mse" or "infonce", see `last_token_loss`.
        temperature: Of "infonce", whose negatives are the other targets of the same micro-batch,
            over all processes.
        detach_target: Let no gradient flow into the target views.
        gather_negatives: False keeps the negatives to those of the process; a process group
            takes those of its members, which tensor parallelism needs. See `llm_jepa_loss`.
        max_logits: The most logits that exist at once; None for all, see `llm_jepa_loss`.
        head_impl: "liger" for Liger's fused head and loss, see `llm_jepa_loss`.

    A `ViewHead`, which `add_view_head` gives the model beforehand, is trained along; it is saved
    beside every checkpoint, and read from there by ``train(resume_from_checkpoint=…)``.

    Training stops at the first log, or save, of a loss or weights that are not finite, and saves
    none of those.

    Raises:
        FloatingPointError: By ``train`` and ``save_model``, see above.
        ValueError: `weight_warmup` is not from 0 to 1; or DataParallel, label smoothing, NEFTune,
            a loss function or metrics of logits are asked for, none of which fits a packed row; or
            a `ViewHead` under FSDP or DeepSpeed.
    """

    # Trainer must not divide by the accumulation steps what is already normalised over them.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[Sequence[Any]], Any] | None = None,
        *other: Any,
        jepa_weight: float = 1.0,
        stp_weight: float = 0.0,
        sigreg_weight: float = 0.0,
        vicreg_weight: float = 0.0,
        ntp_weight: float = 1.0,
        aux_weight: float | None = None,
        weight_warmup: float = 0.0,
        metric: str = "cosine",
        temperature: float = 0.07,
        detach_target: bool = False,
        gather_negatives: bool | ProcessGroup = True,
        max_logits: int | None = MAX_LOGITS,
        head_impl: str | None = None,
        **more: Any,
    ) -> None:
        if data_collator is None:
            data_collator = LLMJEPACollator(more.get("processing_class"))
        super().__init__(model, args, data_collator, *other, **more)
        check_supported(self)
        to_train: Any = self.model
        if not _is_patched(to_train):
            patch_model(to_train)
        example_format = getattr(self.data_collator, "example_format", None)
        warn_if_frozen(pretrained_model(to_train), getattr(example_format, "pred_ids", ()))
        handler = self.accelerator.ddp_handler
        if view_head_of(to_train) is not None and handler is not None:
            handler.find_unused_parameters = False  # among which it would take the head's
        config = pretrained_model(to_train).config
        self._balances_experts = returns_aux_loss(config)
        if self._balances_experts and aux_weight is None:
            aux_weight = aux_weight_of(config)
        if not 0 <= weight_warmup <= 1:
            raise ValueError(f"weight_warmup must be from 0 to 1, got {weight_warmup}")
        self.weight_warmup = weight_warmup
        self.loss_options: dict[str, Any] = {
            "jepa_weight": jepa_weight,
            "stp_weight": stp_weight,
            "sigreg_weight": sigreg_weight,
            "vicreg_weight": vicreg_weight,
            "ntp_weight": ntp_weight,
            "aux_weight": aux_weight,
            "metric": metric,
            "temperature": temperature,
            "detach_target": detach_target,
            "gather_negatives": gather_negatives,
            "max_logits": max_logits,
            "head_impl": head_impl,
        }
        compares_batches = metric == "infonce" or sigreg_weight or vicreg_weight
        if compares_batches and gather_negatives is True and self.get_tp_size() > 1:
            raise ValueError(
                "gather_negatives must be the process group of data parallelism, or False, where "
                "tensor parallelism lets processes share a batch; got True"
            )
        if not self.is_deepspeed_enabled:
            # Transformers 5.5 has Accelerate divide by them what is normalised over them already.
            self.accelerator.gradient_accumulation_steps = 1
        # A stream is read by every process; a batch packed by the first could not be cut apart.
        self.accelerator.dataloader_config.dispatch_batches = False
        self._update_sampler: UpdateSampler | None = None
        self.add_callback(SetEpoch(self))
        self.args.remove_unused_columns = False  # the collator takes the columns it knows
        self.model_accepts_loss_kwargs = True  # makes Trainer count the supervised tokens
        # Terms that are there for some alone are not logged for all.
        optional = {
            "sigreg_loss": sigreg_weight,
            "vicreg_loss": vicreg_weight,
            "aux_loss": self._balances_experts,
        }
        self._watched = [name for name in MEANS if optional.get(name, True)]
        self._num_pairs: Tensor | int = 0
        self._num_tubes: Tensor | int = 0
        self._eval_sums = torch.zeros(0)
        self._counted: Any = None
        self._begin()

    def _begin(self) -> None:
        """Forgets an earlier training, which may have been of another model or interrupted."""
        self._telemetry = CollapseTelemetry(self.args.device)
        counted = pretrained_model(cast(Any, self.model))
        if counted is not self._counted:
            self._flops, self._counted = FlopCount(cast(Any, self.model)), counted
        self._updates_in_all = 0
        self._left_over = 0  # batches at the ends of a stream
        self._reset_train_sums()

    def _inner_training_loop(self, *args, **kwargs):
        """Trains, from the beginning also where a smaller batch is tried after an error."""
        self._begin()
        return super()._inner_training_loop(*args, **kwargs)

    def call_model_init(self, trial=None):
        """A new model of ``model_init``, patched."""
        model = super().call_model_init(trial)
        return model if _is_patched(model) else patch_model(model)

    def _reset_train_sums(self) -> None:
        self._train_sums = torch.zeros(len(SUMS), device=self.args.device)
        self._updates = 0
        self._updates_with_pairs: Tensor | int = 0
        self._updates_with_tubes: Tensor | int = 0
        self._started: float | None = None

    def _get_train_sampler(self, train_dataset=None):
        """Deals the examples of an update to the processes by work, where that is known.

        Unlike Accelerate's own sampler it knows its epoch after a resume with several processes.
        """
        dataset = self.train_dataset if train_dataset is None else train_dataset
        try:
            base = super()._get_train_sampler(dataset)
        except ValueError as error:
            raise ValueError(
                f"train_sampling_strategy {self.args.train_sampling_strategy!r} needs a Dataset "
                f"with the column {self.args.length_column_name!r}; packed rows have hardly any "
                "padding that it could save: take 'random'"
            ) from error
        per_step = isinstance(dataset, LossDropout) and dataset.per == "step"
        num_processes = self.accelerator.num_processes // self.get_tp_size()
        if num_processes == 1 and not per_step:
            return base
        if isinstance(base, RandomSampler) and self.accelerator.use_seedable_sampler:
            # As Accelerate would, so that the order stays that of a plain Trainer.
            base = SeedableRandomSampler(dataset, data_seed=self.args.data_seed)
        elif not isinstance(base, SequentialSampler):
            if per_step:
                raise ValueError(
                    "loss dropout per step needs train_sampling_strategy random or sequential and "
                    f"a seedable sampler, got {self.args.train_sampling_strategy}"
                )
            return base
        split = num_processes if self.accelerator.split_batches else 1
        self._update_sampler = UpdateSampler(
            base,
            self._train_batch_size // split,
            num_processes=num_processes,
            accumulation_steps=self.args.gradient_accumulation_steps,
            drop_last=self.args.dataloader_drop_last,
            even_batches=self.accelerator.even_batches,
            work=self._work_of(dataset) if num_processes > 1 else None,
            with_update=per_step,
        )
        return self._update_sampler

    def get_eval_dataloader(self, eval_dataset=None):
        """As Trainer's; all evaluations draw the same tubes."""
        with self._collating_for_evaluation():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As Trainer's; all evaluations draw the same tubes."""
        with self._collating_for_evaluation():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _collating_for_evaluation(self) -> Iterator[None]:
        """In it, data loaders are made with a collator of their own, that knows no epochs."""
        collator = self.data_collator
        if hasattr(collator, "for_evaluation"):  # whose epoch its workers share
            self.data_collator = collator.for_evaluation()
        try:
            yield
        finally:
            self.data_collator = collator

    def _work_of(self, dataset: Any) -> Callable[[int, int], float] | None:
        """The work of (index, update) of a dataset, or None if it cannot be known beforehand."""
        dropout = dataset if isinstance(dataset, LossDropout) else None
        examples = dataset.data if dropout else dataset
        if not isinstance(examples, Sequence) or not all(isinstance(x, Example) for x in examples):
            return None
        model: Any = pretrained_model(cast(Any, self.model))
        hidden_size = model.get_input_embeddings().weight.shape[-1]

        def works(examples: Iterable[Example]) -> list[float]:
            return [example_work(example, hidden_size) for example in examples]

        if not getattr(self.data_collator, "with_views", True):
            bare = works(map(without_views, examples))
            return lambda index, update: bare[index]
        whole = works(examples)
        if not dropout or not dropout.rate:
            return lambda index, update: whole[index]
        bare = works(map(without_views, examples))
        return lambda index, update: (bare if dropout.drops(index, update) else whole)[index]

    def _track_num_input_tokens(self, inputs):
        """Counts tokens, with those that packing has added or without."""
        if self.args.include_num_input_tokens_seen == "non_padding":
            inputs = {**inputs, "attention_mask": real_tokens(inputs)}
        super()._track_num_input_tokens(inputs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Collects the batches of an update, and counts their pairs and tubes."""
        if self._started is None:
            self._started = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) < num_batches:
            # A stream has ended, and is begun again. Of what is left Trainer would make no update,
            # but add its gradients to the next one's.
            self._check_stream(len(batches), num_batches)
            return [], None
        self._updates += 1
        self._updates_in_all += 1
        missing = [name for name in REQUIRED_KEYS if name not in batches[0]]
        if missing:
            raise ValueError(
                f"data_collator must make packed rows, as LLMJEPACollator does; its batches lack "
                f"{missing}"
            )
        pairs = [batch["view_pairs"][..., 0] >= 0 for batch in batches]
        self._num_pairs = self._count(pairs, device)
        self._updates_with_pairs = self._updates_with_pairs + (self._num_pairs > 0)
        if all(batch.get("tubes") is not None for batch in batches):
            self._num_tubes = self._count([real_tubes(batch["tubes"]) for batch in batches], device)
            self._updates_with_tubes = self._updates_with_tubes + (self._num_tubes > 0)
        return batches, num_items

    def _check_stream(self, found: int, needed: int) -> None:
        """Whether a stream, which has ended, may be begun again without a word."""
        self._left_over += found
        if self._updates_in_all or (self._left_over and self.state.global_step):
            return
        if found:
            raise ValueError(
                f"train_dataset ended after {found} batches, before the first update, which takes "
                f"gradient_accumulation_steps={needed}"
            )
        if self.state.global_step:
            warnings.warn(
                "the stream ended within what the checkpoint has seen of it, and is begun again, "
                "perhaps not at the example where the training was interrupted",
                RuntimeWarning,
                stacklevel=2,
            )

    def _count(self, real: list[Tensor], device: torch.device) -> Any:
        """How many are True of all batches of an update, over all processes.

        Counted like supervised tokens, so whatever parallelism means for those holds for these.
        """
        labels = [torch.where(x, 0, IGNORE) for x in real]
        return self._get_num_items_in_batch(
            [{"labels": label, "shift_labels": label} for label in labels], device
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one batch: its share of the update's, given `num_items_in_batch`."""
        batch = dict(inputs)
        sft_tokens = batch.pop("sft_tokens", None)
        counts = {}
        if num_items_in_batch is not None:
            counts = {
                "num_items_in_batch": num_items_in_batch,
                "num_pairs_in_batch": self._num_pairs,
                "num_tubes_in_batch": self._num_tubes,
            }
        options = self._warmed_up() if model.training else self.loss_options
        watched = model.training and batch["view_pairs"].shape[1] > 0
        outputs: Any = llm_jepa_loss(model, batch, **options, **counts, return_views=watched)
        if watched:
            self._telemetry.add(outputs.views)
        loss = outputs.loss
        if counts:
            scale = self._loss_scale()
            loss = loss * scale
            # Filled in on the device, since copying a number there would wait for it.
            tokens = torch.full((), batch["input_ids"].numel(), device=loss.device)
            values = {name: scale * mean.detach() for name, mean in means_of(outputs).items()} | {
                "pairs": outputs.num_pairs,
                "tubes": outputs.num_tubes,
                "tokens": tokens,
                "sft_tokens": tokens if sft_tokens is None else sft_tokens.sum(),
                "flops": self._flops(batch, outputs.num_items),
            }
            device = self._train_sums.device
            self._train_sums += torch.stack([values[name].to(device) for name in SUMS])
        return (loss, outputs) if return_outputs else loss

    def _warmed_up(self) -> dict[str, Any]:
        """The options of the loss at this update."""
        # Of the same directions in all processes, and after a resume.
        seed = Random(f"{self.args.seed},{self.state.global_step}").getrandbits(32)
        updates = self.weight_warmup * self.state.max_steps
        share = min(1.0, (self.state.global_step + 1) / updates) if updates else 1.0
        weights = {name: share * self.loss_options[name] for name in ("jepa_weight", "stp_weight")}
        return {**self.loss_options, **weights, "slices_seed": seed}

    def _loss_scale(self) -> int:
        """Makes the mean over processes, which DistributedDataParallel takes, a sum."""
        if not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    def log(self, logs, start_time=None):
        """Adds what was summed up since the last log to the log of the loss."""
        if "loss" in logs and self._started is not None:
            own = [
                torch.as_tensor(count, dtype=torch.float32, device=self._train_sums.device)
                for count in (self._updates_with_pairs, self._updates_with_tubes)
            ]
            sums = torch.cat([self._train_sums, torch.stack(own)])
            *sums, with_pairs, with_tubes = (
                self.accelerator.reduce(sums, reduction="mean") / self._updates
            ).tolist()
            found = dict(zip(SUMS, sums, strict=True))
            self._refuse_to_go_on_with(sum(found[name] for name in MEANS))
            replicas = self.accelerator.num_processes / self.get_tp_size()
            tokens_per_step = found["tokens"] * replicas // 1
            seconds = time.perf_counter() - self._started
            updates_with = {"pairs": with_pairs, "tubes": with_tubes}
            for name in self._watched:
                counted = OF.get(name, "items")
                if counted == "items":
                    logs[name] = found[name]
                elif found[counted]:
                    logs[name] = found[name] / updates_with[counted]
            seen = self._telemetry.logs(lambda x: self.accelerator.reduce(x, reduction="sum"))
            if seen and self.is_world_process_zero():
                self._telemetry.warn_of_collapse(logs["cosine"], seen["other_cosine"])
            logs |= seen
            logs |= {
                "tokens_per_step": tokens_per_step,
                "tokens_per_second": tokens_per_step * self._updates / seconds,
                "flops_per_step": found["flops"] * replicas,
            }
            if found["sft_tokens"]:
                logs["relative_cost"] = found["tokens"] / found["sft_tokens"]
            self._reset_train_sums()
        super().log(logs, start_time)

    def _refuse_to_go_on_with(self, loss: float) -> None:
        if not math.isfinite(loss):
            self._reset_train_sums()
            raise FloatingPointError(
                f"the loss is {loss} at update {self.state.global_step}: training diverged, as it "
                "may with too great a learning rate or jepa_weight"
            )

    def save_model(self, output_dir=None, _internal_call=False):
        """Saves the weights, unless they or the losses since the last log are not finite."""
        self._refuse_to_go_on_with(float(self._train_sums.sum()))
        trained: Any = self.model
        for name, parameter in trained.named_parameters():
            if not parameter.requires_grad:  # and perhaps of a dtype that knows no isfinite
                continue
            local = getattr(parameter, "to_local", lambda parameter=parameter: parameter)()
            if not local.isfinite().all():
                raise FloatingPointError(
                    f"{name} is not finite at update {self.state.global_step}: training diverged"
                )
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir=None, state_dict=None):
        """Saves a checkpoint's weights; example format and view head beside them."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            share_as_umask_says(Path(output_dir or str(self.args.output_dir)))
        if self.args.should_save and isinstance(self.data_collator, LLMJEPACollator):
            directory: Any = output_dir or self.args.output_dir
            self.data_collator.example_format.save(directory)
        head = view_head_of(cast(Any, self.model))
        if self.args.should_save and head is not None:
            head.save(output_dir or str(self.args.output_dir))

    def _issue_warnings_after_load(self, load_result):
        """Warns of weights that are missing; those of the view head come from their own file."""
        missing = [key for key in load_result.missing_keys if not key.startswith(f"{NAME}.")]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Loads a checkpoint's weights, and those of the view head beside them."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_head(resume_from_checkpoint, self.model if model is None else model)

    def _load_best_model(self):
        """Loads the best checkpoint's weights, and those of the view head beside them."""
        super()._load_best_model()
        self._load_head(self.state.best_model_checkpoint, self.model)

    def _load_head(self, checkpoint: Any, model: Any) -> None:
        has_head, was_saved = view_head_of(model) is not None, Path(checkpoint, HEAD_FILE).is_file()
        if has_head and not was_saved:
            raise ValueError(f"{checkpoint} has no {HEAD_FILE}, but the model has a ViewHead")
        if was_saved and not has_head:
            raise ValueError(f"{checkpoint} has a {HEAD_FILE}, but the model has no ViewHead")
        if has_head:
            load_view_head(model, checkpoint)

    def _save_checkpoint(self, model, trial):
        """Saves a checkpoint, marks it as complete, and only then deletes older ones."""
        paused = time.perf_counter()
        run_directory = self._get_output_dir(trial)
        directory = Path(run_directory, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:  # an interrupted run may have left it there
            (directory / MANIFEST).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with saving(directory):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        with saving(directory):
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                torch.save(self.args, directory / TRAINING_ARGS_NAME)  # those with the limit
                mark_complete(directory)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run_directory,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self._pass_over(paused)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of one batch; there are no predictions."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, batch, return_outputs=True)
        counts = {
            "items": outputs.num_items,
            "pairs": outputs.num_pairs,
            "tubes": outputs.num_tubes,
        }
        means = means_of(outputs)
        sums = [means[name] * counts[OF.get(name, "items")] for name in MEANS]
        sums += counts.values()
        self._eval_sums += torch.stack(sums).to(self._eval_sums)
        return loss, None, None

    def evaluation_loop(
        self,
        dataloader,
        description,
        prediction_loss_only=None,
        ignore_keys=None,
        metric_key_prefix="eval",
    ):
        """Evaluates; each loss is the mean over all tokens or pairs, however they are batched."""
        paused = time.perf_counter()
        self._eval_sums = torch.zeros(len(MEANS) + 3, device=self.args.device)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        *sums, items, pairs, tubes = self.accelerator.reduce(
            self._eval_sums, reduction="sum"
        ).tolist()
        counts = {"items": items, "pairs": pairs, "tubes": tubes}
        means = {
            name: total / max(counts[OF.get(name, "items")], 1)
            for name, total in zip(MEANS, sums, strict=True)
        }
        weights = {name.replace("_loss", "_weight"): name for name in MEANS if name != "cosine"}
        loss = sum((self.loss_options[key] or 0) * means[name] for key, name in weights.items())
        seen = {name: means[name] for name in self._watched if counts[OF.get(name, "items")]}
        metrics = {"loss": loss, **seen} if seen else {}
        named = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        output = output._replace(metrics={**(output.metrics or {}), **named})
        self._pass_over(paused)
        return output

    def _pass_over(self, paused: float) -> None:
        """Counts the time since then not as spent on training."""
        if self._started is not None:
            self._started += time.perf_counter() - paused


def _is_patched(model: torch.nn.Module) -> bool:
    try:
        patched_impl(model)
    except RuntimeError:
        return False
    return True
