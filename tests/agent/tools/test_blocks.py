"""Blocksworld: hand-computed states, reasons for refusals, and invariants of any play."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.tools.arguments import Refused
from agent.tools.blocks import Blocks, BlocksTool
from trajectory.errors import InputError
from trajectory.records import Task

START = ("handempty", "ontable a", "ontable c", "ontable d", "on b c", "clear a", "clear b")


def played(*actions, start=START):
    state = Blocks.from_facts(start)
    for action in actions:
        state = state.act(action)
    return state


def task(**meta):
    return Task(task_id="t", domain="planning", prompt="p", answer="a", meta=meta)


def test_the_state_is_shown_in_words():
    assert played().words() == (
        "Hand: empty. On the table: a, c, d. Stacked: b on c. Clear: a, b, d."
    )


def test_each_action_does_what_its_name_says():
    assert played("unstack b from c").facts() == {
        "holding b", "ontable a", "ontable c", "ontable d", "clear a", "clear c", "clear d",
    }  # fmt: skip
    assert played("unstack b from c", "stack b on a").facts() == {
        "handempty", "ontable a", "ontable c", "ontable d", "on b a", "clear b", "clear c",
        "clear d",
    }  # fmt: skip
    assert played("unstack b from c", "put-down b", "pick-up c").held == "c"


@pytest.mark.parametrize(
    "spelled",
    [
        "unstack b c",
        "(unstack b c)",
        "Unstack B from C.",
        "unstack the block b from on top of the block c",
        "unstack(b, c)",
    ],
)
def test_spellings_of_one_action(spelled):
    assert played(spelled) == played("unstack b from c")


@pytest.mark.parametrize("spelled", ["pick up a", "pick-up a", "PICK_UP block a", "(pick-up a)"])
def test_spellings_of_pick_up(spelled):
    assert played(spelled).held == "a"


def test_a_block_may_be_called_like_a_filler_word():
    assert played("pick up the block top", start=["ontable top"]).held == "top"


@pytest.mark.parametrize(
    ("actions", "reason"),
    [
        (["pick-up c"], "c is not clear, b is on it"),
        (["pick-up b"], "b is on c; unstack b from c would take it"),
        (["unstack a from c"], "a is on the table; pick-up a would take it"),
        (["unstack b from a"], "b is on c; unstack b from c would take it"),
        (["pick-up a", "pick-up d"], "your hand is not empty, it holds a"),
        (["pick-up a", "pick-up a"], "your hand is not empty, it holds a"),
        (["put-down a"], "you are not holding a"),
        (["pick-up a", "stack d on b"], "you are not holding d"),
        (["pick-up a", "stack a on c"], "c is not clear, b is on it"),
        (["pick-up a", "stack a on a"], "you are holding a"),
    ],
)
def test_an_impossible_action_is_refused_with_the_reason(actions, reason):
    before = played(*actions[:-1])
    with pytest.raises(Refused, match=f"^{reason}$") as refused:
        before.act(actions[-1])
    assert refused.value.problem == "impossible"


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("", "'' is no action: write pick-up a"),
        ("move a to b", "'move a to b' is no action"),
        ("stack a", r"stack names 2 block\(s\), not 1"),
        ("pick-up a b", r"pick-up names 1 block\(s\), not 2"),
        ("pick-up z", "there is no block 'z'; blocks: a, b, c, d"),
        ("pick-up a then put-down a", "there is no block 'then'"),
    ],
)
def test_what_is_no_action_is_answered_with_the_form(action, reason):
    with pytest.raises(Refused, match=reason) as refused:
        played().act(action)
    assert refused.value.problem == "unknown_action"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ([], "cannot be so"),
        (["on a b"], "cannot be so"),
        (["on a b", "on b a"], "cannot be so"),
        (["ontable a", "on b a", "on c a"], "cannot be so"),
        (["ontable a", "on a b", "ontable b"], "'a' is in two places"),
        (["holding a", "ontable a"], "'a' is in two places"),
        (["holding a", "holding b"], "holding b cannot be so"),
        (["ontable a", "on b a", "clear a"], "clear a cannot be so"),
        (["holding a", "handempty"], "handempty cannot be so"),
        (["ontable a b"], "'ontable a b' is no fact"),
        ([""], "'' is no fact"),
    ],
)
def test_an_impossible_state_is_refused(facts, words):
    with pytest.raises(InputError, match=words):
        Blocks.from_facts(facts)


def test_a_refused_call_says_that_nothing_changed_and_shows_the_state():
    async def run():
        session = await BlocksTool().open(task(blocks={"init": list(START)}), 0)
        refused = await session.call({"action": "pick-up c"})
        return refused, await session.call({"action": "pick-up a"})

    refused, done = asyncio.run(run())
    assert refused.error == "impossible"
    assert refused.content == (
        "Refused: c is not clear, b is on it. Nothing has changed. "
        "Hand: empty. On the table: a, c, d. Stacked: b on c. Clear: a, b, d."
    )
    assert (done.error, done.content.split(". ")[:2]) == (None, ["Done", "Hand: a"])


@pytest.mark.parametrize("meta", [{}, {"blocks": 3}, {"blocks": {"init": "on a b"}}])
def test_a_task_without_blocks_is_refused_with_what_to_do(meta):
    with pytest.raises(InputError, match=r"'t' has no blocks.*planning:blocksworld:FILE"):
        asyncio.run(BlocksTool().open(task(**meta), 0))


@st.composite
def plays(draw):
    """A start state of up to six blocks and the numbers that choose among actions."""
    names = [f"b{n}" for n in range(draw(st.integers(1, 6)))]
    facts = []
    for number, name in enumerate(names):
        free = [under for under in names[:number] if not any(f.endswith(f" {under}") for f in facts
                if f.startswith("on "))]  # fmt: skip
        under = draw(st.sampled_from([None, *free]))
        facts.append(f"ontable {name}" if under is None else f"on {name} {under}")
    return facts, draw(st.lists(st.integers(0, 10**6), max_size=25))


def legal(state):
    """Every action that the preconditions of the PDDL domain allow, read off the facts alone."""
    facts, names = state.facts(), state.names
    found = []
    for x in names:
        if {f"clear {x}", f"ontable {x}", "handempty"} <= facts:
            found.append(f"pick-up {x}")
        if f"holding {x}" in facts:
            found.append(f"put-down {x}")
        for y in names:
            if {f"on {x} {y}", f"clear {x}", "handempty"} <= facts:
                found.append(f"unstack {x} from {y}")
            if {f"holding {x}", f"clear {y}"} <= facts:
                found.append(f"stack {x} on {y}")
    return found


def every_action(names):
    yield from (f"{kind} {x}" for kind in ("pick-up", "put-down") for x in names)
    yield from (f"{kind} {x} {y}" for kind in ("stack", "unstack") for x in names for y in names)


@given(plays())
def test_any_play_keeps_every_block_in_exactly_one_place(play):
    facts, choices = play
    state = Blocks.from_facts(facts)
    names = state.names
    for choice in choices:
        actions = legal(state)
        state = state.act(actions[choice % len(actions)])
        places = [
            f.split()[1] for f in state.facts() if f.split()[0] in ("on", "ontable", "holding")
        ]
        assert sorted(places) == names
        assert Blocks.from_facts(state.facts()) == state


@given(plays())
def test_exactly_the_legal_actions_are_possible(play):
    facts, choices = play
    state = Blocks.from_facts(facts)
    for choice in choices[:6]:
        actions = legal(state)
        state = state.act(actions[choice % len(actions)])
    done = set()
    for action in every_action(state.names):
        try:
            done.add(state.act(action).facts())
        except Refused:
            continue
    assert done == {state.act(action).facts() for action in legal(state)}


@given(plays(), st.integers(0, 25))
def test_a_branch_equals_replaying_the_actions_and_is_independent(play, length):
    facts, choices = play
    state, actions = Blocks.from_facts(facts), []
    for choice in choices:
        actions.append(legal(state)[choice % len(legal(state))])
        state = state.act(actions[-1])

    async def run():
        tool, about = BlocksTool(), task(blocks={"init": facts})
        session, again = await tool.open(about, 0), await tool.open(about, 1)
        for action in actions[:length]:
            await session.call({"action": action})
            await again.call({"action": action})
        branch = await session.branch()
        for action in actions[length:]:
            await session.call({"action": action})
        assert branch.state == again.state
        for action in actions[length:]:
            await branch.call({"action": action})
        assert branch.state == session.state == state

    asyncio.run(run())
