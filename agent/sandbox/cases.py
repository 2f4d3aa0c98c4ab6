"""Hostile and odd inputs for a sandbox: reading them, and running one to see how it ends.

A case is a JSON object with ``id``, ``category``, ``code``, ``expect`` and ``reason``; a line
``# %%`` in ``code`` separates the turns of one session and ``expect`` is about the last one:
``ok``, ``error`` (an exception, the state kept), ``timeout``, ``killed`` (the process died) or
``contained`` (any of these). Category ``sql`` is a query against a small database. In every case
no turn may show ``ESCAPED`` or a canary, and the next turn of the session must still work.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.sandbox.base import Limits, Result, Sandbox
from trajectory.codec import from_json
from trajectory.errors import InputError

LIMITS = Limits(cpu_s=3.0, wall_s=10.0, memory_mb=512)
CANARY_VARIABLE = "SBX_CANARY_SECRET"
CANARY_FILE = "sbx_canary_"
ESCAPED = "ESCAPED"
_NEXT_TURN = re.compile(r"(?m)^# %%\n")
_EXPECTED = ("ok", "error", "timeout", "killed", "contained")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One input and what has to become of it."""

    id: str
    category: str
    code: str
    expect: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What became of a case."""

    case: Case
    ended: str
    """How the last turn ended."""
    problem: str
    """What was not as expected; empty if all was."""
    seconds: float
    """Wall-clock time of the last turn."""


def read_cases(path: Path) -> list[Case]:
    """Read a file of cases.

    Raises
    ------
    InputError
        If it is missing, or a line is no case.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the cases {path}: {error.strerror}") from error
    cases = []
    for number, line in enumerate(lines, start=1):
        try:
            case = from_json(Case, json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not a case: {error}") from error
        if case.expect not in _EXPECTED:
            valid = ", ".join(_EXPECTED)
            raise InputError(f"{path}, line {number}: expect is {case.expect!r}; valid: {valid}")
        cases.append(case)
    if not cases:
        raise InputError(f"{path} holds no case")
    return cases


@contextmanager
def canaries() -> Iterator[str]:
    """Plant a secret in this process's environment and beside its temporary files."""
    secret = f"canary-{secrets.token_hex(8)}"
    with tempfile.NamedTemporaryFile("w", prefix=CANARY_FILE, suffix=".txt") as file:
        file.write(secret)
        file.flush()
        os.chmod(file.name, 0o644)
        os.environ[CANARY_VARIABLE] = secret
        try:
            yield secret
        finally:
            del os.environ[CANARY_VARIABLE]


async def run_case(
    sandbox: Sandbox, case: Case, *, secret: str, limits: Limits = LIMITS
) -> Verdict:
    """Run a case in a session of its own.

    Raises
    ------
    SandboxError
        If the sandbox broke.
    """
    if case.category == "sql":
        return await _run_query(sandbox, case, secret=secret, limits=limits)
    session = await sandbox.open(limits, 0)
    try:
        results = [await session.run(turn) for turn in _NEXT_TURN.split(case.code)]
        after = await session.run("print(6 * 7)")
    finally:
        await session.close()
    text = "".join(r.stdout + r.stderr for r in results)
    ended = _ended(results[-1])
    # Patched builtins are the session's own affair: its next turn has to end, not to print.
    patched = case.category == "tamper" and after.status in ("ok", "error")
    goes_on = after.stdout.strip().endswith("42") or patched
    return Verdict(
        case=case,
        ended=ended,
        problem=_problem(case, ended, text, secret=secret, goes_on=goes_on),
        seconds=results[-1].wall_s,
    )


async def _run_query(sandbox: Sandbox, case: Case, *, secret: str, limits: Limits) -> Verdict:
    """Run a case of category ``sql`` through the SQL tool."""
    from agent.tools.sql_cases import run_sql_case  # a tool, made of sandboxes: not at the top

    began = time.perf_counter()
    found = await run_sql_case(sandbox, limits, case.code)
    return Verdict(
        case=case,
        ended=found.ended,
        problem=_problem(case, found.ended, found.text, secret=secret, goes_on=found.goes_on),
        seconds=time.perf_counter() - began,
    )


def _ended(result: Result) -> str:
    """Name the end of a run as cases do."""
    return {"crash": "killed", "output_limit": "killed"}.get(result.status, result.status)


def _problem(case: Case, ended: str, text: str, *, secret: str, goes_on: bool) -> str:
    """Say what is wrong, or nothing."""
    problems = []
    if case.expect not in ("contained", ended):
        problems.append(f"expected {case.expect}")
    if ESCAPED in text:
        problems.append("it escaped")
    if secret in text:
        problems.append("it read a canary")
    if not goes_on:
        problems.append("the next turn of the session failed")
    return ", ".join(problems)
