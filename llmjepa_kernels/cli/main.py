"""The ``llmjepa`` command: its subcommands, and what happens on a mistake."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from llmjepa_kernels.cli.analyze_options import AnalyzeOptions
from llmjepa_kernels.cli.evaluate_options import EvaluateOptions
from llmjepa_kernels.cli.option_parser import Options, Parser
from llmjepa_kernels.cli.train_options import TrainOptions

# A subcommand's module has a function of its name, which takes its options. It is imported when it
# runs, as Transformers takes seconds: --help and mistakes in the options answer at once.
COMMANDS: dict[str, type[Options]] = {
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
    "analyze": AnalyzeOptions,
}
MODULES = {"scikit-learn": "sklearn"}  # of packages that are not imported by their name


def main(argv: list[str] | None = None) -> int:
    """Runs the ``llmjepa`` command; returns its exit status."""
    parsed, unknown = _parser().parse_known_args(argv)
    try:
        options = COMMANDS[parsed.command].of(parsed, unknown)
        _require(options.packages())
        module = importlib.import_module(f"llmjepa_kernels.cli.{parsed.command}")
        getattr(module, parsed.command)(options)
    except (ValueError, OSError, ImportError) as error:
        if parsed.traceback:
            raise
        print(f"llmjepa {parsed.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> Parser:
    parser = Parser("llmjepa", description="LLM-JEPA training in one forward pass of packed rows.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, options in COMMANDS.items():
        command = commands.add_parser(
            name,
            usage=f"llmjepa {name} [options]{options.arguments}",
            help=options.summary,
            description=options.description,
            epilog=options.epilog,
        )
        command.add_argument(
            "--traceback", action="store_true", help="show where in the code an error was found"
        )
        options.add_to(command)
    return parser


def _require(packages: dict[str, list[str]]) -> None:
    """Raises an ImportError that says how to install, if a package is missing."""
    for extra, names in packages.items():
        for name in names:
            if importlib.util.find_spec(MODULES.get(name, name)) is None:
                raise ImportError(
                    f"the package {name} is missing: pip install 'llmjepa_kernels[{extra}]'"
                )
