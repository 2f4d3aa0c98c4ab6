"""The synchronous facade: threads, errors, closing, and the interpreter's end."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from agent.sandbox import build_sandbox
from agent.sandbox.base import Limits, SandboxError
from agent.sandbox.sync import SyncSandbox
from trajectory.errors import InputError

LIMITS = Limits(cpu_s=5, wall_s=20, memory_mb=512)
BACKENDS = ("monty", "unsafe")


def make(backend="monty"):
    return SyncSandbox(build_sandbox(backend, allow_unsafe=True))


def sandbox_threads():
    return [thread for thread in threading.enumerate() if thread.name == "sandbox"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_branches_and_nodes_work_as_in_the_sandbox_itself(backend):
    with make(backend) as sandbox, sandbox.open(LIMITS, 0) as session:
        assert session.run("x = [1]").node == 1
        branch = session.branch()
        assert branch.run("x.append(2)\nx").stdout == "[1, 2]\n"
        assert session.run("x").stdout == "[1]\n"
        assert session.run("x", at=0).error == "NameError"
        assert branch.branch(1).run("x").stdout == "[1]\n"


def test_what_the_backend_is_can_be_asked():
    with make("unsafe") as sandbox:
        assert (sandbox.name, sandbox.isolation) == ("unsafe", "none")
        assert sandbox.capabilities.cpython


def test_errors_pass_through():
    with make() as sandbox:
        with pytest.raises(InputError, match="lru:N"):
            sandbox.open(LIMITS, 0, retain="some")
        with sandbox.open(LIMITS, 0) as session, pytest.raises(ValueError, match="no node 9"):
            session.run("1", at=9)
        with pytest.raises(SandboxError, match="session is closed"):
            session.run("1")


def test_leaving_the_block_ends_the_thread_and_an_error_in_it_is_kept():
    before = len(sandbox_threads())
    with pytest.raises(KeyError), make() as sandbox:
        assert len(sandbox_threads()) == before + 1
        sandbox.open(LIMITS, 0).run("1")
        raise KeyError
    assert len(sandbox_threads()) == before


def test_closing_twice_is_allowed_and_ends_all_use():
    sandbox = make()
    session = sandbox.open(LIMITS, 0)
    sandbox.close()
    sandbox.close()
    session.close()
    for use in (lambda: session.run("1"), lambda: sandbox.open(LIMITS, 0), session.branch):
        with pytest.raises(SandboxError, match="the sandbox is closed"):
            use()


def test_many_threads_use_one_sandbox():
    with make() as sandbox, ThreadPoolExecutor(8) as threads:

        def episode(number):
            with sandbox.open(LIMITS, number) as session:
                session.run(f"x = {number}")
                return session.run("x * x").stdout

        assert list(threads.map(episode, range(24))) == [f"{n * n}\n" for n in range(24)]


def test_one_session_used_from_many_threads_takes_turns():
    with make() as sandbox, sandbox.open(LIMITS, 0) as session, ThreadPoolExecutor(8) as threads:
        session.run("x = []")
        list(threads.map(lambda n: session.run(f"x.append({n})"), range(20)))
        assert session.run("sorted(x)").stdout == f"{list(range(20))}\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_can_be_used_where_an_event_loop_runs(backend):
    async def run():
        with make(backend) as sandbox, sandbox.open(LIMITS, 0) as session:
            return session.run("1 + 1").stdout

    assert asyncio.run(run()) == "2\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_closing_ends_a_call_that_waits_in_another_thread(backend):
    sandbox = make(backend)
    session = sandbox.open(LIMITS, 0)
    session.run("1")
    ended = []

    def wait():
        try:
            ended.append(session.run("import time; time.sleep(15)").status)
        except SandboxError:
            ended.append("broken")

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.5)
    started = time.monotonic()
    sandbox.close()
    waiting.join(10)
    assert ended in (["broken"], ["crash"])
    assert time.monotonic() - started < 10


def test_ctrl_c_ends_the_code_and_the_session_can_be_used():
    with make() as sandbox, sandbox.open(LIMITS, 0) as session:
        session.run("x = 1")
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            session.run("x = 2\nimport time\ntime.sleep(15)")
        assert session.run("x").stdout == "1\n"
        assert time.monotonic() - started < 10


def test_a_call_from_the_sandboxs_own_thread_is_refused_instead_of_waiting_for_ever():
    sandbox = make()
    asked = []

    async def ask():
        try:
            sandbox.open(LIMITS, 0)
        except RuntimeError as error:
            asked.append(str(error))

    with sandbox:
        sandbox._loop.call(ask)
    assert "would wait for itself" in asked[0]


def test_a_sandbox_that_is_dropped_ends():
    before = len(sandbox_threads())
    session = make().open(LIMITS, 0)
    session.run("1")
    assert len(sandbox_threads()) == before + 1
    del session
    gc.collect()
    assert len(sandbox_threads()) == before


SCRIPT = """
import threading, time
from agent.sandbox import build_sandbox
from agent.sandbox.base import Limits
from agent.sandbox.sync import SyncSandbox
sandbox = SyncSandbox(build_sandbox("unsafe", allow_unsafe=True))
session = sandbox.open(Limits(cpu_s=60, wall_s=60), 0)
print(session.run("import os; print(os.getpid())").stdout, end="", flush=True)
threading.Thread(target=session.run, args=("import time; time.sleep(50)",), daemon=True).start()
time.sleep(0.5)
"""


def test_the_interpreters_end_neither_waits_nor_leaves_processes(repository):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=repository, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)
