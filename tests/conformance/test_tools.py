"""What every tool must do."""

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from agent.sandbox import SandboxProvider
from agent.tools import TOOLS, build_tools
from agent.tools.base import SideEffect, schema
from agent.tools.sql_database import database_from_script
from trajectory.records import Observation, Task

UNSAFE = SandboxProvider("unsafe", allow_unsafe=True)

DATABASE = "items.sqlite"
META = {
    "database": DATABASE,
    "blocks": {"init": ["ontable a", "ontable c", "on b c"]},
    "countdown": {"numbers": [30, 100, 93], "target": 23},
}
TASK = Task(task_id="t", domain="d", prompt="p", answer="a", meta=META)


@dataclass(frozen=True, kw_only=True)
class Example:
    """Calls of one tool that the checks need."""

    calls: tuple[dict, ...]
    """A sequence whose last result depends on the earlier ones where the tool has state."""
    results: tuple[str, ...]
    mistake: dict
    """Good arguments with bad content."""
    endless: dict
    """A call that would take for ever without limits."""


EXAMPLES = {
    "blocks": Example(
        calls=({"action": "unstack b from c"}, {"action": "stack b on a"}),
        results=(
            "Done. Hand: b. On the table: a, c. Stacked: nothing. Clear: a, c.",
            "Done. Hand: empty. On the table: a, c. Stacked: b on a. Clear: b, c.",
        ),
        mistake={"action": "pick-up c"},
        endless={"action": "stack b on " * 100_000},
    ),
    "calculator": Example(
        calls=({"expression": "1 + 2"}, {"expression": "0.1 + 0.2"}),
        results=("3", "0.3"),
        mistake={"expression": "1 +"},
        endless={"expression": "9**9**9**9"},
    ),
    "countdown": Example(
        calls=({"step": "30 + 93"}, {"step": "123 - 100"}),
        results=(
            "30 + 93 = 123. Numbers left: 100, 123. Target: 23.",
            "123 - 100 = 23. Numbers left: 23. Target: 23.",
        ),
        mistake={"step": "31 + 93"},
        endless={"step": "9" * 100_000 + " * 9"},
    ),
    "python": Example(
        calls=({"code": "x = 20"}, {"code": "x += 1\nx"}, {"code": "x * 2"}),
        results=("(no output; use print to see a value)", "21", "42"),
        mistake={"code": "1 +"},
        endless={"code": "while True: pass"},
    ),
    "sql": Example(
        calls=(
            {"query": "CREATE TABLE prices(price)"},
            {"query": "INSERT INTO prices SELECT id * 2.5 FROM items"},
            {"query": "SELECT sum(price) AS total FROM prices"},
        ),
        results=("done", "3 rows changed", "total\n-----\n15.0\n(1 row)"),
        mistake={"query": "SELECT FROM items"},
        endless={
            "query": "WITH RECURSIVE r AS (SELECT 1 UNION ALL SELECT 1 FROM r) SELECT * FROM r"
        },
    ),
}
pytestmark = pytest.mark.parametrize("name", sorted(TOOLS))


@pytest.fixture(autouse=True)
def database(tmp_path, monkeypatch):
    """The file that the task names."""
    script = "CREATE TABLE items(id); INSERT INTO items VALUES (1), (2), (3);"
    (tmp_path / DATABASE).write_bytes(database_from_script(script))
    monkeypatch.chdir(tmp_path)


@asynccontextmanager
async def opened(name, *, sessions=1):
    (tool,) = build_tools([name], UNSAFE)
    made = [await tool.open(TASK, 0) for _ in range(sessions)]
    try:
        yield made
    finally:
        for session in made:
            await session.close()


def call_all(name, calls):
    async def run():
        async with opened(name) as (session,):
            return [await session.call(arguments) for arguments in calls]

    return asyncio.run(run())


def test_the_schema_is_a_valid_function_schema(name):
    (tool,) = build_tools([name], UNSAFE)
    function = schema(tool)["function"]
    assert function["name"] == name
    assert function["description"].endswith(".")
    parameters = function["parameters"]
    assert parameters["type"] == "object"
    assert set(parameters["required"]) <= set(parameters["properties"])
    assert all(
        field["type"] and field["description"] for field in parameters["properties"].values()
    )
    assert isinstance(tool.effect, SideEffect)


def test_calls_give_their_results(name):
    example = EXAMPLES[name]
    observations = call_all(name, example.calls)
    assert [(o.content, o.error) for o in observations] == [(r, None) for r in example.results]
    assert all(o.seconds >= 0 for o in observations)


@pytest.mark.parametrize(
    "change",
    [
        lambda good: {},
        lambda good: dict.fromkeys(good, 5),
        lambda good: dict.fromkeys(good),
        lambda good: {key: ["1"] for key in good},
        lambda good: {**good, "extra": 1},
        lambda good: {"wrong": "1"},
    ],
)
def test_bad_arguments_are_a_readable_observation_and_change_nothing(name, change):
    example = EXAMPLES[name]
    bad = change(example.calls[0])
    observations = call_all(name, [*example.calls[:1], bad, *example.calls[1:]])
    assert observations[1].error == "bad_arguments"
    assert repr(next(iter(example.calls[0]))) in observations[1].content
    assert observations[-1].content == example.results[-1]


def test_a_mistake_in_the_content_is_an_observation(name):
    (observation,) = call_all(name, [EXAMPLES[name].mistake])
    assert isinstance(observation, Observation)
    assert observation.error
    assert observation.content


def test_an_endless_call_ends_and_the_session_goes_on(name):
    example = EXAMPLES[name]
    started = time.monotonic()
    observations = call_all(name, [*example.calls[:-1], example.endless, example.calls[-1]])
    assert time.monotonic() - started < 60
    assert observations[-2].error
    assert observations[-1].content == example.results[-1]


def test_odd_text_comes_back_as_text(name):
    argument = next(iter(EXAMPLES[name].calls[0]))
    (observation,) = call_all(name, [{argument: "'\x00\u202e\U0001f600' \\"}])
    assert observation.content.encode("utf-8")


def test_a_branch_equals_replaying_the_calls(name):
    example = EXAMPLES[name]

    async def run():
        async with opened(name) as (session,):
            for arguments in example.calls[:-1]:
                await session.call(arguments)
            branch = await session.branch()
            try:
                return [await s.call(example.calls[-1]) for s in (branch, session)]
            finally:
                await branch.close()

    assert [o.content for o in asyncio.run(run())] == [example.results[-1]] * 2


def test_sessions_share_no_state(name):
    example = EXAMPLES[name]

    async def run():
        async with opened(name, sessions=2) as (first, second):
            for arguments in example.calls:
                await first.call(arguments)
            return [(await second.call(arguments)).content for arguments in example.calls]

    assert tuple(asyncio.run(run())) == example.results


def test_a_tool_with_state_says_so(name):
    example = EXAMPLES[name]
    (tool,) = build_tools([name], UNSAFE)
    alone = call_all(name, example.calls[-1:])[0].content
    assert (tool.effect is SideEffect.PURE) == (alone == example.results[-1])


def test_closing_twice_is_allowed(name):
    async def run():
        async with opened(name) as (session,):
            before = await session.call(EXAMPLES[name].calls[0])
            await session.close()
            await session.close()
        async with opened(name) as (session,):  # and harms no later session
            return before, await session.call(EXAMPLES[name].calls[0])

    before, after = asyncio.run(run())
    assert before.content == after.content
