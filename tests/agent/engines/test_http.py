"""The http engine against well-behaved servers on loopback, and what it refuses at the start."""

import asyncio
import importlib.util
import threading
import time
from dataclasses import replace

import pytest

from agent.engines import build_engine
from agent.engines.base import EngineError, EngineOptions
from tests.agent.engines import loopback
from tests.agent.engines.loopback import asked, expected, status
from tests.agent.engines.tiny import prompts, run_all
from trajectory.errors import InputError


def test_the_request_says_everything_that_decides_the_sample(make, connect):
    server = make()
    engine = connect(server)
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_tokens": 7}
    run_all(engine, [asked((4, 5), seed=2**63 - 1, stop=(8, 9), **sampling)])
    (body,) = server.bodies
    assert body.items() >= (sampling | {"seed": 2**63 - 1, "prompt": [4, 5]}).items()
    assert body["stop_token_ids"] == [8, 9]
    assert body["ignore_eos"] is True
    assert (body["repetition_penalty"], body["min_p"], body["logprobs"]) == (1.0, 0.0, 0)
    assert body["return_token_ids"] is body["return_tokens_as_token_ids"] is True
    assert server.asked[0] == "t/0@1/9223372036854775807.0#0"
    assert "Authorization" not in server.headers[0]


def test_ids_that_no_header_can_carry_still_come_through_and_stay_apart(make, connect):
    server = make()
    engine = connect(server)
    names = ["Maße/\n1", "x" * 300 + "1", "x" * 300 + "2"]
    run_all(engine, [replace(asked(seed=n), request_id=name) for n, name in enumerate(names)])
    assert len(set(server.asked)) == 3
    assert all(i.isascii() and len(i) < 250 for i in server.asked)


def test_servers_may_come_up_after_the_command(make, connect):
    late = make()
    late.stop()
    timer = threading.Timer(0.7, late.start)
    timer.start()
    assert run_all(connect(late), [asked()])[0].token_ids
    timer.join()


def test_a_run_starts_with_the_servers_that_are_up_and_takes_the_others_later(make, connect):
    servers = [make(), make()]
    servers[1].stop()
    engine = connect(*servers)
    assert run_all(engine, [asked()])[0].token_ids
    servers[1].start()
    for n in range(90):
        run_all(engine, [asked((n, 1, 2), seed=n)])
        if servers[1].asked:
            return
        time.sleep(0.02)
    pytest.fail("the second server was never used")


def test_without_any_server_there_is_no_engine(make, connect):
    gone = make()
    gone.stop()
    with pytest.raises(InputError, match=r"no server that works within 1 s \(http.*no connection"):
        connect(gone, patience_s=1.0)


def test_servers_of_different_models_are_refused(make, connect):
    one, other = make(), make(model="another")
    with pytest.raises(InputError, match="serves '(tiny|another)' and http.* serves") as caught:
        connect(one, other)
    assert "'tiny'" in str(caught.value)
    assert "'another'" in str(caught.value)


def test_a_server_that_returns_with_another_model_stays_out(make, connect):
    servers = [make(), make()]
    engine = connect(*servers)
    servers[0].stop()
    servers[0].model = "another"
    run_all(engine, [asked(seed=n) for n in range(20)])
    before = len(servers[0].asked)
    servers[0].start()
    time.sleep(0.5)
    turns = run_all(engine, [asked(seed=n) for n in range(20)])
    assert len(turns) == 20
    assert len(servers[0].asked) == before


def test_servers_that_were_started_wrongly_are_refused_with_the_flag_to_give(make, connect):
    short = make(max_model_len=128)
    with pytest.raises(InputError, match="--max-model-len 128, which --max-context 256 exceeds"):
        connect(short)
    raw = make()
    raw.raw_logprobs = True
    with pytest.raises(InputError, match="--logprobs-mode processed_logprobs"):
        connect(raw)


