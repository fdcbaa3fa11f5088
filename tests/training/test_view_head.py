"""The view head: what it maps, that it is trained, and where it is kept."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from llmjepa_kernels import Example, Segment, pack
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.hf.load import add_lora
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.training.objective import llm_jepa_loss
from llmjepa_kernels.training.trainer import LLMJEPATrainer
from llmjepa_kernels.training.view_head import (
    HEAD_FILE,
    add_view_head,
    load_view_head,
    remove_view_head,
    rows_of,
    view_head_of,
)
from llmjepa_kernels.tubes import TubeSampler
from tests.support.models import tiny_model
from tests.training.test_trainer import ROWS, arguments, build, parameters

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def chats():
    """A batch with pairs and tubes, of which several are of one row."""
    _, collator = build(train_tokenizer(ROWS, vocab_size=300))
    collator.tubes, collator.max_length = TubeSampler(count=3, seed=1), 300
    return collator(ROWS[:7])


@pytest.fixture
def model():
    model, _ = build(train_tokenizer(ROWS, vocab_size=300))
    return patch_model(model.double(), impl="reference")


def states_of(model, batch):
    keys = ("input_ids", "position_ids", "visible_until")
    return model(**{key: batch[key] for key in keys}, output_hidden_states=True).hidden_states[-1]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def pair_states(hidden, batch):
    row, pair = (batch["view_pairs"][..., 0] >= 0).nonzero(as_tuple=True)
    return hidden[row[:, None], batch["view_pairs"][row, pair]].unbind(dim=1)


@pytest.mark.parametrize(("projector_size", "predictor"), [(None, True), (12, False), (12, True)])
def test_pairs_are_compared_behind_it(model, chats, projector_size, predictor):
    add_view_head(model, projector_size=projector_size, predictor=predictor)
    output = llm_jepa_loss(model, chats, ntp_weight=0.0, return_views=True)
    found = gradients(model, output.loss)

    x, y = pair_states(states_of(model, chats), chats)
    weights = dict(model.view_head.named_parameters())
    if projector_size:
        w1, b1, w2, b2 = (
            weights[f"projector.{key}"] for key in ("0.weight", "0.bias", "2.weight", "2.bias")
        )
        x, y = (torch.nn.functional.gelu(side @ w1.T + b1) @ w2.T + b2 for side in (x, y))
    if predictor:
        x = x @ weights["predictor.weight"].T
    expected = (1 - cosine_similarity(x, y, dim=-1)).mean()
    torch.testing.assert_close(output.jepa_loss, expected)
    torch.testing.assert_close(output.cosine, 1 - expected)
    for a, b in zip(found, gradients(model, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)
    views = output.views.flatten(1, 2)
    torch.testing.assert_close(views[0][views[0].any(dim=1)], torch.nn.functional.normalize(x))


def test_tubes_are_predicted_by_their_own_matrix(model, chats):
    head = add_view_head(model, tube_predictor=True)
    output = llm_jepa_loss(model, chats, ntp_weight=0.0, jepa_weight=0.0, stp_weight=1.0)
    found = gradients(model, output.loss)
    hidden, losses = states_of(model, chats), []
    for row, tubes in zip(hidden, chats["tubes"], strict=True):
        for tube in tubes[(tubes >= 0).flatten(1).any(dim=1)].tolist():
            rest, patch = (
                sum(row[end] - row[start] for start, end in vector if start >= 0) for vector in tube
            )
            rest = head.tube_predictor.weight @ rest
            losses.append(1 - cosine_similarity(rest, patch, dim=0))
    expected = sum(losses) / len(losses)
    assert len(losses) == output.num_tubes == 21
    torch.testing.assert_close(output.stp_loss, expected)
    for a, b in zip(found, gradients(model, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)
    without_path = Example([Segment([5, 6, 7], labels=[5, 6, 7])])
    nothing = llm_jepa_loss(model, pack([without_path]), stp_weight=1.0)
    model.zero_grad()
    nothing.loss.backward()
    assert nothing.stp_loss == 0
    assert (head.tube_predictor.weight.grad == 0).all()  # which it has nevertheless


def test_rows_and_their_gradient():
    hidden = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[[4, 0], [4, -1]], [[2, 2], [0, 1]]])
    rows = rows_of(hidden, index)
    assert torch.equal(rows[0, 0, 0], hidden[0, 4])
    assert torch.equal(rows[0, 1, 1], hidden[0, 0])
    assert torch.equal(rows[1, 1, 1], hidden[1, 1])
    assert torch.autograd.gradcheck(lambda x: rows_of(x, index), [hidden])


def test_same_seed_same_weights_and_the_global_one_is_left_alone():
    heads, after = [], []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        heads.append(add_view_head(tiny_model("llama"), predictor=True, seed=seed))
        after.append(torch.rand(1))
    weights = [head.predictor.weight for head in heads]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert after[0] == after[1] == after[2]


def test_first_weights_of_matrices_are_those_of_glorot_and_bengio():
    head = add_view_head(tiny_model("llama"), predictor=True, tube_predictor=True)
    for matrix in (head.predictor, head.tube_predictor):
        bound = (6 / sum(matrix.weight.shape)) ** 0.5
        assert 0.95 * bound < matrix.weight.abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_loads_without_it_and_it_loads_beside(tmp_path, model, dtype, recwarn):
    model = model.to(dtype)
    head = add_view_head(model, projector_size=8, predictor=True, tube_predictor=True)
    assert head.predictor.weight.dtype == dtype
    model.save_pretrained(tmp_path)
    head.save(tmp_path)
    assert not any("view_head" in key for key in load_file(tmp_path / "model.safetensors"))
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=dtype
    )
    assert not info["unexpected_keys"]
    assert view_head_of(again) is None
    loaded = load_view_head(again, tmp_path)
    assert loaded is view_head_of(again)
    for key, value in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_what_cannot_be_loaded_is_named(tmp_path, model):
    assert load_view_head(model, tmp_path) is None
    (tmp_path / HEAD_FILE).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=f"{HEAD_FILE} is no view head of this model"):
        load_view_head(model, tmp_path)
    add_view_head(model, projector_size=9).save(tmp_path)
    add_view_head(model, predictor=True)  # a model that has another head already
    with pytest.raises(ValueError, match=r"predictor\.weight"):
        load_view_head(model, tmp_path)
    with pytest.raises(ValueError, match="projector_size must be"):
        add_view_head(model, projector_size=0)
    with pytest.raises(ValueError, match="must be a causal language model, got LlamaModel"):
        add_view_head(model.model, predictor=True)
    with pytest.raises(ValueError, match="must be given, got none of them"):
        add_view_head(model)


def trainer(model, collator, directory, **options):
    data = [collator.example(row) for row in ROWS[:16]]
    args = arguments(directory, max_steps=4, save_strategy="steps", save_steps=2, **options)
    return LLMJEPATrainer(model, args, collator, train_dataset=data, stp_weight=0.5)


def test_the_trainer_trains_saves_and_resumes_it(tmp_path, caplog):
    model, collator = build(train_tokenizer(ROWS, vocab_size=300))
    collator.tubes = TubeSampler(seed=1)
    head = add_view_head(model, predictor=True, tube_predictor=True)
    before, start = copy.deepcopy(head.state_dict()), copy.deepcopy(model)
    trainer(model, collator, tmp_path).train()
    for key, value in head.state_dict().items():
        assert not torch.equal(value, before[key]), key
    saved = load_file(tmp_path / "checkpoint-4" / HEAD_FILE)
    assert saved.keys() == before.keys()
    trainer(start, collator, tmp_path).train(str(tmp_path / "checkpoint-2"))
    assert torch.equal(parameters(start), parameters(model))
    assert "missing keys" not in caplog.text or "view_head" not in caplog.text
    modes = {path.stat().st_mode for path in (tmp_path / "checkpoint-4").glob("*.safetensors")}
    assert len(modes) == 1  # others may read the head if they may read the model
    remove_view_head(start)
    with pytest.raises(ValueError, match=f"has a {HEAD_FILE}, but the model has no ViewHead"):
        trainer(start, collator, tmp_path).train(str(tmp_path / "checkpoint-2"))
    add_view_head(start, predictor=True, tube_predictor=True)
    (tmp_path / "checkpoint-2" / HEAD_FILE).unlink()
    with pytest.raises(ValueError, match=f"has no {HEAD_FILE}, but the model has a ViewHead"):
        trainer(start, collator, tmp_path).train(str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_what_cuts_parameters_apart_is_refused(tmp_path, monkeypatch, name):
    """Said of itself by Transformers' trainer, as neither runs in one process on a CPU."""
    start = LLMJEPATrainer.create_accelerator_and_postprocess

    def with_plugin(self):
        start(self)
        setattr(self, f"is_{name.lower()}_enabled", True)

    monkeypatch.setattr(LLMJEPATrainer, "create_accelerator_and_postprocess", with_plugin)
    model, collator = build(train_tokenizer(ROWS, vocab_size=300))
    trainer(model, collator, tmp_path)
    add_view_head(model, predictor=True)
    with pytest.raises(ValueError, match=f"does not support a ViewHead under {name}"):
        trainer(model, collator, tmp_path)


