"""SQL judged by execution: what counts as equal, and queries that mean harm."""

from __future__ import annotations

import hashlib
import sqlite3
import sys
import time
from contextlib import closing

import pytest

from llmjepa_kernels.evaluation.rules import answer_rule
from llmjepa_kernels.evaluation.sql import SpiderDatabases, same_rows
from llmjepa_kernels.evaluation.sql_process import QueryProcess

DATABASE = "pets_1"


@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    # Characters that mean something in a URI must not end the path.
    directory = tmp_path_factory.mktemp("spider 100%?mode=rwc#")
    (directory / DATABASE).mkdir()
    with closing(sqlite3.connect(directory / DATABASE / f"{DATABASE}.sqlite")) as connection:
        connection.executescript(
            """
            CREATE TABLE pets (name TEXT, kind TEXT, weight REAL, owner INT);
            INSERT INTO pets VALUES ('Rex', 'dog', 12, 1), ('Tom', 'cat', 4.5, 2),
                                    ('Kim', 'dog', 9, NULL), ('Rex', 'cat', 3, 1);
            CREATE TABLE empty (x);
            """
        )
        connection.execute("INSERT INTO pets VALUES (CAST(x'52ff' AS TEXT), 'owl', 1, 3)")
        connection.commit()
    return directory


@pytest.fixture(scope="module")
def queries():
    return QueryProcess()


def sample(query: str, database: str = DATABASE) -> dict:
    return {
        "messages": [
            {"role": "system", "content": "Convert natural language to SQL."},
            {"role": "user", "content": f"For db_id:[{database}]\n\nWhich pets?"},
            {"role": "assistant", "content": query},
        ]
    }


@pytest.mark.parametrize(
    ("reference", "completion", "correct"),
    [
        ("SELECT name FROM pets;", "select  pets.name from pets", True),
        ("SELECT name FROM pets", "SELECT name FROM pets ORDER BY weight DESC", True),
        ("SELECT name FROM pets ORDER BY weight", "SELECT name FROM pets ORDER BY 0-weight", False),
        ("SELECT name FROM pets order\nby weight", "SELECT name FROM pets ORDER BY weight", True),
        ("SELECT name, kind FROM pets", "SELECT kind, name FROM pets", True),
        ("SELECT name, kind FROM pets ORDER BY weight", "SELECT kind, name FROM pets", False),
        ("SELECT name, kind FROM pets", "SELECT name, name FROM pets", False),
        ("SELECT name FROM pets", "SELECT name, name FROM pets", False),
        ("SELECT name FROM pets", "SELECT DISTINCT name FROM pets", False),
        ("SELECT name FROM pets", "SELECT name FROM pets UNION ALL SELECT 'Rex'", False),
        ("SELECT count(*) FROM pets", "SELECT 5.0", True),
        ("SELECT count(*) FROM pets", "SELECT '5'", False),
        ("SELECT owner FROM pets WHERE name='Kim'", "SELECT NULL", True),
        ("SELECT name FROM pets WHERE kind='owl'", "SELECT name FROM pets WHERE weight=1", True),
        ("SELECT x FROM empty", "SELECT name FROM pets WHERE 0", True),
        ("SELECT x FROM empty", "", False),
        ("SELECT x FROM empty", "-- nothing", False),
        ("SELECT x FROM empty", "I do not know", False),
        ("SELECT x FROM empty", "SELECT nothing FROM empty", False),
        ("SELECT x FROM empty", "SELECT x FROM empty; SELECT x FROM empty", False),
        ("SELECT x FROM empty", "SELECT x FROM empty; ;", True),
        ("SELECT x FROM empty;;", "SELECT x FROM empty ;\n;\t; ", True),
        ("SELECT ';' FROM pets", "SELECT ';' FROM pets;", True),
        ("SELECT x FROM empty", ";", False),
        ("SELECT x FROM empty", "SELECT x FROM empty\0", False),
        ("SELECT x FROM empty", "SELECT '\ud800'", False),
        ("SELECT x FROM empty", "SELECT " + "(" * 9999, False),
    ],
)
def test_rows_decide(databases, reference, completion, correct):
    judge = answer_rule("sql", databases=databases)
    judge.check(sample(reference))
    assert judge.is_correct(completion, sample(reference)) is correct


ATTACKS = [
    "DROP TABLE pets",
    "DELETE FROM pets",
    "INSERT INTO pets VALUES (1, 2, 3, 4) RETURNING name",
    "UPDATE pets SET name = 'x' RETURNING name",
    "CREATE TABLE t (x)",
    "CREATE TEMP TABLE t AS SELECT * FROM pets",
    "ATTACH DATABASE '{new}' AS other",
    "VACUUM INTO '{new}'",
    "VACUUM",
    "PRAGMA query_only = 0",
    "PRAGMA journal_mode = WAL",
    "PRAGMA table_info(pets)",
    "SELECT * FROM pragma_database_list",
    "SELECT load_extension('{new}')",
    "SELECT LOAD_EXTENSION('{new}')",
    "BEGIN EXCLUSIVE",
    "REINDEX",
    "ANALYZE",
]
if sys.version_info >= (3, 11):  # before, sqlite3 could not be told how large a value may be
    ATTACKS += [
        "SELECT length(zeroblob(1000000000))",
        "SELECT hex(randomblob(100000000))",
        "SELECT replace(hex(zeroblob(4000000)), '0', 'xxxx')",
    ]


