import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from prm.cli import main
from prm.remote import TOKEN_VARIABLE, RemoteScorer
from prm.score import Scorer
from prm.serve import ServeConfig, read_token
from tests.prm.loopback import NO_RETRY, metrics_of, post, runs, serving
from tests.prm.synthetic import make_trajectory, make_turns
from trajectory.codec import to_json
from trajectory.errors import InputError
from trajectory.formats import from_messages, to_messages
from trajectory.records import Step


@pytest.fixture(scope="module")
def scorer(prm_folder):
    return Scorer.load(prm_folder, device="cpu")


@pytest.fixture(scope="module")
def url(scorer):
    with serving(scorer, max_request_mb=0.2) as url:
        yield url


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def test_trajectories_get_the_scores_they_get_in_process(url, scorer):
    trajectories = [*runs(5), make_turns("+-", "", "-+-", task="several")]
    for calibrated in (True, False):
        body = {"trajectories": [to_json(t) for t in trajectories], "calibrated": calibrated}
        answer = post(url, body).json()
        expected = scorer.score(trajectories, calibrated=calibrated)
        for found, wanted in zip(answer["scores"], expected, strict=True):
            assert found["values"] == pytest.approx(wanted.values, abs=1e-5)
            assert [len(c) for c in found["calls"]] == [len(c) for c in wanted.calls]
            for one, other in zip(found["calls"], wanted.calls, strict=True):
                assert one == pytest.approx(other, abs=1e-5)
            bare = {"values": [], "calls": []}
            assert found | bare == to_json(replace(wanted, values=(), calls=()))
        last = [s["values"][-1] for s in answer["scores"]]
        assert (answer["aggregation"], answer["aggregates"]) == ("last", last)


def test_messages_get_the_scores_of_the_trajectory_they_are(url, scorer):
    trajectory = make_trajectory("+-")
    written = [replace(s, text=f"{s.text}") for s in trajectory.steps]
    messages = to_messages(replace(trajectory, steps=tuple(written)), system="Be brief.")
    answer = post(url, {"messages": messages, "trajectory_id": "mine"}).json()
    (found,) = answer["scores"]
    assert found["trajectory_id"] == "mine"
    assert len(found["values"]) == trajectory.num_steps + 1
    prompt_only = scorer.score([replace(trajectory, steps=())])[0].values
    assert found["values"][0] == pytest.approx(prompt_only[0], abs=1e-5)
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert post(url, {"messages": parts}).json()["aggregates"] == pytest.approx(
        answer["aggregates"], abs=1e-6
    )


