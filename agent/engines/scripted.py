"""A deterministic engine that follows a script: tests and demonstrations run in seconds.

It is a real engine as far as callers can tell: ids in, ids out, stop ids, token limits, seeds,
concurrency and failures; only the choice of words comes from a script instead of a model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from agent.engines.base import (
    EngineError,
    EngineOptions,
    EngineStats,
    GenerateRequest,
    Generation,
)
from agent.engines.checks import check_options, check_request
from trajectory.errors import InputError

Script = Callable[[str, int], str]
"""From the prompt's text and the request's seed to the text of the turn."""


class Codec(Protocol):
    """The part of a Hugging Face tokenizer that a script needs."""

    def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text, without beginning or end markers."""
        ...

    def decode(self, ids: list[int], /) -> str:
        """Return the text of some ids, special tokens included."""
        ...


class CharacterCodec:
    """One id per character: its code point plus one; id 0 is free for an end marker."""

    def encode(self, text: str, /, *, add_special_tokens: bool = False) -> list[int]:
        """Return one id per character.

        Examples
        --------
        >>> CharacterCodec().decode(CharacterCodec().encode("2+2"))
        '2+2'
        """
        return [ord(character) + 1 for character in text]

    def decode(self, ids: list[int], /) -> str:
        """Return the text; the end marker becomes a newline."""
        return "".join(chr(i - 1) if i > 0 else "\n" for i in ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """When a scripted engine misbehaves."""

    fail_at: frozenset[int] = frozenset()
    """Numbers of the requests (counted from 1) that end with `EngineError`."""
    delay_s: float = 0.0
    """Time each request takes, seconds."""


class ScriptedEngine:
    """Answer each prompt with what a script says.

    Parameters
    ----------
    turns : callable, mapping or sequence of str
        A function of (prompt text, seed); or a table from a substring of the prompt to the turns
        to choose from, where the last key (in table order) found wins; or a list of turns to
        choose from whatever the prompt. The choice among several is ``seed`` modulo their number.
    codec : Codec, optional
        A tokenizer; one id per character when not given.
    policy : str
        Name stamped into trajectories.
    max_context : int
        Longest prompt plus generation, tokens.
    faults : Faults
        Failures and delays.

    Examples
    --------
    >>> import asyncio
    >>> from trajectory.records import Sampling
    >>> engine = ScriptedEngine({"2+2": "4", "3+3": ("6", "7")})
    >>> request = GenerateRequest(
    ...     request_id="a",
    ...     prompt_ids=tuple(CharacterCodec().encode("3+3=")),
    ...     sampling=Sampling(),
    ...     seed=1,
    ...     stop_ids=(0,),
    ... )
    >>> turn = asyncio.run(engine.generate(request))
    >>> CharacterCodec().decode(list(turn.token_ids[:-1])), turn.finish
    ('7', 'stop')
    """

    name = "scripted"

    def __init__(
        self,
        turns: Script | Mapping[str, str | Sequence[str]] | Sequence[str],
        *,
        codec: Codec | None = None,
        policy: str = "scripted",
        max_context: int = 4096,
        faults: Faults | None = None,
    ) -> None:
        self.policy = policy
        self.revision = "0"
        self.max_context = max_context
        self.stats = EngineStats()
        self._script = turns if callable(turns) else _table_script(turns)
        self._codec: Codec = codec or CharacterCodec()
        self._faults = faults or Faults()
        self._closed = False

    @classmethod
    def from_options(cls, options: EngineOptions) -> ScriptedEngine:
        r"""Make the engine of the table: it guesses ``\boxed{d}`` with the digit the seed gives.

        The policy's tokenizer encodes the turns; the policy ``scripted`` needs none.
        """
        check_options(options)
        codec: Codec | None = None
        if options.policy != "scripted":
            codec = _load_tokenizer(options.policy)
        return cls(
            lambda prompt, seed: f"\\boxed{{{seed % 10}}}",
            codec=codec,
            policy=options.policy,
            max_context=options.max_context,
        )

    async def generate(self, request: GenerateRequest) -> Generation:
        """Give the scripted turn, ended by the first stop id, or cut at ``max_tokens``.

        Log-probabilities are 0: the script leaves no choice.
        """
        if self._closed:
            raise EngineError("the engine is closed")
        check_request(request, max_context=self.max_context, vocabulary=None)
        self.stats.requests += 1
        number = self.stats.requests
        await asyncio.sleep(self._faults.delay_s)
        if self._closed:
            raise EngineError("the engine was closed")
        if number in self._faults.fail_at:
            raise EngineError(f"scripted failure of request {number}")
        text = self._script(self._codec.decode(list(request.prompt_ids)), request.seed)
        ids = self._codec.encode(text, add_special_tokens=False)
        limit = min(request.sampling.max_tokens, self.max_context - len(request.prompt_ids))
        kept = _ended(ids, request)
        cut = len(kept) > limit or not _ends(kept, request)
        generation = Generation(
            token_ids=tuple(kept[:limit]),
            logprobs=(0.0,) * len(kept[:limit]),
            finish="length" if cut else "stop",
        )
        self.stats.prompt_tokens += len(request.prompt_ids)
        self.stats.generated_tokens += len(generation.token_ids)
        return generation

    async def close(self) -> None:
        """Refuse further requests and end delayed ones with `EngineError`."""
        self._closed = True


def _table_script(turns: Mapping[str, str | Sequence[str]] | Sequence[str]) -> Script:
    """Turn a table, or a list of turns for any prompt, into a function."""
    table = turns if isinstance(turns, Mapping) else {"": turns}
    choices = {
        key: (value,) if isinstance(value, str) else tuple(value) for key, value in table.items()
    }
    if not choices or not all(choices.values()):
        raise InputError("a scripted engine needs at least one turn for every key of its table")

    def script(prompt: str, seed: int) -> str:
        found = [key for key in choices if key in prompt]
        if not found:
            raise EngineError(f"the script has no turn for a prompt that ends {prompt[-80:]!r}")
        options = choices[found[-1]]
        return options[seed % len(options)]

    return script


def _ends(ids: Sequence[int], request: GenerateRequest) -> bool:
    """Whether a turn of these ids ends after the last one."""
    return bool(ids) and (
        ids[-1] in request.stop_ids
        or (request.stop_when is not None and request.stop_when(list(ids)))
    )


def _ended(ids: list[int], request: GenerateRequest) -> list[int]:
    """Cut a turn after the first id that ends it; if none does, end it with a stop id."""
    for length in range(1, len(ids) + 1):
        if _ends(ids[:length], request):
            return ids[:length]
    return [*ids, *request.stop_ids[:1]]


def _load_tokenizer(policy: str) -> Codec:
    """Load the tokenizer of a policy."""
    from transformers import AutoTokenizer

    try:
        return cast("Codec", AutoTokenizer.from_pretrained(policy))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the tokenizer of the policy {policy}") from error
