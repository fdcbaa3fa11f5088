"""The Python of README.md and of the documentation runs as it is pasted."""

import re
import runpy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.hf.load import small_llama
from tests.test_examples import ROOT

SNIPPETS = [
    pytest.param(code, id=f"{path.stem}-{i}")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL))
]


@pytest.fixture
def names():
    """What a snippet may take for granted: a model, its tokenizer and rows of data."""
    rows = grammar.generate(32, seed=0)
    tokenizer = train_tokenizer(rows, vocab_size=300)
    torch.manual_seed(0)
    model = small_llama(tokenizer, hidden_size=64, num_layers=1)
    return {"model": model, "tokenizer": tokenizer, "rows": rows}


def check_loop(names):
    """Two steps, of which the second one starts from what the first one learned."""
    out, model = names["out"], names["model"]
    assert len(names["tokenizer"]) == model.get_input_embeddings().weight.shape[0] == 301
    assert {id(p) for p in model.parameters()} == set(map(id, names["optimizer"].state))
    assert out.loss == out.ntp_loss + out.jepa_loss
    assert out.num_pairs == 16


def check_trainer(names):
    state = names["trainer"].state
    assert state.global_step == state.max_steps == 16
    assert state.log_history[-1]["train_loss"] > 0


def check_tree(names):
    q, k, v, until = (names[name] for name in ("q", "k", "v", "visible_until"))
    i = torch.arange(q.shape[2])
    visible = (i <= i[:, None]) & (i[:, None] < until[0])
    torch.testing.assert_close(names["out"], scaled_dot_product_attention(q, k, v, visible))
    answers = visible[300:].reshape(3, 50, 450)
    assert answers[:, :, :300].all()
    assert answers[:, :, 300:].sum() == 3 * 50 * 51 / 2


def check_pack(names):
    assert names["batch"]["view_pairs"].tolist() == [[[8, 15], [11, 13]]]


CHECKS = {
    "llm_jepa_loss(": check_loop,
    "trainer.train()": check_trainer,
    "view_attention(": check_tree,
    "pack(": check_pack,
}


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet(code, names, one_thread, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the Trainer writes
    exec(code, names)
    (check,) = {check for call, check in CHECKS.items() if call in code}
    check(names)


def test_every_kind_of_snippet_is_there():
    codes = [param.values[0] for param in SNIPPETS]
    assert all(any(call in code for code in codes) for call in CHECKS)


@pytest.mark.parametrize("name", ["mask", "row"])
def test_figures_are_drawn_from_what_pack_makes(name):
    figures = ROOT / "docs" / "figures"
    drawn = runpy.run_path(str(figures / "draw.py"))[f"draw_{name}"]()
    assert drawn == (figures / f"{name}.svg").read_text("utf-8")
