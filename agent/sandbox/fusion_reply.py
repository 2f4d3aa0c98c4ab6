"""What a SandboxFusion server's reply says about a cell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

from agent.sandbox.base import Limits, ReplayDiverged, SandboxError, Status
from agent.sandbox.child import MAX_OUTPUT_BYTES, Outcome
from agent.sandbox.fusion_program import MARK, Note, Report
from agent.sandbox.history import Cell
from agent.sandbox.output import show_controls
from trajectory.records import JsonValue

NoReport = Literal["timeout", "crash"]
"""How the program ended where it did not come to report: stopped by the server, or killed."""


class Unavailable(SandboxError):
    """A failure of the server that may have passed by the next attempt."""


def read_reply(reply: JsonValue, where: str) -> Report | NoReport:
    """Return the program's report, or how the program ended without one.

    Parameters
    ----------
    reply : JsonValue
        The body of a reply to ``/run_code``.
    where : str
        The address, for messages.

    Raises
    ------
    Unavailable
        If the server says that it failed.
    SandboxError
        If this is no reply of a SandboxFusion server, or its Python could not run the program.
    """
    if not isinstance(reply, dict) or "status" not in reply:
        raise SandboxError(f"{where} did not answer as a SandboxFusion server does")
    run = reply.get("run_result")
    if reply["status"] == "SandboxError" or (isinstance(run, dict) and run["status"] == "Error"):
        raise Unavailable(f"{where} failed: {str(reply.get('message'))[:200]}")
    if not isinstance(run, dict):
        raise SandboxError(f"{where} answered without a run_result")
    if run.get("status") == "TimeLimitExceeded":
        return "timeout"
    for line in str(run.get("stdout")).split("\n"):
        if line.startswith(MARK) and (report := _parse_report(line[len(MARK) :])) is not None:
            if report["ready"]:
                return report
            raise SandboxError(f"no cell can run on {where}: {report['stderr'].strip()}")
    if run.get("return_code") == 1:  # Python's own, of a program it cannot run
        raise SandboxError(f"{where} cannot run the program: {str(run.get('stderr'))[-300:]}")
    return "crash"


def check_repeated(path: Sequence[tuple[int, Cell]], report: Report) -> None:
    """Insist that the cells before the last did what they did the first time.

    Raises
    ------
    ReplayDiverged
        If one did not.
    """
    notes = report["notes"]
    for position, (number, cell) in enumerate(path):
        if position == len(notes):
            raise ReplayDiverged(f"cell {number} died when it was replayed")
        status, error, stdout = cell.seen
        note = notes[position]
        if (note["status"], note["error"], note["digest"]) != (status, error, digest(stdout)):
            raise ReplayDiverged(
                f"cell {number} gave another result when it was replayed ({note['status']}, then "
                f"{status}): its state cannot be restored"
            )


def digest(text: str) -> str:
    """Return what the program reports of a cell's stdout, addresses left out.

    Examples
    --------
    >>> digest("")
    'e3b0c44298fc1c14'
    """
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def outcome_of(report: Report, num_repeated: int, limits: Limits) -> Outcome:
    """Return what the last cell did.

    Parameters
    ----------
    report : Report
        Of the program.
    num_repeated : int
        Cells before it.
    limits : Limits
        Bounds of the run.
    """
    notes, stderr = report["notes"], report["stderr"]
    status: Status
    error: str | None
    if len(notes) > num_repeated:
        note = notes[num_repeated]
        status, error = ("ok", None) if note["status"] == "ok" else ("error", note["error"])
        cpu_s, wall_s = note["cpu_s"], note["wall_s"]
    else:
        cpu_s = max(0.0, report["cpu_s"] - sum(note["cpu_s"] for note in notes))
        wall_s = max(0.0, report["wall_s"] - sum(note["wall_s"] for note in notes))
        status = error = _cause_of_death(report, cpu_s, limits)
        if report["signal"] in ("SIGPROF", "SIGXCPU"):
            cpu_s = max(cpu_s, limits.cpu_s)  # the alarm rounds
        if status == "crash":
            reason = report["signal"] and f"signal {report['signal']}"
            reason = reason or f"exit code {report['exit_code']}"
            stderr += f"the interpreter died ({reason})\n"
    if report["printed_bytes"] >= min(MAX_OUTPUT_BYTES, limits.file_mb * 2**20):
        status = error = "output_limit"
    return Outcome(
        status=status,
        error=error,
        stdout=report["stdout"],
        stderr=stderr,
        cpu_s=cpu_s,
        wall_s=wall_s,
    )


def ended_without_report(ending: NoReport, limits: Limits) -> Outcome:
    """Return the outcome of a cell whose program the server stopped, or which killed it."""
    stderr = "the interpreter died (with the program that ran it)\n" if ending == "crash" else ""
    wall_s = limits.wall_s if ending == "timeout" else 0.0
    return Outcome(status=ending, error=ending, stdout="", stderr=stderr, cpu_s=0.0, wall_s=wall_s)


def _cause_of_death(report: Report, cpu_s: float, limits: Limits) -> NoReport:
    """Tell a limit from a death of its own."""
    alarms = ("SIGPROF", "SIGXCPU", "SIGALRM")
    used_up = report["signal"] == "SIGKILL" and cpu_s >= limits.cpu_s
    return "timeout" if report["signal"] in alarms or report["overdue"] or used_up else "crash"


def _parse_report(text: str) -> Report | None:
    """Return the report if the line is one: code on the server may have written it."""
    try:
        data = json.loads(text)
        notes: list[Note] = [
            {
                "status": str(note["status"]),
                "error": None if note["error"] is None else show_controls(str(note["error"])[:80]),
                "digest": str(note["digest"]),
                "cpu_s": float(note["cpu_s"]),
                "wall_s": float(note["wall_s"]),
            }
            for note in data["notes"]
        ]
        return {
            "ready": bool(data["ready"]),
            "notes": notes,
            "exit_code": None if data["exit_code"] is None else int(data["exit_code"]),
            "signal": None if data["signal"] is None else show_controls(str(data["signal"])[:20]),
            "overdue": bool(data["overdue"]),
            "cpu_s": float(data["cpu_s"]),
            "wall_s": float(data["wall_s"]),
            "printed_bytes": int(data["printed_bytes"]),
            "stdout": show_controls(str(data["stdout"])),
            "stderr": show_controls(str(data["stderr"])),
        }
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
