"""The ``llmjepa`` command: its subcommands, and what happens on a mistake."""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
import sys
import time
import warnings

import torch

from llmjepa_kernels import __version__
from llmjepa_kernels.cli.analyze_options import AnalyzeOptions
from llmjepa_kernels.cli.config_file import read_config
from llmjepa_kernels.cli.evaluate_options import EvaluateOptions
from llmjepa_kernels.cli.export_options import ExportOptions
from llmjepa_kernels.cli.generate_options import GenerateOptions
from llmjepa_kernels.cli.option_parser import Options, Parser
from llmjepa_kernels.cli.say import is_first_process, say
from llmjepa_kernels.cli.show_options import ShowOptions
from llmjepa_kernels.cli.train_options import TrainOptions

# A subcommand's module has a function of its name, which takes its options. It is imported when it
# runs, as Transformers takes seconds: --help and mistakes in the options answer at once.
COMMANDS: dict[str, type[Options]] = {
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
    "analyze": AnalyzeOptions,
    "generate": GenerateOptions,
    "export": ExportOptions,
    "show": ShowOptions,
}
# What a user or the machine is at fault for; all others are our own, and show a traceback.
FAULTS = (ValueError, OSError, ImportError, RecursionError, torch.OutOfMemoryError)
ALONE_AFTER = 5.0  # seconds
MODULES = {"scikit-learn": "sklearn"}  # of packages that are not imported by their name


def main(argv: list[str] | None = None) -> int:
    """Runs the ``llmjepa`` command.

    Returns:
        Its exit status: 0; 1 if a training diverged or a model gives NaN; 2 if an option, a file or
        the machine is at fault, which one line names; 130 if it was interrupted.
    """
    for stream in (sys.stdout, sys.stderr):  # which may not know λ
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else argv
    parsed, unknown = _parser().parse_known_args([_hyphenated(word) for word in words])
    command = COMMANDS[parsed.command]
    if not parsed.traceback:
        warnings.formatwarning = _warning
    try:
        options = command.of(parsed, unknown, *read_config(parsed.config, command))
        _require(options.packages())
        say(f"llmjepa {parsed.command}: importing Transformers")
        module = importlib.import_module(f"llmjepa_kernels.cli.{parsed.command}")
        getattr(module, parsed.command)(options)
    except KeyboardInterrupt as stop:
        _complain(f"llmjepa {parsed.command}: {str(stop) or command.when_interrupted}")
        return 130
    except (*FAULTS, FloatingPointError) as error:
        if parsed.traceback:
            raise
        _complain(f"llmjepa {parsed.command}: error: {error}")
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


def _hyphenated(word: str) -> str:
    """An option with hyphens, as which Transformers' scripts take underscores too."""
    name, equals, value = word.partition("=")
    is_option = re.fullmatch(r"--[\w-]+", name)  # and no text that begins so
    return name.replace("_", "-") + equals + value if is_option else word


def _warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning in one line, without the place in the code that it comes from."""
    clear = "\r\033[K" if sys.stderr.isatty() else ""  # a bar, which is drawn again
    return f"{clear}warning: {message}\n"


def _complain(message: str) -> None:
    """Says it once, though torchrun may have started many processes."""
    if not is_first_process():
        time.sleep(ALONE_AFTER)  # by then torchrun has ended this one, if the first has failed too
    print(message, file=sys.stderr)


def _parser() -> Parser:
    parser = Parser("llmjepa", description="LLM-JEPA training in one forward pass of packed rows.")
    parser.add_argument("--version", action="version", version=f"llmjepa_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, options in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            usage=f"llmjepa {name} [options]{options.arguments}",
            help=options.summary,
            description=options.description,
            epilog=options.epilog,
        )
        subparser.add_argument(
            "--traceback", action="store_true", help="show where in the code an error was found"
        )
        subparser.add_argument(
            "--config",
            metavar="FILE.yaml",
            help="options by their names, as learning_rate: 2e-5; those given here count more",
        )
        options.add_to(subparser)
    return parser


def _require(packages: dict[str, list[str]]) -> None:
    """Raises an ImportError that says how to install, if a package is missing."""
    for extra, names in packages.items():
        for name in names:
            if importlib.util.find_spec(MODULES.get(name, name)) is None:
                raise ImportError(
                    f"the package {name} is missing: pip install 'llmjepa_kernels[{extra}]'"
                )
