"""The sql tool: what it allows, what it refuses, and what the model reads."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.sandbox import SandboxProvider, build_sandbox
from agent.sandbox.base import Limits
from agent.tools import build_tools
from agent.tools.base import ToolFailure
from agent.tools.sql import MAX_QUERY_CHARS, SqlTool
from agent.tools.sql_cases import run_sql_case
from agent.tools.sql_database import database_from_script, pack
from agent.tools.sql_program import NOW, Database, split
from agent.tools.sql_table import MAX_CHARS
from trajectory.errors import InputError
from trajectory.records import Task

LIMITS = Limits(cpu_s=1, wall_s=60, memory_mb=512)
SCRIPT = (
    "CREATE TABLE items(id INTEGER, name TEXT); INSERT INTO items VALUES (1,'a'),(2,'b'),(3,'c')"
)
ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r)"


@pytest.fixture(params=["forkjail", "unsafe"])
def backend(request):
    """Each backend that runs CPython on this machine."""
    try:
        build_sandbox(request.param, allow_unsafe=True)
    except InputError as error:
        pytest.skip(str(error))
    return request.param


@asynccontextmanager
async def opened(script=SCRIPT, *, limits=LIMITS, seed=0, backend="unsafe"):
    sandbox = SandboxProvider(backend, allow_unsafe=True)
    try:
        tool = SqlTool(sandbox(), limits=limits)
        yield await tool.open_packed(pack(database_from_script(script)), seed)
    finally:
        await sandbox.close()


def observe(*queries, **options):
    async def run():
        async with opened(**options) as session:
            return [await session.call({"query": query}) for query in queries]

    return asyncio.run(run())


def contents(*queries, **options):
    return [observation.content for observation in observe(*queries, **options)]


def test_rows_are_an_aligned_table_with_a_header():
    (observation,) = observe("SELECT id, name, NULL AS unknown, 1.5 AS x FROM items WHERE id > 1")
    assert observation.error is None
    assert observation.content == (
        "id | name | unknown | x\n"
        "---+------+---------+----\n"
        "2  | b    | NULL    | 1.5\n"
        "3  | c    | NULL    | 1.5\n"
        "(2 rows)"
    )


def test_no_rows_are_named():
    assert contents("SELECT id FROM items WHERE id = 9") == ["id\n--\n(no rows)"]


def test_writes_count_their_rows_and_last():
    assert contents(
        "UPDATE items SET id = id + 10 WHERE id < 3",
        "DELETE FROM items WHERE id = 99",
        "SELECT sum(id) AS total FROM items",
        "INSERT INTO items VALUES (7, 'x') RETURNING id",
    ) == [
        "2 rows changed",
        "0 rows changed",
        "total\n-----\n26\n(1 row)",
        "id\n--\n7\n(1 row; 1 row changed)",
    ]


def test_several_statements_give_their_results_in_turn():
    (content,) = contents("DELETE FROM items WHERE id = 1; SELECT count(*) AS n FROM items; -- end")
    assert content == "1 row changed\n\nn\n-\n2\n(1 row)\n\ndone"


def test_a_mistake_is_readable_and_says_what_took_effect():
    first, second = observe(
        "DELETE FROM items; SELECT nme FROM items; SELECT 1", "SELECT count(*) FROM items"
    )
    assert first.error == "sql_error"
    assert first.content == (
        "3 rows changed\n\nError in statement 2 (those before it took effect): no such column: nme"
    )
    assert "\n0\n" in second.content


def test_a_transaction_may_span_calls():
    results = contents("BEGIN", "DELETE FROM items", "ROLLBACK", "SELECT count(*) AS n FROM items")
    assert results[-1] == "n\n-\n3\n(1 row)"


def test_a_markdown_fence_around_the_query_is_ignored():
    assert contents("```sql\nSELECT 1 AS one\n```") == ["one\n---\n1\n(1 row)"]


def test_triggers_strings_and_comments_may_hold_semicolons():
    results = contents(
        "CREATE TRIGGER t AFTER INSERT ON items BEGIN "
        "UPDATE items SET name = 'new;' WHERE id = 1; DELETE FROM items WHERE id = 2; END; "
        "INSERT INTO items VALUES (4, 'd;e'); /* a; b */ SELECT name FROM items -- c;",
    )
    assert results[0].endswith("name\n----\nnew;\nc\nd;e\n(3 rows)")


@given(st.lists(st.sampled_from(["SELECT ';'", "SELECT 1 -- a;b\n", "SELECT /* ; */ 2", 'x";"'])))
def test_splitting_gives_the_statements_back(statements):
    text = "".join(f"{statement};" for statement in statements)
    assert [part.strip() for part in split(text)] == [f"{statement};" for statement in statements]


@pytest.mark.parametrize(
    ("query", "refused"),
    [
        ("ATTACH ':memory:' AS other", "ATTACH"),
        ("ATTACH 'file:other.db?mode=rwc' AS other", "ATTACH"),
        ("DETACH main", "DETACH"),
        ("VACUUM INTO 'copy.db'", "ATTACH"),
        ("PRAGMA writable_schema = ON", "PRAGMA writable_schema"),
        ("pragma Journal_Mode = WAL", "PRAGMA journal_mode"),
        ("PRAGMA temp_store_directory = '/'", "PRAGMA temp_store_directory"),
        ("PRAGMA hard_heap_limit = 0", "PRAGMA hard_heap_limit"),
        ("PRAGMA user_version = 5", "PRAGMA user_version with a value"),
        ("SELECT * FROM pragma_journal_mode", "PRAGMA journal_mode"),
        ("SELECT load_extension('libm.so.6')", "the function load_extension"),
        ("SELECT fts3_tokenizer('simple')", "the function fts3_tokenizer"),
        ("CREATE VIRTUAL TABLE words USING fts5(word)", "CREATE VIRTUAL TABLE"),
    ],
)
def test_what_would_leave_the_database_is_refused_and_named(query, refused):
    observation, after = observe(query, "SELECT count(*) AS n FROM items")
    assert observation.error == "sql_error"
    assert observation.content.startswith(f"Error: not allowed here: {refused}")
    assert after.content == "n\n-\n3\n(1 row)"


def test_a_refusal_is_not_blamed_for_the_next_mistake():
    refused, mistake = contents("DETACH main", "SELECT 1;" * 101)
    assert refused == "Error: not allowed here: DETACH"
    assert mistake == "Error: more than 100 statements in one call"


@pytest.mark.parametrize("query", ["SELECT readfile('x')", "SELECT writefile('x', 'y')"])
def test_functions_of_the_shell_are_not_there(query):
    assert observe(query)[0].error == "sql_error"


def test_looking_at_the_schema_is_allowed():
    table, names, version = contents(
        "PRAGMA table_info(items)",
        "SELECT name FROM pragma_table_info('items')",
        "PRAGMA user_version",
    )
    assert "INTEGER" in table
    assert names == "name\n----\nid\nname\n(2 rows)"
    assert version == "user_version\n------------\n0\n(1 row)"


def test_refused_queries_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    database = Database("", seed=0, heap_mb=16, read_only=False)
    for query in (f"VACUUM INTO '{tmp_path}/a.db'", f"ATTACH '{tmp_path}/b.db' AS b"):
        reply = json.loads(database.answer(query, rows=1, columns=1, chars=9, cell_chars=9))
        assert reply["error"].startswith("not allowed here")
    assert list(tmp_path.iterdir()) == []


def test_a_value_is_bounded_in_length_and_a_query_in_memory():
    big, wide, after = observe(
        "SELECT length(zeroblob(100000000))",
        f"{ENDLESS} SELECT count(*) FROM (SELECT DISTINCT n, zeroblob(100000) AS b FROM r)",
        "SELECT 6 * 7 AS n",
    )
    assert (big.error, big.content) == ("sql_error", "Error: string or blob too big")
    assert (wide.error, wide.content) == ("sql_error", "Error: out of memory")
    assert after.content == "n\n--\n42\n(1 row)"


@pytest.mark.parametrize("query", [f"{ENDLESS} SELECT max(n) FROM r", f"{ENDLESS} SELECT n FROM r"])
def test_an_endless_query_times_out_with_the_database_as_before(query, backend):
    deleted, ended, after = observe(
        "DELETE FROM items WHERE id = 1",
        f"DELETE FROM items; {query}",
        "SELECT count(*) AS n FROM items",
        backend=backend,
    )
    assert (deleted.content, ended.error) == ("1 row changed", "timeout")
    assert ended.content == "[timed out: 1 s of CPU time. The database is as before this call.]"
    assert after.content == "n\n-\n2\n(1 row)"


def test_rows_that_are_not_shown_are_counted():
    (content,) = contents(f"{ENDLESS} SELECT n FROM r LIMIT 1000")
    lines = content.splitlines()
    assert lines[2:-1] == [f"{n}".rstrip() for n in range(1, 21)]
    assert lines[-1] == "(1000 rows, 980 of them not shown)"


def test_a_wide_result_is_cut_to_fewer_rows_and_columns():
    columns = ", ".join(f"printf('%050d', n) AS column_{i}" for i in range(40))
    (content,) = contents(f"{ENDLESS} SELECT {columns} FROM r LIMIT 9")
    assert len(content) <= MAX_CHARS + 60
    assert content.endswith("(9 rows, 8 of them not shown; 10 more columns not shown)")


def test_long_values_are_cut_and_say_their_length():
    (content,) = contents("SELECT printf('%.*c', 500, 'a') AS a, zeroblob(500) AS b")
    row = content.splitlines()[2]
    assert f"{'a' * 100}... (500 characters)" in row
    assert row.endswith("00'... (500 bytes)")


@pytest.mark.parametrize(
    ("expression", "shown"),
    [
        ("CAST(x'ff41' AS TEXT)", "\\xffA"),
        ("char(0, 7, 27)", "\\x00\\x07\\x1b"),
        ("'a' || char(10) || 'b' || char(9)", "a\\nb\\t"),
        ("char(8238)", "\\u202e"),
        ("x'00ff'", "X'00ff'"),
        ("1e999", "inf"),
        ("9223372036854775807", "9223372036854775807"),
    ],
)
def test_odd_values_are_one_readable_line(expression, shown):
    (content,) = contents(f"SELECT {expression} AS v")
    assert content.splitlines()[2] == shown


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT '\ud800'", "no valid text"),
        ("SELECT 'a\0b'", "null character"),
        ("SELECT ';", "unrecognized token"),
        ("SELECT 1;" * 101, "more than 100 statements"),
        ("SELECT " + "(" * 3000 + "1" + ")" * 3000, "parser stack overflow"),
        ("SELECT '" + "a" * MAX_QUERY_CHARS + "'", "the limit is 20000"),
        ("UPDATE sqlite_master SET sql = 'x'", "may not be modified"),
    ],
)
def test_odd_queries_are_errors_the_model_can_read(query, message):
    observation, after = observe(query, "SELECT 1 AS n")
    assert observation.error == "sql_error"
    assert message in observation.content
    assert after.content == "n\n-\n1\n(1 row)"


@pytest.mark.parametrize("query", ["", "  \n", ";;", "-- nothing"])
def test_a_query_of_nothing_is_no_error(query):
    (observation,) = observe(query)
    assert observation.error is None
    assert observation.content in ("(no statement)", "done")


def test_chance_and_clock_are_the_same_in_every_replay():
    query = "SELECT random() AS a, hex(randomblob(4)) AS b, datetime('now') AS c"
    first, again, other = contents(query), contents(query), contents(query, seed=1)
    assert first == again
    assert first != other
    assert NOW in first[0]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("date('2020-01-31', '+1 day')", "2020-02-01"),
        ("date()", "2025-01-01"),
        ("date('NOW', '-1 day')", "2024-12-31"),
        ("strftime('%Y', 'now')", "2025"),
        ("strftime('%Y')", "2025"),
        ("CURRENT_TIMESTAMP", "2025-01-01 00:00:00"),
        ("CURRENT_DATE", "2025-01-01"),
        ("time('12:34')", "12:34:00"),
        ("unixepoch('1970-01-02')", "86400"),
        ("date(NULL)", "NULL"),
    ],
)
def test_date_functions_are_sqlites_own_with_a_standing_clock(expression, value):
    assert contents(f"SELECT {expression} AS v")[0].splitlines()[2] == value


def test_a_branch_goes_its_own_way(backend):
    async def run():
        async with opened(backend=backend) as session:
            await session.call({"query": "DELETE FROM items WHERE id = 1"})
            branch = await session.branch()
            await branch.call({"query": "DELETE FROM items"})
            count = {"query": "SELECT count(*) AS n FROM items"}
            return [(await s.call(count)).content for s in (session, branch)]

    assert asyncio.run(run()) == ["n\n-\n2\n(1 row)", "n\n-\n0\n(1 row)"]


def test_the_file_is_copied_and_never_written(tmp_path):
    path = tmp_path / "items.sqlite"
    path.write_bytes(database_from_script(SCRIPT))
    before = path.read_bytes()
    task = Task(task_id="t", domain="sql", prompt="p", answer="a", meta={"database": str(path)})

    async def run():
        sandbox = SandboxProvider("unsafe", allow_unsafe=True)
        try:
            session = await SqlTool(sandbox()).open(task, 0)
            return await session.call({"query": "DROP TABLE items; SELECT * FROM sqlite_master"})
        finally:
            await sandbox.close()

    assert "(no rows)" in asyncio.run(run()).content
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_database_that_cannot_be_opened_is_a_failure_and_no_observation():
    async def run():
        sandbox = SandboxProvider("unsafe", allow_unsafe=True)
        try:
            await SqlTool(sandbox()).open_packed("abcd", 0)
        finally:
            await sandbox.close()

    with pytest.raises(ToolFailure, match=r"the database could not be opened: error: zlib\.error"):
        asyncio.run(run())


@pytest.mark.slow
def test_every_hostile_case_ends_as_expected(shared, backend):
    cases = [
        case
        for line in (shared / "data/sandbox_hostile/cases.jsonl").read_text().splitlines()
        if (case := json.loads(line))["category"] == "sql"
    ]

    async def run():
        sandbox = SandboxProvider(backend, allow_unsafe=True)
        try:
            return [await run_sql_case(sandbox(), LIMITS, case["code"]) for case in cases]
        finally:
            await sandbox.close()

    for case, found in zip(cases, asyncio.run(run()), strict=True):
        assert case["expect"] in (found.ended, "contained"), (case["id"], found)
        assert found.goes_on, case["id"]
    assert len(cases) == 8


def test_a_sandbox_without_sqlite_is_refused_at_once():
    pytest.importorskip("pydantic_monty")
    with pytest.raises(InputError, match="whole of Python, which 'monty' is not"):
        build_tools(["sql"], SandboxProvider("monty"))
