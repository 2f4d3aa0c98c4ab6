"""Database files: found, checked, copied."""

import sqlite3
from contextlib import closing

import pytest

from agent.tools import check_tasks
from agent.tools.sql_database import (
    database_from_script,
    database_path,
    packed_database,
    read_database,
)
from trajectory.errors import InputError
from trajectory.records import Task

SCRIPT = "CREATE TABLE items(id INTEGER); INSERT INTO items VALUES (1), (2), (3);"


def test_a_task_without_a_database_is_refused_before_any_episode():
    task = Task(task_id="t7", domain="math", prompt="p", answer="a")
    check_tasks(["calculator", "python"], [task])
    with pytest.raises(InputError, match="task 't7' of the domain 'math' has no database"):
        check_tasks(["calculator", "sql"], [task])
    with pytest.raises(InputError, match="has no database"):
        database_path(task)


def wal_database(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(SCRIPT)
    return path


def test_a_database_in_write_ahead_mode_is_read(tmp_path):
    data = read_database(wal_database(tmp_path / "items.sqlite"))
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.deserialize(data)
        assert connection.execute("SELECT count(*) FROM items").fetchone() == (3,)


def test_changes_that_are_not_in_the_file_yet_are_not_lost_silently(tmp_path):
    path = tmp_path / "items.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(SCRIPT)
        with pytest.raises(InputError, match="changes beside it in items.sqlite-wal"):
            read_database(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"id,name\n1,a\n", "no SQLite database"), (b"", "no SQLite")],
)
def test_a_file_that_is_no_database_is_named(tmp_path, content, message):
    path = tmp_path / "items.sqlite"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"items\.sqlite.*{message}"):
        packed_database(path)


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "items.sqlite"
    path.write_bytes(database_from_script("CREATE TABLE a(x)"))
    first = packed_database(path)
    path.write_bytes(database_from_script("CREATE TABLE a(x); CREATE TABLE b(x)"))
    assert packed_database(path) != first
