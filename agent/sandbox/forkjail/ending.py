"""How a cell ended: what is the code's doing, what a limit's, and what the machine's."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from agent.sandbox.base import Limits, Source, Status
from agent.sandbox.forkjail.client import Ended


def killed_from_outside(ended: Ended, limits: Limits) -> bool:
    """Tell whether neither the code nor a limit can have ended a cell.

    Code cannot send itself SIGKILL, and what dies before its code has begun died of the machine.
    """
    frame = ended.frame
    if frame["t"] != "exit" or ended.cut or frame["why"]:
        return False
    return not frame["started"] or (
        frame["code"] == -signal.SIGKILL and frame["cpu"] < limits.cpu_s
    )


@dataclass(frozen=True, slots=True)
class Ran:
    """A cell's end as the history compares it."""

    ended: Ended

    @property
    def status(self) -> str:
        """``ok`` or ``error``, or what killed it."""
        return str(self.ended.cut or self.ended.frame.get("status", "killed"))

    @property
    def error(self) -> str | None:
        """Name of the exception."""
        error = self.ended.frame.get("error")
        return None if error is None else str(error)

    @property
    def stdout(self) -> str:
        """What it printed."""
        return self.ended.stdout


def verdict(ended: Ended, limits: Limits) -> tuple[Status, Source, str | None]:
    """Turn a report into a status, who says so, and the error's name."""
    frame = ended.frame
    if frame["t"] == "done" and not ended.cut:
        status: Status = "ok" if frame["status"] == "ok" else "error"
        return status, "runner", None if frame["error"] is None else str(frame["error"])
    if ended.cut == "output":
        return "output_limit", "kernel", "output_limit"
    out_of_time = (
        ended.cut == "wall"
        or frame["why"] == "cpu"
        or frame["code"] == -signal.SIGXCPU
        or (frame["code"] == -signal.SIGKILL and frame["cpu"] >= limits.cpu_s)
    )
    return ("timeout", "kernel", "timeout") if out_of_time else ("crash", "kernel", "crash")


def cause(ended: Ended, status: Status, limits: Limits) -> str:
    """Say what a crash was."""
    if status != "crash":
        return ""
    frame = ended.frame
    if frame["why"] == "quota":
        return f"stopped: more than {limits.scratch_mb} MiB of files\n"
    if frame["code"] >= 0:
        return f"the interpreter died (exit code {frame['code']})\n"
    return f"the interpreter died (signal {signal.Signals(-frame['code']).name})\n"
