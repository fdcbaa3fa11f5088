"""Where rows of data come from: files, pairs of lines, and the datasets library."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from itertools import zip_longest
from os import PathLike, fspath
from pathlib import Path
from types import ModuleType
from typing import Any

Source = str | PathLike[str] | Iterable["str | PathLike[str] | Mapping[str, Any]"]
Rows = Iterator[tuple[str, Callable[[], Any]]]
HUB = "hub:"
STDIN = "-"
GZIP = ".gz"


def open_rows(source: Source) -> Rows:
    """Every row as where it is from, and a function that reads it, which may raise.

    Args:
        source: One of

            - the path of a JSONL file, or by its ending of a CSV, TSV or Parquet file; every value
              of a CSV file is a string; all but Parquet may be compressed (``.gz``);
            - ``-``, JSONL from standard input, which is kept and so can be read again;
            - a directory with ``src.txt`` and ``targ.txt``, as NL-RX is distributed: row i has
              line i of each, as ``src`` and ``targ``;
            - a directory that ``Dataset.save_to_disk`` wrote;
            - ``hub:NAME:SPLIT`` or ``hub:NAME:CONFIG:SPLIT``, of the Hugging Face hub, read as a
              stream;
            - an iterable of paths of such files and of mappings, such as a ``Dataset``.

    Raises:
        FileNotFoundError: A path does not exist; raised at once if ``source`` is a single path.
        ValueError: It is a directory of something else, or holds several splits.
        ImportError: The package datasets is needed and missing.
    """
    if isinstance(source, Mapping):
        raise ValueError(f"source must be one split or sample stream, got all of {list(source)}")
    if not isinstance(source, (str, PathLike)):
        return _items(source)
    name = fspath(source)
    if name.startswith(HUB):
        return _hub(name)
    path = Path(name)
    if path.is_file() or name == STDIN:
        return _items([name])
    if not path.is_dir():
        raise FileNotFoundError(f"no file {name!r}")
    if (path / "src.txt").is_file() and (path / "targ.txt").is_file():
        return _line_pairs(path)
    if (path / "dataset_dict.json").is_file():
        splits = sorted(file.parent for file in path.glob("*/dataset_info.json"))
        such = f", such as {splits[0]}" if splits else ""
        raise ValueError(f"{name} has several splits: give one{such}")
    if (path / "dataset_info.json").is_file():
        return _dataset(name, _datasets().load_from_disk(name))
    raise ValueError(
        f"{name} is a directory, but neither of src.txt and targ.txt nor a saved dataset"
    )


def _items(source: Iterable[Any]) -> Rows:
    for index, item in enumerate(source):
        if isinstance(item, (str, PathLike)):
            path = Path(fspath(item).lower().removesuffix(GZIP))
            yield from _READERS.get(path.suffix, _json_lines)(fspath(item))
        else:
            yield f"row {index}", partial(_given, item)


def _given(item: Any) -> Any:
    return item


@contextmanager
def _opened(name: str) -> Iterator[Any]:
    """The bytes of a file, what was compressed in it."""
    if name == STDIN:
        yield io.BytesIO(_standard_input())
    elif not name.lower().endswith(GZIP):
        with open(name, "rb") as file:
            yield file
    else:
        try:
            with gzip.open(name) as unpacked:
                yield unpacked
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{name} is no complete gzip file: {error}") from error


@cache
def _standard_input() -> bytes:
    if sys.stdin is None:
        raise ValueError("standard input is closed")
    return sys.stdin.buffer.read()


def _json_lines(name: str) -> Rows:
    with _opened(name) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{name}:{number}", partial(_parsed, line)


def _parsed(line: bytes) -> Any:
    return json.loads(line.rstrip())


def _separated(name: str, delimiter: str) -> Rows:
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the default of 128 KiB
    with _opened(name) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        try:
            rows = csv.DictReader(text, delimiter=delimiter, strict=True)
            repeated = [name for name, n in Counter(rows.fieldnames or ()).items() if n > 1]
            if repeated:
                raise ValueError(f"{name}: its header has the columns {repeated} more than once")
            for row in rows:
                yield f"{name}:{rows.line_num}", partial(_complete, row, delimiter)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{name}: not CSV in UTF-8 after line {rows.line_num}: {error}"
            ) from error


def _complete(row: dict[Any, Any], delimiter: str) -> dict[str, str]:
    """A row of a table, which must have a value for every column and no more."""
    for column, value in row.items() if delimiter == "\t" else ():
        # Such files often have quotation marks that quote nothing.
        lines = value.splitlines()[1:] if isinstance(value, str) else []
        cells = ([cell.strip() for cell in line.split("\t")] for line in lines)
        if any(found[0] and len(found) == len(row) > 1 for found in cells):
            raise ValueError(
                f"the value of {column!r} goes over whole rows, as behind a quotation mark that "
                f"should be doubled, got {value!r}"
            )
    beyond = len(row.get(None, ()))
    missing = [column for column, value in row.items() if value is None]
    if beyond or missing:
        columns = [column for column in row if column is not None]
        found = len(columns) - len(missing) + beyond
        raise ValueError(f"expected {len(columns)} values, for {columns}, got {found}")
    return row


def _parquet(name: str) -> Rows:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise _missing("pyarrow") from error
    try:
        with ParquetFile(name) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for index, row in enumerate(rows):
                yield f"{name} row {index}", partial(_given, row)
    except ArrowException as error:
        raise ValueError(f"{name} is no Parquet file: {error}") from error


_READERS: dict[str, Callable[[str], Rows]] = {
    ".csv": partial(_separated, delimiter=","),
    ".tsv": partial(_separated, delimiter="\t"),
    ".parquet": _parquet,
}


def _line_pairs(directory: Path) -> Rows:
    with open(directory / "src.txt", "rb") as src, open(directory / "targ.txt", "rb") as targ:
        for file in (src, targ):  # past a byte order mark
            file.seek(3 if file.read(3) == codecs.BOM_UTF8 else 0)
        for number, lines in enumerate(zip_longest(src, targ), start=1):
            yield f"{directory}:{number}", partial(_pair, *lines)


def _pair(src: bytes | None, targ: bytes | None) -> dict[str, str]:
    if src is None or targ is None:
        raise ValueError("src.txt and targ.txt must have equally many lines")
    return {"src": src.decode().strip(), "targ": targ.decode().strip()}


def _dataset(name: str, dataset: Iterable[Any]) -> Rows:
    for index, row in enumerate(dataset):
        yield f"{name} row {index}", partial(_given, row)


def _hub(name: str) -> Rows:
    parts = name.removeprefix(HUB).split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f"expected hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT, got {name!r}")
    *path, split = parts
    return _dataset(name, _rows(_datasets().load_dataset(*path, split=split, streaming=True)))


def _rows(stream: Any) -> Iterator[dict[str, Any]]:
    """All of them: plain iteration leaves a worker of a DataLoader only its share, which the
    caller would divide once more.
    """
    for batch in stream.iter(batch_size=100):
        yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise _missing("datasets") from error
    return datasets


def _missing(package: str) -> ImportError:
    return ImportError(f"the package {package} is missing: pip install 'llmjepa_kernels[data]'")
