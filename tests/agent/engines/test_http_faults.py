"""The http engine when servers answer wrongly, hang, die, or are all gone."""

import asyncio
import logging
import time
from collections import Counter
from dataclasses import replace

import pytest

from agent.engines.base import EngineError
from tests.agent.engines import loopback
from tests.agent.engines.loopback import altered, asked, expected, status
from tests.agent.engines.tiny import VOCABULARY, prompts, run_all


def first_choice(**changes):
    return altered(lambda whole: whole["choices"][0].update(changes))


def logprobs(change):
    return altered(lambda whole: change(whole["choices"][0]["logprobs"]))


FAULTS = {
    "429": (status(429, "too many"), "429"),
    "retry-after": (status(429, "wait", **{"Retry-After": "0"}), "429"),
    "500": (status(500, "cuda error"), "500 Internal Server Error: cuda error"),
    "503": (status(503), "503"),
    "404": (status(404), "404"),
    "redirect": (status(302, Location="http://127.0.0.1:9/"), "302"),
    "half json": (loopback.half_json, "JSON that is not complete"),
    "broken body": (loopback.broken_body, "broke off in the middle"),
    "closed": (loopback.closed, "closed the connection without an answer"),
    "no json": (altered(lambda whole: whole.clear()), "a wrong id: Field required"),
    "id too large": (first_choice(token_ids=[VOCABULARY]), "outside the vocabulary of 96"),
    "id negative": (first_choice(token_ids=[-1]), "outside the vocabulary of 96"),
    "id as text": (first_choice(token_ids=["7"]), "a wrong choices.0.token_ids.0"),
    "no ids": (first_choice(token_ids=None), "a wrong choices.0.token_ids"),
    "nothing": (first_choice(token_ids=[], finish_reason="length"), "without a token"),
    "too long": (first_choice(token_ids=[1] * 21), "more than the 20 tokens"),
    "too short": (
        altered(
            lambda whole: whole["choices"][0].update(
                token_ids=whole["choices"][0]["token_ids"][:3],
                logprobs={
                    name: value[:3] for name, value in whole["choices"][0]["logprobs"].items()
                },
            )
        ),
        "for its length after 3 of 20",
    ),
    "few logprobs": (logprobs(lambda given: given["token_logprobs"].pop()), "do not belong"),
    "shifted logprobs": (logprobs(lambda given: given["tokens"].reverse()), "do not belong"),
    "no logprobs": (first_choice(logprobs=None), "do not belong"),
    "null logprob": (
        logprobs(lambda given: given["token_logprobs"].__setitem__(0, None)),
        "a wrong choices.0.logprobs.token_logprobs.0",
    ),
    "nan logprob": (
        logprobs(lambda given: given["token_logprobs"].__setitem__(0, float("nan"))),
        "a wrong choices.0.logprobs.token_logprobs.0",
    ),
    "positive logprob": (
        logprobs(lambda given: given["token_logprobs"].__setitem__(0, 0.5)),
        "a log-probability that is none",
    ),
    "aborted": (first_choice(finish_reason="abort"), "finish reason 'abort'"),
    "unfinished": (first_choice(finish_reason=None), "finish reason None"),
    "foreign stop": (
        first_choice(finish_reason="stop", stop_reason=5),
        "stopped at 5, which is no stop id",
    ),
    "another prompt": (first_choice(prompt_token_ids=[9]), "continued another prompt"),
    "no prompt": (first_choice(prompt_token_ids=None), "which prompt ids it used"),
    "another request": (
        altered(lambda whole: whole.update(id="cmpl-other")),
        "with the answer to 'cmpl-other'",
    ),
    "another model": (
        altered(lambda whole: whole.update(model="other")),
        "answered as model 'other', not 'tiny'",
    ),
    "two answers": (
        altered(lambda whole: whole["choices"].append(whole["choices"][0])),
        "several answers",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_answer_is_the_servers_fault_and_another_one_is_asked(make, connect, caplog, fault):
    behaviour, sentence = FAULTS[fault]
    servers = [make(), make()]
    for server in servers:
        server.misbehave.append(behaviour)
        if fault == "closed":
            server.misbehave.append(behaviour)  # the first close may be that of an idle connection
    engine = connect(*servers)
    one = asked(seed=3)
    with caplog.at_level(logging.WARNING):
        (turn,) = run_all(engine, [one])
    assert (turn.token_ids, turn.finish) == expected(one)
    assert len(turn.logprobs) == len(turn.token_ids)
    ids = [i for server in servers for i in server.asked]
    assert set(ids) == {one.request_id}
    assert sum((server.answered for server in servers), Counter()) == {one.request_id: 1}
    out = [r.getMessage() for r in caplog.records if "is out" in r.getMessage()]
    assert 1 <= len(out) <= 2
    assert all(any(server.url in said for server in servers) for said in out)
    assert all(sentence in said for said in out)
    assert (engine.stats.requests, engine.stats.generated_tokens) == (1, len(turn.token_ids))


def test_a_fault_of_the_request_is_an_error_and_is_not_repeated(make, connect):
    servers = [make(), make()]
    for server in servers:
        server.always = status(400, "This model's maximum context length is 7 tokens")
    engine = connect(*servers)
    with pytest.raises(EngineError, match=r"refuses request t/0@1/0.0#0: 400 .*maximum context"):
        run_all(engine, [asked()])
    assert sum(len(server.asked) for server in servers) == 1
    for server in servers:
        server.always = None
    assert run_all(engine, [asked()])[0].token_ids  # nobody was taken out


def test_a_request_that_breaks_every_server_is_given_up(make, connect):
    servers = [make(), make()]
    for server in servers:
        server.always = status(500, "illegal memory access")
    engine = connect(*servers)
    with pytest.raises(EngineError, match="was given up: http://.*illegal memory access"):
        run_all(engine, [asked()])
    assert sum(len(server.asked) for server in servers) == 4
    for server in servers:
        server.always = None
    assert run_all(engine, [asked()])[0].token_ids


def test_busy_servers_are_waited_for(make, connect):
    server = make()
    server.misbehave.extend([status(429, **{"Retry-After": "1"}), *[status(503)] * 3])
    engine = connect(server)
    started = time.monotonic()
    assert run_all(engine, [asked()])[0].token_ids
    assert time.monotonic() - started >= 1
    assert server.asked == ["t/0@1/0.0#0"] * 5


def test_a_server_that_hangs_is_left_after_the_time_limit(make, connect, caplog):
    servers = [make(), make()]
    for server in servers:
        server.misbehave.append(loopback.hang)
    engine = connect(*servers, timeout_s=0.3)
    with caplog.at_level(logging.WARNING):
        (turn,) = run_all(engine, [asked()])
    assert turn.token_ids == expected(asked())[0]
    assert "no answer in 0 s" in caplog.text
    assert sum(len(server.aborted) for server in servers) >= 1


def test_a_server_that_gives_no_sign_of_life_is_left_long_before(make, connect, caplog):
    servers = [make(), make()]
    engine = connect(*servers, check_s=0.1)
    for server in servers:
        server.delay_s = 0.4
    servers[0].always, servers[0].healthy = loopback.hang, False
    requests = [asked(seed=n) for n in range(20)]
    with caplog.at_level(logging.WARNING):
        turns = run_all(engine, requests)
    assert [t.token_ids for t in turns] == [expected(one)[0] for one in requests]
    assert f"{servers[0].url} is out (gave no sign of life" in caplog.text
    assert f"{servers[1].url} is out" not in caplog.text
    assert sorted(servers[0].aborted) == sorted(servers[0].asked) != []


def test_a_server_killed_amid_work_loses_and_doubles_nothing(make, connect):
    servers = [make(), make()]
    for server in servers:
        server.delay_s = 0.01
    engine = connect(*servers)
    requests = [asked(p, seed=n, stop=(7,)) for n, p in enumerate(prompts(300, high=30))]

    async def main():
        asking = asyncio.gather(*(engine.generate(one) for one in requests))
        while len(servers[0].answered) < 30:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(servers[0].stop)
        while len(servers[1].answered) < 150:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(servers[0].start)
        return await asking

    turns = asyncio.run(main())
    assert [(t.token_ids, t.finish) for t in turns] == [expected(one) for one in requests]
    assert engine.stats.requests == 300
    assert engine.stats.generated_tokens == sum(len(t.token_ids) for t in turns)
    assert set(servers[0].asked) | set(servers[1].asked) == {one.request_id for one in requests}
    for _ in range(100):  # what was killed comes back
        before = len(servers[0].answered)
        run_all(engine, [asked(seed=n) for n in range(1000, 1020)])
        if len(servers[0].answered) > before:
            return
        time.sleep(0.02)
    pytest.fail("the restarted server was never used again")


def test_all_servers_down_is_a_pause(make, connect):
    servers = [make(), make()]
    engine = connect(*servers)
    for server in servers:
        server.stop()

    async def main():
        waiting = [asyncio.create_task(engine.generate(asked(seed=n))) for n in range(5)]
        await asyncio.sleep(0.5)
        assert not any(task.done() for task in waiting)
        await asyncio.to_thread(servers[1].start)
        return await asyncio.gather(*waiting)

    assert [t.token_ids for t in asyncio.run(main())] == [
        expected(asked(seed=n))[0] for n in range(5)
    ]


def test_all_servers_down_for_too_long_is_a_clear_error_and_then_a_quick_one(make, connect):
    servers = [make(), make()]
    engine = connect(*servers, patience_s=1.0)
    for server in servers:
        server.stop()
    started = time.monotonic()
    with pytest.raises(EngineError, match="no server has worked for 1 s") as caught:
        run_all(engine, [asked(seed=n) for n in range(5)])
    assert all(f"{server.url}: no connection" in str(caught.value) for server in servers)
    assert time.monotonic() - started < 4
    started = time.monotonic()
    with pytest.raises(EngineError, match="no server has worked"):
        run_all(engine, [asked()])
    assert time.monotonic() - started < 0.5
    servers[0].start()
    for _ in range(200):
        try:
            assert run_all(engine, [asked()])[0].token_ids
            return
        except EngineError:
            time.sleep(0.05)
    pytest.fail("the server came back and was not used")


@pytest.mark.parametrize(
    ("behaviour", "sentence"),
    [
        (loopback.broken_stream, "broke off in the middle"),
        (loopback.stream_error, "broke off with: engine died"),
        (status(500), "500"),
    ],
)
def test_a_broken_stream_leaves_no_token_behind(make, connect, caplog, behaviour, sentence):
    server = make()
    server.misbehave.extend([behaviour, behaviour])
    engine = connect(server)
    one = asked()
    with caplog.at_level(logging.WARNING):
        (turn,) = run_all(engine, [replace(one, stop_when=lambda ids: False)])
    assert turn.token_ids == expected(one)[0]
    assert engine.stats.generated_tokens == 20
    assert sentence in caplog.text


def test_a_wall_clock_that_jumps_changes_nothing(make, connect, monkeypatch):
    servers = [make(), make()]
    engine = connect(*servers)
    servers[0].stop()
    now = time.time()
    jumps = iter([0, 1e9, -1e9, 5e8] * 100_000)
    monkeypatch.setattr(time, "time", lambda: now + next(jumps))
    turns = run_all(engine, [asked(seed=n) for n in range(30)])
    assert [t.token_ids for t in turns] == [expected(asked(seed=n))[0] for n in range(30)]
