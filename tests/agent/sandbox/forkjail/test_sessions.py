"""Which state is gone on from by fork, which by replay, and what is never shared."""

import asyncio
import os
import resource
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from agent.processes import descendants
from agent.sandbox.base import ReplayDiverged, SandboxError
from agent.sandbox.forkjail import client
from agent.sandbox.forkjail.sandbox import FELL_BACK
from tests.agent.sandbox.forkjail.conftest import LIMITS

THREAD_BOMB = """
from threading import Thread
import time
n = 0
try:
    while n < 200:
        Thread(target=time.sleep, args=(60,), daemon=True).start()
        n += 1
except RuntimeError:
    pass
n
"""


def parent(pid):
    """The parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid):
    """Whether a process runs, rather than waits for its parent to notice its end."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_branch_is_a_fork_in_the_same_box(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0)
        await session.run("x = 1")
        branch = await session.branch()
        results = [await session.run("x += 1\nx"), await branch.run("x += 10\nx")]
        return [r.stdout for r in results], branch._box is session._box

    assert play(scene) == (["2\n", "11\n"], True)


def test_any_number_of_branches_start_from_the_same_state(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0, retain="all")
        await session.run("x = 1")
        branches = [await session.branch(1) for _ in range(6)]
        seen = [(await b.run(f"x += {n}\nx")).stdout for n, b in enumerate(branches)]
        return seen, {b._box is session._box for b in branches}

    assert play(scene) == (["1\n", "2\n", "3\n", "4\n", "5\n", "6\n"], {True})


def test_branches_run_side_by_side(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0, retain="all")
        await session.run("import time")
        branches = [await session.branch(1) for _ in range(4)]
        began = time.monotonic()
        await asyncio.gather(*(b.run("time.sleep(1.5)") for b in branches))
        return time.monotonic() - began

    assert play(scene, max_running=4) < 5.5


def test_a_branch_that_writes_files_leaves_the_others_alone(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0, retain="all")
        await session.run("import os")
        first, second = await session.branch(), await session.branch()
        wrote = await first.run("_ = open('f', 'w').write('1')\nos.listdir()")
        other = await second.run("os.listdir()")
        here = await session.run("os.listdir()")
        again = await first.run("open('f').read()")
        boxes = {id(s._box) for s in (session, first, second)}
        return [r.stdout for r in (wrote, other, here, again)], len(boxes)

    seen, boxes = play(scene)
    assert seen == ["['f']\n", "[]\n", "[]\n", "'1'\n"]
    assert boxes >= 2


def test_an_earlier_state_does_not_see_later_files(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0, retain="all")
        await session.run("import os")
        await session.run("_ = open('f', 'w').write('1')")
        return [(await session.run("os.listdir()", at=node)).stdout for node in (1, 2, 0)]

    seen = play(scene)
    assert seen[:2] == ["[]\n", "['f']\n"]


def test_an_overwritten_file_is_as_old_as_the_state_that_reads_it(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0, retain="all")
        await session.run("_ = open('f', 'w').write('1')")
        await session.run("_ = open('f', 'r+').write('2')")
        return [(await session.run("open('f').read()", at=node)).stdout for node in (1, 2)]

    assert play(scene) == ["'1'\n", "'2'\n"]


def test_an_open_pipe_is_not_shared_by_branches(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0, retain="all")
        await session.run("import os\nr, w = os.pipe()\nos.write(w, b'abc')")
        branches = [await session.branch(1) for _ in range(3)]
        return [(await b.run("os.read(r, 2)")).stdout for b in branches]

    assert play(scene) == ["b'ab'\n"] * 3


def test_random_numbers_go_on_where_they_were(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 7, retain="all")
        await session.run("import random\nrandom.gauss(0, 1)")
        numbers = [(await session.run("random.gauss(0, 1), random.random()", at=1)).stdout]
        numbers += [
            (await (await session.branch(1)).run("random.gauss(0, 1), random.random()")).stdout
        ]
        whole = await sandbox.open(LIMITS, 7)
        await whole.run("import random\nrandom.gauss(0, 1)")
        numbers.append((await whole.run("random.gauss(0, 1), random.random()")).stdout)
        return numbers

    assert len(set(play(scene))) == 1


