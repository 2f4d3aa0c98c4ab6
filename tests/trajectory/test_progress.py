"""Progress: a bar on a terminal, plain lines elsewhere."""

import io
import os
import pty
import subprocess
import sys

import pytest

from trajectory import progress as module
from trajectory.progress import progress


def test_a_log_file_gets_one_line_at_the_end(capsys):
    with progress("labels", 4) as bar:
        for _ in range(4):
            bar.advance(tokens=12, reward=0.123456)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("labels: 4/4, 0 s, ")
    assert err.endswith("tokens 12 reward 0.1235\n")


def test_the_rate_counts_only_what_was_done_now(monkeypatch):
    clock = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    lines = module._Lines("labels", 110, 100, stream)
    lines._shown = 10.0
    lines.advance(5)
    lines.show()
    assert stream.getvalue() == "labels: 105/110, 10 s, 0.5/s, 10 s left\n"


def test_lines_are_at_least_thirty_seconds_apart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    lines = module._Lines("labels", None, 0, stream)
    for second in range(100):
        now[0] = float(second)
        lines.advance()
    assert [line.split(",")[1] for line in stream.getvalue().splitlines()] == [
        " 30 s",
        " 60 s",
        " 90 s",
    ]


def test_the_last_line_is_shown_even_after_an_interruption(capsys):
    with pytest.raises(KeyboardInterrupt), progress("labels", 4) as bar:
        bar.advance()
        raise KeyboardInterrupt
    assert "labels: 1/4" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_and_a_pipe_what_is_printed():
    code = (
        "from trajectory.progress import progress\n"
        "with progress('labels [x]', 3, done=1) as bar:\n"
        "    bar.advance(); print('result'); bar.advance(tokens=7)\n"
    )
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    result = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, check=True, env=env
    )
    assert result.stdout == b"result\n"
    os.close(theirs)
    text = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "labels [x]" in text
    assert "3/3" in text
    assert "tokens 7" in text
