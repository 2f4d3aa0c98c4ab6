"""What this machine offers: makes a real box per tier and tries forbidden things in it.

Flags are not trusted: some systems let a process enter namespaces and then refuse the mounts. A
tier counts only if a box came up and every attempt inside it was refused.
"""

from __future__ import annotations

import asyncio
import os
import platform
import socket
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from agent.processes import CHILD_ENVIRONMENT
from agent.sandbox.base import Limits, SandboxError
from agent.sandbox.forkjail.sandbox import ForkjailSandbox
from agent.sandbox.forkjail.syscalls import MACHINES

TIERS: Mapping[str, bool] = {"A": True, "B": False}
"""Tier -> whether it has its own namespaces, strongest first."""
DESCRIPTION: Mapping[str, str] = {
    "A": "namespaces + Landlock where there is one + seccomp",
    "B": "Landlock + seccomp",
}
_LIMITS = Limits(cpu_s=5.0, wall_s=60.0)

# Each entry of `tries` must raise OSError; what does not is printed by name.
ATTEMPTS = """
import ctypes, os, resource, signal, socket, subprocess
libc = ctypes.CDLL(None, use_errno=True)
def no(result):
    if result < 0: raise OSError(ctypes.get_errno(), "refused")
def connect():
    s = socket.socket(); s.settimeout(2); s.connect(("127.0.0.1", {port}))
def environment():
    if not set({variables!r}) & set(os.environ): raise OSError("not there")
def more_memory():
    try: resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    except ValueError as error: raise OSError(error)
tries = {{
    "read a file of the caller": lambda: open({canary!r}).read(),
    "write into it": lambda: open({canary!r}, "r+"),
    "write a shared library": lambda: open(os.__file__, "a"),
    "read the list of users": lambda: open("/etc/passwd").read(),
    "list other processes": lambda: os.listdir("/proc"),
    "see the caller's environment": environment,
    "connect to the caller": connect,
    "make a socket": lambda: socket.socket(),
    "signal the caller": lambda: os.kill({pid}, 0),
    "fork": lambda: os.fork() or os._exit(0),
    "run a program": lambda: os.execv("/bin/sh", ["sh"]),
    "start a process": lambda: subprocess.Popen(["/bin/true"]),
    "mount": lambda: no(libc.mount(b"none", b"/scratch", b"tmpfs", 0, None)),
    "enter a user namespace": lambda: no(libc.unshare(0x10000000)),
    "trace": lambda: no(libc.ptrace(16, {pid}, 0, 0)),
    "become root": lambda: os.setuid(0) or open("/proc/1/environ").read(),
    "raise a limit": more_memory,
    "hold memory outside the limit": lambda: os.memfd_create("x"),
}}
for name, attempt in tries.items():
    try: attempt()
    except OSError: pass
    else: print("DONE", name)
try: open({canary!r} + ".new", "w").close()  # whether this arrives is seen from outside
except OSError: pass
print("TRIED", len(tries) + 1)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What came of a tier."""

    tier: str
    usable: bool
    reason: str
    """Why not; empty if usable."""
    tried: int
    """Forbidden things tried."""


def probe(tier: str) -> Finding:
    """Make a box of a tier and try forbidden things in it; takes about 0.2 s.

    May be called from any thread, whether or not it runs an event loop.
    """
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        system = f"{sys.platform} on {platform.machine()}"
        return Finding(tier=tier, usable=False, tried=0, reason=f"not made for {system}")
    found: list[Finding] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(_probe(tier))))
    thread.start()
    thread.join()
    return found[0]


async def _probe(tier: str) -> Finding:
    """Run the attempts."""
    sandbox = ForkjailSandbox(own_namespaces=TIERS[tier], max_running=1, preload=())
    server = socket.create_server(("127.0.0.1", 0))
    try:
        with tempfile.NamedTemporaryFile(prefix="sandbox-canary-") as canary:
            canary.write(b"canary")
            canary.flush()
            os.chmod(canary.name, 0o644)
            code = ATTEMPTS.format(
                port=server.getsockname()[1],
                variables=sorted(set(os.environ) - {*CHILD_ENVIRONMENT, "HOME", "TMPDIR"}),
                canary=canary.name,
                pid=os.getpid(),
            )
            session = await sandbox.open(_LIMITS, 0)
            result = await session.run(code)
            beside = Path(canary.name + ".new")
            arrived = beside.exists()
            beside.unlink(missing_ok=True)
    except SandboxError as error:
        return Finding(tier=tier, usable=False, tried=0, reason=str(error))
    finally:
        server.close()
        await sandbox.close()
    lines = result.stdout.splitlines()
    done = [line.removeprefix("DONE ") for line in lines if line.startswith("DONE ")]
    if result.status != "ok" or not lines or not lines[-1].startswith("TRIED "):
        said = [line for line in result.stderr.splitlines() if not line.startswith("the interp")]
        last = (said or [result.status])[-1]
        return Finding(tier=tier, usable=False, tried=0, reason=f"a first cell failed: {last}")
    if arrived:
        done.append("write outside its folder")
    tried = int(lines[-1].split()[1])
    reason = f"code in it could {', '.join(done)}" if done else ""
    return Finding(tier=tier, usable=not done, tried=tried, reason=reason)


@cache
def usable_tier() -> tuple[str | None, str]:
    """Return the strongest tier that holds here, or None, and why stronger ones do not.

    The answer is kept for the life of the process.
    """
    reasons: list[str] = []
    for tier in TIERS:
        finding = probe(tier)
        if finding.usable:
            return tier, "; ".join(reasons)
        reasons.append(f"{DESCRIPTION[tier]}: {finding.reason}")
    return None, "; ".join(reasons)
