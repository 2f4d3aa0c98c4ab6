"""Runs hidden tests on a candidate that never meets them.

Two sandbox sessions are opened for each verdict. One holds the candidate; it is sent calls and
gives back values, as text. The other holds the tests, expected values included; where they call a
tested function they are given the value that the candidate returned for these arguments, made anew
from the text as a value of plain types. Whatever a candidate patches, prints, overrides or exits
from happens in a process that knows no expected value and whose word counts for nothing but its
own return values.

Each call starts from the state right after the candidate's definition, so calls cannot influence
each other, and the same call with the same arguments is made once. A candidate that changes its
arguments changes its own copies. What is raised reaches the tests as the nearest built-in
exception. A value of any other type than None, bool, int, float, complex, str, bytes, list, tuple,
set, frozenset and dict is wrong (numpy's scalars count as Python's, and built-in types are values
too), as is a call that crashes, exits or exceeds a limit.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from agent.sandbox import SandboxProvider
from agent.sandbox.base import Limits, ReplayDiverged, Result, SandboxError, Session
from agent.tasks.code_box import MAX_CALLS
from agent.tools.base import ToolFailure
from trajectory.errors import InputError
from trajectory.records import JsonValue, Task

META = "code"
"""Key of a task's ``meta`` that holds its `HiddenTests`."""
PROGRAM = Path(__file__).with_name("code_box.py").read_text()
CANDIDATE_LIMITS = Limits(cpu_s=10.0, wall_s=60.0, output_chars=200_000)
"""Of its definition, and of each call: gold solutions need up to 5 s. A longer reply is cut, and
wrong."""
TESTS_LIMITS = Limits(cpu_s=10.0, wall_s=60.0, output_chars=2_000_000)
MAX_CODE_CHARS = 100_000
"""A longer candidate is wrong."""
TOTAL_CPU_S = 40.0
"""CPU time of all calls together, seconds."""
TOTAL_WALL_S = 180.0
"""Wall clock of all calls together, seconds: for a candidate that sleeps."""
MAX_REPLIES_CHARS = 2_000_000
"""Of all replies together, as text."""
FAILED = '{"failed": true}'
_TAGS = frozenset({"tuple", "set", "frozenset", "dict", "complex"})


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenTests:
    """The tests of one task, and what stands around them and the candidate."""

    given: str
    """Code run before the candidate, in its box: what the task gives it."""
    objects_code: str
    """Code run after the candidate, in its box: makes objects that the tests pass as arguments."""
    setup: str
    """Code run before the tests, in their box."""
    tests: str
    """The tests: they pass unless they raise."""
    functions: tuple[str, ...]
    """Names of the tested functions, at least one."""
    constructors: tuple[str, ...] = ()
    """Names of classes beside the candidate whose objects the tests pass as arguments."""
    objects: tuple[str, ...] = ()
    """Names of objects that ``objects_code`` makes."""

    def as_meta(self) -> dict[str, JsonValue]:
        """Return the entry of a task's ``meta``."""
        fields = asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}

    @classmethod
    def of(cls, task: Task) -> HiddenTests:
        """Read a task's tests.

        Raises
        ------
        InputError
            If it has none.
        """
        about = task.meta.get(META)
        if not isinstance(about, dict) or not about.get("functions"):
            raise InputError(f"the task {task.task_id!r} has no hidden tests in meta {META!r}")
        lists = {key: tuple(map(str, v)) for key, v in about.items() if isinstance(v, list)}
        texts = {key: str(v) for key, v in about.items() if not isinstance(v, list)}
        return cls(**texts, **lists)  # type: ignore[arg-type]


