"""Questions about databases: reading the files, and which answers are right."""

import asyncio
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.sandbox import SandboxProvider
from agent.sandbox.base import Limits
from agent.tasks import parse_tasks
from agent.tasks.sql import SqlDomain
from agent.tasks.sql_results import same_rows, same_value
from agent.tasks.sql_text import orders_rows, query_in, schema_outline, tokens
from agent.tools.base import ToolFailure
from agent.tools.sql import SqlTool
from agent.tools.sql_database import database_from_script
from trajectory.errors import InputError

UNSAFE = SandboxProvider("unsafe", allow_unsafe=True)
SCRIPT = """
CREATE TABLE pet(id INTEGER PRIMARY KEY, name TEXT, kind TEXT, weight REAL, owner INT);
INSERT INTO pet VALUES
  (1, 'Rex', 'dog', 30.5, 1), (2, 'Tom', 'cat', 4.0, 1), (3, 'Ada', 'cat', NULL, 2),
  (4, 'Tom', 'dog', 8.25, 3);
"""


@pytest.fixture
def make(tmp_path):
    """Make the domain, and its task for a gold query."""
    (tmp_path / "database").mkdir()
    (tmp_path / "database" / "pets.sqlite").write_bytes(database_from_script(SCRIPT))

    def make(gold="SELECT name FROM pet", **row):
        rows = tmp_path / "tasks.jsonl"
        rows.write_text(json.dumps({"question": "Q?", "query": gold, "db_id": "pets", **row}))
        domain = parse_tasks(f"sql:{rows}", UNSAFE)
        (task,) = domain.load(split="test", first=0, count=None)
        return domain, task

    return make


def graded(made, answer):
    domain, task = made
    return asyncio.run(domain.grade(task, answer))


def test_the_prompt_is_schema_and_question(make):
    _, task = make()
    assert task.prompt == (
        "CREATE TABLE pet (id INTEGER, name TEXT, kind TEXT, weight REAL, owner INT, "
        "PRIMARY KEY (id));\n\nQuestion: Q?"
    )
    assert task.answer == "SELECT name FROM pet"


def test_columns_of_intercode_are_read_too(make, tmp_path):
    row = {"task_id": 0, "db": "pets", "gold": "SELECT 1", "query": "What is one?", "hardness": "x"}
    path = tmp_path / "intercode.jsonl"
    path.write_text(json.dumps({**row, "db_tables": {"pet": ["id"]}}))
    make()
    (task,) = parse_tasks(f"sql:{path}", UNSAFE).load(split="train", first=0, count=1)
    assert (task.task_id, task.answer) == ("0", "SELECT 1")
    assert task.prompt.endswith("Question: What is one?")
    assert set(task.meta) == {"hardness", "database"}


