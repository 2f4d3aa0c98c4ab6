"""What every sandbox backend must do."""

import asyncio
import os
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from agent.sandbox import SANDBOXES, SERVERS, build_sandbox
from agent.sandbox.base import Limits, SandboxError
from tests.agent.sandbox.fusion_server import FusionServer
from trajectory.errors import InputError

LIMITS = Limits(cpu_s=0.6, wall_s=30, memory_mb=512, output_chars=400, file_mb=1)
pytestmark = pytest.mark.parametrize("backend", sorted({*SANDBOXES, *SERVERS}), indirect=True)


@pytest.fixture(scope="module")
def fusion_url():
    with FusionServer() as server:
        yield server.url


@pytest.fixture
def backend(request):
    """The name to choose the backend with; those on a server get one."""
    if request.param in SERVERS:
        return f"{request.param}:{request.getfixturevalue('fusion_url')}"
    return request.param


@asynccontextmanager
async def opened(backend, *, seed=0, limits=LIMITS):
    sandbox = build_sandbox(backend, allow_unsafe=True)
    try:
        yield await sandbox.open(limits, seed)
    finally:
        await sandbox.close()


def needs(backend, *flags):
    """Skip the test where the backend says that it cannot do this."""
    capabilities = build_sandbox(backend, allow_unsafe=True).capabilities
    for flag in flags:
        if not getattr(capabilities, flag):
            pytest.skip(f"{backend}: capabilities.{flag} is False")


def results(backend, *codes, seed=0):
    async def run():
        async with opened(backend, seed=seed) as session:
            return [await session.run(code) for code in codes]

    return asyncio.run(run())


def test_the_backend_says_its_name_and_isolation(backend):
    sandbox = build_sandbox(backend, allow_unsafe=True)
    assert sandbox.name == backend.partition(":")[0]
    assert sandbox.isolation


def test_a_backend_without_isolation_needs_the_users_word(backend):
    if build_sandbox(backend, allow_unsafe=True).isolation == "none":
        with pytest.raises(InputError, match="--allow-unsafe-tools"):
            build_sandbox(backend, allow_unsafe=False)
    else:
        assert build_sandbox(backend, allow_unsafe=False).name == backend.partition(":")[0]


def test_state_lasts_from_run_to_run(backend):
    last = results(backend, "import math\ndef f(n): return math.comb(n, 2)", "k = 10", "f(k)")[-1]
    assert (last.node, last.status, last.stdout, last.error) == (3, "ok", "45\n", None)


def test_printed_text_and_the_last_value_are_captured(backend):
    (result,) = results(backend, "import sys\nprint('out')\nprint('err', file=sys.stderr)\n'v'")
    assert (result.stdout, result.stderr) == ("out\n'v'\n", "err\n")


def test_output_of_every_kind_is_captured(backend):
    needs(backend, "cpython")
    prints = "import os, sys\nprint('out')\nprint('err', file=sys.stderr)\n"
    (result,) = results(backend, prints + "_ = os.write(1, b'raw\\n')\n'v'")
    assert result.stdout == "out\nraw\n'v'\n"
    assert result.stderr == "err\n"


def test_an_exception_is_named_and_keeps_what_ran_before_it(backend):
    failed, after = results(backend, "a = 1\nraise ValueError('boom')", "a")
    assert (failed.status, failed.error, failed.node) == ("error", "ValueError", 1)
    assert failed.stderr.endswith("ValueError: boom\n")
    assert "<cell 1>" in failed.stderr
    assert after.stdout == "1\n"


