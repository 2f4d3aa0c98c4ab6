import asyncio
import time

import pytest

from agent.engines import build_engine
from agent.engines.base import EngineError, EngineOptions
from agent.engines.scripted import CharacterCodec, Faults, ScriptedEngine
from tests.agent.engines.tiny import request, run_all
from trajectory.errors import InputError

CODEC = CharacterCodec()


def ask(text: str, **settings):
    return request(CODEC.encode(text), **({"stop": (0,)} | settings))


def texts(engine, requests):
    return [CODEC.decode(list(turn.token_ids)) for turn in run_all(engine, requests)]


def test_a_function_sees_the_prompt_and_the_seed():
    engine = ScriptedEngine(lambda prompt, seed: f"{prompt[::-1]}{seed}")
    assert texts(engine, [ask("ab", seed=4)]) == ["ba4\n"]


def test_the_last_key_of_the_table_found_in_the_prompt_wins():
    engine = ScriptedEngine({"2+2": "4", "result": "done"})
    assert texts(engine, [ask("2+2"), ask("2+2 result")]) == ["4\n", "done\n"]


def test_the_seed_chooses_among_several_turns():
    engine = ScriptedEngine(["a", "b", "c"])
    assert texts(engine, [ask("?", seed=s) for s in range(4)]) == ["a\n", "b\n", "c\n", "a\n"]


def test_the_turn_ends_at_the_first_stop_id_of_the_script_itself():
    (turn,) = run_all(ScriptedEngine(["yes no"]), [ask("?", stop=CODEC.encode(" "))])
    assert CODEC.decode(list(turn.token_ids)) == "yes "
    assert turn.finish == "stop"
    assert turn.logprobs == (0.0,) * 4


def test_a_long_turn_is_cut_at_max_tokens():
    (turn,) = run_all(ScriptedEngine(["123456789"]), [ask("?", max_tokens=5)])
    assert CODEC.decode(list(turn.token_ids)) == "12345"
    assert turn.finish == "length"


def test_a_prompt_without_a_turn_is_an_engine_error():
    with pytest.raises(EngineError, match="no turn for a prompt that ends 'abc'"):
        run_all(ScriptedEngine({"x": "y"}), [ask("abc")])


def test_the_chosen_request_fails_and_the_others_do_not():
    engine = ScriptedEngine(["a"], faults=Faults(fail_at=frozenset({2})))
    assert texts(engine, [ask("?")]) == ["a\n"]
    with pytest.raises(EngineError, match="request 2"):
        run_all(engine, [ask("?")])
    assert texts(engine, [ask("?")]) == ["a\n"]
    assert engine.stats.requests == 3


def test_delays_overlap():
    engine = ScriptedEngine(["a"], faults=Faults(delay_s=0.2))
    started = time.monotonic()
    run_all(engine, [ask("?")] * 10)
    assert 0.2 <= time.monotonic() - started < 1.5


def test_closing_ends_pending_and_later_requests():
    engine = ScriptedEngine(["a"], faults=Faults(delay_s=0.05))

    async def main():
        pending = asyncio.create_task(engine.generate(ask("?")))
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await pending
        with pytest.raises(EngineError, match="closed"):
            await engine.generate(ask("?"))

    asyncio.run(main())


def test_an_empty_script_is_refused():
    with pytest.raises(InputError, match="at least one turn"):
        ScriptedEngine({"key": ()})


def test_the_engine_of_the_table_guesses_the_digit_of_the_seed():
    engine = build_engine("scripted", EngineOptions(policy="scripted"))
    assert texts(engine, [ask("What is 3 + 4?", seed=17)]) == ["\\boxed{7}\n"]