def test_databases_may_lie_elsewhere_and_in_a_folder_each(make, tmp_path):
    make()
    folder = tmp_path / "elsewhere" / "pets"
    folder.mkdir(parents=True)
    (tmp_path / "database" / "pets.sqlite").rename(folder / "pets.sqlite")
    spec = f"sql:{tmp_path}/tasks.jsonl,databases={tmp_path}/elsewhere"
    (task,) = parse_tasks(spec).load(split="test", first=0, count=None)
    assert task.meta["database"] == str(folder / "pets.sqlite")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"db_id": "dogs"}, r"line 1: no database .*dogs\.sqlite: .*databases=FOLDER"),
        ({"db_id": "../pets"}, r"line 1: '\.\./pets' is no database name"),
        ({"db_id": None}, "line 1: no database name: one of the columns db_id, db, database"),
        ({"query": " "}, "line 1: no gold query: one of the columns gold, query, sql, answer"),
        ({"question": ""}, "line 1: no question: one of the columns problem, question, prompt"),
    ],
)
def test_a_bad_row_is_named(make, row, message):
    with pytest.raises(InputError, match=message):
        make(**row)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sql:", "takes a file and two options"),
        ("sql", "takes a file and two options"),
        ("sql:a.jsonl,folder=b", "databases=FOLDER"),
        ("sql:a.jsonl,databases=", "is no option"),
        ("sql:a.jsonl,thinned=-1", "thinned=NUMBER"),
    ],
)
def test_a_bad_specification_is_refused(spec, message):
    with pytest.raises(InputError, match=message):
        parse_tasks(spec)


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("SELECT name FROM pet", "SELECT name FROM pet ORDER BY id DESC", 1),
        ("SELECT name FROM pet ORDER BY id", "SELECT name FROM pet ORDER BY id DESC", 0),
        ("SELECT name FROM pet ORDER BY id", "SELECT name FROM pet", 1),
        ("SELECT name FROM pet", "SELECT DISTINCT name FROM pet", 0),
        ("SELECT name, kind FROM pet", "SELECT kind, name FROM pet", 0),
        ("SELECT name FROM pet", "SELECT name AS anything FROM pet;", 1),
        ("SELECT name FROM pet", "SELECT name, id FROM pet", 0),
        ("SELECT count(*) FROM pet", "SELECT 4.0", 1),
        ("SELECT count(*) FROM pet", "SELECT '4'", 0),
        ("SELECT sum(weight) FROM pet", "SELECT 42.7500001", 1),
        ("SELECT sum(weight) FROM pet", "SELECT 42.75001", 0),
        ("SELECT weight FROM pet WHERE id = 3", "SELECT NULL", 1),
        ("SELECT weight FROM pet WHERE id = 3", "SELECT 0", 0),
        ("SELECT weight FROM pet WHERE id = 3", "SELECT ''", 0),
        ("SELECT name FROM pet WHERE id = 1", "SELECT 'rex'", 0),
        ("SELECT name FROM pet WHERE id = 9", "SELECT kind FROM pet WHERE 0", 1),
        ("SELECT name FROM pet WHERE id = 9", "SELECT name, kind FROM pet WHERE 0", 0),
        ("SELECT zeroblob(900)", "SELECT zeroblob(900)", 1),
        ("SELECT zeroblob(900)", "SELECT zeroblob(901)", 0),
        ("SELECT printf('%.*c', 900, 'a') || 'b'", "SELECT printf('%.*c', 900, 'a') || 'c'", 0),
    ],
)
def test_the_rules_of_the_comparison(make, gold, answer, verdict):
    assert graded(make(gold), answer) == verdict


@pytest.mark.parametrize(
    "answer",
    [
        "SELECT name FROM pets",
        "the names",
        "SELECT name FROM pet; SELECT name FROM pet",
        "DELETE FROM pet; SELECT name FROM pet",
        "CREATE TABLE a(b); SELECT name FROM pet",
        "ATTACH 'x.db' AS x",
        "-- SELECT name FROM pet",
        "SELECT name FROM pet" + " " * 20_000,
    ],
)
def test_what_is_not_one_query_that_works_is_wrong(make, answer):
    assert graded(make(), answer) == 0.0


@pytest.mark.parametrize(
    "answer", ["SELECT name FROM pet -- all;", "/* all */ SELECT name FROM pet;;"]
)
def test_comments_beside_the_query_do_no_harm(make, answer):
    assert graded(make(), answer) == 1.0


@pytest.mark.parametrize(
    ("gold", "coincidence"),
    [
        ("SELECT count(*) FROM pet", "SELECT 4"),
        ("SELECT count(*) FROM pet", "SELECT count(*) + 2 FROM pet WHERE kind = 'dog'"),
        ("SELECT name FROM pet WHERE id < 3", "VALUES ('Rex'), ('Tom')"),
    ],
)
def test_thinned_copies_find_constants_and_coincidences(make, gold, coincidence):
    _, task = make(gold)
    grades = [
        asyncio.run(SqlDomain("tasks.jsonl", UNSAFE, thinned=thinned).grade(task, answer))
        for thinned in (0, 3)
        for answer in (coincidence, gold.replace("pet", "pet AS p"))
    ]
    assert grades == [1.0, 1.0, 0.0, 1.0]


