"""`llmjepa export`: what leaves is a plain checkpoint with the same logits."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmjepa_kernels.cli import main as cli
from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.predictor_tokens import add_tokens, predictor_tokens
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.hf import load as models
from llmjepa_kernels.hf.export import _say_in_old_words, export_model
from tests.support.models import tiny_model

PROMPT = "lines with a vowel or [0-9]"
ELSEWHERE = """
import json, sys
sys.modules["llmjepa_kernels"] = None  # not to be had
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt")["input_ids"]
logits = model(ids).logits[0]
print(json.dumps({"ids": ids[0].tolist(), "logits": logits.tolist()}))
"""


def export(*options):
    return cli.main(["export", *map(str, options)])


def checkpoint(directory, *, after=(), pad=None, dtype="float32", **config):
    """A model whose [PRED] tokens stand between its own tokens and others; all tokens and rows."""
    tokenizer = train_tokenizer(grammar.generate(20, seed=3), vocab_size=300)
    model = tiny_model("phi", vocab_size=len(tokenizer), **config)  # whose head has a bias
    known = len(tokenizer)
    names = [*predictor_tokens(2), *after]
    ids = add_tokens(model, tokenizer, names, pad_to_multiple_of=pad)
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_()
    models.cast_weights(model, dtype)
    if after:
        model.generation_config.eos_token_id = ids[3]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    form = {"template": "plain", "separator_id": ids[2], "end_id": ids[3]} if after else {}
    ExampleFormat(pred_ids=ids[:2], **form).save(directory)
    kept = [*range(known), *ids[2:]]
    model.set_attn_implementation("sdpa")  # as it is loaded
    return model.eval(), tokenizer, kept


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"pad": 64},
        {"after": ("<|sep|>", "<|end|>", "<|more|>"), "pad": 64},
        {"after": ("<|sep|>", "<|end|>"), "dtype": "bfloat16"},
    ],
)
def test_the_other_logits_are_the_same_bits(tmp_path, capsys, tied, how):
    model, tokenizer, kept = checkpoint(tmp_path / "in", tie_word_embeddings=tied, **how)
    assert export(tmp_path / "in", tmp_path / "out") == 0
    assert "without <|predictor_2|>, <|predictor_1|>" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert plain.dtype == model.dtype
    assert plain.config.vocab_size == len(kept)
    assert plain.generation_config.suppress_tokens is None
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = PROMPT + "".join(how.get("after", ()))
    before, after = (t(text, return_tensors="pt")["input_ids"] for t in (tokenizer, found))
    assert [kept[i] for i in after[0].tolist()] == before[0].tolist()
    assert found.decode(after[0]) == tokenizer.decode(before[0])
    head = model.get_output_embeddings()
    with torch.no_grad():
        hidden = model.model(before).last_hidden_state
        # A product of all rows may round otherwise.
        expected = torch.nn.functional.linear(hidden, head.weight[kept], head.bias[kept])
        assert torch.equal(plain(after).logits, expected)
        torch.testing.assert_close(expected, model(before).logits[..., kept])
    form = ExampleFormat.load(tmp_path / "out", found)
    assert form.pred_ids == ()
    if how.get("after"):
        ids = (form.separator_id, form.end_id)
        assert tuple(found.convert_ids_to_tokens(ids)) == how["after"][:2]
        assert plain.generation_config.eos_token_id == form.end_id
    assert len(found) == len(kept)
    assert "<|predictor_1|>" not in (tmp_path / "out" / "tokenizer.json").read_text()


def test_a_process_without_this_package_reads_it(tmp_path):
    options = ["--train-samples", 20, "--eval-samples", 4, "--max-steps", 2, "--hidden-size", 64]
    options += ["--num-layers", 1, "--no-compare", "--pad-vocab-to-multiple-of", 64]
    run = [*options, "--output-dir", tmp_path / "run"]
    assert cli.main(["train", *map(str, run)]) == 0
    trained, out = tmp_path / "run" / "llm-jepa", tmp_path / "out"
    assert export(trained, out) == 0
    command = [sys.executable, "-c", ELSEWHERE, str(out), PROMPT]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    model, tokenizer = models.load_pretrained(str(trained))
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    assert found["ids"] == ids[0].tolist()
    with torch.no_grad():
        logits = model(ids).logits[0]
    expected = logits[:, : len(tokenizer) - 1]  # maybe of another number of threads
    torch.testing.assert_close(torch.tensor(found["logits"]), expected)
    card = (out / "README.md").read_text()
    for expected in ("library_name: transformers", "# LLM-JEPA", "max_steps: 2", "| accuracy on"):
        assert expected in card
    assert "jepa_weight" not in card  # the default
    # What other versions of Transformers call these.
    config = json.loads((out / "config.json").read_text())
    assert (config["torch_dtype"], config["rope_theta"]) == ("float32", 10000.0)
    tokenizer_config = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|user|>" in tokenizer_config["additional_special_tokens"]
    assert cli.main(["evaluate", str(out), "--samples", "3"]) == 0


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def adapter(tmp_path, request):
    """An adapter that trains [PRED] rows, and its base."""
    tokenizer = train_tokenizer(grammar.generate(20, seed=3), vocab_size=300)
    torch.manual_seed(0)
    base = models.small_llama(tokenizer, hidden_size=64, num_layers=1)
    base.config.tie_word_embeddings = request.param
    base = type(base)(base.config)
    models.cast_weights(base, "bfloat16")
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def make(*after):
        model, tokenizer = models.load_pretrained(str(tmp_path / "base"))
        ids = add_tokens(model, tokenizer, [*predictor_tokens(2), *after])
        adapted = models.add_lora(model, 2, new_ids=ids)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "delta" in name:
                torch.nn.init.normal_(parameter.data, std=0.05)
        adapted.save_pretrained(tmp_path / "adapter")
        tokenizer.save_pretrained(tmp_path / "adapter")
        return adapted.eval(), tokenizer

    return make


def test_an_adapter_stays_one(adapter, tmp_path):
    adapted, tokenizer = adapter()
    assert export(tmp_path / "adapter", tmp_path / "out") == 0
    base, _ = models.load_pretrained(str(tmp_path / "base"))
    plain = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = adapted(ids).logits[..., : len(tokenizer) - 2]
        torch.testing.assert_close(plain(ids).logits, expected)
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "base").get_vocab()


def test_modules_that_an_adapter_saves_whole(tmp_path, capsys):
    """And biases; a head that was resized does not fit the base model."""
    checkpoint(tmp_path / "base")
    adapted, tokenizer = models.load_pretrained(str(tmp_path / "base"))
    whole = ["embed_tokens", "lm_head", "mlp"]
    trained = {"modules_to_save": whole, "bias": "lora_only"}
    config = LoraConfig(r=2, target_modules=["q_proj"], **trained)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    def save(model, directory):
        model = get_peft_model(model, config).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter.data, std=0.05)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        with torch.no_grad():
            return model(ids).logits

    expected = save(adapted, tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "out") == 0
    base, _ = models.load_pretrained(str(tmp_path / "base"))
    plain = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, expected)

    grown, _ = models.load_pretrained(str(tmp_path / "base"))
    add_tokens(grown, tokenizer, predictor_tokens(3))
    expected = save(grown, tmp_path / "grown")
    assert export(tmp_path / "grown", tmp_path / "none") == 2
    assert "embed_tokens.weight for more tokens than its base" in capsys.readouterr().err
    assert export(tmp_path / "grown", tmp_path / "merged", "--merge") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found = merged(ids).logits
    torch.testing.assert_close(found, expected[..., : found.shape[-1]])


def test_an_adapter_is_merged(adapter, tmp_path):
    adapted, tokenizer = adapter("<|sep|>")
    assert export(tmp_path / "adapter", tmp_path / "merged", "--merge", "--dtype", "float32") == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    merged = adapted.merge_and_unload()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    kept = [*range(len(tokenizer) - 3), len(tokenizer) - 1]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, merged(ids).logits[..., kept])
    assert export(tmp_path / "adapter", tmp_path / "auto", "--merge") == 0
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "auto")
    assert auto.dtype == torch.bfloat16  # that of the base model


def test_an_adapter_whose_tokens_would_move(tmp_path, capsys):
    """Its base has tokens behind [PRED], which keep their ids there."""
    checkpoint(tmp_path / "base", after=("<|sep|>", "<|end|>"))
    model, tokenizer = models.load_pretrained(str(tmp_path / "base"))
    models.add_lora(model, 2).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    ExampleFormat.load(tmp_path / "base").save(tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "out") == 2
    assert "has tokens behind <|predictor_2|>, <|predictor_1|>" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export(tmp_path / "adapter", tmp_path / "out", "--merge") == 0


@pytest.mark.parametrize("num_pred_tokens", [0, 1])
def test_an_adapter_of_a_padded_vocabulary_is_loaded_again(tmp_path, num_pred_tokens):
    options = ["--train-samples", 20, "--eval-samples", 2, "--max-steps", 1, "--no-compare"]
    options += ["--num-pred-tokens", num_pred_tokens]
    small = ["--hidden-size", 64, "--num-layers", 1, "--vocab-size", 300]
    small += ["--output-dir", tmp_path / "first"]
    assert cli.main(["train", *map(str, options + small)]) == 0
    more = ["--model", tmp_path / "first" / "llm-jepa", "--lora-rank", 2]
    more += ["--pad-vocab-to-multiple-of", 64, "--output-dir", tmp_path / "second"]
    assert cli.main(["train", *map(str, options + more)]) == 0
    run = tmp_path / "second" / "llm-jepa"
    merged, tokenizer = models.load_pretrained(str(run))
    loaded, _ = models.load_pretrained(str(run / "adapter"))
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, merged(ids).logits)
    assert loaded.config.vocab_size % 64 == 0
    assert export(run / "adapter", tmp_path / "out", "--merge") == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("llm_jepa.json", "{", "is no example format"),
        ("llm_jepa.json", '{"template": "plain", "separator_id": 7777}', "separator_id of"),
        ("run.json", "{", "is no record of a run"),
        ("run.json", '{"options": [1]}', "is no record of a run"),
        ("run.json", "[]", "is no record of a run"),
    ],
)
def test_nothing_is_left_where_something_is_corrupt(tmp_path, capsys, name, text, message):
    checkpoint(tmp_path / "in")
    (tmp_path / "in" / name).write_text(text)
    assert export(tmp_path / "in", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_cannot_leave(adapter, tmp_path, capsys):
    adapter("<|sep|>")
    out = tmp_path / "out"
    assert export(tmp_path / "adapter", out) == 2
    assert "trains the rows of ['<|sep|>'] too" in capsys.readouterr().err
    assert export(tmp_path / "adapter", out, "--dtype", "float16") == 2
    assert "an adapter needs --merge" in capsys.readouterr().err
    assert export(tmp_path / "base", tmp_path / "adapter") == 2
    assert "must not hold anything yet" in capsys.readouterr().err
    assert export(tmp_path / "nowhere", out) == 2
    assert "nowhere" in capsys.readouterr().err
    adapter()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"garbage")
    assert export(tmp_path / "adapter", tmp_path / "out") == 2
    assert "adapter_model.safetensors cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_ends_get_new_ids(tmp_path):
    model, tokenizer, kept = checkpoint(tmp_path / "in", after=("<|sep|>", "<|end|>"))
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    model.generation_config.eos_token_id = ends
    model.generation_config.bad_words_ids = [[4, ends[1]], tokenizer.encode(predictor_tokens(2)[0])]
    model.config.pad_token_id = ends[1]
    export_model(model, tokenizer, predictor_tokens(2), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = [kept.index(i) for i in ends]
    assert again.generation_config.eos_token_id == expected
    assert again.generation_config.bad_words_ids == [[4, expected[1]]]
    assert again.config.pad_token_id == expected[1]


def test_rotary_scaling_in_the_words_of_older_versions():
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    values = {"dtype": "bfloat16", "rope_parameters": rope}
    _say_in_old_words(values)
    assert values["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}


def test_into_a_directory_that_is_there(tmp_path, monkeypatch):
    checkpoint(tmp_path / "in")
    there = tmp_path / "out"
    there.mkdir()
    monkeypatch.chdir(there)
    assert export(tmp_path / "in", ".") == 0
    assert (there / "model.safetensors").is_file()
    assert not list(there.glob("tmp*"))
