"""The trainer's update against one written by hand, and everything that must not change it."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.grammar import generate
from llmjepa_kernels.data.predictor_tokens import add_predictor_tokens
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.example import IGNORE, Example, Segment, without_views
from llmjepa_kernels.hf.load import add_lora
from llmjepa_kernels.hf.patch import patch_model, patched_impl
from llmjepa_kernels.training.collator import LLMJEPACollator, chat_tokens
from llmjepa_kernels.training.loss_dropout import LossDropout
from llmjepa_kernels.training.objective import llm_jepa_loss
from llmjepa_kernels.training.trainer import LLMJEPATrainer
from llmjepa_kernels.tubes import TubeSampler
from tests.support.models import BEFORE_5_17, CHECKPOINTING

datasets = pytest.importorskip("datasets")

ROWS = generate(24, seed=3)


@pytest.fixture
def tokenizer():
    return train_tokenizer(ROWS, vocab_size=300)


def tiny_llama(tokenizer, *, tied: bool = True, spare_rows: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + spare_rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def build(tokenizer, **options):
    tokenizer = copy.deepcopy(tokenizer)  # it gets the [PRED] tokens of one model
    model = tiny_llama(tokenizer, **options)
    return model, LLMJEPACollator(
        tokenizer, ExampleFormat(pred_ids=add_predictor_tokens(model, tokenizer, 2))
    )


def arguments(directory, **options) -> TrainingArguments:
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 8,
    }
    return TrainingArguments(str(directory), **defaults | options)


def parameters(model) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# The collator


def test_collator_packs_chats_and_examples_alike(tokenizer):
    _, collator = build(tokenizer)
    batch = collator(ROWS[:8])
    same = collator([collator.example(row) for row in ROWS[:8]])
    assert batch.keys() == same.keys()
    assert all(torch.equal(batch[key], same[key]) for key in batch)
    again = pickle.loads(pickle.dumps(collator))(ROWS[:8])
    assert all(torch.equal(batch[key], again[key]) for key in batch)


def test_collator_counts_what_plain_fine_tuning_takes(tokenizer):
    _, collator = build(tokenizer)
    chats = [tokenizer.apply_chat_template(row["messages"])["input_ids"] for row in ROWS[:8]]
    sft_tokens = sum(map(len, chats))
    rows = LLMJEPACollator(tokenizer, collator.example_format, max_length=200)(ROWS[:8])
    assert len(rows["input_ids"]) > 1
    assert rows["input_ids"].shape[1] <= 200
    for batch in (rows, collator(ROWS[:8])):
        assert batch["sft_tokens"].shape == (len(batch["input_ids"]),)
        assert int(batch["sft_tokens"].sum()) == sft_tokens

    plain = LLMJEPACollator(tokenizer, with_views=False, share_prefixes=False)(ROWS[:8])
    assert plain["input_ids"].numel() == int(plain["sft_tokens"].sum()) == sft_tokens
    assert plain["view_pairs"].shape[1] == 0


def test_loss_dropout_takes_the_cost_of_the_views_away(tokenizer):
    _, collator = build(tokenizer)
    examples = [collator.example(row) for row in ROWS]
    data = LossDropout(examples, 0.75, seed=1)
    kept = [i for i in range(len(data)) if not data.drops(i)]
    assert 0 < len(kept) < len(data)
    collator = replace(collator, share_prefixes=False)
    batch = collator([data[i] for i in range(len(data))])
    views = [sum(len(s.input_ids) for s in e.segments) - chat_tokens(e) for e in examples]
    sft_tokens = sum(map(chat_tokens, examples))
    assert int(batch["sft_tokens"].sum()) == sft_tokens  # what relative_cost divides by
    assert batch["input_ids"].numel() == sft_tokens + sum(views[i] for i in kept)


def test_collator_draws_tubes_anew_every_epoch(tokenizer):
    _, collator = build(tokenizer)
    collator = replace(collator, tubes=TubeSampler(count=3))
    first, again = collator(ROWS[:4])["tubes"], collator(ROWS[:4])["tubes"]
    assert first.shape == (1, 12, 2, 3, 2)
    assert torch.equal(first, again)
    collator.set_epoch(1)
    assert not torch.equal(collator(ROWS[:4])["tubes"], first)
    # They cost no tokens.
    collator = replace(collator, with_views=False, share_prefixes=False)
    batch = collator(ROWS[:4])
    assert int(batch["sft_tokens"].sum()) == batch["input_ids"].numel()


def test_weights_grow_over_the_warm_up(tokenizer, tmp_path):
    """λ is a quarter and a half of itself at the first two of eight updates with all of a warm-up
    over half of them, and whole from the fourth on."""
    model, collator = build(tokenizer)
    collator.tubes = TubeSampler()
    trainer = LLMJEPATrainer(
        model,
        arguments(tmp_path, max_steps=8, train_sampling_strategy="sequential"),
        collator,
        train_dataset=ROWS,
        jepa_weight=2.0,
        stp_weight=0.5,
        weight_warmup=0.5,
    )
    trainer.train()
    for i, log in enumerate(trainer.state.log_history[:8]):
        share = min(1, (i + 1) / 4)
        terms = 2 * log["jepa_loss"] + 0.5 * log["stp_loss"]
        assert log["loss"] == pytest.approx(log["ntp_loss"] + share * terms, rel=1e-4)


def test_collator_names_what_is_wrong(tokenizer):
    with pytest.raises(ValueError, match="tubes are drawn from a path"):
        LLMJEPACollator(tubes=TubeSampler())([Example([Segment([5], labels=[5])])])
    with pytest.raises(ValueError, match=r"with the key messages, got \['text'\]"):
        LLMJEPACollator(tokenizer)([{"text": "a"}])
    with pytest.raises(ValueError, match="tokenizer=None"):
        LLMJEPACollator()(ROWS[:1])
    with pytest.raises(ValueError, match=r"example \d takes .* more than max_length = 20"):
        LLMJEPACollator(tokenizer, max_length=20)(ROWS[:2])


# The update


def by_hand(model, batch, learning_rate=0.1, **weights):
    batch = {key: value for key, value in batch.items() if key != "sft_tokens"}
    outputs = llm_jepa_loss(patch_model(model), batch, **weights)
    outputs.loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= learning_rate * parameter.grad
    return outputs


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (3, 3)])
def test_accumulation_gives_the_update_of_the_whole_batch(
    tokenizer, tmp_path, batch_size, accumulation
):
    model, collator = build(tokenizer)
    start = parameters(model)
    # One chat in three has no pair, so the counts of pairs and tokens differ between batches.
    data = [collator.example(row) for row in ROWS[:8]]
    data = [without_views(example) if i % 3 == 0 else example for i, example in enumerate(data)]
    data = [
        replace(x, tubes=TubeSampler(count=1 + i % 2).draw(x.path, [i])) for i, x in enumerate(data)
    ]
    expected_model, _ = build(tokenizer)
    weights = {"jepa_weight": 2.0, "stp_weight": 0.5, "ntp_weight": 0.8}
    expected = by_hand(expected_model, collator(data), **weights)

    options = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
    }
    args = arguments(tmp_path, **options)
    trainer = LLMJEPATrainer(model, args, collator, train_dataset=data, **weights)
    trainer.train()
    update = parameters(expected_model) - start
    assert relative(parameters(model) - start, update) <= 1e-6
    log = trainer.state.log_history[0]
    for name in ("loss", "ntp_loss", "jepa_loss", "stp_loss", "cosine"):
        assert log[name] == pytest.approx(expected[name].item(), rel=1e-5)


def test_gradient_checkpointing_changes_nothing(tokenizer, tmp_path):
    results = []
    for checkpointing in (False, True):
        model, collator = build(tokenizer)
        args = arguments(tmp_path, **{CHECKPOINTING: checkpointing}, max_steps=2)
        LLMJEPATrainer(model, args, collator, train_dataset=ROWS).train()
        results.append(parameters(model))
    assert torch.equal(*results)


def test_bf16_autocast_follows_float32(tokenizer, tmp_path):
    results = []
    for bf16 in (False, True):
        model, collator = build(tokenizer)
        start = parameters(model)
        args = arguments(tmp_path, bf16=bf16)
        LLMJEPATrainer(model, args, collator, train_dataset=ROWS).train()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        results.append(parameters(model) - start)
    full, low = results
    assert not torch.equal(full, low)
    assert torch.nn.functional.cosine_similarity(full, low, dim=0) > 0.99


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_adapters_and_predictor_rows_only(tokenizer, tmp_path, tied):
    model, collator = build(tokenizer, tied=tied)
    ids = list(collator.example_format.pred_ids)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lora = add_lora(model, 4, new_ids=ids)
    args = arguments(tmp_path, max_steps=3, **{CHECKPOINTING: True})
    LLMJEPATrainer(lora, args, collator, train_dataset=ROWS).train()

    merged = lora.merge_and_unload()
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, before[name])}
    projections = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {name.split(".")[-2] for name in changed} == projections | {"embed_tokens"}
    name = "model.embed_tokens.weight"
    weight = dict(merged.named_parameters())[name]
    rows = (weight != before[name]).any(dim=1).nonzero().flatten().tolist()
    assert rows == ids


def test_plain_fine_tuning_is_the_models_own_loss(tokenizer, tmp_path):
    model = tiny_llama(tokenizer)
    chats = [without_views(LLMJEPACollator(tokenizer).example(row)) for row in ROWS[:8]]
    total, count = 0.0, 0
    for chat in chats:
        ids = [token for segment in chat.segments for token in segment.input_ids]
        labels = [y for s in chat.segments for y in s.labels or [IGNORE] * len(s.input_ids)]
        supervised = sum(y != IGNORE for y in labels)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total, count = total + float(loss) * supervised, count + supervised

    collator = LLMJEPACollator(tokenizer, with_views=False)
    trainer = LLMJEPATrainer(model, arguments(tmp_path), collator, train_dataset=ROWS[:8])
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == log["ntp_loss"] == pytest.approx(total / count, rel=1e-5)
    assert "jepa_loss" not in log


# Logs, evaluation, data


def test_logs_of_tokens_and_cost(tokenizer, tmp_path):
    model, collator = build(tokenizer)
    args = arguments(
        tmp_path,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        logging_steps=2,
        max_steps=2,
    )
    trainer = LLMJEPATrainer(model, args, collator, train_dataset=ROWS)
    trainer.train()
    tokens = [collator(ROWS[i : i + 3])["input_ids"].numel() for i in range(0, 12, 3)]
    sft_tokens = sum(chat_tokens(collator.example(row)) for row in ROWS[:12])
    log = trainer.state.log_history[0]
    assert log["tokens_per_step"] == sum(tokens) // 2
    assert log["relative_cost"] == pytest.approx(sum(tokens) / sft_tokens)
    assert log["loss"] == pytest.approx(log["ntp_loss"] + log["jepa_loss"], rel=1e-5)
    assert log["tokens_per_second"] > 0


@pytest.mark.parametrize("metric", ["cosine", "l2", "infonce"])
def test_evaluation_is_a_mean_over_the_whole_set(tokenizer, tmp_path, metric):
    model, collator = build(tokenizer)
    data = [collator.example(row) for row in ROWS[:7]]
    data[0] = without_views(data[0])
    args = arguments(tmp_path, per_device_eval_batch_size=7 if metric == "infonce" else 3)
    options = {"metric": metric, "jepa_weight": 0.5, "detach_target": metric == "l2"}
    trainer = LLMJEPATrainer(model, args, collator, eval_dataset=data, **options)
    metrics = trainer.evaluate()
    batch = collator(data)
    del batch["sft_tokens"]
    expected = llm_jepa_loss(model, batch, **options)
    for name in ("loss", "ntp_loss", "jepa_loss", "cosine"):
        assert metrics[f"eval_{name}"] == pytest.approx(expected[name].item(), rel=1e-5)
    predicted = trainer.predict(data)
    assert predicted.predictions is None
    assert predicted.metrics["test_loss"] == metrics["eval_loss"]


def test_examples_without_supervised_tokens_count_for_no_fine_tuning(tokenizer):
    _, collator = build(tokenizer)
    example = collator.example(ROWS[0])
    bare = [Segment(s.input_ids, s.parent) for s in example.segments]
    batch = collator([Example(bare, example.pairs), example])
    assert batch["sft_tokens"] == chat_tokens(example)
    assert (batch["view_pairs"][..., 0] >= 0).sum() == 2


def test_evaluation_leaves_out_the_losses_of_what_is_not_there(tokenizer, tmp_path):
    model, collator = build(tokenizer)
    plain = [without_views(collator.example(row)) for row in ROWS[:3]]
    trainer = LLMJEPATrainer(model, arguments(tmp_path), collator)
    metrics = trainer.evaluate(plain)
    assert metrics["eval_loss"] == metrics["eval_ntp_loss"] > 0
    assert not {"eval_jepa_loss", "eval_cosine"} & metrics.keys()
    nothing = trainer.evaluate([])  # a loss of 0 would pass for the best checkpoint
    assert not {"eval_loss", "eval_ntp_loss", "eval_jepa_loss"} & nothing.keys()


def test_a_stream_that_ends_is_begun_again(tokenizer, tmp_path):
    model, collator = build(tokenizer)
    epochs = []
    set_epoch = collator.set_epoch
    collator.set_epoch = lambda epoch: (epochs.append(epoch), set_epoch(epoch))
    stream = datasets.IterableDataset.from_generator(lambda: iter(ROWS[:12]))
    args = arguments(tmp_path, per_device_train_batch_size=4, max_steps=7)
    trainer = LLMJEPATrainer(model, args, collator, train_dataset=stream)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 7
    assert logs[0]["tokens_per_step"] == logs[3]["tokens_per_step"] == logs[6]["tokens_per_step"]
    assert epochs == [0, 1, 2]  # so that tubes are drawn anew


def test_columns_of_a_dataset_reach_the_collator(tokenizer, tmp_path):
    model, collator = build(tokenizer)
    rows = [row | {"text": row["messages"][1]["content"][:10]} for row in ROWS]
    args = arguments(tmp_path, dataloader_num_workers=1)
    results = []
    for data in (rows, datasets.Dataset.from_list(rows)):
        model, collator = build(tokenizer)
        LLMJEPATrainer(model, args, collator, train_dataset=data).train()
        results.append(parameters(model))
    assert torch.equal(*results)


def test_loss_dropout_is_drawn_by_seed_epoch_and_example(tokenizer):
    _, collator = build(tokenizer)
    data = [collator.example(row) for row in ROWS]

    def dropped(epoch: int, rate: float = 0.75, seed: int = 1, source=data) -> list[int]:
        dataset = LossDropout(source, rate, seed=seed)
        dataset.set_epoch(epoch)
        order = reversed(range(len(dataset)))
        return [i for i in order if not collator.example(dataset[i]).pairs][::-1]

    assert dropped(0) == dropped(0) == dropped(0, source=ROWS)
    assert dropped(0) != dropped(1)
    assert dropped(0) != dropped(0, seed=2)
    assert not dropped(0, rate=0.0)
    assert dropped(0, rate=1.0) == list(range(len(data)))
    rates = [len(dropped(epoch)) / len(data) for epoch in range(20)]
    assert sum(rates) / len(rates) == pytest.approx(0.75, abs=0.06)
    with pytest.raises(ValueError, match="rate must be from 0 to 1, got 2"):
        LossDropout(data, 2)


def test_loss_dropout_saves_the_views_cost_in_every_epoch(tokenizer, tmp_path):
    model, collator = build(tokenizer)
    data = LossDropout([collator.example(row) for row in ROWS], 0.75)
    args = arguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=len(ROWS),
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
    )
    trainer = LLMJEPATrainer(model, args, collator, train_dataset=data)
    trainer.train()
    expected = []
    for epoch in range(3):
        data.set_epoch(epoch)
        batch = collator([data[i] for i in range(len(data))])
        expected.append(batch["input_ids"].numel())
    found = [log["tokens_per_step"] for log in trainer.state.log_history[:3]]
    assert found == expected
    assert max(found) < collator(data.data)["input_ids"].numel()


def test_loss_dropout_per_step_drops_whole_updates(tokenizer, tmp_path):
    """All examples of an update or none, over its accumulated batches; none of their cost stays."""
    model, collator = build(tokenizer)
    examples = [collator.example(row) for row in ROWS]
    data = LossDropout(examples, 0.5, per="step", seed=1)
    batches = []

    def collate(features):
        batches.append([len(features), sum(bool(example.pairs) for example in features)])
        return collator(features)

    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    args = arguments(tmp_path, max_steps=12, **options)  # three epochs
    trainer = LLMJEPATrainer(model, args, collate, train_dataset=data)
    trainer.train()

    drops = []
    for epoch in range(3):
        data.set_epoch(epoch)
        drops += [data.drops(0, update) for update in range(4)]
    assert True in drops
    assert False in drops
    assert drops[:4] != drops[4:8]
    assert batches == [[3, 0 if drop else 3] for drop in drops for _ in range(2)]
    logs = trainer.state.log_history[:12]
    assert ["jepa_loss" not in log for log in logs] == drops
    assert all((log["relative_cost"] < 0.9) == drop for log, drop in zip(logs, drops, strict=True))


def test_logs_of_pairs_are_means_over_the_updates_that_have_some(tokenizer, tmp_path):
    history = []
    for steps in (1, 6):
        model, collator = build(tokenizer)
        data = LossDropout([collator.example(row) for row in ROWS], 0.5, per="step", seed=1)
        args = arguments(tmp_path, max_steps=6, logging_steps=steps, learning_rate=0.01)
        trainer = LLMJEPATrainer(model, args, collator, train_dataset=data)
        trainer.train()
        history.append(trainer.state.log_history)
    single = [log for log in history[0] if "jepa_loss" in log]
    assert 0 < len(single) < 6
    for name in ("jepa_loss", "cosine"):
        expected = sum(log[name] for log in single) / len(single)
        assert history[1][0][name] == pytest.approx(expected, rel=1e-4)


def test_loss_dropout_per_step_keeps_the_order_of_a_plain_trainer(tokenizer, tmp_path):
    results = []
    for rate in (None, 0.0):
        model, collator = build(tokenizer)
        data = [collator.example(row) for row in ROWS]
        data = data if rate is None else LossDropout(data, rate, per="step")
        args = arguments(tmp_path, max_steps=5, per_device_train_batch_size=6)
        LLMJEPATrainer(model, args, collator, train_dataset=data).train()
        results.append(parameters(model))
    assert torch.equal(*results)


def test_loss_dropout_per_step_is_the_same_after_a_resume(tokenizer, tmp_path):
    """Interrupted in the middle of an epoch: six updates are one and a half."""
    results = []
    for resumed in (False, True):
        for max_steps in (6, 9) if resumed else (9,):
            model, collator = build(tokenizer)
            data = LossDropout([collator.example(row) for row in ROWS], 0.5, per="step", seed=1)
            args = arguments(
                tmp_path / str(resumed),
                max_steps=max_steps,
                per_device_train_batch_size=3,
                gradient_accumulation_steps=2,
                save_strategy="steps",
                save_steps=6,
            )
            trainer = LLMJEPATrainer(model, args, collator, train_dataset=data)
            trainer.train(resume_from_checkpoint=max_steps == 9 and resumed)
        results.append(parameters(model))
    assert torch.equal(*results)


def test_loss_dropout_per_step_needs_to_know_the_step(tokenizer, tmp_path):
    model, collator = build(tokenizer)
    data = LossDropout(ROWS, 0.5, per="step")
    with pytest.raises(ValueError, match="train with LLMJEPATrainer, whose sampler knows it"):
        data[0]
    assert data[0, 3]["messages"] == ROWS[0]["messages"]
    with pytest.raises(ValueError, match=r"per must be one of \('example', 'step'\), got 'batch'"):
        LossDropout(ROWS, 0.5, per="batch")
    args = arguments(tmp_path)
    args.accelerator_config.use_seedable_sampler = False
    with pytest.raises(ValueError, match="needs train_sampling_strategy random or sequential"):
        LLMJEPATrainer(model, args, collator, train_dataset=data).train()


def test_trainer_patches_once_and_packs_by_default(tokenizer, tmp_path):
    model = tiny_llama(tokenizer)
    trainer = LLMJEPATrainer(
        model, arguments(tmp_path), train_dataset=ROWS, processing_class=tokenizer
    )
    assert isinstance(trainer.data_collator, LLMJEPACollator)
    assert patched_impl(model) is None
    trainer.train()
    patch_model(model, impl="reference")
    LLMJEPATrainer(model, arguments(tmp_path), processing_class=tokenizer)
    assert patched_impl(model) == "reference"


def test_models_of_model_init_are_patched(tokenizer, tmp_path):
    given, collator = build(tokenizer)
    args = arguments(tmp_path, train_sampling_strategy="sequential")
    LLMJEPATrainer(given, args, collator, train_dataset=ROWS).train()
    trainer = LLMJEPATrainer(
        args=args,
        data_collator=collator,
        train_dataset=ROWS,
        model_init=lambda: build(tokenizer)[0],
    )
    trainer.train()
    assert torch.equal(parameters(trainer.model), parameters(given))


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_grouping_by_length(tokenizer, tmp_path, strategy):
    """It needs to know the lengths, and says so."""
    if strategy == "batch_rebalance" and BEFORE_5_17:
        pytest.skip("a strategy of later versions")
    model, collator = build(tokenizer)
    args = arguments(tmp_path, train_sampling_strategy=strategy)
    trainer = LLMJEPATrainer(model, args, collator, train_dataset=ROWS)
    with pytest.raises(ValueError, match=f"{strategy}' needs a Dataset with the column 'length'"):
        trainer.train()
    rows = datasets.Dataset.from_list([row | {"length": len(str(row))} for row in ROWS])
    LLMJEPATrainer(model, args, collator, train_dataset=rows).train()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("DataParallel", lambda args: setattr(args, "_n_gpu", 2)),
        ("label_smoothing_factor", lambda args: setattr(args, "label_smoothing_factor", 0.1)),
        ("neftune_noise_alpha", lambda args: setattr(args, "neftune_noise_alpha", 5)),
        ("compute_loss_func", lambda args: {"compute_loss_func": lambda *a, **k: None}),
        ("compute_metrics", lambda args: {"compute_metrics": lambda p: {}}),
        (
            "dispatch_batches",
            lambda args: setattr(args.accelerator_config, "dispatch_batches", True),
        ),
    ],
)
def test_trainer_refuses_what_it_would_ignore(tokenizer, tmp_path, name, make):
    args = arguments(tmp_path)
    assert args.n_gpu == 0
    options = make(args) or {}
    with pytest.raises(ValueError, match=f"LLMJEPATrainer does not support {name}"):
        LLMJEPATrainer(tiny_llama(tokenizer), args, processing_class=tokenizer, **options)