def test_an_endless_answer_is_wrong(make):
    _, task = make("SELECT count(*) FROM pet")
    domain = SqlDomain("tasks.jsonl", UNSAFE, limits=Limits(cpu_s=0.5))
    endless = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT max(n) FROM r"
    assert asyncio.run(domain.grade(task, endless)) == 0.0


def test_more_rows_than_gold_has_are_wrong_and_do_not_come_out_of_the_sandbox(make):
    many = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r LIMIT 300000) TABLE r"
    assert graded(make(), many.replace("TABLE r", "SELECT n FROM r")) == 0.0


def test_what_the_agent_wrote_does_not_reach_the_checker(make):
    domain, task = make("SELECT count(*) FROM pet")

    async def run():
        session = await SqlTool(UNSAFE()).open(task, 0)
        try:
            await session.call({"query": "DELETE FROM pet"})
            seen = await session.call({"query": "SELECT count(*) AS n FROM pet"})
            return (
                seen.content,
                await domain.grade(task, "SELECT 0"),
                await domain.grade(task, "SELECT 4"),
            )
        finally:
            await session.close()

    assert asyncio.run(run()) == ("n\n-\n0\n(1 row)", 0.0, 1.0)


@pytest.mark.parametrize(
    ("gold", "why"),
    [
        ("SELECT nme FROM pet", "no such column: nme"),
        ("DELETE FROM pet", "readonly database"),
        ("SELECT 1; SELECT 2", "2 statements return rows"),
        (
            "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r LIMIT 30000) "
            "SELECT n FROM r",
            "30000 rows are too many",
        ),
    ],
)
def test_a_gold_query_without_a_result_gives_no_verdict(make, gold, why):
    with pytest.raises(ToolFailure, match=f"the gold query of task .* gives no result.*{why}"):
        graded(make(gold), "SELECT name FROM pet")


def test_a_database_that_is_gone_gives_no_verdict(make, tmp_path):
    made = make()
    (tmp_path / "database" / "pets.sqlite").unlink()
    with pytest.raises(ToolFailure, match=r"cannot read the database .*pets\.sqlite"):
        graded(made, "SELECT name FROM pet")


def test_a_task_without_a_database_gives_no_verdict(make):
    domain, task = make()
    with pytest.raises(ToolFailure, match="has no database"):
        asyncio.run(domain.grade(replace(task, meta={}), "SELECT 1"))


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("So:\n```sql\nSELECT 1\n```", "SELECT 1"),
        ("```sql\nSELECT 1\n```\nor better\n```SQL\nSELECT\n2\n```\nDone.", "SELECT\n2"),
        ("```\nSELECT 1\n```", "SELECT 1"),
        ("```sql\nSELECT 1\n```\n```\noutput\n```", "SELECT 1"),
        ("```sql\nSELECT 1", "SELECT 1"),
        ("**Answer:** `SELECT 1`", "SELECT 1"),
        ("Answer: SELECT a FROM `t`", "SELECT a FROM `t`"),
        ("Final answer:\nSELECT a\nFROM t", "SELECT a\nFROM t"),
        ("  with a as (select 1) select * from a", "with a as (select 1) select * from a"),
        ("There are four pets.", None),
        ("```python\nprint(1)\n```", None),
        ("```sql\n\n```", None),
        ("Answer:", None),
        ("", None),
    ],
)
def test_the_query_is_found_in_the_last_turn(text, query):
    assert query_in(text) == query


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a limit 1", True),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("WITH w AS (SELECT 1 ORDER BY 1) SELECT * FROM w", False),
        ("SELECT row_number() OVER (ORDER BY a) FROM t", False),
        ("SELECT a FROM t WHERE b = ' ORDER BY '", False),
        ('SELECT "ORDER BY" FROM t', False),
        ("SELECT a FROM t -- ORDER BY a", False),
        ("SELECT a FROM t WHERE b IN (SELECT c FROM u ORDER BY c LIMIT 1)", False),
        ("SELECT a /* ( */ FROM t ORDER BY a", True),
    ],
)
def test_only_an_order_of_the_query_itself_counts(query, ordered):
    assert orders_rows(query) is ordered


