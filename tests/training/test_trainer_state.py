"""What the trainer keeps from one training, evaluation or checkpoint to the next, and what not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from transformers import TrainerCallback, default_data_collator

from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.hf.load import add_lora
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.training import trainer as trainer_module
from llmjepa_kernels.training.checkpoints import mark_complete, why_incomplete
from llmjepa_kernels.training.loss_dropout import LossDropout
from llmjepa_kernels.training.objective import llm_jepa_loss
from llmjepa_kernels.training.sampler import UpdateSampler
from llmjepa_kernels.training.trainer import LLMJEPATrainer
from llmjepa_kernels.tubes import TubeSampler
from tests.training.test_trainer import ROWS, arguments, build, parameters, tiny_llama


@pytest.fixture
def tokenizer():
    return train_tokenizer(ROWS, vocab_size=300)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS[:10])


def test_the_end_of_a_stream_makes_no_update_of_double_weight(tokenizer, tmp_path):
    model, collator = build(tokenizer)
    patch_model(model)
    expected = [llm_jepa_loss(model, collator(ROWS[i : i + 4])).loss.item() for i in (0, 4)]
    options = arguments(
        tmp_path,
        max_steps=4,
        learning_rate=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer = LLMJEPATrainer(model, options, collator, train_dataset=Stream())
    trainer.train()  # the last two of the ten rows are left over, twice
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses == pytest.approx(expected * 2, rel=1e-4)
    norms = [log["grad_norm"] for log in trainer.state.log_history if "loss" in log]
    assert norms[2:] == pytest.approx(norms[:2], rel=1e-4)


def test_a_stream_that_is_too_short(tokenizer, tmp_path):
    model, collator = build(tokenizer)
    options = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    trainer = LLMJEPATrainer(model, options, collator, train_dataset=Stream())
    with pytest.raises(ValueError, match="ended after 3 batches, before the first update"):
        trainer.train()


def test_a_resume_beyond_the_end_of_a_stream_is_told(tokenizer, tmp_path):
    model, collator = build(tokenizer)
    options = arguments(tmp_path, max_steps=5, save_strategy="steps", save_steps=4)
    options.per_device_train_batch_size = 4
    trainer = LLMJEPATrainer(model, options, collator, train_dataset=Stream())
    trainer.train()
    with pytest.warns(RuntimeWarning, match="the stream ended within what the checkpoint has seen"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_resume_before_the_end_of_a_stream(tokenizer, tmp_path, recwarn):
    """What is left over is no update of a resumed training either, and no error."""
    losses = []
    for checkpoint in (None, tmp_path / "checkpoint-2"):
        model, collator = build(tokenizer)
        options = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
        options.per_device_train_batch_size = 1
        options.gradient_accumulation_steps = 4
        trainer = LLMJEPATrainer(model, options, collator, train_dataset=Stream())
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]
    assert not any("stream ended" in str(warning.message) for warning in recwarn)


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_an_interrupted_training_leaves_nothing_behind(tokenizer, tmp_path):
    def logs(interrupted):
        model, collator = build(tokenizer)
        options = arguments(tmp_path, max_steps=4, logging_steps=2, learning_rate=0.0)
        trainer = LLMJEPATrainer(model, options, collator, train_dataset=ROWS)
        if interrupted:
            trainer.add_callback(Interrupt)
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            trainer.remove_callback(Interrupt)
        trainer.train()
        names = ("loss", "ntp_loss", "jepa_loss", "other_cosine", "target_rank", "tokens_per_step")
        return [[log[name] for name in names] for log in trainer.state.log_history if "loss" in log]

    assert logs(interrupted=True)[-2:] == logs(interrupted=False)


def test_a_training_after_one_that_diverged(tokenizer, tmp_path):
    _, collator = build(tokenizer)
    trainer = LLMJEPATrainer(
        args=arguments(tmp_path, max_steps=3, learning_rate=1e30),
        data_collator=collator,
        model_init=lambda: build(tokenizer)[0],
        train_dataset=ROWS,
    )
    with pytest.raises(FloatingPointError, match="training diverged"):
        trainer.train()
    trainer.args.learning_rate = 0.1
    trainer.train()
    trainer.save_model()


def test_models_of_other_sizes_one_after_the_other(tokenizer, tmp_path):
    sizes = [32, 32, 64]  # one for the trainer, one for each training

    def make():
        model, _ = build(tokenizer)
        config = {**model.config.to_dict(), "hidden_size": sizes.pop(0)}
        return type(model)(type(model.config)(**config))

    _, collator = build(tokenizer)
    trainer = LLMJEPATrainer(
        args=arguments(tmp_path, max_steps=2, logging_steps=2),
        data_collator=collator,
        model_init=make,
        train_dataset=ROWS,
    )
    flops = []
    for _ in range(2):
        trainer.train()
        flops.append(trainer.state.log_history[0]["flops_per_step"])
    assert flops[1] > 1.5 * flops[0]


class Epochs(torch.utils.data.Dataset):
    """Remembers the epochs that it was told."""

    def __init__(self):
        self.told = []

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return ROWS[index]

    def set_epoch(self, epoch):
        self.told.append(epoch)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: Subset(ConcatDataset([x]), range(8))])
def test_the_epoch_reaches_data_sets_in_others(tokenizer, tmp_path, wrap):
    model, collator = build(tokenizer)
    options = arguments(tmp_path, max_steps=-1, num_train_epochs=3)
    epochs = Epochs()
    trainer = LLMJEPATrainer(model, options, collator, train_dataset=wrap(epochs))
    trainer.train()
    assert list(dict.fromkeys(epochs.told)) == [0, 1, 2]


def test_loss_dropout_in_a_subset_is_drawn_anew(tokenizer, tmp_path):
    model, collator = build(tokenizer)
    data = LossDropout(ROWS, 0.5)
    options = arguments(tmp_path, max_steps=-1, num_train_epochs=2)
    trainer = LLMJEPATrainer(model, options, collator, train_dataset=Subset(data, range(len(data))))
    trainer.train()
    costs = [log["relative_cost"] for log in trainer.state.log_history if "loss" in log]
    assert len(set(costs)) == len(costs)


class Around:
    """A collator of a user's own."""

    def __init__(self, collator):
        self.collator = collator
        self.epoch, self.set_epoch = collator.epoch, collator.set_epoch
        self.example_format = collator.example_format

    def __call__(self, rows):
        return self.collator(rows)

    def for_evaluation(self):
        return Around(self.collator.for_evaluation())