class Box:
    """A sandbox session with the program of `agent.tasks.code_box` in it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._mark = f"<{secrets.token_hex(8)}>"
        self._ready = 0

    async def prepare(self, statement: str) -> Result:
        """Load the program, then run a statement that makes ``box``; ok only if it was made.

        Raises
        ------
        ToolFailure
            If the program itself does not load.
        """
        loaded = await self._run(PROGRAM)
        if loaded.status != "ok":
            raise ToolFailure(f"the box of the hidden tests did not start: {_end(loaded)}")
        self._ready = loaded.node
        made = await self._run(f"{statement}\nprint({self._mark!r})")
        self._ready = made.node
        return made if self._mark in made.stdout else replace(made, status="error")

    async def ask(self, method: str, argument: str, options: str = "") -> tuple[str | None, Result]:
        """Call a method of ``box`` in the state after `prepare` and return what it printed."""
        result = await self._run(f"box.{method}({argument!r}, {self._mark!r}{options})")
        _, found, printed = result.stdout.rpartition(self._mark)
        text = printed.partition("\n")[0]
        return (text if found and result.status == "ok" else None), result

    async def _run(self, code: str) -> Result:
        """Run code in the prepared state, twice if it dies: it may have been the machine."""
        result = await self._session.run(code, at=self._ready)
        if result.status == "crash":
            result = await self._session.run(code, at=self._ready)
        return result


class _Verdict:
    """One run of the tests of one task on one candidate."""

    def __init__(self, task: Task, candidate: Box, tests: Box) -> None:
        self._task, self._candidate, self._tests = task, candidate, tests
        self._replies: dict[str, str] = {}
        self._cpu_s = self._wall_s = 0.0
        self._num_chars = 0

    async def passed(self) -> bool:
        """Ask for the calls the tests make until they end."""
        needed, _ = await self._run_tests(rehearsal=True)
        while len(self._replies) < MAX_CALLS:
            if not await self._make_calls(needed):
                return False
            needed, passed = await self._run_tests()
            if not needed:
                return passed
        return False

    async def _make_calls(self, calls: Sequence[str]) -> bool:
        """Collect replies up to the first that is none; False once they are too much."""
        for call in calls[: MAX_CALLS - len(self._replies)]:
            text, result = await self._candidate.ask("reply", call)
            self._replies[call] = checked_reply(text) or FAILED
            self._cpu_s += result.cpu_s
            self._wall_s += result.wall_s
            self._num_chars += len(self._replies[call])
            too_long = self._cpu_s > TOTAL_CPU_S or self._wall_s > TOTAL_WALL_S
            if too_long or self._num_chars > MAX_REPLIES_CHARS:
                return False
            if self._replies[call] == FAILED:  # the tests may end before they get here
                break
        return True

    async def _run_tests(self, *, rehearsal: bool = False) -> tuple[list[str], bool]:
        """Run the tests on the replies so far; return the calls they need, and if they passed."""
        replies = ",".join(f"{json.dumps(call)}:{reply}" for call, reply in self._replies.items())
        text, result = await self._tests.ask("run", f"{{{replies}}}", f", rehearsal={rehearsal}")
        if result.status in ("timeout", "output_limit"):
            return [], False
        if text is None:
            raise ToolFailure(f"the box of the hidden tests broke: {_end(result)}")
        end = json.loads(text)
        if end["odd"] and not rehearsal:
            raise ToolFailure(
                f"the hidden tests of task {self._task.task_id!r} pass a value of type "
                f"{end['odd']}, which cannot be sent to the candidate"
            )
        return end["needed"], end["ended"] == "passed"


class Checker:
    """Judges candidates by hidden tests.

    Parameters
    ----------
    sandbox : SandboxProvider
        Where candidates and tests run; asked when the first verdict is needed.
    """

    def __init__(self, sandbox: SandboxProvider) -> None:
        self._sandbox = sandbox

    async def passes(self, task: Task, candidate: str, *, seed: int = 0) -> bool:
        """Tell whether a candidate passes a task's hidden tests.

        Parameters
        ----------
        task : Task
            Holds `HiddenTests` in ``meta["code"]``.
        candidate : str
            The source code of a module.
        seed : int, default=0
            Fixes whatever is random in candidate and tests.

        Raises
        ------
        ToolFailure
            If the sandbox broke, or the tests pass arguments that do not travel: no verdict.
        InputError
            If the task has no hidden tests, or the sandbox does not run all of Python.
        """
        hidden = HiddenTests.of(task)
        if len(candidate) > MAX_CODE_CHARS:
            return False
        sources = json.dumps([hidden.given, candidate, hidden.objects_code])
        try:
            async with (
                self._box(TESTS_LIMITS, seed) as tests,
                self._box(CANDIDATE_LIMITS, seed) as beside,
            ):
                judge = await tests.prepare(f"box = Judge({json.dumps(hidden.as_meta())!r})")
                if judge.status != "ok":
                    raise ToolFailure(f"the hidden tests could not be loaded: {_end(judge)}")
                made = await beside.prepare(f"box = Candidate({sources!r})")
                if made.status != "ok":
                    return False
                return await _Verdict(task, beside, tests).passed()
        except ReplayDiverged:  # only a candidate that does not repeat itself brings this about
            return False
        except SandboxError as error:
            raise ToolFailure(f"the sandbox of the hidden tests broke: {error}") from error

    @asynccontextmanager
    async def _box(self, limits: Limits, seed: int) -> AsyncIterator[Box]:
        """Open a session for one verdict; the state after its preparation stays alive."""
        sandbox = self._sandbox()
        if not sandbox.capabilities.cpython:
            raise InputError(
                f"hidden tests run in a sandbox with the whole of Python, which {sandbox.name!r} "
                "is not: choose --sandbox auto"
            )
        session = await sandbox.open(limits, seed, retain="lru:2")
        try:
            yield Box(session)
        finally:
            await session.close()


def _end(result: Result) -> str:
    """Say how a run ended, for a message."""
    return f"{result.status} {result.stderr[-200:]}".strip()


def checked_reply(text: str | None) -> str | None:
    """Return what a candidate's box printed if it is a reply of plain values, else None.

    Examples
    --------
    >>> checked_reply('{"value":{"tuple":[1,2.5]}}')
    '{"value": {"tuple": [1, 2.5]}}'
    >>> checked_reply('{"value": {"name": "box"}}') is None
    True
    """
    try:
        reply = json.loads(text or "")
        if not isinstance(reply, dict) or len(reply) != 1:
            return None
        names = reply.get("raised")
        raised = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if raised or ("value" in reply and _is_plain(reply["value"])):
            return json.dumps(reply)
    except (ValueError, RecursionError):
        return None
    return None


def _is_plain(value: object) -> bool:
    """Whether JSON describes a value of plain types."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if not isinstance(value, dict):
        return True
    if len(value) != 1:
        return False
    ((tag, body),) = value.items()
    if tag in ("bytes", "type"):
        return isinstance(body, str)
    return tag in _TAGS and isinstance(body, list) and _is_plain(body)