def test_messages_get_a_score_per_call_in_call_order_whatever_the_order_of_results(url, scorer):
    trajectory = make_turns("+-+", "", "-", task="t")
    messages = to_messages(trajectory)
    assert [i for i, m in enumerate(messages) if m["role"] == "tool"] == [2, 3, 4, 7]
    shuffled = [messages[i] for i in (0, 1, 4, 2, 3, 5, 6, 7)]
    ordered, other = (
        post(url, {"messages": m, "trajectory_id": "t"}).json()["scores"][0]
        for m in (messages, shuffled)
    )
    assert other == ordered | {
        "values": pytest.approx(ordered["values"], abs=1e-6),
        "calls": [pytest.approx(c, abs=1e-6) for c in ordered["calls"]],
    }
    assert [len(c) for c in ordered["calls"]] == [3, 0, 1]
    read = from_messages(shuffled, trajectory_id="t", task=trajectory.task)
    (expected,) = scorer.score([read])
    for found, wanted in zip(ordered["calls"], expected.calls, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
    assert len({v for c in ordered["calls"] for v in c}) == 4


def test_an_empty_list_gets_an_empty_answer(url):
    answer = post(url, {"trajectories": []}).json()
    assert answer == {"scores": [], "aggregates": [], "aggregation": "last"}


@pytest.mark.slow
def test_64_clients_at_once_get_their_own_answers(scorer):
    trajectories = runs(512, seed=3)
    expected = {s.trajectory_id: s.values for s in scorer.score(trajectories)}
    with serving(scorer, batch_tokens=4096) as url:

        def ask(start):
            wrong = 0
            for chunk in (trajectories[i : i + 2] for i in range(start, 512, 128)):
                answer = post(url, {"trajectories": [to_json(t) for t in chunk]}).json()["scores"]
                for trajectory, found in zip(chunk, answer, strict=True):
                    assert found["trajectory_id"] == trajectory.trajectory_id
                    values = pytest.approx(expected[trajectory.trajectory_id], abs=1e-5)
                    wrong += found["values"] != values
            return wrong

        with ThreadPoolExecutor(64) as pool:
            assert sum(pool.map(ask, range(0, 128, 2))) == 0
        counted = metrics_of(url)
    assert counted["prm_trajectories_total",] == 512
    assert counted["prm_requests_total", "/score", "200"] == 256
    assert counted["prm_batch_tokens_count",] < 200  # requests really shared forward passes
    assert counted["prm_waiting_trajectories",] == 0


def test_the_metrics_are_those_of_this_server(scorer):
    trajectories = runs(3)
    tokens = sum(len(r.input_ids) for r in scorer.render(trajectories))
    with serving(scorer) as url:
        post(url, {"trajectories": [to_json(t) for t in trajectories]})
        post(url, {"nothing": 1})
        NO_RETRY.request("GET", f"{url}/elsewhere")
        counted = metrics_of(url)
    assert counted["prm_tokens_total",] == tokens
    assert counted["prm_requests_total", "/score", "422"] == 1
    assert counted["prm_requests_total", "other", "404"] == 1
    assert counted["prm_scoring_seconds_total",] > 0


def broken(change):
    record = to_json(make_trajectory("+"))
    change(record)
    return {"trajectories": [to_json(make_trajectory("+")), record]}


@pytest.mark.parametrize(
    ("body", "place", "message"),
    [
        (b"{", ["body", 1], "JSON decode error"),
        ({}, ["body"], "either 'trajectories' or 'messages'"),
        ({"trajectories": [], "messages": []}, ["body"], "either"),
        ({"trajectories": 3}, ["body", "trajectories"], "list"),
        ({"trajectories": [], "extra": 1}, ["body", "extra"], "not permitted"),
        ({"trajectories": [], "calibrated": "perhaps"}, ["body", "calibrated"], "boolean"),
        (
            broken(lambda r: r["steps"][0]["calls"][0].update(name=3)),
            ["body", "trajectories", 1],
            r"steps\[0\].calls\[0\].name: expected str",
        ),
        (broken(lambda r: r.pop("task")), ["body", "trajectories", 1], "task"),
        (
            broken(lambda r: r["steps"][0].update(observations=[])),
            ["body", "trajectories", 1],
            "one observation per call",
        ),
        (
            broken(lambda r: r["steps"].append(to_json(Step(text="a" * 600)))),
            ["body", "trajectories"],
            r"trajectory t0/0 has 6\d\d tokens, the PRM takes 512",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, ["body", "messages"], "no user"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]},
            ["body", "messages"],
            r"messages\[1\]: role 'tool' before any assistant",
        ),
    ],
)
def test_a_malformed_request_is_422_and_names_the_field(url, body, place, message):
    answer = post(url, body)
    assert answer.status == 422
    (detail,) = answer.json()["detail"]
    assert detail["loc"] == place
    assert re.search(message, detail["msg"])


