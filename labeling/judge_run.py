"""The command ``prm judge``: a model's votes on every step of labelled trajectories.

``judgements.jsonl`` only grows, one line per step and vote, each in one write. What is left to do
is the planned votes minus those found there, so a killed run resumes without loss or doubling. A
vote that the engine broke is not written: it is asked for again, and never an abstention.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from agent.chat import ChatFormat, ChatKind
from agent.engines import build_engine, check_engine
from agent.engines.base import Engine, EngineError, EngineOptions, GenerateRequest
from labeling.inputs import LABELS, read_labels_folder
from labeling.judge import (
    VALUES,
    Abstention,
    Judgement,
    Verdict,
    data_mark,
    majority,
    parse_verdict,
    render_prompt,
)
from trajectory.errors import InputError
from trajectory.progress import Progress, progress
from trajectory.records import Sampling, Trajectory
from trajectory.run import RunFolder, config_dict, open_run
from trajectory.seeds import derive_seed
from trajectory.store import JsonlWriter, read_jsonl, repair_tail

JUDGEMENTS = "judgements.jsonl"

_ATTEMPTS = 2
"""A vote that the engine broke is asked for this often in one start."""
_FEWEST_FAILURES = 16
"""Failed votes in a row below which the engine is not taken for dead."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Ask a language model whether each step was good, neutral or bad."""

    labels: Path
    """Folder that `prm label` wrote; its trajectories are judged, its labels are not shown."""
    judge: str
    """Model that judges: hub id or folder, with a chat template."""
    out: Path
    """Folder for judgements.jsonl and manifest.json."""
    votes: int = 3
    """Samples per step; their majority counts."""
    num_trajectories: int | None = None
    """Judge only the first ones; all when not given."""
    engine: str = "transformers"
    """Generation engine: transformers, vllm, http:URL[,URL...] (vLLM servers) or scripted."""
    chat_format: ChatKind = "auto"
    """The tokenizer's own template, or the built-in chatml."""
    temperature: float = 0.7
    """Softmax temperature, >= 0; 0 makes all votes equal."""
    max_tokens: int = 256
    """Most new tokens of a vote; a longer one is cut off and abstains."""
    max_context: int = 4096
    """Most tokens of prompt and vote together; longer prompts are not asked and abstain."""
    concurrency: int = 32
    """Votes in flight, and most sequences in a batch."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the judge; auto is float32 on CPU and bfloat16 on GPU."""
    seed: int = 0
    """Makes runs differ; the same seed gives the same votes."""

    def __post_init__(self) -> None:
        for name in ("votes", "max_tokens", "max_context", "concurrency"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} must be >= 1, not {getattr(self, name)}")
        if self.num_trajectories is not None and self.num_trajectories < 1:
            raise InputError(f"--num-trajectories must be >= 1, not {self.num_trajectories}")
        if self.temperature < 0:
            raise InputError(f"--temperature must be >= 0, not {self.temperature}")
        check_engine(self.engine)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One vote to ask for."""

    trajectory: Trajectory
    step: int
    vote: int

    @property
    def key(self) -> tuple[str, int, int]:
        """What the vote settles."""
        return (self.trajectory.trajectory_id, self.step, self.vote)


def judge(config: JudgeConfig, *, engine: Engine | None = None) -> Mapping[str, int]:
    """Judge trajectories, or resume doing so, and print a summary.

    Parameters
    ----------
    config : JudgeConfig
        Resolved flags.
    engine : Engine, optional
        Use this engine, and leave it open, instead of making the one the config names.

    Returns
    -------
    mapping of str to int
        Everything in the folder, as in its manifest.

    Raises
    ------
    InputError
        On bad input, or if the engine stops working midway; the votes before are kept.
    """
    rows = read_labels_folder(config.labels)[: config.num_trajectories]
    trajectories = [row.trajectory for row in rows]
    parents = [config.labels / LABELS, Path(config.judge)]
    with open_run(config.out, kind="judge", config=config_dict(config), parents=parents) as run:
        counts = asyncio.run(_judge(config, trajectories, run, engine))
        run.finish(counts)
    _show(counts, Console())
    return counts


@dataclass(kw_only=True, slots=True)
class _Ledger:
    """The judgements of a folder, reduced to what is needed to go on and to count."""

    path: Path
    cut_lines: int
    """Unterminated lines dropped, 0 or 1."""
    duplicates: int = 0
    tokens: int = 0
    verdicts: dict[tuple[str, int, int], Verdict | Abstention] = field(default_factory=dict)

    def add(self, judgement: Judgement) -> None:
        """Count one line."""
        said = judgement.verdict or judgement.abstention
        assert said is not None
        self.verdicts[judgement.key] = said
        self.tokens += judgement.tokens


def read_judgements(path: Path) -> Iterator[Judgement]:
    """Yield the judgements of a file, each key once.

    Raises
    ------
    InputError
        If the file is missing, a line is malformed, or two lines say different things of a key.
    """
    seen: dict[tuple[str, int, int], int] = {}
    for judgement in read_jsonl(path, Judgement):
        known = seen.setdefault(judgement.key, hash(judgement))
        if known != hash(judgement):
            raise InputError(
                f"{path} holds vote {judgement.vote} on step {judgement.step} of "
                f"{judgement.trajectory_id!r} twice with different content: remove the wrong line"
            )
        yield judgement


def _open_ledger(path: Path) -> _Ledger:
    """Repair and count what earlier starts left."""
    ledger = _Ledger(path=path, cut_lines=repair_tail(path))
    for judgement in read_judgements(path) if path.exists() else ():
        if judgement.key in ledger.verdicts:
            ledger.duplicates += 1
        else:
            ledger.add(judgement)
    return ledger


async def _judge(
    config: JudgeConfig,
    trajectories: Sequence[Trajectory],
    run: RunFolder,
    engine: Engine | None,
) -> dict[str, int]:
    """Ask for every vote that is missing and count all."""
    ledger = _open_ledger(run.path / JUDGEMENTS)
    planned = [
        Ask(trajectory=trajectory, step=step, vote=vote)
        for trajectory in trajectories
        for step in range(1, trajectory.num_steps + 1)
        for vote in range(config.votes)  # side by side: the prompt they share is cached once
    ]
    missing = [ask for ask in planned if ask.key not in ledger.verdicts]
    if missing:
        async with _open_judge(config, engine) as (chat, made):
            with JsonlWriter(ledger.path) as writer:
                court = _Court(config, chat, made, ledger=ledger, writer=writer)
                with progress("votes", len(planned), done=len(planned) - len(missing)) as bar:
                    await court.run(missing, bar)
    return _count(config, trajectories, ledger)


@asynccontextmanager
async def _open_judge(
    config: JudgeConfig, engine: Engine | None
) -> AsyncIterator[tuple[ChatFormat, Engine]]:
    """Load the judge's chat format and its engine, and release a made engine at the end."""
    chat = ChatFormat.load(config.judge, tools=(), kind=config.chat_format)
    options = EngineOptions(
        policy=config.judge,
        device=config.device,
        dtype=config.dtype,
        max_batch=config.concurrency,
        max_context=config.max_context,
    )
    made = engine or build_engine(config.engine, options)
    try:
        yield chat, made
    finally:
        if engine is None:
            await made.close()


