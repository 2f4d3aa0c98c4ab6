"""The sandboxfusion backend against a real server on loopback, sound and failing."""

import ast
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

import agent.sandbox.sandboxfusion as sandboxfusion
from agent.sandbox import build_sandbox
from agent.sandbox.base import Limits, ReplayDiverged, SandboxError
from agent.sandbox.fusion_program import MARK
from agent.sandbox.fusion_reply import Unavailable, outcome_of, read_reply
from agent.sandbox.sandboxfusion import SandboxFusionSandbox
from tests.agent.sandbox.fusion_server import FusionServer
from trajectory.errors import InputError

LIMITS = Limits(cpu_s=0.6, wall_s=20, memory_mb=512, output_chars=400, file_mb=1)


@pytest.fixture
def server():
    with FusionServer() as running:
        yield running


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(sandboxfusion, "RETRY_PAUSES", (0.01, 0.02))


@asynccontextmanager
async def opened(url, limits=LIMITS, **settings):
    sandbox = SandboxFusionSandbox(url, **settings)
    try:
        yield await sandbox.open(limits, 0)
    finally:
        await sandbox.close()


def results(url, *codes, limits=LIMITS, **settings):
    async def run():
        async with opened(url, limits, **settings) as session:
            return [await session.run(code) for code in codes]

    return asyncio.run(run())


@pytest.mark.parametrize(
    "url",
    ["", "HOST:80", "ftp://host", "http://", "http://host:x", "http://h/?q=1", "http://me:pw@h"],
)
def test_what_is_no_address_is_refused_with_the_form(url):
    with pytest.raises(InputError, match="sandboxfusion:http://HOST:PORT"):
        build_sandbox(f"sandboxfusion:{url}", allow_unsafe=False)


def test_the_name_alone_is_refused_with_the_form():
    with pytest.raises(InputError, match="sandboxfusion:http://HOST:PORT"):
        build_sandbox("sandboxfusion", allow_unsafe=False)


def test_the_valid_names_show_that_an_address_is_needed():
    with pytest.raises(InputError, match="sandboxfusion:URL"):
        build_sandbox("fusion", allow_unsafe=True)


def test_a_path_before_the_servers_own_is_kept(server):
    with pytest.raises(SandboxError, match=r"/prefix/run_code answered with HTTP status 404"):
        results(f"{server.url}/prefix/", "1")


def test_more_output_than_the_server_carries_is_refused(server):
    with pytest.raises(InputError, match="at most 16000 characters"):
        results(server.url, "1", limits=replace(LIMITS, output_chars=20_000))


def test_every_run_sends_the_cells_before_it(server):
    shown = results(server.url, "x = 1", "x += 1", "print(x)")[-1].stdout
    assert shown == "2\n"
    assert len(server.requests) == 3
    assert {"language": "python"}.items() <= server.requests[-1].items()
    assert set(server.requests[-1]) == {"code", "language", "run_timeout", "files"}


def test_output_beyond_the_servers_pipe_is_no_time_out():
    with FusionServer(reads_while_waiting=False) as old:
        limits = replace(LIMITS, output_chars=16_000)
        first, second = results(old.url, "print('é' * 400_000)", "'next'", limits=limits)
    assert (first.status, second.stdout) == ("ok", "'next'\n")
    assert first.stdout.startswith("é" * 8000 + "\n... [384001 characters cut] ...\n")


def test_the_signal_that_killed_the_interpreter_is_named(server):
    code = "print('before')\nimport os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    (result,) = results(server.url, code)
    assert (result.status, result.source, result.stdout) == ("crash", "kernel", "before\n")
    assert result.stderr == "the interpreter died (signal SIGSEGV)\n"


def test_code_that_ends_the_program_too_is_a_crash(server):
    ending = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
    _, died, after = results(server.url, "x = 1", f"x = 2\n{ending}", "x")
    assert (died.status, died.node, after.stdout) == ("crash", 1, "1\n")