@pytest.mark.parametrize(
    ("code", "status", "flags"),
    [
        ("while True: pass", "timeout", ()),
        (
            "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
            "timeout",
            (),
        ),
        ("import re; re.match(r'(a+)+$', 'a' * 64 + 'b')", "timeout", ("cpython",)),
        ("import os; os._exit(0)", "crash", ("cpython",)),
        ("while True: print('x' * 100_000)", "output_limit", ()),
    ],
)
def test_a_limit_takes_the_state_back(backend, code, status, flags):
    needs(backend, *flags)
    _, limited, after = results(backend, "x = [1]", f"x.append(2)\n{code}", "x")
    assert (limited.status, limited.error, limited.node) == (status, status, 1)
    assert (after.node, after.stdout) == (2, "[1]\n")
    assert limited.wall_s < 30


def test_sleeping_code_meets_the_wall_clock(backend):
    async def run():
        async with opened(backend, limits=replace(LIMITS, wall_s=1.5)) as session:
            return await session.run("import time; time.sleep(60)")

    result = asyncio.run(run())
    assert result.status == "timeout"
    assert result.cpu_s < 0.6
    assert 1.5 <= result.wall_s < 30


def test_output_before_a_limit_is_shown(backend):
    (result,) = results(backend, "print('step 1')\nwhile True: pass")
    assert result.stdout == "step 1\n"


def test_long_output_is_cut_with_a_count(backend):
    (result,) = results(backend, "print('a' * 100_000)")
    assert result.status == "ok"
    assert result.stdout.startswith("a" * 200 + "\n... [99601 characters cut] ...\na")


def test_files_are_private_limited_and_last(backend):
    needs(backend, "files")
    first, second, third = results(
        backend,
        "open('note.txt', 'w').write('42')",
        "open('note.txt').read()",
        "open('big', 'wb').write(b'x' * 2**21)",
    )
    assert (first.stdout, second.stdout) == ("2\n", "'42'\n")
    assert third.status == "error" or third.stdout != f"{2**21}\n"


def test_the_environment_is_empty_of_the_callers(backend, monkeypatch):
    needs(backend, "cpython")
    monkeypatch.setenv("SECRET_CANARY", "1")
    code = "import os\nprint([k for k in os.environ if 'CANARY' in k], os.path.expanduser('~'))"
    (result,) = results(backend, code)
    assert result.stdout.startswith("[] ")
    assert result.stdout.split()[1] != os.path.expanduser("~")


def test_input_is_at_its_end(backend):
    needs(backend, "cpython")
    (result,) = results(backend, "input('who? ')")
    assert result.error == "EOFError"


def test_a_run_can_start_from_an_earlier_node(backend):
    async def run():
        async with opened(backend) as session:
            for code in ("x = 1", "x += 10", "x += 100"):
                await session.run(code)
            early = await session.run("x", at=1)
            latest = await session.run("x")
            return early, latest, await session.run("x", at=3)

    early, latest, late = asyncio.run(run())
    assert [early.stdout, latest.stdout, late.stdout] == ["1\n", "1\n", "111\n"]
    assert [early.node, latest.node, late.node] == [4, 5, 6]


def test_a_missing_node_is_refused(backend):
    async def run():
        async with opened(backend) as session:
            await session.run("1", at=7)

    with pytest.raises(ValueError, match="no node 7"):
        asyncio.run(run())


def test_a_branch_equals_replaying_the_codes(backend):
    codes = ["import random\nx = [random.random()]", "x.append(random.random())", "1/0"]
    probe = "print(x, random.random(), list({'a', 'b', 'c'}), hash('seed'))"

    async def run():
        async with opened(backend, seed=3) as session:
            for code in codes:
                await session.run(code)
            branch = await session.branch()
            early = await session.branch(1)
            return [(await s.run(probe)).stdout for s in (session, branch)] + [
                (await early.run("len(x)")).stdout
            ]

    here, branched, early = asyncio.run(run())
    replayed = results(backend, *codes, probe, seed=3)[-1].stdout
    assert here == branched == replayed
    assert early == "1\n"


def test_branches_share_nothing(backend):
    async def run():
        async with opened(backend) as session:
            await session.run("x = [0]")
            branches = [await session.branch() for _ in range(2)]
            for number, branch in enumerate(branches):
                await branch.run(f"x.append({number})")
            return [(await s.run("x")).stdout for s in (session, *branches)]

    assert asyncio.run(run()) == ["[0]\n", "[0, 0]\n", "[0, 1]\n"]


