"""The shared hostile cases, side by side with ordinary snippets, leaving nothing behind."""

import asyncio
import os
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from agent.sandbox.check import LIMITS, canaries, read_cases, run_case
from agent.sandbox.forkjail.box import SCRATCH_PREFIX
from agent.sandbox.forkjail.doctor import TIERS
from agent.sandbox.forkjail.sandbox import ForkjailSandbox
from agent.sandbox.soak import descendants
from tests.agent.sandbox.ordinary_user import run as run_as_ordinary_user

CASES = "data/sandbox_hostile/cases.jsonl"
SHORT = replace(LIMITS, wall_s=12.0)
SIDE_BY_SIDE = 6


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


async def all_cases(cases, tier):
    """Run every case with ordinary sessions beside them; return verdicts and what was left."""
    sandbox = ForkjailSandbox(own_namespaces=TIERS[tier], max_running=SIDE_BY_SIDE)
    ordinary, over = Counter(), asyncio.Event()
    places = asyncio.Semaphore(SIDE_BY_SIDE - 2)

    async def harmless():
        while not over.is_set():
            session = await sandbox.open(SHORT, 0)
            for number in range(1, 6):
                result = await session.run(f"x = {number} + (x if {number} > 1 else 0)\nx")
                ordinary[result.stdout == f"{number * (number + 1) // 2}\n"] += 1
            await session.close()
            await asyncio.sleep(0.05)

    async def one(case, secret):
        async with places:
            return await run_case(sandbox, case, secret=secret, limits=SHORT)

    beside = asyncio.create_task(harmless())
    try:
        with canaries() as secret:
            verdicts = await asyncio.gather(*(one(case, secret) for case in cases))
        over.set()
        await beside
        processes = [sandbox.pid, *descendants(sandbox.pid)]
    finally:
        over.set()
        await sandbox.close()
    left = [pid for pid in processes if os.path.exists(f"/proc/{pid}")]
    left += Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}{processes[0]}-*")
    return verdicts, ordinary, left


@pytest.mark.slow
def test_every_case_ends_as_expected_and_harms_nobody(shared, tier):
    descriptors = open_descriptors()
    verdicts, ordinary, left = asyncio.run(all_cases(read_cases(shared / CASES), tier))
    problems = [f"{v.case.id}: {v.ended}, {v.problem}" for v in verdicts if v.problem]
    assert not problems
    assert len(verdicts) == 119
    assert ordinary[True] > 20
    assert not ordinary[False]
    assert not left
    assert open_descriptors() <= descriptors


@pytest.mark.slow
def test_every_case_ends_as_expected_for_an_ordinary_user(shared, tier, tmp_path):
    copy = tmp_path / "cases.jsonl"
    copy.write_text((shared / CASES).read_text())
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o005)
    code = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from agent.sandbox.check import read_cases\n"
        "from tests.agent.sandbox.forkjail.test_hostile import all_cases\n"
        "assert os.getuid() != 0\n"
        "cases = read_cases(Path(sys.argv[1]))\n"
        "verdicts, ordinary, left = asyncio.run(all_cases(cases, sys.argv[2]))\n"
        "for v in verdicts:\n"
        "    if v.problem: print(v.case.id, v.ended, v.problem)\n"
        "print(len(verdicts), ordinary[False], len(left), ordinary[True] > 20)\n"
    )
    repository = str(Path(__file__).resolve().parents[4])
    result = run_as_ordinary_user(
        "-c", code, str(copy), tier, env={**os.environ, "PYTHONPATH": repository}, timeout=500
    )
    assert result.stdout == "119 0 0 True\n", result.stdout + result.stderr[-2000:]
