"""The child of the unsafe backend: what a run that was cut short leaves in the event loop."""

import asyncio
import os
import socket
import subprocess
import sys

import pytest

from agent.sandbox import build_sandbox
from agent.sandbox.base import Limits, SandboxError
from agent.sandbox.child import Child

LIMITS = Limits(cpu_s=0.3, wall_s=20, memory_mb=512, output_chars=400)


async def receives(fd):
    """Whether the loop notices data on a new socket that has the descriptor ``fd``."""
    pairs = []
    try:
        while all(fd not in (ours.fileno(), theirs.fileno()) for ours, theirs in pairs):
            pairs.append(socket.socketpair())
        for ours, theirs in pairs:
            ours.setblocking(False)
            theirs.setblocking(False)
        end, other = next(
            (a, b) for pair in pairs for a, b in (pair, pair[::-1]) if a.fileno() == fd
        )
        loop = asyncio.get_running_loop()
        loop.call_later(0.05, other.send, b"x")
        async with asyncio.timeout(5):  # no step of the loop lies before the next line
            return await loop.sock_recv(end, 1) == b"x"
    finally:
        for pair in pairs:
            for each in pair:
                each.close()


def test_a_descriptor_of_a_run_cut_short_can_be_used_again_at_once():
    async def run():
        child = Child(LIMITS, 0)
        await child.ready()
        control = child._control.fileno()
        outcome = await child.run("while True: pass", 1)
        child.close()
        return outcome.status, await receives(control)

    assert asyncio.run(run()) == ("timeout", True)


def test_closing_a_session_in_a_run_ends_it_before_its_descriptors_are_closed():
    async def run():
        sandbox = build_sandbox("unsafe", allow_unsafe=True)
        session = await sandbox.open(LIMITS, 0)
        await session.run("1")
        child = session._machine._child
        fds = [child._control.fileno(), *child._pipes]
        cell = asyncio.create_task(session.run("import time; time.sleep(15)"))
        await asyncio.sleep(0.2)
        await session.close()
        noticed = [await receives(fd) for fd in fds]
        with pytest.raises(SandboxError, match="closed"):
            await cell
        await sandbox.close()
        return noticed

    assert asyncio.run(run()) == [True, True, True]


@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs the CPU clock of a process")
def test_the_cpu_time_of_a_run_that_died_is_kept():
    async def run():
        child = Child(Limits(cpu_s=20, wall_s=60), 0)
        try:
            await child.ready()
            code = "import os, time\nwhile time.process_time() < 1: pass\nos._exit(3)"
            return await child.run(code, 1)
        finally:
            child.close()

    outcome = asyncio.run(run())
    assert outcome.status == "crash"
    assert 0.5 < outcome.cpu_s < 2


IGNORING = """
import asyncio, signal
from agent.sandbox import build_sandbox
from agent.sandbox.base import Limits
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
async def main():
    sandbox = build_sandbox("unsafe", allow_unsafe=True)
    session = await sandbox.open(Limits(), 0)
    for code in ("x = 1", "import os; os._exit(3)", "x"):
        result = await session.run(code)
        print(result.status, result.stdout.strip())
    await sandbox.close()
asyncio.run(main())
"""


def test_a_death_is_noticed_in_a_caller_that_ignores_its_children(repository):
    command = [sys.executable, "-c", IGNORING]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n") == ["ok ", "crash ", "ok 1", ""]