@pytest.mark.parametrize("around", [False, True])
def test_evaluations_have_the_same_tubes(tokenizer, tmp_path, around):
    model, collator = build(tokenizer)
    collator = replace(collator, tubes=TubeSampler())
    options = arguments(
        tmp_path, max_steps=-1, num_train_epochs=3, learning_rate=0.0, eval_strategy="epoch"
    )
    trainer = LLMJEPATrainer(
        model,
        options,
        Around(collator) if around else collator,
        stp_weight=1.0,
        train_dataset=ROWS,
        eval_dataset=ROWS,
    )
    epochs = []

    class Watch(TrainerCallback):
        def on_prediction_step(self, *args, **kwargs):
            epochs.append(collator.epoch)  # which workers may be drawing the tubes of meanwhile

    trainer.add_callback(Watch)
    trainer.train()
    assert set(epochs) == {0, 1, 2}
    logs = trainer.state.log_history
    assert len({log["eval_stp_loss"] for log in logs if "eval_loss" in log}) == 1
    assert len({log["stp_loss"] for log in logs if "loss" in log}) > 1
    assert collator.epoch == 2


class Clock(TrainerCallback):
    """In place of `time`: two seconds pass in an update, a hundred in a batch of an evaluation."""

    def save(self, directory):
        self.seconds += 1000

    seconds = 0.0

    def perf_counter(self):
        return self.seconds

    def on_step_end(self, *_, **__):
        self.seconds += 2

    def on_prediction_step(self, *_, **__):
        self.seconds += 100