def test_branches_share_no_files(backend):
    needs(backend, "files")

    async def run():
        async with opened(backend) as session:
            await session.run("open('f', 'w').write('0')")
            branches = [await session.branch() for _ in range(2)]
            for number, branch in enumerate(branches):
                await branch.run(f"open('f', 'a').write('{number}')")
            return [(await s.run("open('f').read()")).stdout for s in (session, *branches)]

    assert asyncio.run(run()) == ["'0'\n", "'00'\n", "'01'\n"]


def test_sessions_share_no_variables(backend):
    async def run():
        sandbox = build_sandbox(backend, allow_unsafe=True)
        first, second = await sandbox.open(LIMITS, 0), await sandbox.open(LIMITS, 0)
        await first.run("x = 1")
        seen = await second.run("x")
        await sandbox.close()
        return seen

    assert asyncio.run(run()).error == "NameError"


def test_sessions_share_nothing(backend):
    needs(backend, "cpython", "files")

    async def run():
        sandbox = build_sandbox(backend, allow_unsafe=True)
        first, second = await sandbox.open(LIMITS, 0), await sandbox.open(LIMITS, 0)
        await first.run("x = 1; open('f', 'w').write('1')")
        seen = await second.run("import os\nprint('x' in globals(), os.listdir())")
        await sandbox.close()
        return seen

    assert asyncio.run(run()).stdout == "False []\n"


def test_the_seed_fixes_random_numbers(backend):
    probe = "import random\nrandom.random()"
    first, again, other = (results(backend, probe, seed=s)[0].stdout for s in (5, 5, 6))
    assert first == again != other


def test_other_coroutines_go_on_while_code_runs(backend):
    async def run():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        async with opened(backend) as session:
            await session.run("1")
            ticker = asyncio.create_task(tick())
            await session.run("import time; time.sleep(0.5)")
            ticker.cancel()
        return ticks

    assert asyncio.run(run()) >= 10


def test_a_cancelled_run_leaves_a_usable_session(backend):
    async def run():
        async with opened(backend) as session:
            await session.run("x = 1")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(session.run("x = 2; import time; time.sleep(30)"), 0.3)
            return await session.run("x")

    assert asyncio.run(run()).stdout == "1\n"


def test_runs_of_one_session_take_turns(backend):
    async def run():
        async with opened(backend) as session:
            await session.run("x = []")
            await asyncio.gather(*(session.run(f"x.append({n})") for n in range(5)))
            return await session.run("sorted(x)")

    assert asyncio.run(run()).stdout == "[0, 1, 2, 3, 4]\n"


def test_closing_twice_is_allowed(backend):
    async def run():
        async with opened(backend) as session:
            await session.run("1")
            await session.close()
            await session.close()
            with pytest.raises(SandboxError, match="closed"):
                await session.run("1")

    asyncio.run(run())


def test_too_much_memory_is_an_exception_that_keeps_the_state(backend):
    _, failed, after = results(backend, "x = [1]", "x.append(2)\na = 'a' * 10**10", "x")
    assert (failed.status, failed.error, failed.source) == ("error", "MemoryError", "runner")
    assert after.stdout == "[1, 2]\n"


def test_a_limit_is_the_kernels_word(backend):
    _, limited = results(backend, "1", "while True: pass")
    assert (limited.status, limited.source) == ("timeout", "kernel")


def test_an_unknown_retention_is_refused_with_the_valid_ones(backend):
    async def run():
        sandbox = build_sandbox(backend, allow_unsafe=True)
        try:
            await sandbox.open(LIMITS, 0, retain="some")
        finally:
            await sandbox.close()

    with pytest.raises(InputError, match="valid: last, all, lru:N"):
        asyncio.run(run())
