"""What importing the package brings in, and what the README says about using it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llmjepa_kernels
from llmjepa_kernels import versions

README = Path(__file__).parents[1] / "README.md"


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_needs_torch_only():
    run(
        "import sys, llmjepa_kernels\n"
        "assert not {'transformers', 'triton', 'datasets', 'peft'} & set(sys.modules)"
    )


@pytest.mark.parametrize("name", llmjepa_kernels.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert name in dir(llmjepa_kernels)
    assert getattr(llmjepa_kernels, name).__doc__


def test_type_checkers_see_what_is_imported_on_demand():
    """The block that only type checkers read names the modules that `_LAZY` imports from."""
    tree = ast.parse(Path(llmjepa_kernels.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    shown = {name.name: line.module for line in block.body for name in line.names}
    assert shown == {name: f"llmjepa_kernels.{m}" for name, m in llmjepa_kernels._LAZY.items()}
    assert set(llmjepa_kernels._LAZY) < set(llmjepa_kernels.__all__)


def test_unknown_names_are_unknown():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        llmjepa_kernels.nonsense  # noqa: B018


def test_a_missing_transformers_is_named():
    run(
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "import llmjepa_kernels\n"
        "try:\n"
        "    llmjepa_kernels.patch_model\n"
        "except ImportError as error:\n"
        "    assert 'llmjepa_kernels[train]' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('no error')\n"
    )


def test_the_readme_example_trains(one_thread):
    """The ten lines for an existing loop, run as they are printed."""
    from llmjepa_kernels.data import grammar
    from llmjepa_kernels.data.tokenizer import train_tokenizer
    from llmjepa_kernels.hf import load as models

    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    chats = grammar.generate(16, seed=0)
    tokenizer = train_tokenizer(chats, vocab_size=300)
    torch.manual_seed(0)
    model = models.small_llama(tokenizer, hidden_size=64, num_layers=1)
    losses = []
    names = {
        "model": model,
        "tokenizer": tokenizer,
        "loader": [[chat["messages"] for chat in chats]] * 8,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "losses": losses,
    }
    exec(code.replace("out.loss.backward()", "out.loss.backward(); losses.append(out)"), names)
    assert len(losses) == 8
    assert losses[-1].ntp_loss < losses[0].ntp_loss
    assert losses[-1].jepa_loss < losses[0].jepa_loss


@pytest.mark.parametrize(
    ("package", "old", "new"),
    [
        ("torch", "2.9.1", "2.10.0a0+git1234"),
        ("triton", "3.5.0", "3.6.0"),
        ("transformers", "4.57.6", "5.5.0"),
    ],
)
def test_older_versions_are_refused_by_name(package, old, new, monkeypatch):
    """At import, before anything of them is imported."""
    found = {package: new}
    monkeypatch.setattr(versions, "version", lambda name: found.get(name, "99.0"))
    versions.check_versions()
    found[package] = old
    with pytest.raises(ImportError, match=rf"needs {package} [\d.]+ or newer, found {old}"):
        versions.check_versions()


def test_the_oldest_versions_are_those_of_the_installer():
    text = (README.parent / "pyproject.toml").read_text(encoding="utf-8")
    for package, oldest in versions.OLDEST.items():
        assert re.search(rf'"{package}>={re.escape(oldest)}["; ]', text), package