@given(st.text())
def test_tokens_are_the_whole_text(text):
    assert "".join(token.text for token in tokens(text)) == text


def test_a_schema_is_outlined_with_keys_and_views():
    outline = schema_outline(
        database_from_script("""
        CREATE TABLE "a b"("x y" INT DEFAULT 3 CHECK ("x y" > 0), z, PRIMARY KEY (z, "x y"));
        CREATE TABLE c(z REFERENCES "a b", p, q, FOREIGN KEY (p, q) REFERENCES "a b"(z, "x y"));
        CREATE INDEX i ON c(z);
        CREATE VIEW v AS
            SELECT 1;
        """)
    )
    assert outline.splitlines() == [
        'CREATE TABLE "a b" ("x y" INT, z, PRIMARY KEY (z, "x y"));',
        'CREATE TABLE c (z, p, q, FOREIGN KEY (p, q) REFERENCES "a b"(z, "x y"), '
        'FOREIGN KEY (z) REFERENCES "a b");',
        "CREATE VIEW v AS SELECT 1;",
    ]


def test_close_numbers_find_their_partners_whatever_the_order():
    """Hand-computed: sorted by number, the two rows would meet the wrong partners."""
    gold = [[0.1 + 0.2, "a"], [0.3, "b"]]
    assert same_rows(gold, [[0.3, "a"], [0.1 + 0.2, "b"]], ordered=False)
    assert not same_rows(gold, [[0.3, "a"], [0.3001, "b"]], ordered=False)


def test_large_integers_are_compared_exactly():
    assert not same_value(2**60, 2**60 + 1)
    assert same_value(float(2**60), 2**60)
    assert same_value(float("inf"), float("inf"))


cells = (
    st.none() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0, 2.5]) | st.text("ab", max_size=1)
)
results = st.lists(st.tuples(cells, cells), max_size=8)


@given(results, st.randoms(use_true_random=False))
def test_a_shuffled_result_with_noise_is_the_same_multiset(rows, rng):
    noisy = [
        tuple(c + 1e-9 if isinstance(c, float) else c for c in row)
        for row in rng.sample(rows, len(rows))
    ]
    assert same_rows(rows, noisy, ordered=False)


@given(results, results)
def test_the_comparison_is_symmetric_and_counts(left, right):
    same = same_rows(left, right, ordered=False)
    assert same == same_rows(right, left, ordered=False)
    if same:
        assert not same_rows([*left, left[0]] if left else [(1, 1)], right, ordered=False)


def test_a_long_result_is_compared_in_reasonable_time():
    rng = random.Random(0)
    gold = [[rng.random(), rng.random()] for _ in range(5000)]
    given_rows = [[a + 1e-9, b] for a, b in rng.sample(gold, len(gold))]
    assert same_rows(gold, given_rows, ordered=False)


NUM_SAMPLED = 6
SOURCES = {
    "spider": "sql:{data}/spider_dev/dev.jsonl",
    "intercode": "sql:{data}/intercode/sql_tasks.jsonl,databases={data}/spider_dev/database",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SOURCES))
def test_real_gold_is_right_and_changed_gold_is_wrong(shared, name):
    """A sample; ``python -m benchmarks sql-gold`` does it for every row."""
    from benchmarks.sql_gold import SqlGoldConfig, check

    spec = SOURCES[name].format(data=shared / "data")
    first = {"spider": 0, "intercode": 500}[name]
    report = check(
        SqlGoldConfig(
            tasks=spec,
            first_task=first,
            num_tasks=NUM_SAMPLED,
            sandbox="unsafe",
            allow_unsafe_tools=True,
        )
    )
    assert (report.gold_fails, report.gold_wrong, report.misjudged) == ({}, [], [])
    counts = report.counts.values()
    assert sum(c["rejected"] for c in counts) >= 2 * NUM_SAMPLED
    assert sum(c["same"] for c in counts) == sum(c["accepted"] for c in counts) > 0