def test_only_the_states_that_are_retained_stay_alive(play):
    async def scene(sandbox):
        counts = {}
        for retain in ("last", "lru:3", "all"):
            session = await sandbox.open(LIMITS, 0, retain=retain)
            for number in range(6):
                await session.run(f"x = {number}")
            await asyncio.sleep(0.1)
            counts[retain] = len(session._alive)
            restored = await session.run("x", at=2)
            assert restored.stdout == "1\n"
            await session.close()
        return counts

    assert play(scene) == {"last": 1, "lru:3": 3, "all": 6}


def test_a_cell_that_cannot_be_replayed_is_named(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0)
        await session.run("import time\ntime.time_ns()")
        await session.run("1")
        await session.run("2", at=1)

    with pytest.raises(ReplayDiverged, match="cell 1 gave another result"):
        play(scene)


def test_a_state_that_hangs_in_its_fork_gives_way_to_the_one_before(play, monkeypatch):
    monkeypatch.setattr(client, "WAKE_S", 1.0)

    async def scene(sandbox):
        session = await sandbox.open(replace(LIMITS, cpu_s=20), 0)
        await session.run("x = 1")
        await session.run(
            "import os, time\nos.register_at_fork(before=lambda: time.sleep(99))\nx = 2"
        )
        return [await session.run("x"), await session.run("x + 1")]

    first, second = play(scene)
    assert (first.stdout, first.stderr) == ("1\n", FELL_BACK)
    assert (second.stdout, second.stderr) == ("2\n", "")


def test_a_snapshot_whose_clones_die_at_birth_gives_way_at_once(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0)
        await session.run("x = 1")
        await session.run("import os\nos.register_at_fork(after_in_child=lambda: os._exit(0))")
        began = time.monotonic()
        result = await session.run("x")
        return result.stdout, result.stderr, time.monotonic() - began

    stdout, stderr, seconds = play(scene)
    assert (stdout, stderr) == ("1\n", FELL_BACK)
    assert seconds < client.WAKE_S


def test_closing_a_session_ends_the_run_in_it(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0)
        await session.run("import time")
        running = asyncio.create_task(session.run("time.sleep(60)"))
        await asyncio.sleep(0.3)
        await session.close()
        with pytest.raises(SandboxError):
            await running
        for _ in range(200):  # a box takes a moment to go
            if not descendants(sandbox.pid):
                break
            await asyncio.sleep(0.1)
        return descendants(sandbox.pid), session._box

    assert play(scene) == ([], None)


def test_a_process_left_alone_by_a_thread_bomb_is_no_hindrance(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0)
        return await session.run(THREAD_BOMB), await session.run("n")

    bomb, after = play(scene)
    assert bomb.status == "ok"
    assert after.stdout == bomb.stdout


def test_a_killed_box_is_replaced_by_replay(play):
    async def scene(sandbox):
        session, other = await sandbox.open(LIMITS, 0), await sandbox.open(LIMITS, 0)
        await session.run("x = 41")
        await other.run("x = 1")
        running = asyncio.create_task(session.run("import time\ntime.sleep(1)\nx + 1"))
        neighbour = asyncio.create_task(other.run("time_passed = x\nx"))
        await asyncio.sleep(0.4)
        session._box.sock.shutdown(2)
        return (await running).stdout, (await neighbour).stdout, (await other.run("x + 1")).stdout

    assert play(scene) == ("42\n", "1\n", "2\n")


def test_a_box_that_hangs_is_replaced(play, monkeypatch):
    monkeypatch.setattr(client, "WAKE_S", 1.0)
    monkeypatch.setattr(client, "GRACE_S", 1.0)

    async def scene(sandbox):
        session, other = await sandbox.open(LIMITS, 0), await sandbox.open(LIMITS, 0)
        await session.run("x = 41")
        below = set(descendants(sandbox.pid))
        await other.run("x = 1")
        (box,) = [p for p in below if parent(p) == sandbox.pid]
        os.kill(box, signal.SIGSTOP)
        result, beside = await asyncio.gather(session.run("x + 1"), other.run("x"))
        return result.stdout, beside.stdout, [*descendants(sandbox.pid), sandbox.pid]

    result, beside, processes = play(scene)
    assert (result, beside) == ("42\n", "1\n")
    assert not [p for p in processes if os.path.exists(f"/proc/{p}")]