def test_code_that_ignores_its_alarms_is_stopped(server):
    code = (
        "from signal import SIG_IGN, SIGALRM, SIGPROF, SIGXCPU, signal\n"
        "for s in (SIGALRM, SIGPROF, SIGXCPU): signal(s, SIG_IGN)\n"
    )
    (busy,) = results(server.url, code + "while True: pass")
    assert (busy.status, busy.source) == ("timeout", "kernel")
    asleep = code + "import time; time.sleep(60)"
    (result,) = results(server.url, asleep, limits=replace(LIMITS, wall_s=0.5))
    assert (result.status, result.source) == ("timeout", "kernel")


def test_processes_the_code_leaves_behind_are_ended(server):
    code = "import subprocess\np = subprocess.Popen(['sleep', '60'])\nprint(p.pid)"
    (result,) = results(server.url, code)
    end = time.monotonic() + 10
    while alive(int(result.stdout)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(int(result.stdout))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_files_the_code_puts_over_the_programs_own_change_nothing(server):
    code = (
        "import os\nfor name in ('output.py', 'runner.py', 'request.json'):\n"
        "    open(os.path.join('..', name), 'w').write('raise SystemExit(1)')"
    )
    first, second = results(server.url, code, "21 * 2")
    assert (first.status, second.stdout) == ("ok", "42\n")


def test_a_forged_report_is_only_a_lie_about_the_codes_own_result(server):
    forged = json.dumps({"ready": True, "notes": "x"})
    code = f"import os\nos.write(1, b'\\n{MARK}{forged}\\n')\n1 / 0"
    (result,) = results(server.url, code)
    assert (result.status, result.error) == ("error", "ZeroDivisionError")


def test_a_cell_that_differs_when_repeated_breaks_the_session(server):
    with pytest.raises(ReplayDiverged, match="cell 1 gave another result"):
        results(server.url, "import time\nprint(time.time_ns())", "1")


def test_numpy_and_hashes_are_seeded(server):
    code = "import numpy as np\nprint(np.random.rand(2), hash('a'), {'a', 'b', 'c'})"
    first, second = results(server.url, code)[0], results(server.url, "0", code)[1]
    assert first.status == "ok"
    assert first.stdout == second.stdout


def test_an_address_may_differ_when_repeated(server):
    codes = ("class A: pass\na = A()\na", "1")
    assert results(server.url, *codes)[-1].status == "ok"


def test_few_requests_run_at_the_same_time(server):
    async def run():
        sandbox = SandboxFusionSandbox(server.url, max_running=2)
        sessions = [await sandbox.open(LIMITS, n) for n in range(6)]
        most = 0

        async def watch():
            nonlocal most
            while True:
                most = max(most, len(server.running))
                await asyncio.sleep(0.005)

        watcher = asyncio.create_task(watch())
        done = await asyncio.gather(*(session.run("1") for session in sessions))
        watcher.cancel()
        await sandbox.close()
        return most, {result.stdout for result in done}

    most, seen = asyncio.run(run())
    assert most == 2
    assert seen == {"1\n"}


@pytest.mark.parametrize(
    "fault",
    [500, 503, 429, "reset", "truncated", {"status": "SandboxError", "message": "no disk"}],
)
def test_a_failure_that_passes_is_not_seen(server, fault):
    server.faults += [fault, fault]
    assert results(server.url, "x = 1", "x")[-1].stdout == "1\n"
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, "HTTP status 500"),
        ("reset", "could not be reached"),
        ("truncated", "could not be reached"),
        ({"status": "SandboxError", "message": "no disk"}, "failed: no disk"),
    ],
)
def test_a_failure_that_stays_breaks_the_sandbox_and_not_the_session(server, fault, message):
    async def run():
        async with opened(server.url) as session:
            await session.run("x = 1")
            server.faults += [fault] * 3
            with pytest.raises(SandboxError, match=message):
                await session.run("x = 2")
            return await session.run("x")

    assert asyncio.run(run()).stdout == "1\n"
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (404, "HTTP status 404"),
        (422, "HTTP status 422"),
        ({"detail": "x"}, "did not answer as a SandboxFusion server"),
        ({"status": "Success", "message": ""}, "without a run_result"),
    ],
)
def test_a_failure_that_cannot_pass_is_not_tried_again(server, fault, message):
    server.faults.append(fault)
    with pytest.raises(SandboxError, match=message):
        results(server.url, "1")
    assert len(server.requests) == 1


