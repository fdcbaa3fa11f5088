"""SQL queries that are not trusted, executed in a process of their own.

SQLite looks at the clock between its steps, but one call of LIKE, GLOB or instr on a long string is
a single step that may take hours. So queries run in a child that is ended when its time is up. The
child runs this very file as a script, which therefore imports the standard library only.
"""

from __future__ import annotations

import pickle
import signal
import sqlite3
import subprocess
import sys
import time
import weakref
from contextlib import closing, suppress
from os import PathLike
from pathlib import Path
from threading import Timer
from typing import Any

Rows = list[tuple[Any, ...]]

TIME_LIMIT = 10.0
GRACE = 0.5  # in which SQLite may still give up by itself
MAX_VALUE_BYTES = 10_000_000
MAX_MEMORY_BYTES = 4 * 2**30
_STEPS_BETWEEN_CHECKS = 10_000
_READING = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}


class QueryProcess:
    """Executes queries that only read, one after the other.

    Args:
        time_limit: Seconds per query.
    """

    def __init__(self, time_limit: float = TIME_LIMIT):
        self.time_limit = time_limit
        self._child: subprocess.Popen[bytes] | None = None

    def execute(self, path: str | PathLike[str], query: str, *, max_rows: int = -1) -> Rows:
        """The rows of one query.

        Args:
            path: An SQLite database, which is neither written to nor locked for writing.
            query: One statement, whatever semicolons follow it. It may call built-in functions,
                but not attach, write, load an extension, or set or ask for a PRAGMA.
            max_rows: Rows to fetch at most; all if negative.
        Raises:
            ValueError: The query is malformed, not authorised, no query at all, took too long or
                too much memory.
        """
        uri = f"{Path(path).absolute().as_uri()}?mode=ro"
        rows, reason = self._ask((uri, query, max_rows, self.time_limit))
        if rows is None:
            raise ValueError(f"query {query!r} failed on {Path(path).name}: {reason}")
        return rows

    def _ask(self, request: tuple[str, str, int, float]) -> tuple[Rows | None, str]:
        child = self._started()
        assert child.stdin is not None
        assert child.stdout is not None
        timer = Timer(self.time_limit + GRACE, child.kill)
        timer.start()
        start = time.monotonic()
        try:
            pickle.dump(request, child.stdin)
            child.stdin.flush()
            return pickle.load(child.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            self._end()
            if time.monotonic() - start >= self.time_limit:
                return None, f"it took over {self.time_limit:g} s"
            return None, "SQLite crashed on it"
        except BaseException:  # such as Ctrl-C, after which the answer would be that of the next
            self._end()
            raise
        finally:
            timer.cancel()
            timer.join()

    def _started(self) -> subprocess.Popen[bytes]:
        """The child, after it has said that it is ready: how long that takes is no query's time."""
        if self._child is not None and self._child.poll() is not None:
            self._end()
        if self._child is None:
            self._child = child = subprocess.Popen(
                [sys.executable, "-I", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            weakref.finalize(self, child.kill)
            assert child.stdout is not None
            pickle.load(child.stdout)
        return self._child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            with suppress(OSError):
                child.communicate()


def _serve() -> None:
    """Answers requests from standard input until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the parent gets as well
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    answer: Any = "ready"
    while True:
        try:
            pickle.dump(answer, sys.stdout.buffer)
        except MemoryError:
            pickle.dump((None, "it returns too much"), sys.stdout.buffer)
        sys.stdout.buffer.flush()
        try:
            answer = _answer(*pickle.load(sys.stdin.buffer))
        except EOFError:
            return


def _answer(uri: str, query: str, max_rows: int, time_limit: float) -> tuple[Rows | None, str]:
    """The rows of a query, or None and why there are none."""
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.text_factory = lambda text: text.decode("utf-8", errors="replace")
            if sys.version_info >= (3, 11):
                connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
            connection.set_authorizer(_authorize)
            deadline = time.monotonic() + time_limit
            connection.set_progress_handler(
                lambda: time.monotonic() > deadline, _STEPS_BETWEEN_CHECKS
            )
            cursor = connection.execute(query.rstrip("; \t\r\n"))
            if cursor.description is None:
                return None, "it returns no table"
            return (cursor.fetchall() if max_rows < 0 else cursor.fetchmany(max_rows)), ""
    except MemoryError:
        return None, "it takes too much memory"
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        return None, f"it took over {time_limit:g} s" if str(error) == "interrupted" else str(error)


def _authorize(action: int, *_: str | None) -> int:
    return sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY


if __name__ == "__main__":
    _serve()
