"""JSONL files: append, read, repair, and every way a line can be bad."""

import os
import resource
import signal
import subprocess
import sys

import pytest
from hypothesis import given

from tests.examples import make_trajectory, trajectories
from trajectory.errors import InputError
from trajectory.records import Observation, ToolCall, Trajectory
from trajectory.store import JsonlWriter, encode_line, read_jsonl, repair_tail, write_jsonl

GOOD = b'{"name":"c","arguments":"{}"}\n'


def read(path, **options):
    return list(read_jsonl(path, ToolCall, **options))


@given(trajectories())
def test_a_record_is_one_line_and_comes_back_exactly(tmp_path_factory, trajectory):
    path = tmp_path_factory.mktemp("store") / "t.jsonl"
    assert write_jsonl(path, [trajectory]) == 1
    assert path.read_bytes().count(b"\n") == 1
    assert list(read_jsonl(path, Trajectory)) == [trajectory]


def test_lone_surrogates_and_line_separators_survive(tmp_path):
    path = tmp_path / "o.jsonl"
    records = [Observation(content="a\udcffb"), Observation(content="x\u2028y\x85z")]
    write_jsonl(path, records)
    assert list(read_jsonl(path, Observation)) == records


def test_text_is_readable_in_the_file():
    assert "日本" in encode_line(ToolCall(name="日本", arguments="{}")).decode()


def test_nan_is_refused(tmp_path):
    with (
        JsonlWriter(tmp_path / "o.jsonl") as writer,
        pytest.raises(ValueError, match="not JSON compliant"),
    ):
        writer.append(Observation(content="", seconds=float("nan")))
    assert (tmp_path / "o.jsonl").read_bytes() == b""


def test_appending_continues_a_file(tmp_path):
    path = tmp_path / "new" / "t.jsonl"
    for number in range(3):
        with JsonlWriter(path, fsync=True) as writer:
            writer.append(make_trajectory(trajectory_id=str(number)))
    assert [t.trajectory_id for t in read_jsonl(path, Trajectory)] == ["0", "1", "2"]


def test_a_closed_writer_refuses(tmp_path):
    writer = JsonlWriter(tmp_path / "t.jsonl")
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.append(ToolCall(name="c", arguments="{}"))


def test_reading_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl does not exist: give the path"):
        read_jsonl(tmp_path / "none.jsonl", ToolCall)
    with pytest.raises(InputError, match="is a folder"):
        read_jsonl(tmp_path, ToolCall)


def test_empty_files_and_empty_lines_hold_no_records(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"")
    assert read(path) == []
    path.write_bytes(b"\n" + GOOD + b"  \n" + GOOD)
    assert len(read(path)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"name": \n', "line 2: not JSON"),
        (b"[1]\n", "line 2: expected an object"),
        (b'{"name":"c","arguments":"{}","x":1}\n', "line 2: unknown field 'x'"),
        (b'{"name":"c"}\n', "line 2: missing field arguments"),
        (b'{"name":1,"arguments":"{}"}\n', "line 2: name: expected str"),
        (b'{"name":"c","arguments":NaN}\n', "line 2: NaN is not a JSON number"),
        (b'{"name":"\xff","arguments":"{}"}\n', "line 2: not UTF-8 text"),
        (b"[" * 100_000 + b"\n", "line 2: nested too deeply"),
        (b'{"name":"c","argu', r"line 2: not JSON.*\(the last line is cut off\)"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + line)
    with pytest.raises(InputError, match=rf"bad\.jsonl, {message}"):
        read(path)


def test_a_complete_last_line_needs_no_newline(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(GOOD + GOOD.rstrip())
    assert len(read(path)) == 2


def test_a_cut_tail_is_passed_over_on_request(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(GOOD + GOOD[:7])
    assert len(read(path, tail="drop")) == 1


def test_dropping_the_tail_excuses_no_other_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"{\n" + GOOD)
    with pytest.raises(InputError, match="line 1"):
        read(path, tail="drop")


@pytest.mark.parametrize("size", [1, 70_000])
def test_repair_cuts_off_just_the_cut_line(tmp_path, size):
    path = tmp_path / "t.jsonl"
    path.write_bytes(GOOD * 2 + b"x" * size)
    assert repair_tail(path) == 1
    assert path.read_bytes() == GOOD * 2
    assert repair_tail(path) == 0


def test_repair_of_a_file_without_any_line_end_empties_it(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(GOOD[:5])
    assert repair_tail(path) == 1
    assert path.read_bytes() == b""
    assert repair_tail(tmp_path / "missing.jsonl") == 0


def test_a_writer_refuses_to_append_to_a_cut_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(GOOD + GOOD[:7])
    with pytest.raises(InputError, match="ends in a cut line"):
        JsonlWriter(path)


def test_a_line_that_does_not_fit_on_the_disk_is_taken_back(tmp_path):
    path = tmp_path / "t.jsonl"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with JsonlWriter(path) as writer:
        writer.append(ToolCall(name="c", arguments="{}"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(GOOD) + 10, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                writer.append(ToolCall(name="c", arguments="{}"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.append(ToolCall(name="d", arguments="{}"))
    assert [call.name for call in read(path)] == ["c", "d"]


def test_records_written_before_a_kill_are_all_there(tmp_path):
    path = tmp_path / "t.jsonl"
    code = (
        "import os, signal, sys\n"
        "from trajectory.store import JsonlWriter; from trajectory.records import ToolCall\n"
        "writer = JsonlWriter(sys.argv[1])\n"
        "for n in range(50): writer.append(ToolCall(name=str(n), arguments='{}'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert [call.name for call in read(path)] == [str(n) for n in range(50)]


def test_yesterdays_file_still_loads(repository):
    path = repository / "tests" / "golden" / "trajectories_v1.jsonl"
    assert list(read_jsonl(path, Trajectory)) == [
        make_trajectory(num_steps=3),
        make_trajectory(num_steps=1, trajectory_id="bare", meta={}, prompt_ids=None),
    ]


def test_the_light_layer_does_not_import_torch():
    code = "import sys, trajectory.store, trajectory.run; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ
    )
    assert result.stdout == "False\n"