def test_a_cell_that_something_outside_kills_is_run_again(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0)
        await session.run("x = 41")
        before = set(descendants(sandbox.pid))
        running = asyncio.create_task(session.run("import time\ntime.sleep(1)\nx + 1"))
        cells = set()
        while not cells:
            await asyncio.sleep(0.05)
            cells = set(descendants(sandbox.pid)) - before
        for cell in cells:
            os.kill(cell, signal.SIGKILL)
        return await running

    result = play(scene)
    assert (result.status, result.stdout) == ("ok", "42\n")


def test_code_that_closes_its_connection_is_a_crash_of_the_code(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0)
        await session.run("x = 1")
        closed = await session.run("import os, time\nos.closerange(3, 64)\ntime.sleep(5)")
        return closed.status, (await session.run("x")).stdout

    assert play(scene) == ("crash", "1\n")


def test_a_killed_zygote_is_replaced(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0)
        await session.run("x = 41")
        before = sandbox.pid
        os.kill(before, signal.SIGKILL)
        while alive(before):  # it may answer until the signal has reached it
            await asyncio.sleep(0.01)
        result = await session.run("x + 1")
        return result.stdout, sandbox.pid != before

    assert play(scene) == ("42\n", True)


def test_no_descriptor_to_spare_is_a_broken_sandbox_and_passes(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0)
        await session.run("x = 1")
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.open(os.devnull, os.O_RDONLY)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, limits[1]))
        try:
            with pytest.raises(SandboxError, match="Too many open files"):
                await session.run("x")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            os.close(lowest)
        return (await session.run("x")).stdout

    assert play(scene) == "1\n"


def test_a_full_scratch_folder_is_the_codes_own_error(play):
    async def scene(sandbox):
        session = await sandbox.open(LIMITS, 0)
        await session.run("x = 1")
        filling = "for i in range(99): open(f'f{i}', 'wb').write(b'x' * 10**6)"
        return await session.run(filling), await session.run("x")

    filled, after = play(scene)
    assert (filled.status, filled.error) in {("error", "OSError"), ("crash", "crash")}
    assert after.stdout == "1\n"


def test_nothing_is_left_behind(play):
    fds = len(os.listdir("/proc/self/fd"))

    async def scene(sandbox):
        for number in range(5):
            session = await sandbox.open(replace(LIMITS, cpu_s=0.2), number, retain="all")
            for code in ("x = 1", "while True: pass", "import os; os._exit(1)", "x"):
                await session.run(code)
            await session.branch()
        return [sandbox.pid, *descendants(sandbox.pid)]

    processes = play(scene)
    assert len(processes) > 5
    assert not [p for p in processes if os.path.exists(f"/proc/{p}")]
    assert len(os.listdir("/proc/self/fd")) <= fds + 1


def test_sessions_that_are_closed_at_any_moment_leave_nothing_behind(play):
    """A box may be starting, cloning or about to report when nobody listens any more."""

    async def visit(sandbox, seconds, *, cancelled):
        session = await sandbox.open(LIMITS, 0)

        async def work():
            for code in ("open('f', 'w').write('x')", "print(1)", "while True: pass"):
                await session.run(code)

        working = asyncio.create_task(work())
        await asyncio.sleep(seconds)
        if cancelled:
            working.cancel()
        await session.close()
        await asyncio.gather(working, return_exceptions=True)

    async def scene(sandbox):
        for _ in range(2):
            visits = (visit(sandbox, n * 0.02, cancelled=n % 2 == 1) for n in range(10))
            await asyncio.gather(*visits)
        return [sandbox.pid, *descendants(sandbox.pid)]

    processes = play(scene, max_running=6)
    assert not [p for p in processes if os.path.exists(f"/proc/{p}")]
    assert not list(Path(tempfile.gettempdir()).glob(f"forkjail-{processes[0]}-*"))
