"""Labelling while the wall clock is set forward and back by years."""

import itertools
import json
import time
from datetime import UTC, datetime, timedelta

from labeling.run import label
from tests.labeling.folders import config, evidence, timeless
from tests.labeling.walker import WalkerEngine
from trajectory import run as runs
from trajectory.run import read_manifest

YEAR = timedelta(days=365)
WALL = time.time


def set_clock(monkeypatch, *shifts):
    """Let every look at the wall clock find it at the next of these shifts."""
    jumps = itertools.cycle(shifts)

    class Jumping(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromtimestamp(time.time(), tz)

    monkeypatch.setattr(time, "time", lambda: WALL() + next(jumps).total_seconds())
    monkeypatch.setattr(runs, "datetime", Jumping)


def test_a_run_and_its_resumption_do_not_depend_on_the_wall_clock(
    lab, finished, tmp_path, monkeypatch
):
    out = tmp_path / "labels"
    settings = config(lab, out, samples=2)
    set_clock(monkeypatch, 10 * YEAR, -10 * YEAR, timedelta())
    label(settings, engine=WalkerEngine(lab / "policy"))
    assert evidence(out) == evidence(finished[0])

    ledger = out / "evidence.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[: len(lines) // 2]))
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    set_clock(monkeypatch, -20 * YEAR)  # resumed long before it began
    resumed = label(settings, engine=WalkerEngine(lab / "policy"))
    assert evidence(out) == evidence(finished[0])
    assert timeless(out) == timeless(finished[0])
    assert 0 < resumed.counts["rollouts"] == len(evidence(out))
    assert 0 <= resumed.seconds < 600
    manifest = read_manifest(out)
    assert (manifest.status, manifest.starts) == ("finished", 2)
    assert datetime.fromisoformat(manifest.finished) < datetime.now(UTC) - 10 * YEAR
