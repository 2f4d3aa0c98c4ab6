"""The http engine against servers on loopback that misbehave in every way we know of."""

import asyncio
import importlib.util
import logging
import threading
import time
from dataclasses import replace

import pytest

from agent.engines import build_engine, check_engine
from agent.engines.base import EngineError, EngineOptions
from agent.engines.http import HttpEngine
from agent.engines.servers import Servers, parse_servers
from tests.agent.engines import loopback
from tests.agent.engines.loopback import Loopback, altered, dice, status
from tests.agent.engines.shared_vllm import shared_folder
from tests.agent.engines.tiny import VOCABULARY, prompts, request, run_all
from trajectory.errors import InputError


@pytest.fixture(scope="module")
def folder():
    return str(shared_folder())


@pytest.fixture
def make():
    """Make servers that are closed at the end."""
    made = []

    def server(**settings):
        made.append(Loopback(**settings).start())
        return made[-1]

    yield server
    for one in made:
        one.close()


@pytest.fixture
def connect(folder):
    """Make engines that are closed at the end."""
    made = []

    def engine(*servers, max_batch=64, **limits):
        urls = tuple(one if isinstance(one, str) else one.url for one in servers)
        settings = {"patience_s": 5.0, "timeout_s": 20.0, "backoff_s": 0.05, "check_s": 5.0}
        options = EngineOptions(policy=folder, max_context=256, max_batch=max_batch)
        made.append(HttpEngine(options, Servers(urls=urls, **(settings | limits))))
        return made[-1]

    yield engine
    for one in made:
        asyncio.run(one.close())


def asked(prompt=(1, 2, 3), **settings):
    one = request(prompt, **settings)
    return replace(one, request_id=f"t/0@1/{one.seed}.0#0")


def expected(one):
    """What a good server answers: ids and finish."""
    ids, _, finish = dice(
        {
            "prompt": list(one.prompt_ids),
            "seed": one.seed,
            "max_tokens": one.sampling.max_tokens,
            "stop_token_ids": list(one.stop_ids),
            "top_k": one.sampling.top_k,
        }
    )
    return tuple(ids), finish


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
    assert sum((server.answered for server in servers), loopback.Counter()) == {one.request_id: 1}
    out = [r.getMessage() for r in caplog.records if "is out" in r.getMessage()]
    assert 1 <= len(out) <= 2
    assert all(any(server.url in said for server in servers) for said in out)
    assert all(sentence in said for said in out)
    assert (engine.stats.requests, engine.stats.generated_tokens) == (1, len(turn.token_ids))


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
    for n in range(200):
        run_all(engine, [asked(seed=n)])
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


def test_a_wall_clock_that_jumps_changes_nothing(make, connect, monkeypatch):
    servers = [make(), make()]
    engine = connect(*servers)
    servers[0].stop()
    now = time.time()
    jumps = iter([0, 1e9, -1e9, 5e8] * 100_000)
    monkeypatch.setattr(time, "time", lambda: now + next(jumps))
    turns = run_all(engine, [asked(seed=n) for n in range(30)])
    assert [t.token_ids for t in turns] == [expected(asked(seed=n))[0] for n in range(30)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("http", "names no server: give --engine http:URL"),
        ("http:", "names no server"),
        ("http:,", "names no server"),
        ("http:127.0.0.1:8000", "neither a URL nor a file"),
        ("http:http://", "is not the URL of a server"),
        ("http:http://a:99999", "is no URL"),
        ("http:http://a:0", "is not the URL of a server"),
        ("http:http://a,http://A/v1/", "names the server http://a twice"),
        ("http:http://me:pw@a", "must hold no name, password or query"),
        ("http:http://a?key=1", "must hold no name, password or query"),
        ("http:http://a,patience=-1", "patience must be seconds above 0"),
        ("http:http://a,timeout=nan", "timeout must be seconds above 0"),
        ("transformers:x", "takes nothing after its name"),
        ("https:x", "unknown engine"),
    ],
)
def test_bad_names_are_refused(name, reason):
    with pytest.raises(InputError, match=reason) as caught:
        check_engine(name)
    assert "pw" not in str(caught.value)


def test_servers_can_be_listed_in_a_file(tmp_path):
    path = tmp_path / "servers.txt"
    path.write_text("# rack 1\nhttp://a:1\n\nhttps://b/x/v1/  # spare\n")
    found = parse_servers(f"{path}, http://c,patience=7,timeout=9")
    assert found.urls == ("http://a:1", "https://b/x", "http://c")
    assert (found.patience_s, found.timeout_s) == (7, 9)


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"dtype": "float32"}])
def test_settings_that_are_the_servers_to_make_are_refused(folder, change):
    options = EngineOptions(policy=folder, max_context=256, **change)
    with pytest.raises(InputError, match="--device and --dtype do not apply"):
        build_engine("http:http://127.0.0.1:9", options)


def test_an_absent_aiohttp_is_one_clear_sentence(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="install this package with the extra 'http'"):
        build_engine("http:http://127.0.0.1:9", EngineOptions(policy=folder))