def test_the_token_comes_from_the_environment(make, connect, monkeypatch):
    server = make(token="secret")
    monkeypatch.delenv("TOOLPRM_SERVER_TOKEN", raising=False)
    with pytest.raises(InputError, match="401 Unauthorized.* set TOOLPRM_SERVER_TOKEN"):
        connect(server)
    monkeypatch.setenv("TOOLPRM_SERVER_TOKEN", "secret")
    engine = connect(server)
    run_all(engine, [asked()])
    assert server.headers[0]["Authorization"] == "Bearer secret"
    server.always = status(400, "no")
    with pytest.raises(EngineError) as caught:
        run_all(engine, [asked()])
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("TOOLPRM_SERVER_TOKEN", "two\nlines")
    with pytest.raises(InputError, match="no HTTP header can carry"):
        connect(server)


def test_a_cancelled_episode_aborts_its_request_and_no_other(make, connect):
    server = make()
    server.misbehave.append(loopback.hang)
    engine = connect(server)

    async def main():
        doomed = asyncio.create_task(engine.generate(asked(seed=1)))
        while not server.asked:
            await asyncio.sleep(0.01)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        turn = await engine.generate(asked(seed=2))
        for _ in range(100):
            if server.aborted:
                return turn
            await asyncio.sleep(0.02)
        pytest.fail("the server was not told")

    assert asyncio.run(main()).token_ids == expected(asked(seed=2))[0]
    assert server.aborted == ["t/0@1/1.0#0"]
    assert server.alive == 0


def test_stop_when_ends_the_turn_and_tells_the_server(make, connect):
    server = make()
    server.always = loopback.slow_stream
    engine = connect(server)
    one = asked(max_tokens=100)
    seen = []

    def fifth(ids):
        seen.append(len(ids))
        return len(ids) >= 5

    (turn,) = run_all(engine, [replace(one, stop_when=fifth)])
    assert turn.token_ids == expected(one)[0][:5]
    assert (turn.finish, seen, len(turn.logprobs)) == ("stop", [1, 2, 3, 4, 5], 5)
    for _ in range(100):
        if server.aborted:
            return
        time.sleep(0.02)
    pytest.fail("the server was not told")


@pytest.mark.parametrize("stop", [(), (7,)])
def test_a_stream_that_stop_when_does_not_end_is_a_whole_answer(make, connect, stop):
    server = make()
    engine = connect(server)
    one = asked(stop=stop, seed=4, max_tokens=200)
    (turn,) = run_all(engine, [replace(one, stop_when=lambda ids: False)])
    assert (turn.token_ids, turn.finish) == expected(one)
    assert turn.finish == ("stop" if stop else "length")
    assert engine.stats.cached_prompt_tokens == 1


def test_requests_of_one_task_meet_one_cache(make, connect):
    servers = [make(), make()]
    engine = connect(*servers)
    for n in range(12):
        run_all(engine, [replace(asked(prompts(1, seed=n)[0], seed=n), affinity="task 3")])
    assert sorted(len(server.asked) for server in servers) == [0, 12]
    for n in range(40):
        run_all(engine, [asked((n, 1, 2), seed=n)])
    assert all(len(server.asked) > 5 for server in servers)


def test_no_more_requests_are_in_flight_than_asked_for(make, connect):
    server = make()
    server.delay_s = 0.02
    engine = connect(server, max_batch=5)
    run_all(engine, [asked(seed=n) for n in range(30)])
    assert server.most_alive == 5


def test_usage_is_what_the_servers_report(make, connect):
    engine = connect(make(), make())
    run_all(engine, [asked(range(10), seed=n) for n in range(6)])
    stats = engine.stats
    assert (stats.requests, stats.prompt_tokens, stats.cached_prompt_tokens) == (6, 60, 30)
    assert stats.generated_tokens == 120
    assert engine.revision == "tiny"


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"dtype": "float32"}])
def test_settings_that_are_the_servers_to_make_are_refused(served_folder, change):
    options = EngineOptions(policy=served_folder, max_context=256, **change)
    with pytest.raises(InputError, match="--device and --dtype do not apply"):
        build_engine("http:http://127.0.0.1:9", options)


def test_an_absent_aiohttp_is_one_clear_sentence(served_folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="install this package with the extra 'http'"):
        build_engine("http:http://127.0.0.1:9", EngineOptions(policy=served_folder))
