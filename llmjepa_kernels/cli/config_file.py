"""Options from a file, in place of a long command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from llmjepa_kernels.cli.option_parser import Options, flags_of, kinds, specs


def read_config(path: str | None, command: type[Options]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads a YAML file of options, named as on the command line: ``learning_rate: 2e-5``.

    Hyphens and underscores are the same, and so are ``null`` and an option that is not there.

    Returns:
        The values of fields of the command's options; and options that it hands on, as on the
        command line.

    Raises:
        ValueError: It is no mapping, or an option is unknown or of another type; names it.
        OSError: There is no such file.
    """
    if path is None:
        return {}, ()
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):
        """Takes no key twice, of which the last would count."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            merge = "tag:yaml.org,2002:merge"  # the key <<, which has no value
            keys = [
                self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge
            ]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.YAMLError(f"{key} is given twice")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must map options to values, got {type(content).__name__}")
    types = kinds(command)
    names = {
        flag.removeprefix("--"): each
        for each, spec in specs(command)
        for flag in flags_of(each.name, spec)
    }
    values: dict[str, Any] = {}
    other: list[str] = []
    seen: dict[str, str] = {}
    for key, value in content.items():
        name = str(key).replace("_", "-")
        plain = name if name in names else name.removeprefix("no-")
        same = names[plain].name if plain in names else name
        if same in seen:
            raise ValueError(f"{path}: {key} is given twice, as {seen[same]} too")
        seen[same] = str(key)
        if value is None:
            continue
        opposite = name.removeprefix("no-")
        if name not in names and opposite in names and isinstance(value, bool):
            name, value = opposite, not value
        if name not in names:
            if "other" not in types:
                raise ValueError(f"{path}: {key} is no option: see --help")
            parts = value if isinstance(value, list) else [value]
            other += [
                f"--{name}",
                *(json.dumps(x) if isinstance(x, Mapping) else str(x) for x in parts),
            ]
            continue
        field = names[name]
        if field.default is MISSING:
            raise ValueError(f"{path}: {key} is to be given on the command line")
        kind, many = types[field.name]
        if many != isinstance(value, list):
            raise ValueError(
                f"{path}: {key} must be {'a list' if many else 'one value'}, got {value!r}"
            )
        found = [_of_kind(kind, each, f"{path}: {key}") for each in (value if many else [value])]
        values[field.name] = tuple(found) if many else found[0]
    return values, tuple(other)


def _of_kind(kind: type, value: Any, where: str) -> Any:
    """A value as the command line would give it; YAML takes 2e-5 for a text."""
    fits = isinstance(value, bool) == (kind is bool) and isinstance(value, (bool, int, float, str))
    fits = fits and (kind is not Path or isinstance(value, str))
    try:
        if fits and not (kind is int and isinstance(value, float)):
            return kind(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{where} must be of type {kind.__name__}, got {value!r}")