def test_another_kind_of_server_is_a_broken_sandbox(server):
    server.faults += ["html"] * 3
    with pytest.raises(SandboxError, match="not JSON"):
        results(server.url, "1")


def test_a_late_reply_breaks_the_sandbox_and_is_not_waited_for_again(server, monkeypatch):
    monkeypatch.setattr(sandboxfusion, "MARGIN_SECONDS", -5.0)
    server.faults.append("hang")
    started = time.monotonic()
    with pytest.raises(SandboxError, match="no reply within 0.7 s"):
        results(server.url, "1", limits=replace(LIMITS, wall_s=0.5), queue_s=0.2)
    assert time.monotonic() - started < 10
    assert len(server.requests) == 1


def test_a_program_the_server_stops_is_a_time_out(server, monkeypatch):
    monkeypatch.setattr(sandboxfusion, "MARGIN_SECONDS", -5.0)
    code = "import signal, time; signal.alarm(0); signal.setitimer(signal.ITIMER_REAL, 0)\n"
    limits = replace(LIMITS, wall_s=3)
    (result,) = results(server.url, code + "time.sleep(60)", limits=limits)
    assert (result.status, result.source, result.wall_s) == ("timeout", "kernel", 3)


def test_a_refused_connection_is_a_broken_sandbox():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(SandboxError, match="could not be reached"):
        results(url, "1")


def test_a_server_without_encryption_is_not_talked_to_over_https(server):
    with pytest.raises(SandboxError, match="could not be reached"):
        results(server.url.replace("http:", "https:"), "1")
    assert server.requests == []


def test_a_server_killed_during_a_request_is_a_broken_sandbox(repository):
    command = [sys.executable, "-m", "tests.agent.sandbox.fusion_server"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        url = process.stdout.readline().decode().strip()

        async def run():
            async with opened(url) as session:
                assert (await session.run("x = 1")).status == "ok"
                cell = asyncio.create_task(session.run("import time; time.sleep(3)"))
                await asyncio.sleep(1)
                process.kill()
                with pytest.raises(SandboxError, match="could not be reached"):
                    await cell

        try:
            asyncio.run(run())
        finally:
            process.kill()


def test_a_server_whose_python_cannot_run_the_program_is_a_broken_sandbox():
    run = {"status": "Finished", "return_code": 1, "stdout": "", "stderr": "SyntaxError: x"}
    reply = {"status": "Failed", "message": "", "run_result": run}
    with pytest.raises(SandboxError, match="cannot run the program: SyntaxError: x"):
        read_reply(reply, "http://h/run_code")


def test_a_command_that_the_server_could_not_start_may_be_tried_again():
    run = {"status": "Error", "stderr": "no such file"}
    with pytest.raises(Unavailable):
        read_reply({"status": "SandboxError", "message": "m", "run_result": run}, "u")


@pytest.mark.parametrize("name", ["fusion_program.py", *sandboxfusion.SENT])
def test_what_is_sent_has_the_syntax_of_python_3_8(name, repository):
    source = (repository / "agent/sandbox" / name).read_text()
    assert ast.parse(source, feature_version=(3, 8)).body
    with pytest.raises(SyntaxError):  # the check can fail: this is newer
        ast.parse(source + "\nmatch 1:\n    case 1: pass\n", feature_version=(3, 8))


def test_a_death_is_measured_from_the_end_of_the_repeated_cells():
    note = {"status": "ok", "error": None, "digest": "d", "cpu_s": 0.25, "wall_s": 1.0}
    report = {
        "ready": True,
        "notes": [note, note],
        "exit_code": 3,
        "signal": None,
        "overdue": False,
        "cpu_s": 0.75,
        "wall_s": 2.5,
        "printed_bytes": 0,
        "stdout": "",
        "stderr": "",
    }
    outcome = outcome_of(report, 2, LIMITS)
    assert (outcome.status, outcome.cpu_s, outcome.wall_s) == ("crash", 0.25, 0.5)
    assert outcome.stderr == "the interpreter died (exit code 3)\n"
