"""``python -m agent.sandbox``: doctor, check, bench, soak; and what happens without isolation."""

import json
import os
import subprocess
import sys
import tempfile

import pytest

from agent.sandbox import bench, build_sandbox
from agent.sandbox.bench import BenchConfig
from agent.sandbox.cases import CANARY_FILE, Case, read_cases
from agent.sandbox.forkjail.doctor import usable_tier
from agent.sandbox.soak import SoakConfig
from trajectory.errors import InputError

needs_isolation = pytest.mark.skipif(
    usable_tier()[0] is None, reason=f"no isolation here: {usable_tier()[1]}"
)

# Makes a process and its children unable to enter namespaces or use Landlock, as containers and
# old kernels do, then becomes the command given.
WITHOUT_ISOLATION = """
import ctypes, os, struct, sys
from agent.sandbox.forkjail.seccomp import _Program
from agent.sandbox.forkjail.syscalls import LIBC, PR_SET_NO_NEW_PRIVS, numbers, prctl, this_machine
from agent.sandbox.forkjail.syscalls import TRUSTED
landlock = numbers(TRUSTED, this_machine())["landlock_create_ruleset"]
unshare = {"x86_64": 272, "aarch64": 97}[this_machine().name]
op = lambda code, value, yes=0, no=0: struct.pack("HBBI", code, yes, no, value)
program = op(0x20, 0) + op(0x15, landlock, 1) + op(0x15, unshare, 0, 1)
program += op(0x06, 0x00050001) + op(0x06, 0x7FFF0000)
buffer = ctypes.create_string_buffer(program, len(program))
described = _Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
prctl(PR_SET_NO_NEW_PRIVS, 1)
assert LIBC.prctl(22, 2, ctypes.byref(described), 0, 0) == 0
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def command(*arguments, prefix=()):
    result = subprocess.run(
        [sys.executable, *prefix, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "COLUMNS": "200"},
    )
    return result.returncode, " ".join(result.stdout.split()), " ".join(result.stderr.split())


@needs_isolation
def test_the_doctor_names_the_tier_in_use():
    code, out, err = command("agent.sandbox", "doctor")
    assert code == 0, err
    assert f"auto uses forkjail, tier {usable_tier()[0]}" in out
    assert "forbidden things tried, all refused" in out


@pytest.mark.skipif(sys.platform != "linux", reason="takes Linux's isolation away")
def test_without_isolation_the_doctor_says_what_is_missing():
    code, out, _ = command("agent.sandbox", "doctor", prefix=["-c", WITHOUT_ISOLATION])
    assert code == 1
    assert "unshare: Operation not permitted" in out
    assert "landlock_create_ruleset: Operation not permitted" in out
    assert "auto refuses to run code here" in out


@pytest.mark.skipif(sys.platform != "linux", reason="takes Linux's isolation away")
def test_without_isolation_a_command_refuses_in_one_sentence(tmp_path):
    rows = tmp_path / "tasks.jsonl"
    rows.write_text(
        json.dumps({"problem": "2+3?", "answer": "5", "solution": "<<2+3=5>>5\n#### 5"})
    )
    arguments = ("policy.cli", "synthesize", "--tasks", f"math:{rows}", "--tool", "python")
    refused = command(*arguments, "--out", tmp_path / "out", prefix=["-c", WITHOUT_ISOLATION])
    assert refused[0] == 2
    assert "this machine offers no isolation" in refused[2]
    assert "unshare" in refused[2]
    assert "--allow-unsafe-tools" in refused[2]
    assert not (tmp_path / "out").exists()

    accepted = command(
        *arguments,
        "--allow-unsafe-tools",
        "--out",
        tmp_path / "out",
        prefix=["-c", WITHOUT_ISOLATION],
    )
    assert accepted[0] == 0, accepted[2]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["isolation"] == ["none"]


def cases_file(path, *rows):
    names = ("id", "category", "code", "expect", "reason")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


@needs_isolation
def test_a_case_that_differs_is_named_and_fails_the_check(tmp_path):
    path = cases_file(
        tmp_path / "cases.jsonl",
        ("plain", "benign", "x = 1\n# %%\nx", "ok", "state lasts"),
        ("query", "sql", "SELECT name FROM items WHERE id = 1;", "ok", "a query"),
        ("lie", "benign", "1/0", "ok", "said to be harmless"),
        ("out", "filesystem", "print('ESCAPED')", "contained", "says it escaped"),
    )
    code, out, _ = command("agent.sandbox", "check", path)
    assert code == 1
    assert "ok plain" in out
    assert "ok query" in out
    assert "FAIL lie error" in out
    assert "expected ok: said to be harmless" in out
    assert "it escaped" in out
    assert "2 of 4 as expected" in out
    assert out.endswith("left behind: nothing")
    assert command("agent.sandbox", "check", path, "--only", "plain")[0] == 0


def test_a_backend_that_shows_a_canary_fails_the_check(tmp_path):
    pattern = f"{tempfile.gettempdir()}/{CANARY_FILE}*"
    code = f"import glob\nfor name in glob.glob({pattern!r}): print(open(name).read())"
    path = cases_file(tmp_path / "cases.jsonl", ("peek", "secrets", code, "contained", "a secret"))
    unsafe = ("--backend", "unsafe", "--allow-unsafe-tools")
    status, out, _ = command("agent.sandbox", "check", path, *unsafe)
    assert status == 1
    assert "it read a canary" in out
    if usable_tier()[0] is not None:
        assert command("agent.sandbox", "check", path)[0] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no case"),
        ("{}", "line 1: not a case"),
        ("nonsense", "line 1: not a case"),
        (
            json.dumps(dict.fromkeys(("id", "category", "code", "expect", "reason"), "x")),
            "line 1: expect is 'x'; valid: ok, error",
        ),
    ],
)
def test_a_file_that_holds_no_cases_is_refused(tmp_path, content, message):
    path = tmp_path / "cases.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_cases(path)
    with pytest.raises(InputError, match="cannot read the cases"):
        read_cases(tmp_path / "missing.jsonl")


def test_shared_cases_can_be_read(shared):
    cases = read_cases(shared / "data/sandbox_hostile/cases.jsonl")
    assert len(cases) == 119
    assert all(isinstance(case, Case) for case in cases)


@needs_isolation
def test_the_bench_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "THROUGHPUT_S", 0.2)
    monkeypatch.setattr(bench, "TRAJECTORY", ("roots = [1, 2]", "roots"))
    out = tmp_path / "bench.json"
    bench.bench(BenchConfig(repeats=2, out=out))
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) >= 9
    assert all(
        row["value"] > 0 and row["low"] <= row["value"] <= row["high"] for row in rows.values()
    )
    assert "times as fast as replay" in capsys.readouterr().out


@needs_isolation
def test_a_soak_with_kills_loses_nothing():
    arguments = ("--calls", 150, "--hostile", 0.1, "--kills", 1, "--sessions", 3)
    code, out, err = command("agent.sandbox", "soak", *arguments)
    assert code == 0, out + err
    assert "wrong answers 0, processes left 0, descriptors left 0" in out
    assert "150 calls in" in out


@pytest.mark.parametrize(
    "setting", [{"calls": 0}, {"sessions": 0}, {"hostile": 1.5}, {"kills": -1}]
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(InputError):
        SoakConfig(**setting)


def test_an_unknown_backend_is_answered_with_the_valid_ones():
    with pytest.raises(InputError, match="valid names: auto, forkjail, monty, unsafe"):
        build_sandbox("jail", allow_unsafe=True)
