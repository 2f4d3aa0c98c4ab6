"""Sessions of the monty backend for the tests."""

import asyncio
from contextlib import asynccontextmanager

from agent.sandbox.base import Limits
from agent.sandbox.monty import MontySandbox

LIMITS = Limits(cpu_s=0.6, wall_s=20, memory_mb=64, output_chars=400)


@asynccontextmanager
async def opened(limits=LIMITS, *, retain="last", seed=0, max_running=2):
    sandbox = MontySandbox(max_running=max_running)
    try:
        yield await sandbox.open(limits, seed, retain=retain)
    finally:
        await sandbox.close()


def results(*codes, limits=LIMITS):
    async def run():
        async with opened(limits) as session:
            return [await session.run(code) for code in codes]

    return asyncio.run(run())
