"""The check of the sql checker, on a database small enough to count by hand."""

import json

import pytest

from agent.tools.sql_database import database_from_script
from benchmarks.sql_gold import SqlGoldConfig, check
from benchmarks.sql_perturbations import copied, perturbations, really_differ
from trajectory.errors import InputError

SCRIPT = "CREATE TABLE t(a INT, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, 'y');"
GOLD = [
    "SELECT a FROM t WHERE b = 'y' LIMIT 5",
    "SELECT a FROM t WHERE b = 'nobody'",
    "SELECT c FROM t",
]


@pytest.fixture
def config(tmp_path):
    """The check on three gold queries: one that works, one without rows, one that fails."""
    (tmp_path / "database").mkdir()
    (tmp_path / "database" / "t.sqlite").write_bytes(database_from_script(SCRIPT))
    rows = [
        {"id": f"g{i}", "question": "?", "query": query, "db_id": "t"}
        for i, query in enumerate(GOLD)
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))

    def make(options="", **changes):
        settings = {"sandbox": "unsafe", "allow_unsafe_tools": True, **changes}
        return SqlGoldConfig(tasks=f"sql:{path}{options}", **settings)

    return make


def test_every_kind_is_counted_and_nothing_is_misjudged(config, tmp_path, capsys):
    report = check(config(out=tmp_path / "report.json"))
    assert report.gold_fails == {"g2": "no such column: c"}
    assert (report.gold_wrong, report.gold_empty, report.misjudged) == ([], ["g1"], [])
    assert report.indistinct == []
    counts = {kind: dict(found) for kind, found in report.counts.items()}
    assert counts["where"]["differ"] == counts["where"]["rejected"] == 2
    assert counts["limit"]["same"] == counts["limit"]["accepted"] == 1
    assert counts["copied"]["accepted"] == 1
    assert "no such column: c" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["gold_empty"] == ["g1"]


def test_thinned_copies_reject_what_was_copied(config):
    report = check(config(",thinned=4", num_tasks=1))
    assert report.gold_wrong == []
    assert report.counts["copied"]["same"] == 1
    assert report.counts["copied"]["accepted"] == 0


def test_other_tasks_are_refused(config):
    with pytest.raises(InputError, match="is of the domain 'arithmetic'"):
        check(SqlGoldConfig(tasks="arithmetic", num_tasks=1))


def test_perturbations_change_one_thing_each():
    query = "SELECT DISTINCT max(a) FROM t WHERE b = 'x' AND c > 2 ORDER BY e DESC LIMIT 3;"
    changed = [(p.kind, p.query) for p in perturbations(query)]
    assert changed[:7] == [
        ("distinct", "SELECT  max(a) FROM t WHERE b = 'x' AND c > 2 ORDER BY e DESC LIMIT 3"),
        (
            "aggregate",
            "SELECT DISTINCT min(a) FROM t WHERE b = 'x' AND c > 2 ORDER BY e DESC LIMIT 3",
        ),
        ("where", "SELECT DISTINCT max(a) FROM t ORDER BY e DESC LIMIT 3"),
        (
            "constant",
            "SELECT DISTINCT max(a) FROM t WHERE b = 'no such value' AND c > 2 "
            "ORDER BY e DESC LIMIT 3",
        ),
        (
            "constant",
            "SELECT DISTINCT max(a) FROM t WHERE b = 'x' AND c > 3 ORDER BY e DESC LIMIT 3",
        ),
        (
            "order",
            "SELECT DISTINCT max(a) FROM t WHERE b = 'x' AND c > 2 ORDER BY e asc LIMIT 3",
        ),
        (
            "limit",
            "SELECT DISTINCT max(a) FROM t WHERE b = 'x' AND c > 2 ORDER BY e DESC LIMIT 4",
        ),
    ]
    assert [kind for kind, _ in changed[7:]] == ["rows", "rows", "columns"]


def test_a_where_inside_a_subquery_ends_with_it():
    query = "SELECT a FROM t WHERE a IN (SELECT a FROM u WHERE b = 1) AND c = 2"
    where = [p.query for p in perturbations(query) if p.kind == "where"]
    assert where == ["SELECT a FROM t ", "SELECT a FROM t WHERE a IN (SELECT a FROM u ) AND c = 2"]


def test_only_short_results_are_copied():
    assert copied([]) is None
    assert copied([(1,)] * 21) is None
    assert copied([(1.5, None)]).query == "VALUES (1.5, NULL)"


def test_results_that_differ_in_rounding_do_not_differ():
    assert not really_differ("SELECT 1", (1, [(0.1 + 0.2,)]), (1, [(0.3,)]))
    assert really_differ("SELECT 1", (1, [(0.31,)]), (1, [(0.3,)]))
    assert really_differ("SELECT 1", (1, [(1,), (1,)]), (1, [(1,)]))
    assert really_differ("SELECT 1", (1, []), (2, []))
