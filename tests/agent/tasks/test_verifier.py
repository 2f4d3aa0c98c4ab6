"""math-verify in a child: limits, recovery, and no process left over."""

import gc
import threading
import time

import pytest

from agent.processes import cpu_seconds
from agent.tasks.verifier import Verifier


def test_a_comparison_that_hangs_is_stopped_and_the_next_one_runs():
    verifier = Verifier(cpu_s=0.5, wall_s=30)
    started = time.monotonic()
    assert verifier.equivalent("1", "9**9**9**9") is False
    assert time.monotonic() - started < 30
    assert verifier.equivalent("x+1", "1+x") is True
    verifier.close()


def test_threads_share_one_child():
    verifier = Verifier()
    verdicts, pids = {}, set()

    def ask(n):
        verdicts[n] = verifier.equivalent(f"{n}k", f"k*{n % 5}")
        pids.add(verifier._process.pid)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {n: n < 5 for n in range(10)}
    assert len(pids) == 1
    verifier.close()


def test_a_forgotten_verifier_ends_its_child():
    verifier = Verifier()
    assert verifier.equivalent("2x", "x+x")
    pid = verifier._process.pid
    assert cpu_seconds(pid) > 0
    del verifier
    gc.collect()
    assert cpu_seconds(pid) is None


def test_a_child_killed_from_outside_is_replaced():
    verifier = Verifier()
    verifier.equivalent("x", "y")
    verifier._process.kill()
    verifier._process.wait()
    assert verifier.equivalent("2x", "x+x") is True
    verifier.close()


def test_math_verify_that_does_not_start_is_an_error_not_a_verdict(monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise ImportError('no math_verify here')")
    monkeypatch.setattr("agent.tasks.verifier.PROGRAM", broken)
    with pytest.raises(RuntimeError, match="no math_verify here"):
        Verifier().equivalent("x", "y")
