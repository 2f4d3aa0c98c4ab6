"""The `blocks` tool: Blocksworld, four actions of one hand on blocks that stand on a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent.tools.arguments import Refused, text_argument, text_schema
from agent.tools.base import SideEffect
from trajectory.errors import InputError
from trajectory.records import JsonValue, Observation, Task

META = "blocks"
"""Key of a task's ``meta`` that holds ``{"init": [fact, ...]}``."""
_FACTS = {"on": 2, "ontable": 1, "clear": 1, "holding": 1, "handempty": 0}
"""Kinds of facts, and how many blocks each names."""
_ACTIONS = {"pick-up": 1, "put-down": 1, "stack": 2, "unstack": 2}
"""Actions, and how many blocks each names."""
_FILLERS = frozenset({"the", "block", "on", "onto", "from", "top", "of", "to", "table"})
_FORM = "write pick-up a, put-down a, stack a on b, or unstack a from b"


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Where every block is: on the table, on another block, or in the hand."""

    below: Mapping[str, str | None]
    """What each block but the held one stands on; None for the table."""
    held: str | None
    """The block in the hand; None if it is empty."""

    @classmethod
    def from_facts(cls, facts: Iterable[str]) -> Blocks:
        """Read a state from facts such as ``on a b``, ``ontable b``, ``clear a``, ``handempty``.

        Raises
        ------
        InputError
            If they describe no possible state: a block in no place or in two, a ring, two blocks
            on one, or a ``clear`` or ``handempty`` that is not so.

        Examples
        --------
        >>> Blocks.from_facts(["ontable b", "on a b", "handempty"]).words()
        'Hand: empty. On the table: b. Stacked: a on b. Clear: a.'
        """
        given = {normal_fact(fact) for fact in facts}
        below: dict[str, str | None] = {}
        held: str | None = None
        for kind, *names in (fact.split() for fact in sorted(given)):
            if kind in ("on", "ontable", "holding"):
                if names[0] in below or names[0] == held:
                    raise InputError(f"block {names[0]!r} is in two places: give it one")
                if kind != "holding":
                    below[names[0]] = names[1] if kind == "on" else None
                elif held is None:
                    held = names[0]
        state = cls(below=below, held=held)
        wrong = given - state.facts()
        if wrong or not state._stands():
            raise InputError(
                f"the facts {', '.join(sorted(wrong or given))} cannot be so: every block needs "
                "one place, and the blocks it stands on lead to the table"
            )
        return state

    @property
    def names(self) -> list[str]:
        """All blocks, sorted."""
        return sorted([*self.below, *([] if self.held is None else [self.held])])

    def above(self, block: str) -> str | None:
        """Return the block that stands on ``block``, if any."""
        return next((name for name, under in self.below.items() if under == block), None)

    def facts(self) -> frozenset[str]:
        """Return the state as facts, in the words of the PDDL domain."""
        places = {
            f"ontable {name}" if under is None else f"on {name} {under}"
            for name, under in self.below.items()
        }
        clear = {f"clear {name}" for name in self.below if self.above(name) is None}
        hand = "handempty" if self.held is None else f"holding {self.held}"
        return frozenset(places | clear | {hand})

    def words(self) -> str:
        """Return the state as the model reads it."""
        listed = {
            "On the table": [name for name in sorted(self.below) if self.below[name] is None],
            "Stacked": [f"{name} on {self.below[name]}" for name in self.names if self._on(name)],
            "Clear": [name for name in sorted(self.below) if self.above(name) is None],
        }
        lists = (f" {title}: {', '.join(names) or 'nothing'}." for title, names in listed.items())
        return f"Hand: {self.held or 'empty'}.{''.join(lists)}"

    def act(self, action: str) -> Blocks:
        """Return the state after an action such as ``unstack a from b``.

        Raises
        ------
        Refused
            If the text is no action, or the action cannot be done in this state.

        Examples
        --------
        >>> state = Blocks.from_facts(["ontable b", "on a b"])
        >>> state.act("unstack a from b").act("put-down a").words()
        'Hand: empty. On the table: a, b. Stacked: nothing. Clear: a, b.'
        """
        kind, block, other = self._parse(action)
        if kind in ("pick-up", "unstack"):
            self._check_taken(block, other)
            rest = {name: under for name, under in self.below.items() if name != block}
            return Blocks(below=rest, held=block)
        if self.held != block:
            raise Refused("impossible", f"you are not holding {block}")
        if other is not None:
            self._check_clear(other)
        return Blocks(below={**self.below, block: other}, held=None)

    def _parse(self, action: str) -> tuple[str, str, str | None]:
        """Return an action's kind, its block, and the block it is put on or taken from."""
        spelled = re.sub(r"^\W*(pick|put)[\s_-]*(up|down)\b", r"\1-\2 ", action[:200].lower())
        kind, *words = re.findall(r"[\w-]+", spelled) or [""]
        if kind not in _ACTIONS:
            raise Refused("unknown_action", f"{action[:60]!r} is no action: {_FORM}")
        blocks = [word for word in words if word in self.names or word not in _FILLERS]
        unknown = [word for word in blocks if word not in self.names]
        if unknown:
            known = ", ".join(self.names)
            raise Refused("unknown_action", f"there is no block {unknown[0]!r}; blocks: {known}")
        if len(blocks) != _ACTIONS[kind]:
            raise Refused(
                "unknown_action", f"{kind} names {_ACTIONS[kind]} block(s), not {len(blocks)}"
            )
        return kind, blocks[0], blocks[1] if len(blocks) == 2 else None

    def _check_taken(self, block: str, support: str | None) -> None:
        """Refuse to take a block that cannot be taken from ``support`` (None: the table)."""
        if self.held is not None:
            raise Refused("impossible", f"your hand is not empty, it holds {self.held}")
        under = self.below[block]
        if under != support:
            use = f"unstack {block} from {under}" if under else f"pick-up {block}"
            place = f"{block} is on {under or 'the table'}"
            raise Refused("impossible", f"{place}; {use} would take it")
        self._check_clear(block)

    def _check_clear(self, block: str) -> None:
        """Refuse a block that is held or that another one stands on."""
        if block == self.held:
            raise Refused("impossible", f"you are holding {block}")
        above = self.above(block)
        if above is not None:
            raise Refused("impossible", f"{block} is not clear, {above} is on it")

    def _on(self, block: str) -> bool:
        """Whether a block stands on another one."""
        return self.below.get(block) is not None

    def _stands(self) -> bool:
        """Whether every block rests, through blocks that carry one each, on the table."""
        supports = [under for under in self.below.values() if under is not None]
        if len(set(supports)) != len(supports) or not self.names:
            return False
        resting = {name for name, under in self.below.items() if under is None}
        while True:
            higher = {name for name, under in self.below.items() if under in resting} - resting
            if not higher:
                return len(resting) == len(self.below)
            resting |= higher