def test_evaluation_and_saving_are_not_logged_as_training(tokenizer, tmp_path, monkeypatch):
    found = []
    for strategy in ("no", "steps"):
        model, collator = build(tokenizer)
        steps = {"max_steps": 4, "logging_steps": 2, "eval_steps": 1}
        saves = {"save_strategy": strategy, "save_steps": 1}
        args = arguments(tmp_path, eval_strategy=strategy, **saves, **steps)
        data = {"train_dataset": ROWS, "eval_dataset": ROWS[:5]}
        monkeypatch.setattr(trainer_module, "time", clock := Clock())
        monkeypatch.setattr(trainer_module, "mark_complete", clock.save)
        trainer = LLMJEPATrainer(model, args, collator, callbacks=[clock], **data)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        found.append([(log["ntp_loss"], log["tokens_per_step"]) for log in logs])
        rates = [log["tokens_per_second"] for log in logs]
        assert rates == [log["tokens_per_step"] / 2 for log in logs]
    assert found[0] == found[1]


def test_checkpoints_hold_the_arguments_as_they_were_given(tokenizer, tmp_path):
    model, collator = build(tokenizer)
    options = arguments(
        tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=2
    )
    trainer = LLMJEPATrainer(model, options, collator, train_dataset=ROWS)
    trainer.train()
    saved = sorted(tmp_path.glob("checkpoint-*"))
    assert [path.name for path in saved] == ["checkpoint-2", "checkpoint-3"]
    kept = torch.load(saved[-1] / "training_args.bin", weights_only=False)
    assert kept.save_total_limit == options.save_total_limit == 2


def test_a_checkpoint_that_was_made_just_in_time_is_complete(tmp_path):
    (tmp_path / "weights").write_text("1")
    unfinished = tmp_path / "checkpoint-is-incomplete.txt"  # there until Trainer is through
    unfinished.write_text("")
    mark_complete(tmp_path)
    unfinished.unlink()
    assert why_incomplete(tmp_path) is None


def test_frozen_weights_of_eight_bits_can_be_saved(tokenizer, tmp_path):
    model, collator = build(tokenizer)
    model = add_lora(model, 2, new_ids=collator.example_format.pred_ids)
    frozen = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    frozen.extra = torch.nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn), requires_grad=False)
    trainer = LLMJEPATrainer(model, arguments(tmp_path), collator, train_dataset=ROWS)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["all", "non_padding"])
def test_tokens_that_were_seen(tokenizer, tmp_path, kind):
    model, collator = build(tokenizer)
    collator = replace(collator, pad_to_multiple_of=64)
    options = arguments(tmp_path, include_num_input_tokens_seen=kind)
    trainer = LLMJEPATrainer(model, options, collator, train_dataset=ROWS[:8])
    trainer.train()
    batch = replace(collator, pad_to_multiple_of=None if kind == "non_padding" else 64)(ROWS[:8])
    assert trainer.state.num_input_tokens_seen == batch["input_ids"].numel()


def test_a_collator_of_other_batches_is_named(tokenizer, tmp_path):
    model = tiny_llama(tokenizer)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
    trainer = LLMJEPATrainer(model, arguments(tmp_path), default_data_collator, train_dataset=rows)
    with pytest.raises(ValueError, match=r"data_collator must make packed rows.*'visible_until'"):
        trainer.train()


def test_a_module_around_the_model_trains(tokenizer, tmp_path):
    class Around(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **batch):
            return self.model(**batch)

    model, collator = build(tokenizer)
    before = parameters(model)
    trainer = LLMJEPATrainer(Around(model), arguments(tmp_path), collator, train_dataset=ROWS)
    trainer.train()
    assert not torch.equal(parameters(model), before)


def test_several_processes_share_the_work(tokenizer, tmp_path, monkeypatch):
    model, collator = build(tokenizer)
    data = [collator.example(row) for row in ROWS]
    options = arguments(tmp_path, dataloader_drop_last=True)
    trainer = LLMJEPATrainer(model, options, collator, train_dataset=data)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, UpdateSampler)
    assert sampler.drop_last
    assert sampler.work(0, 0) == trainer._work_of(data)(0, 0) > 0
