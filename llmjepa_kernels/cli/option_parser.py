"""Options as frozen dataclasses: the parser, its help and the checks follow from their fields."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from types import MappingProxyType, UnionType
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin
from typing import get_type_hints as type_hints

O = TypeVar("O", bound="Options")


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes; finite ones only, whatever else."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    multiple_of: int | None = None

    def __contains__(self, number: float) -> bool:
        return (
            abs(number) <= sys.float_info.max
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.multiple_of is None or number % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        parts = [
            ("at least", self.at_least),
            ("more than", self.above),
            ("at most", self.at_most),
            ("a multiple of", self.multiple_of),
        ]
        return ", ".join(f"{words} {number:g}" for words, number in parts if number is not None)


COUNT = Range(at_least=1)
NOT_NEGATIVE = Range(at_least=0)
POSITIVE = Range(above=0)
FRACTION = Range(at_least=0, at_most=1)


class Option(NamedTuple):
    """What the parser has to know of a field beside its name, type and default."""

    help: str
    group: str | None
    metavar: str | None
    flag: str | None
    alias: str | None
    choices: tuple[str, ...]
    range: Range
    default: str | None
    recorded: bool


def option(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    metavar: str | None = None,
    flag: str | None = None,
    alias: str | None = None,
    choices: Iterable[str] = (),
    range: Range = Range(),
    default_is: str | None = None,
    recorded: bool = True,
) -> Any:
    """A field of `Options`.

    Args:
        default: Its value where it is not given; MISSING makes it a positional argument.
        help: A sentence without the default and the range, which are added.
        group: The heading in ``--help``, if another than "options".
        metavar: Stands for the value in ``--help``.
        flag: Its name on the command line. Default: the field's, with "--" and hyphens.
        alias: Another one, as which Transformers' scripts know it.
        choices: All values, if they are few.
        range: Of a number.
        default_is: Says what a default of None stands for.
        recorded: Whether the result of a run depends on it.
    """
    spec = Option(help, group, metavar, flag, alias, tuple(choices), range, default_is, recorded)
    return field(default=default, metadata={"option": spec})


class Options:
    """What a command is asked for; a subclass is a frozen dataclass of fields from `option`.

    The types of fields are str, int, float, bool, Path, those or None, and tuples of them. Values
    outside of their choices or range are refused, however an instance is made.

    Attributes:
        arguments, summary, description, epilog: Of the command's help.
        when_interrupted: What to say then.
        presets: Defaults instead of the fields' own, by the value of the field ``preset``.
        other: Options that the parser does not know; only of subclasses that have this field.

    Raises:
        ValueError: Names the option, what was expected and what was found.
    """

    arguments: ClassVar[str] = ""
    summary: ClassVar[str]
    description: ClassVar[str]
    epilog: ClassVar[str] = ""
    when_interrupted: ClassVar[str] = "interrupted"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self) -> None:
        for each, spec in specs(type(self)):
            value = getattr(self, each.name)
            for one in value if isinstance(value, tuple) else (value,):
                _check(flag_of(each.name, spec), spec, one)
        self.check()

    def check(self) -> None:
        """Raises a ValueError if options contradict each other."""

    def packages(self) -> dict[str, list[str]]:
        """The packages that the command needs, by the extra that installs them."""
        raise NotImplementedError

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Adds an argument per field, in their order."""
        groups: dict[str | None, Any] = {None: parser}
        types = kinds(cls)
        for each, spec in specs(cls):
            if spec.group not in groups:
                groups[spec.group] = parser.add_argument_group(spec.group)
            if each.default is MISSING:
                names, how = [each.name], {}
            else:
                names, how = flags_of(each.name, spec), {"dest": each.name}
            negatable = any(each.name in preset for preset in cls.presets.values())
            how |= _how(spec, each.default, *types[each.name], negatable)
            groups[spec.group].add_argument(*names, **how)

    @classmethod
    def of(
        cls: type[O],
        parsed: argparse.Namespace,
        unknown: list[str],
        values_of_file: Mapping[str, Any] = MappingProxyType({}),
        other_of_file: tuple[str, ...] = (),
    ) -> O:
        """The options that were parsed; others are those of a file, of the preset, or defaults."""
        names = {each.name for each in fields(cls)}  # type: ignore[arg-type]
        values = {name: value for name, value in vars(parsed).items() if name in names}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        values = {**values_of_file, **values}
        if "other" in names:  # of what is given twice, the last counts
            values["other"] = (*other_of_file, *unknown)
        elif unknown:
            raise ValueError(
                f"unknown options {' '.join(unknown)}: see llmjepa {parsed.command} --help"
            )
        preset = dict(cls.presets.get(values.get("preset", ""), {}))
        if "other" in preset:
            values["other"] = (*preset.pop("other"), *values["other"])
        return cls(**(preset | values))

    def recorded(self) -> dict[str, Any]:
        """Those that the result of a run depends on."""
        recorded = (each.name for each, spec in specs(type(self)) if spec.recorded)
        return {name: getattr(self, name) for name in recorded}


