import signal

import pytest

from agent.sandbox.base import Limits
from agent.sandbox.forkjail.client import Ended
from agent.sandbox.forkjail.ending import cause, killed_from_outside, verdict

LIMITS = Limits(cpu_s=2.0, scratch_mb=4)


def ended(*, cut="", **frame):
    whole = {"t": "exit", "code": 0, "why": "", "started": True, "cpu": 0.1, **frame}
    return Ended(frame=whole, cut=cut, stdout="", stderr="", wall_s=1.0)


@pytest.mark.parametrize(
    ("end", "status", "text"),
    [
        (ended(t="done", status="ok", error=None), "ok", ""),
        (ended(t="done", status="error", error="KeyError"), "error", ""),
        (ended(code=-signal.SIGKILL, cut="wall"), "timeout", ""),
        (ended(code=-signal.SIGKILL, cut="output"), "output_limit", ""),
        (ended(code=-signal.SIGKILL, why="cpu"), "timeout", ""),
        (ended(code=-signal.SIGXCPU), "timeout", ""),
        (ended(code=-signal.SIGKILL, cpu=2.5), "timeout", ""),
        (ended(code=3), "crash", "the interpreter died (exit code 3)\n"),
        (ended(code=-signal.SIGSEGV), "crash", "the interpreter died (signal SIGSEGV)\n"),
        (
            ended(code=-signal.SIGKILL, why="left"),
            "crash",
            "the interpreter died (signal SIGKILL)\n",
        ),
        (ended(code=-signal.SIGKILL, why="quota"), "crash", "stopped: more than 4 MiB of files\n"),
    ],
)
def test_an_ending_is_named_after_what_brought_it_about(end, status, text):
    found, source, error = verdict(end, LIMITS)
    assert found == status
    assert source == ("runner" if status in ("ok", "error") else "kernel")
    assert error == {"ok": None, "error": "KeyError"}.get(status, status)
    assert cause(end, found, LIMITS) == text
    assert not killed_from_outside(end, LIMITS)


@pytest.mark.parametrize(
    "end", [ended(code=-signal.SIGKILL), ended(code=120, started=False), ended(started=False)]
)
def test_what_neither_code_nor_limit_can_do_is_the_machines(end):
    assert killed_from_outside(end, LIMITS)