@pytest.mark.parametrize("query", ATTACKS)
def test_nothing_but_reading_is_authorised(databases, queries, tmp_path, query):
    path = databases / DATABASE / f"{DATABASE}.sqlite"
    before = hashlib.sha256(path.read_bytes()).digest()
    new = tmp_path / "new.sqlite"
    with pytest.raises(ValueError, match=r"failed on pets_1\.sqlite"):
        queries.execute(path, query.format(new=new))
    assert not new.exists()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert hashlib.sha256(path.read_bytes()).digest() == before


def test_a_missing_database_is_not_made(queries, tmp_path):
    with pytest.raises(ValueError, match="unable to open database file"):
        queries.execute(tmp_path / "none.sqlite", "SELECT 1")
    assert list(tmp_path.iterdir()) == []


ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT {} FROM n"


def test_endless_queries_end(databases):
    judge = SpiderDatabases(databases, time_limit=0.2)
    path = databases / DATABASE / f"{DATABASE}.sqlite"
    start = time.process_time()
    with pytest.raises(ValueError, match=r"took over 0\.2 s"):
        QueryProcess(0.2).execute(path, ENDLESS.format("count(*)"))
    assert not judge.is_correct(ENDLESS.format("max(x)"), sample("SELECT 1"))
    # As many rows as there is memory for: only one more than expected is fetched.
    assert not judge.is_correct(ENDLESS.format("x"), sample("SELECT 1"))
    many = "SELECT count(*) FROM " + ", ".join(f"pets AS p{i}" for i in range(60))
    assert not judge.is_correct(many, sample("SELECT 1"))
    assert time.process_time() - start < 30  # and not for ever


@pytest.mark.parametrize(
    "query",
    [
        "SELECT hex(zeroblob(4000000)) LIKE '%' || hex(zeroblob(24000)) || '1'",
        "SELECT hex(zeroblob(4000000)) GLOB '*' || hex(zeroblob(24000)) || '1'",
        "SELECT instr(hex(zeroblob(4000000)), hex(zeroblob(2000000)) || '1')",
    ],
)
def test_a_single_step_of_hours_ends(databases, query):
    path = databases / DATABASE / f"{DATABASE}.sqlite"
    queries = QueryProcess(0.5)
    assert queries.execute(path, "SELECT 1") == [(1,)]
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"failed on pets_1\.sqlite: it took over 0\.5 s"):
        queries.execute(path, query)
    assert time.monotonic() - start < 30  # and not for hours
    assert queries.execute(path, "SELECT count(*) FROM pets") == [(5,)]  # a new one is started


def test_a_child_that_was_killed_is_replaced(databases):
    path = databases / DATABASE / f"{DATABASE}.sqlite"
    queries = QueryProcess()
    for _ in range(2):
        assert queries.execute(path, "SELECT 1.5, NULL, x'ff', 'é'") == [(1.5, None, b"\xff", "é")]
        queries._child.kill()
        queries._child.wait()


def test_what_is_wrong_with_a_sample_is_named(databases):
    judge = SpiderDatabases(databases)
    with pytest.raises(FileNotFoundError, match=r"no database .*nowhere\.sqlite"):
        judge.check(sample("SELECT 1", database="nowhere"))
    with pytest.raises(ValueError, match=r"failed on pets_1\.sqlite: no such column: age"):
        judge.check(sample("SELECT age FROM pets"))
    with pytest.raises(ValueError, match="no such column: interrupted"):
        judge.check(sample("SELECT interrupted FROM pets"))
    with pytest.raises(ValueError, match=r"expected For db_id:\[name\] in the user turn"):
        judge.check(sample("SELECT 1", database="../pets_1"))
    # A reference that fails is an error of the data, never a wrong answer.
    with pytest.raises(ValueError, match="no such column"):
        judge.is_correct("SELECT 1", sample("SELECT age FROM pets"))


def test_columns_are_matched_as_a_whole():
    # Each column has the values of the others; only the combination tells tables apart.
    expected = [(1, 2, 3), (2, 3, 1), (3, 1, 2)]
    assert same_rows(expected, [(b, c, a) for a, b, c in expected[::-1]], ordered=False)
    assert not same_rows(expected, [(1, 2, 2), (2, 3, 3), (3, 1, 1)], ordered=False)
    assert not same_rows(expected, [(1, 3, 2), (2, 3, 1), (3, 1, 2)], ordered=False)
    assert not same_rows([(1, 1), (2, 2)], [(1, 2), (2, 1)], ordered=False)
    wide = [tuple([row] * 20) for row in range(5)]
    assert same_rows(wide, wide[::-1], ordered=False)
    assert not same_rows(wide, wide[::-1], ordered=True)
    assert not same_rows(wide, [(*row[:-1], 0) for row in wide], ordered=False)