def test_the_best_model_comes_with_its_head(tmp_path):
    model, collator = build(train_tokenizer(ROWS, vocab_size=300))
    head = add_view_head(model, predictor=True)
    data = [collator.example(row) for row in ROWS[:16]]
    steps = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"metric_for_best_model": "ntp_loss", "greater_is_better": True}  # the first one
    args = arguments(tmp_path, max_steps=3, load_best_model_at_end=True, **steps, **best)
    trained = LLMJEPATrainer(model, args, collator, train_dataset=data, eval_dataset=data)
    trained.train()
    assert trained.state.best_model_checkpoint.endswith("checkpoint-1")
    saved = load_file(tmp_path / "checkpoint-1" / HEAD_FILE)
    assert torch.equal(head.predictor.weight, saved["predictor.weight"])


def test_directions_differ_between_seeds_and_updates(tmp_path):
    """In the low 32 bits, which are all that torch's generator on the CPU takes."""
    found = set()
    for seed in range(4):
        model, collator = build(train_tokenizer(ROWS, vocab_size=300))
        one = trainer(model, collator, tmp_path, seed=seed)
        for one.state.global_step in range(3):
            found.add(one._warmed_up()["slices_seed"] % 2**32)
    assert len(found) == 12


def test_beside_lora(tmp_path):
    """Trained though PEFT freezes the rest, and no part of the adapter."""
    pytest.importorskip("peft")
    model, collator = build(train_tokenizer(ROWS, vocab_size=300))
    collator.tubes = TubeSampler(seed=1)
    lora = add_lora(model, 4, new_ids=collator.example_format.pred_ids)
    head = add_view_head(lora, predictor=True, tube_predictor=True)
    before = head.predictor.weight.detach().clone()
    trainer(lora, collator, tmp_path).train()
    assert not torch.equal(head.predictor.weight, before)
    adapter = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert not any("view_head" in key for key in adapter)
    assert (tmp_path / "checkpoint-4" / HEAD_FILE).is_file()
    assert view_head_of(lora.merge_and_unload()) is head

    late, collator = build(train_tokenizer(ROWS, vocab_size=300))
    add_view_head(late, predictor=True)
    late = add_lora(late, 4, new_ids=collator.example_format.pred_ids)
    with pytest.raises(ValueError, match="call get_peft_model before add_view_head"):
        trainer(late, collator, tmp_path)
