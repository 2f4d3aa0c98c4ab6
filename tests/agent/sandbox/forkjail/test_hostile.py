"""The shared hostile cases, side by side with ordinary snippets, leaving nothing behind."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from agent.sandbox.cases import LIMITS, read_cases
from agent.sandbox.check import run_all
from agent.sandbox.forkjail.doctor import TIERS
from agent.sandbox.forkjail.sandbox import ForkjailSandbox
from tests.agent.sandbox.ordinary_user import run as run_as_ordinary_user

CASES = "data/sandbox_hostile/cases.jsonl"
SIDE_BY_SIDE = 4
PATIENT = replace(LIMITS, wall_s=20.0)  # the machine may be busy; what sleeps sleeps side by side

AS_ORDINARY_USER = """
import asyncio, os, sys
from pathlib import Path
from agent.sandbox.cases import read_cases
from agent.sandbox.check import run_all
from agent.sandbox.forkjail.sandbox import ForkjailSandbox
from tests.agent.sandbox.forkjail.test_hostile import PATIENT
assert os.getuid() != 0
sandbox = ForkjailSandbox(own_namespaces=sys.argv[2] == "A", max_running=6)
found = asyncio.run(run_all(sandbox, read_cases(Path(sys.argv[1])), 4, limits=PATIENT))
for verdict in found.verdicts:
    if verdict.problem: print(verdict.case.id, verdict.ended, verdict.problem)
print(len(found.verdicts), found.clean, found.beside[True] > 20, *found.left)
"""


@pytest.mark.slow
def test_every_case_ends_as_expected_and_harms_nobody(shared, tier):
    sandbox = ForkjailSandbox(own_namespaces=TIERS[tier], max_running=SIDE_BY_SIDE + 1)
    found = asyncio.run(run_all(sandbox, read_cases(shared / CASES), SIDE_BY_SIDE, limits=PATIENT))
    assert not [f"{v.case.id}: {v.ended}, {v.problem}" for v in found.verdicts if v.problem]
    assert len(found.verdicts) == 119
    assert found.beside[True] > 20
    assert not found.beside[False]
    assert not found.left


@pytest.mark.slow
def test_every_case_ends_as_expected_for_an_ordinary_user(shared, tier, tmp_path):
    copy = tmp_path / "cases.jsonl"
    copy.write_text((shared / CASES).read_text())
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o005)
    repository = str(Path(__file__).resolve().parents[4])
    result = run_as_ordinary_user(
        "-c",
        AS_ORDINARY_USER,
        str(copy),
        tier,
        env={**os.environ, "PYTHONPATH": repository},
        timeout=500,
    )
    assert result.stdout == "119 True True\n", result.stdout + result.stderr[-2000:]