def normal_fact(fact: str) -> str:
    """Return a fact in lower case with single spaces.

    Raises
    ------
    InputError
        If it is none of ``on x y``, ``ontable x``, ``clear x``, ``holding x``, ``handempty``.

    Examples
    --------
    >>> normal_fact(" ON a  b")
    'on a b'
    """
    kind, *names = fact.lower().split() or [""]
    if _FACTS.get(kind) != len(names):
        raise InputError(
            f"{fact!r} is no fact of Blocksworld: write on x y, ontable x, clear x, holding x or "
            "handempty"
        )
    return " ".join([kind, *names])


class BlocksSession:
    """The blocks of one episode."""

    def __init__(self, state: Blocks) -> None:
        self.state = state

    async def call(self, arguments: Mapping[str, JsonValue]) -> Observation:
        """Do one action and show the state; what cannot be done is refused with the reason."""
        action = text_argument(arguments, "action")
        if isinstance(action, Observation):
            return action
        try:
            self.state = self.state.act(action)
        except Refused as refusal:
            return Observation(
                content=f"Refused: {refusal}. Nothing has changed. {self.state.words()}",
                error=refusal.problem,
            )
        return Observation(content=f"Done. {self.state.words()}")

    async def branch(self) -> BlocksSession:
        """Return a session in the same state."""
        return BlocksSession(self.state)

    async def close(self) -> None:
        """Do nothing: nothing is held."""


class BlocksTool:
    """One hand that moves blocks; only for tasks that say where the blocks are at first."""

    def __init__(self) -> None:
        self.name = "blocks"
        self.description = (
            "Move one block with your hand. Actions: pick-up a (from the table), put-down a (on "
            "the table), stack a on b, unstack a from b. Returns where all blocks are then."
        )
        self.parameters: Mapping[str, JsonValue] = text_schema(
            "action", "One action, for example unstack a from b."
        )
        self.effect = SideEffect.STATEFUL

    async def open(self, task: Task, seed: int) -> BlocksSession:
        """Begin in the task's initial state; nothing is random.

        Raises
        ------
        InputError
            If the task has no such state, or it is impossible.
        """
        return BlocksSession(initial_blocks(task))


def initial_blocks(task: Task) -> Blocks:
    """Return the state in which a task begins.

    Raises
    ------
    InputError
        If it has none, or it is impossible.
    """
    about = task.meta.get(META)
    facts = about.get("init") if isinstance(about, dict) else None
    if not isinstance(facts, list):
        raise InputError(
            f"the task {task.task_id!r} has no blocks, so the tool 'blocks' cannot be used on it: "
            "take --tasks planning:blocksworld:FILE.jsonl or leave the tool out of --tools"
        )
    return Blocks.from_facts(str(fact) for fact in facts)
