"""The unsafe backend: its processes, its pipes, its replays, and hostile code."""

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import asynccontextmanager

import pytest

from agent.sandbox import build_sandbox
from agent.sandbox.base import Limits, SandboxError
from trajectory.errors import InputError

LIMITS = Limits(cpu_s=0.6, wall_s=20, memory_mb=512, output_chars=400, file_mb=1)

HOSTILE = [
    *("benign-asyncio", "benign-class-pickle", "benign-empty", "benign-numpy-linalg"),
    *("err-nul-in-source", "err-deep-nesting-source", "err-exception-with-evil-str"),
    *("err-exception-huge-message", "err-recursion-limit", "err-exception-group", "err-stdin-fd0"),
    *("life-sys-exit-0", "life-os-exit-after-forged-success", "life-self-sigkill"),
    *("life-segfault-ctypes", "life-ignore-sigterm", "life-atexit-hang", "life-close-all-fds"),
    *("cpu-c-loop-pow", "cpu-sum-range-c", "cpu-many-threads-spin"),
    *("mem-gradual", "mem-string-doubling", "mem-numpy-alloc"),
    *("out-one-huge-line", "out-binary", "out-bidi-zero-width", "out-close-stdout"),
    *("forge-result-json", "forge-write-all-fds", "forge-return-unpicklable"),
    *("forge-sentinel-lines", "forge-hijack-frames", "det-hash-order", "det-default-random"),
    *("env-dump", "env-dump-c", "secrets-heap-scan", "secrets-inherited-fds"),
    *("tamper-builtins-next-turn", "tamper-sys-modules", "tamper-runner-modules"),
    *("tamper-recursion-limit", "tamper-excepthook-displayhook", "tamper-register-at-fork"),
    *("tamper-gc-callbacks", "fs-shadow-module"),
]
"""Cases that ask for no isolation: the file also has those that only a real sandbox withstands."""

ENDINGS = {
    "ok": {"ok"},
    "error": {"error", "output_limit"},
    "timeout": {"timeout"},
    "killed": {"crash"},
    "contained": {"ok", "error", "timeout", "crash", "output_limit"},
}


@asynccontextmanager
async def opened(limits=LIMITS):
    sandbox = build_sandbox("unsafe", allow_unsafe=True)
    try:
        yield await sandbox.open(limits, 0)
    finally:
        await sandbox.close()


def results(*codes, limits=LIMITS):
    async def run():
        async with opened(limits) as session:
            return [await session.run(code) for code in codes]

    return asyncio.run(run())


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.fixture(scope="module")
def cases(shared):
    with (shared / "data/sandbox_hostile/cases.jsonl").open() as lines:
        return {case["id"]: case for case in map(json.loads, lines)}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_is_contained_and_the_session_lives_on(cases, name, monkeypatch):
    monkeypatch.setenv("SBX_CANARY_SECRET", "ESCAPED")
    case = cases[name]

    async def run():
        async with opened() as session:
            seen = [await session.run(code) for code in case["code"].split("\n# %%\n")]
            return seen, await session.run("21 * 2")

    seen, after = asyncio.run(run())
    assert seen[-1].status in ENDINGS[case["expect"]]
    assert not any("ESCAPED" in result.stdout + result.stderr for result in seen)
    assert (after.status, after.stdout) == ("ok", "42\n")


def test_the_flag_is_named_and_explained():
    with pytest.raises(InputError, match=r"your files.*--allow-unsafe-tools"):
        build_sandbox("unsafe", allow_unsafe=False)


def test_an_unknown_backend_is_answered_with_the_valid_names():
    with pytest.raises(InputError, match="'jail'.*unsafe"):
        build_sandbox("jail", allow_unsafe=True)


def test_closing_ends_the_process_its_children_and_its_folder():
    start = "import os, subprocess\np = subprocess.Popen(['sleep', '60'])\n"
    (result,) = results(start + "print(os.getpid(), p.pid, os.getcwd())")
    runner, grandchild, folder = result.stdout.split()
    assert wait_for(lambda: not alive(int(runner)) and not alive(int(grandchild)))
    assert not os.path.exists(folder)


def test_a_limit_ends_grandchildren_that_hold_the_pipes():
    code = (
        "import os, subprocess\np = subprocess.Popen(['sleep', '60'])\nprint(p.pid, flush=True)\n"
    )
    started = time.monotonic()
    (result,) = results(code + "os._exit(0)")
    assert result.status == "crash"
    assert "exit code 0" in result.stderr
    assert time.monotonic() - started < LIMITS.wall_s
    assert wait_for(lambda: not alive(int(result.stdout)))