class Parser(argparse.ArgumentParser):
    """Ends with one line on a mistake, instead of a page of usage."""

    def __init__(self, *args: Any, **more: Any) -> None:
        own: dict[str, Any] = {
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "allow_abbrev": False,
        }
        super().__init__(*args, **(own | more))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def kinds(cls: type[Options]) -> dict[str, tuple[type, bool]]:
    """The type of each field's values, and whether it takes several."""
    hints = type_hints(cls)
    return {each.name: _kind_of_values(hints[each.name]) for each in fields(cls)}  # type: ignore[arg-type]


def specs(cls: type[Options]) -> Iterator[tuple[Field[Any], Option]]:
    for each in fields(cls):  # type: ignore[arg-type]
        if "option" in each.metadata:
            yield each, each.metadata["option"]


def flag_of(name: str, spec: Option) -> str:
    """How an option is written."""
    return spec.flag or f"--{name.replace('_', '-')}"


def flags_of(name: str, spec: Option) -> list[str]:
    """All ways to write it."""
    return [flag_of(name, spec), *([] if spec.alias is None else [spec.alias])]


def _check(flag: str, spec: Option, value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    if spec.choices and value not in spec.choices:
        raise ValueError(f"{flag} must be one of {', '.join(spec.choices)}, got {value!r}")
    if isinstance(value, (int, float)) and value not in spec.range:
        raise ValueError(f"{flag} must be {str(spec.range) or 'a finite number'}, got {value}")


def _how(spec: Option, default: Any, kind: type, many: bool, negatable: bool) -> dict[str, Any]:
    """What ``add_argument`` gets for a field; one that a preset sets can be taken back."""
    how: dict[str, Any] = {"help": _help(spec, default), "default": argparse.SUPPRESS}
    if kind is bool:
        plain = default is False and not negatable
        how["action"] = "store_true" if plain else argparse.BooleanOptionalAction
        return how
    how |= {"type": kind, "metavar": spec.metavar}
    if spec.choices:
        how["choices"] = spec.choices
    if many:
        how["nargs"] = "+"
    return how


def _help(spec: Option, default: Any) -> str:
    notes = []
    if spec.default is not None:
        notes.append(f"default: {spec.default}")
    elif not (default is None or default is MISSING or isinstance(default, bool)):
        values = default if isinstance(default, tuple) else (default,)
        notes.append(
            "default: " + " ".join(f"{x:g}" if isinstance(x, float) else f"{x}" for x in values)
        )
    if str(spec.range):
        notes.append(str(spec.range))
    text = spec.help + (f" ({'; '.join(notes)})" if notes else "")
    return text.replace("%", "%%")


def _kind_of_values(hint: Any) -> tuple[type, bool]:
    """The type of an option's values, and whether it takes several."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(arm for arm in get_args(hint) if arm is not type(None))
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False
