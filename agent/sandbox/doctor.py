"""The command ``doctor``: which isolation this machine offers, tried rather than looked up."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from agent.sandbox.forkjail.doctor import DESCRIPTION, TIERS, probe


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Say what isolation this machine offers, by trying forbidden things in real boxes."""


def doctor(config: DoctorConfig) -> None:
    """Print a table of tiers and other backends, and which one is used.

    Raises
    ------
    SystemExit
        With code 1, if there is no isolation to be had.
    """
    console = Console()
    console.print(
        f"{platform.system()} {platform.release()} on {platform.machine()}, "
        f"Python {platform.python_version()}, uid {os.getuid()}",
        highlight=False,
    )
    table = Table("backend", "isolation", "usable", "why")
    used = None
    for tier in TIERS:
        finding = probe(tier)
        why = finding.reason or f"{finding.tried} forbidden things tried, all refused"
        table.add_row("forkjail", f"{tier}: {DESCRIPTION[tier]}", _yes(finding.usable), why)
        if finding.usable and used is None:
            used = tier
    monty = importlib.util.find_spec("pydantic_monty") is not None
    table.add_row(
        "monty",
        "an interpreter of a part of Python",
        _yes(monty),
        "installed" if monty else "pip install 'toolprm[monty]'",
    )
    table.add_row("sandboxfusion", "that of its server", "ask", "--sandbox sandboxfusion:URL")
    table.add_row("unsafe", "none", "yes", "only with --allow-unsafe-tools")
    console.print(table)
    if used is None:
        console.print("auto refuses to run code here, unless --allow-unsafe-tools is given")
        raise SystemExit(1)
    console.print(f"auto uses forkjail, tier {used}: {DESCRIPTION[used]}", highlight=False)


def _yes(value: bool) -> str:
    """Write a truth value."""
    return "yes" if value else "no"