def test_the_signal_that_killed_the_interpreter_is_named():
    (result,) = results("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert result.stderr == "the interpreter died (signal SIGSEGV)\n"


CALLER = """
import asyncio
from agent.sandbox import build_sandbox
from agent.sandbox.base import Limits
async def main():
    session = await build_sandbox("unsafe", allow_unsafe=True).open(Limits(cpu_s=60), 0)
    print((await session.run("import os; os.getpid()")).stdout, end="", flush=True)
    await session.run("while True: pass")
asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_the_callers_death_ends_a_running_child(repository, signal_number, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", CALLER],
        cwd=repository,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as caller:
        runner = int(caller.stdout.readline())
        assert alive(runner)
        caller.send_signal(signal_number)
        caller.wait()
    assert wait_for(lambda: not alive(runner))


def test_a_replay_that_differs_breaks_the_session_and_is_not_hidden():
    async def run():
        async with opened() as session:
            await session.run("import time\nx = time.time_ns()\nprint(x)")
            await (await session.branch()).run("x")

    with pytest.raises(SandboxError, match="cell 1 gave another result"):
        asyncio.run(run())


def test_addresses_may_differ_in_a_replay():
    async def run():
        async with opened() as session:
            first = await session.run("class A: pass\na = A()\na")
            return first, await (await session.branch()).run("1")

    first, after = asyncio.run(run())
    assert " object at 0x" in first.stdout
    assert after.stdout == "1\n"


def test_numpy_is_seeded_whenever_it_is_imported():
    code = "import numpy as np\nprint(np.random.rand(3), np.random.__spec__.loader.name)"
    first, again = results(code)[0], results("1", code)[1]
    assert first.status == "ok"
    assert first.stdout == again.stdout


def test_a_recursion_limit_the_code_raised_stays_raised():
    *_, last = results("import sys; sys.setrecursionlimit(5000)", "sys.getrecursionlimit()")
    assert last.stdout == "5000\n"


def test_more_cells_than_slots_take_turns_without_false_time_outs():
    limits = Limits(cpu_s=2, wall_s=20)

    async def run():
        sandbox = build_sandbox("unsafe", allow_unsafe=True)
        sessions = [await sandbox.open(limits, n) for n in range(8)]
        code = "import time\nwhile time.process_time() < 0.3: pass\n'done'"
        done = await asyncio.gather(*(session.run(code) for session in sessions))
        await sandbox.close()
        return done

    assert {result.stdout for result in asyncio.run(run())} == {"'done'\n"}


def test_one_sandbox_serves_one_event_loop_after_another():
    sandbox = build_sandbox("unsafe", allow_unsafe=True)

    async def both():
        sessions = [await sandbox.open(LIMITS, n) for n in range(4)]
        done = await asyncio.gather(*(session.run("1 + 1") for session in sessions))
        for session in sessions:
            await session.close()
        return [result.stdout for result in done]

    assert asyncio.run(both()) == asyncio.run(both()) == ["2\n"] * 4


def test_a_session_moves_from_thread_to_thread():
    sandbox = build_sandbox("unsafe", allow_unsafe=True)
    session = asyncio.run(sandbox.open(LIMITS, 0))
    seen = []
    for code in ("x = 1", "x += 1", "x"):
        thread = threading.Thread(target=lambda c=code: seen.append(asyncio.run(session.run(c))))
        thread.start()
        thread.join()
        time.sleep(0.05)  # the kernel may kill a child when the thread that started it ends
    asyncio.run(sandbox.close())
    assert [(result.node, result.stdout) for result in seen] == [(1, ""), (2, ""), (3, "2\n")]


def test_running_out_of_descriptors_breaks_the_session_and_leaks_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def run():
        async with opened() as session:
            before = len(os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (before + 3, limits[1]))
            try:
                with pytest.raises(SandboxError, match="cannot start the runner"):
                    await session.run("1")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            after = len(os.listdir("/proc/self/fd"))
            return before, after, await session.run("1")

    before, after, result = asyncio.run(run())
    assert before == after
    assert result.stdout == "1\n"
    assert not list(tmp_path.iterdir())


def test_a_closed_session_runs_nothing():
    async def run():
        async with opened() as session:
            await session.close()
            await session.run("1")

    with pytest.raises(SandboxError, match="closed"):
        asyncio.run(run())