class _Court:
    """Asks for votes, a bounded number at a time, and writes each as it comes."""

    def __init__(
        self,
        config: JudgeConfig,
        chat: ChatFormat,
        engine: Engine,
        *,
        ledger: _Ledger,
        writer: JsonlWriter,
    ) -> None:
        self._config, self._chat, self._engine = config, chat, engine
        self._ledger, self._writer = ledger, writer
        self._sampling = Sampling(temperature=config.temperature, max_tokens=config.max_tokens)
        revision = f"@{engine.revision}" if engine.revision else ""
        self._name = f"{engine.policy}{revision}"
        self._failed = self._failed_in_a_row = self._abstained = 0
        self._cause = ""

    async def run(self, asks: Sequence[Ask], bar: Progress) -> None:
        """Ask for all.

        Raises
        ------
        InputError
            If the engine has stopped working, or broke some votes; the others are written.
        """
        queue = iter(asks)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._config.concurrency, len(asks))):
                    group.create_task(self._work(queue, bar))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        if self._failed:
            raise InputError(self._sentence(f"the engine broke {self._failed} of the votes"))

    async def _work(self, queue: Iterator[Ask], bar: Progress) -> None:
        """Take votes from the queue until it is empty."""
        for ask in queue:
            judgement = await self._ask(ask)
            if judgement is None:
                continue
            self._writer.append(judgement)
            self._ledger.add(judgement)
            self._abstained += judgement.verdict is None
            bar.advance(abstained=self._abstained)

    async def _ask(self, ask: Ask) -> Judgement | None:
        """Get one vote; None if the engine broke it."""
        data = data_mark(ask.trajectory, ask.step)
        seed = derive_seed("judge", self._config.seed, *ask.key)
        prompt_ids = self._chat.prompt_ids("", render_prompt(ask.trajectory, ask.step))
        if len(prompt_ids) + self._config.max_tokens > self._engine.max_context:
            return self._judgement(ask, data, seed, Abstention.TOO_LONG)
        request = GenerateRequest(
            request_id="/".join(map(str, ask.key)),
            prompt_ids=prompt_ids,
            sampling=self._sampling,
            seed=seed,
            stop_ids=self._chat.stop_ids,
            affinity=f"{ask.key[0]}@{ask.step}",
        )
        for _ in range(_ATTEMPTS):
            try:
                turn = await self._engine.generate(request)
            except EngineError as error:
                self._cause = str(error)
                continue
            self._failed_in_a_row = 0
            text = self._chat.decode(turn.token_ids)
            said = parse_verdict(text, ended=turn.finish == "stop")
            return self._judgement(ask, data, seed, said, text=text, tokens=len(turn.token_ids))
        self._failed += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= max(_FEWEST_FAILURES, 2 * self._config.concurrency):
            raise InputError(self._sentence("the engine stopped working"))
        return None

    def _judgement(
        self,
        ask: Ask,
        data: str,
        seed: int,
        said: Verdict | Abstention,
        *,
        text: str = "",
        tokens: int = 0,
    ) -> Judgement:
        """Make the record of a vote."""
        return Judgement(
            trajectory_id=ask.trajectory.trajectory_id,
            step=ask.step,
            vote=ask.vote,
            judge=self._name,
            data=data,
            seed=seed,
            verdict=said if isinstance(said, Verdict) else None,
            abstention=said if isinstance(said, Abstention) else None,
            text=text,
            tokens=tokens,
        )

    def _sentence(self, what: str) -> str:
        """Say what stopped the run."""
        return (
            f"{what} ({self._cause}); all other votes are saved: repair it and run the same "
            "command again to resume"
        )


