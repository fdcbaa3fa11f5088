"""What importing the package brings in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llmjepa_kernels


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
