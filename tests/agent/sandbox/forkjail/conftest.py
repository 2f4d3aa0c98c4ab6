"""Skips what needs the kernel's isolation where a machine has none."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from agent.sandbox.base import Limits
from agent.sandbox.forkjail.doctor import TIERS, probe
from agent.sandbox.forkjail.sandbox import ForkjailSandbox

LIMITS = Limits(cpu_s=1, wall_s=30, memory_mb=256, output_chars=400, file_mb=1, scratch_mb=4)


@pytest.fixture(scope="session", params=sorted(TIERS))
def tier(request):
    """Each tier that this machine has."""
    finding = probe(request.param)
    if not finding.usable:
        pytest.skip(f"tier {request.param} is not to be had here: {finding.reason}")
    return request.param


@pytest.fixture
def play(tier):
    """Run a coroutine function on a fresh sandbox with nothing preloaded."""

    def run(scene, *, max_running=2):
        @asynccontextmanager
        async def opened():
            sandbox = ForkjailSandbox(
                own_namespaces=TIERS[tier], max_running=max_running, preload=()
            )
            try:
                yield sandbox
            finally:
                await sandbox.close()

        async def main():
            async with opened() as sandbox:
                return await scene(sandbox)

        return asyncio.run(main())

    return run
