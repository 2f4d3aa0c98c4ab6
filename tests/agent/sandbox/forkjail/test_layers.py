"""Each layer alone, in a process that has none of the others, does what it is there for."""

import json
import subprocess
import sys
import textwrap

import pytest

from agent.sandbox.forkjail import landlock
from agent.sandbox.forkjail.doctor import probe

PRELUDE = """
import ctypes, json, os, resource, socket, sys, tempfile
from agent.sandbox.forkjail import landlock, namespaces, seccomp
from agent.sandbox.forkjail.syscalls import LIBC, PR_SET_NO_NEW_PRIVS, prctl, this_machine
def tried(attempt):
    try:
        attempt()
    except OSError as error:
        return error.errno
    return 0
"""


def alone(code, *arguments):
    """Run code in a process of its own and return what it prints as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.skipif(landlock.abi() == 0, reason="this kernel has no Landlock")
def test_landlock_alone_hides_files_and_lets_the_scratch_folder_be_written(tmp_path):
    (tmp_path / "secret").write_text("x")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = alone(
        """
        folder, scratch = sys.argv[1:]
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        landlock.restrict(read=[os.path.dirname(os.__file__)], write=[scratch])
        print(json.dumps([
            tried(lambda: open(folder + "/secret")),
            tried(lambda: open(folder + "/new", "w")),
            tried(lambda: os.listdir(folder)),
            tried(lambda: open(os.__file__)),
            tried(lambda: open(os.__file__, "a")),
            tried(lambda: open(scratch + "/f", "w")),
            tried(lambda: os.mkfifo(scratch + "/pipe")),
        ]))
        """,
        tmp_path,
        scratch,
    )
    assert found == [13, 13, 13, 0, 13, 0, 13]


@pytest.mark.skipif(landlock.abi() < 4, reason="this kernel's Landlock has no network rules")
def test_landlock_alone_refuses_connections():
    found = alone(
        """
        server = socket.create_server(("127.0.0.1", 0))
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        landlock.restrict(read=["/"], write=[])
        connect = lambda: socket.create_connection(server.getsockname())
        print(json.dumps([tried(connect), tried(lambda: socket.create_server(("127.0.0.1", 0)))]))
        """
    )
    assert found == [13, 13]


def test_seccomp_alone_refuses_sockets_programs_signals_and_forks():
    found = alone(
        """
        import threading
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        gate = seccomp.install(seccomp.build_filter(this_machine(), own_files=True))
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        with open(os.devnull) as file:
            opened = file.fileno() > 0
        print(json.dumps([
            tried(lambda: socket.socket()),
            tried(lambda: os.execv("/bin/true", ["true"])),
            tried(lambda: os.kill(os.getppid(), 0)),
            tried(lambda: os.fork()),
            tried(lambda: os.memfd_create("x")),
            tried(lambda: os.setuid(0)),
            opened,
        ]))
        """
    )
    assert found == [1, 1, 1, 1, 38, 38, True]


def test_the_gate_refuses_a_snapshot_that_nobody_granted():
    found = alone(
        """
        from agent.sandbox.forkjail.gate import answer
        from agent.sandbox.forkjail.syscalls import CONDITIONAL, numbers, syscall
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        ready, go = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            gate = seccomp.install(seccomp.build_filter(this_machine(), own_files=True))
            os.write(ready[1], str(gate).encode())
            os.read(go[0], 1)
            clone = numbers(CONDITIONAL, this_machine())["clone"]
            result = LIBC.syscall(clone, seccomp.SNAPSHOT_FLAGS, 0, 0, 0, 0)
            os._exit(ctypes.get_errno() if result < 0 else 99)
        gate = int(os.read(ready[0], 16))
        listener = syscall("pidfd_getfd", os.pidfd_open(child), gate, 0)
        os.write(go[1], b"x")
        answered = answer(listener, set())
        _, status = os.waitpid(child, 0)
        print(json.dumps([answered, os.waitstatus_to_exitcode(status)]))
        """
    )
    assert found == [True, 1]


def test_namespaces_alone_hide_files_processes_and_the_network(tmp_path):
    finding = probe("A")
    if not finding.usable:
        pytest.skip(f"no namespaces here: {finding.reason}")
    (tmp_path / "secret").write_text("x")
    found = alone(
        """
        from agent.sandbox.forkjail.process import SANDBOX_UID, visible_paths
        server = socket.create_server(("127.0.0.1", 0))
        before = os.getpid()
        namespaces.enter_zygote_jail(visible_paths(), SANDBOX_UID)
        print(json.dumps([
            tried(lambda: open(sys.argv[1] + "/secret")),
            tried(lambda: open("/etc/passwd")),
            tried(lambda: open("/new", "w")),
            tried(lambda: open(os.__file__, "a")) != 0,
            tried(lambda: socket.create_connection(server.getsockname(), timeout=2)),
            tried(lambda: open(os.__file__)),
            socket.gethostname(),
        ]))
        """,
        tmp_path,
    )
    assert found == [2, 2, 30, True, 101, 0, "sandbox"]


def test_limits_alone_bound_memory_files_and_time():
    found = alone(
        """
        import signal
        namespaces.limit_resources(
            memory_bytes=512 * 2**20, cpu_s=1, file_bytes=1000, processes=None
        )
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            block = bytearray(2**30)
        except MemoryError:
            block = None
        with tempfile.TemporaryFile() as file:
            written = [os.write(file.fileno(), b"x" * 2000)]
            written.append(tried(lambda: os.write(file.fileno(), b"x")))
        child = os.fork()
        if child == 0:
            while True:
                pass
        _, status = os.waitpid(child, 0)
        print(json.dumps([block is None, written, os.waitstatus_to_exitcode(status)]))
        """
    )
    assert found == [True, [1000, 27], -24]


def test_capabilities_are_gone_for_good():
    found = alone(
        """
        namespaces.drop_capabilities()
        lines = open("/proc/self/status").read().splitlines()
        print(json.dumps([int(l.split()[1], 16) for l in lines if l[:6] in ("CapEff", "CapPrm")]))
        """
    )
    assert found == [0, 0]