def test_a_body_over_the_limit_is_413_announced_or_not(url):
    large = json.dumps({"trajectories": [], "trajectory_id": "x" * 300_000}).encode()
    assert post(url, large).status == 413
    pieces = (large[i : i + 10_000] for i in range(0, len(large), 10_000))
    answer = NO_RETRY.request(
        "POST", f"{url}/score", body=pieces, chunked=True,
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    assert answer.status == 413
    assert "larger than 200,000 bytes" in answer.json()["detail"]


def test_a_token_is_asked_for_everywhere_but_for_health(scorer, monkeypatch):
    with serving(scorer, token="secret") as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = post(url, {"trajectories": []}, **headers)
            assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert NO_RETRY.request("GET", f"{url}/metrics", headers=headers).status == 401
        for scheme in ("Bearer", "bearer"):
            answer = post(url, {"trajectories": []}, Authorization=f"{scheme} secret")
            assert answer.status == 200
        assert NO_RETRY.request("GET", f"{url}/health").json()["status"] == "ok"
        with pytest.raises(InputError, match="answered 401: the bearer token is missing or wrong"):
            RemoteScorer(url).score(runs(1))
        monkeypatch.setenv(TOKEN_VARIABLE, "secret")
        assert len(RemoteScorer(url).score(runs(1))) == 1


def test_a_remote_scorer_gives_what_a_scorer_gives(url, scorer):
    trajectories = [*runs(20), make_turns("+-", "", "-+-", task="several")]
    remote = RemoteScorer(url, per_request=4, concurrency=3)
    for calibrated in (True, False):
        found = remote.score(trajectories, calibrated=calibrated)
        for one, other in zip(
            found, scorer.score(trajectories, calibrated=calibrated), strict=True
        ):
            assert one.values == pytest.approx(other.values, abs=1e-5)
            for ours, wanted in zip(one.calls, other.calls, strict=True):
                assert ours == pytest.approx(wanted, abs=1e-5)
            assert replace(one, values=other.values, calls=other.calls) == other
    assert remote.score([]) == []


def test_a_remote_scorer_passes_a_refusal_on(url):
    long = replace(make_trajectory("+"), steps=(Step(text="a" * 600),))
    with pytest.raises(InputError, match=r"422: body.trajectories: .* the PRM takes 512"):
        RemoteScorer(url).score([long])


def test_a_dead_server_and_another_one_are_named():
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(InputError, match=f"no server answers at {url}: start"):
        RemoteScorer(url, retries=1)
    with pytest.raises(InputError, match="'nonsense' is no address of a server"):
        RemoteScorer("nonsense", retries=0)


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    config = ServeConfig(prm=tmp_path)
    assert read_token(config) is None
    monkeypatch.setenv(TOKEN_VARIABLE, " from-environment\n")
    assert read_token(config) == "from-environment"
    file = tmp_path / "token"
    with_file = replace(config, token_file=file)
    with pytest.raises(InputError, match="does not exist"):
        read_token(with_file)
    file.write_text("from-file\n")
    assert read_token(with_file) == "from-file"
    file.write_text("\n")
    with pytest.raises(InputError, match="holds no token"):
        read_token(with_file)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prm", "nowhere"], "nowhere does not exist: give the folder `prm train --out` wrote"),
        (["--prm", "nowhere", "--port", "70000"], "--port must lie between"),
        (["--prm", "nowhere", "--max-waiting", "0"], "--max-waiting must be at least 1"),
    ],
)
def test_a_wrong_start_is_one_sentence(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["prm", "serve", *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_taken_port_is_one_sentence(prm_folder, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr("sys.argv", ["prm", "serve", "--prm", str(prm_folder), "--port", port])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 2
    assert f"cannot listen on 127.0.0.1:{port} (" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_ends_the_server_after_its_requests(prm_folder, repository):
    process = subprocess.Popen(
        [sys.executable, "-m", "prm.cli", "serve", "--prm", prm_folder, "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=repository,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        line = process.stderr.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", line).group()
        post(url, {"trajectories": []})
        body = {"trajectories": [to_json(t) for t in runs(150)]}
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(post, url, body)
            while metrics_of(url).get(("prm_waiting_trajectories",), 0) == 0:
                assert not waiting.done(), "answered too soon to tell"
            process.send_signal(signal.SIGTERM)
            answer = waiting.result(60)
        assert answer.status == 200
        assert len(answer.json()["scores"]) == 150
        assert process.wait(30) == 0
        assert process.stderr.read() == "ended\n"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
