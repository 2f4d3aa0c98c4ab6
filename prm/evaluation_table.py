"""The report of ``prm evaluate`` as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prm.metrics import show_estimate
from trajectory.records import JsonValue


def print_report(report: Mapping[str, JsonValue], out: Path) -> None:
    """Print the report of ``prm evaluate`` as a table."""
    table = Table(title="Process reward model on held-out tasks")
    for column in ("items", "metric", "PRM", "position + length"):
        table.add_column(column)
    sections = report["sections"]
    assert isinstance(sections, dict)
    for name, section in sections.items():
        assert isinstance(section, dict)
        prm, baseline = section["prm"], section["baseline"]
        assert isinstance(prm, dict)
        assert isinstance(baseline, dict)
        label = f"{name.replace('_', ' ')} ({section['items']})"
        for number, metric in enumerate(prm):
            shown = "" if number else label
            table.add_row(
                shown, metric, show_estimate(prm[metric]), show_estimate(baseline[metric])
            )
        table.add_section()
    exact = report.get("spearman_exact")
    if isinstance(exact, dict):
        table.add_row(
            f"exact states ({exact['states']})", "spearman_exact", show_estimate(exact), ""
        )
    console = Console()
    console.print(table)
    console.print(f"{out / 'metrics.json'}, {out / 'reliability.png'}", soft_wrap=True)