def _count(
    config: JudgeConfig, trajectories: Sequence[Trajectory], ledger: _Ledger
) -> dict[str, int]:
    """Count votes and the majorities of their steps."""
    votes = Counter(ledger.verdicts.values())
    steps: Counter[int | None] = Counter()
    for trajectory in trajectories:
        for step in range(1, trajectory.num_steps + 1):
            said = (
                ledger.verdicts[trajectory.trajectory_id, step, vote]
                for vote in range(config.votes)
            )
            steps[majority([v if isinstance(v, Verdict) else None for v in said])] += 1
    return {
        "trajectories": len(trajectories),
        "steps": steps.total(),
        **{f"steps_{name.value}": steps[value] for name, value in VALUES.items()},
        "steps_without_verdict": steps[None],
        "votes": votes.total(),
        **{f"votes_{name.value}": votes[name] for name in Verdict},
        **{f"votes_abstained_{name.value}": votes[name] for name in Abstention},
        "tokens": ledger.tokens,
        "cut_lines": ledger.cut_lines,
        "duplicate_lines": ledger.duplicates,
    }


def _show(counts: Mapping[str, int], console: Console) -> None:
    """Print what came out."""
    table = Table(title="judgements")
    for name in ("", "steps", "votes"):
        table.add_column(name, justify="right" if name else "left")
    for verdict in Verdict:
        row = (str(counts[f"{what}_{verdict.value}"]) for what in ("steps", "votes"))
        table.add_row(verdict.value, *row)
    table.add_row("no verdict", str(counts["steps_without_verdict"]), "")
    for why in Abstention:
        table.add_row(f"abstained: {why.value}", "", str(counts[f"votes_abstained_{why.value}"]))
    table.add_row("all", str(counts["steps"]), str(counts["votes"]))
    console.print(table)
