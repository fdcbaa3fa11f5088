"""Whether two SQL queries have the same result, the one written by a model not being trusted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from llmjepa_kernels.data.messages import turns_of_views
from llmjepa_kernels.evaluation.sql_process import TIME_LIMIT, QueryProcess, Rows

_DB_ID = re.compile(r"For db_id:\[([^]/\\]+)\]")
_ORDER_BY = re.compile(r"\border\s+by\b", re.IGNORECASE)


class SpiderDatabases:
    """Judges queries by what they return from the databases of Spider.

    A completion is correct if its rows are those of the reference query: in the same order if the
    reference has an ORDER BY, in any order otherwise, always as often, and with the columns in any
    order. A completion that fails, or is no query, is wrong. As Spider's own evaluation this is
    sound for one state of the database only, and unlike it DISTINCT counts.

    Databases are opened for reading only, nothing but reading is authorised, and a query that runs
    for longer than the time limit fails, whatever it does: see `QueryProcess`. Semicolons after a
    statement mean nothing, a second statement makes a completion wrong.

    Source: Spider's execution accuracy, arXiv:2010.02840.

    Args:
        directory: Has ``db_id/db_id.sqlite``; a sample names its database in its user turn, as in
            ``For db_id:[concert_singer]``.
        time_limit: Seconds per query.
    Raises:
        NotADirectoryError: There is no such directory.
    """

    def __init__(self, directory: str | PathLike[str], *, time_limit: float = TIME_LIMIT):
        self.directory = Path(directory)
        self._queries = QueryProcess(time_limit)
        if not self.directory.is_dir():
            raise NotADirectoryError(f"no directory of databases {str(directory)!r}")

    def is_correct(self, completion: str, sample: Mapping[str, Any]) -> bool:
        reference, path = _reference(sample), self._path(sample)
        expected = self._queries.execute(path, reference)
        try:
            limit = len(expected) + 1  # one row too many is wrong, however many follow
            got = self._queries.execute(path, completion, max_rows=limit)
        except ValueError:
            return False
        return same_rows(expected, got, ordered=bool(_ORDER_BY.search(reference)))

    def check(self, sample: Mapping[str, Any]) -> None:
        """Executes the reference.

        Raises:
            ValueError: The sample names no database, or its query fails.
            FileNotFoundError: The database is missing.
        """
        self._queries.execute(self._path(sample), _reference(sample))

    def _path(self, sample: Mapping[str, Any]) -> Path:
        messages = sample["messages"]
        question = messages[turns_of_views(messages)[0]]["content"]
        match = _DB_ID.search(question)
        if not match:
            raise ValueError(f"expected For db_id:[name] in the user turn, got {question[:200]!r}")
        name = match[1]
        path = self.directory / name / f"{name}.sqlite"
        if not path.is_file():
            raise FileNotFoundError(f"no database {str(path)!r}, which a sample asks for")
        return path


def same_rows(expected: Rows, got: Rows, *, ordered: bool) -> bool:
    """Whether two tables are equal up to the order of columns and, unless `ordered`, of rows."""
    if len(expected) != len(got):
        return False
    if not expected:
        return True
    columns, got_columns = list(zip(*expected, strict=True)), list(zip(*got, strict=True))
    if ordered:
        return Counter(columns) == Counter(got_columns)
    return len(columns) == len(got_columns) and _match_columns(columns, got_columns, [])


def _match_columns(expected: Sequence, got: Sequence, chosen: list[int]) -> bool:
    """Whether some order of the columns that begins with `chosen` gives the same bag of rows."""
    size = len(chosen)
    rows = zip(*(got[i] for i in chosen), strict=True)
    if chosen and Counter(rows) != Counter(zip(*expected[:size], strict=True)):
        return False
    if size == len(expected):
        return True
    left = {got[i]: i for i in range(len(got)) if i not in chosen}  # of equal ones, one will do
    return any(_match_columns(expected, got, [*chosen, i]) for i in left.values())


def _reference(sample: Mapping[str, Any]) -> str:
    return sample["messages"][-1]["content"]
