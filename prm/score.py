"""Scoring: one forward pass gives the score of every prefix of a trajectory and of every call.

`Scorer` is the library's front door for reward-model scores; ``prm score`` runs it over a file.
`aggregate` (from `prm.aggregations`) turns a trajectory's scores into one number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from prm import calibrate
from prm.aggregations import AGGREGATIONS, aggregate
from prm.checkpoint import Checkpoint, Metadata, load_checkpoint
from prm.data import Batch, mark_written, pad
from prm.heads import Kind
from prm.metrics import Array
from prm.model import Device, context_length, logits_at, pick_device, to_device
from prm.plan import group_by_length
from prm.rendering import Position, Rendered, render
from trajectory.errors import InputError
from trajectory.progress import progress
from trajectory.records import StepScores, Trajectory
from trajectory.store import JsonlWriter, read_jsonl, repair_tail

__all__ = ["AGGREGATIONS", "ScoreConfig", "Scorer", "aggregate", "make_scores", "score"]

_CHUNK = 256


class Scorer:
    """Scores trajectories with a reward model.

    Parameters
    ----------
    checkpoint : Checkpoint
        A loaded reward model.
    device : torch.device
        Where it runs.
    batch_tokens : int, optional
        Padded tokens of one forward pass; by default 16384, and 2048 on a CPU, where larger
        batches gain nothing and pad more.

    Examples
    --------
    Load with ``scorer = Scorer.load("runs/prm")``, then ``scorer.score(trajectories)[0].values``
    holds one score per prefix 0..S, ``.calls`` one per call of each step.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, *, batch_tokens: int | None = None
    ) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._batch_tokens = batch_tokens or (2048 if device.type == "cpu" else 16_384)
        self._model = checkpoint.model.to(device)  # type: ignore[arg-type]
        self._max_length = context_length(checkpoint.model.config)

    @classmethod
    def load(cls, path: str | Path, *, device: Device = "auto") -> Scorer:
        """Load a reward model from its folder.

        Raises
        ------
        InputError
            If the folder is no reward model, or one this version cannot read.
        """
        return cls(load_checkpoint(path), pick_device(device))

    @property
    def checkpoint(self) -> Checkpoint:
        """The loaded reward model, its network on the device where it runs."""
        return self._checkpoint

    @property
    def max_length(self) -> int | None:
        """Most tokens of a trajectory; None if the model has no limit."""
        return self._max_length

    @property
    def metadata(self) -> Metadata:
        """What ``prm.json`` says."""
        return self._checkpoint.metadata

    @property
    def kind(self) -> Kind:
        """``value`` or ``correctness``."""
        return self.metadata.kind

    @property
    def position(self) -> Position:
        """``observation`` or ``action``."""
        return self.metadata.position

    @property
    def checkpoint_hash(self) -> str:
        """Content hash of the checkpoint."""
        return self._checkpoint.hash

    def score_id(self, *, calibrated: bool) -> str:
        """Return what scores are marked with: the hash, and ``+raw`` if they are uncalibrated."""
        return self.checkpoint_hash if calibrated else f"{self.checkpoint_hash}+raw"

    def render(self, trajectories: Sequence[Trajectory]) -> list[Rendered]:
        """Turn trajectories into the token ids and positions the model is given."""
        return render(trajectories, self._checkpoint.tokenizer, position=self.position)

    def fits(self, trajectories: Sequence[Trajectory]) -> list[bool]:
        """Tell, for each trajectory, whether it is short enough to be scored."""
        longest = self._max_length
        rendered = self.render(trajectories)
        return [longest is None or len(row.input_ids) <= longest for row in rendered]

    def score(
        self, trajectories: Sequence[Trajectory], *, calibrated: bool = True
    ) -> list[StepScores]:
        """Score every prefix of every trajectory.

        Parameters
        ----------
        trajectories : sequence of Trajectory
            Any number; batched by length inside.
        calibrated : bool, default=True
            Whether to apply the checkpoint's calibration, which keeps the ranking.

        Returns
        -------
        list of StepScores
            In the same order, S + 1 values in [0, 1] each, and one for every call. They do not
            depend on what else is in the list.

        Raises
        ------
        InputError
            If a trajectory does not fit the model: nothing is ever cut.
        """
        rendered = self.render(trajectories)
        self.check_lengths(trajectories, rendered)
        return [
            self.scores_of(trajectory, row, margins_P, calibrated=calibrated)
            for trajectory, row, margins_P in zip(
                trajectories, rendered, self.margins(rendered), strict=True
            )
        ]

    def check_lengths(
        self, trajectories: Sequence[Trajectory], rendered: Sequence[Rendered]
    ) -> None:
        """Refuse, with `InputError`, a trajectory that does not fit the model."""
        for trajectory, row in zip(trajectories, rendered, strict=True):
            if self._max_length is not None and len(row.input_ids) > self._max_length:
                raise InputError(
                    f"trajectory {trajectory.trajectory_id} has {len(row.input_ids)} tokens, the "
                    f"PRM takes {self._max_length}: leave it out or train a PRM on a longer base"
                )

    def scores_of(
        self,
        trajectory: Trajectory,
        rendered: Rendered,
        margins_P: Array,
        *,
        calibrated: bool = True,
    ) -> StepScores:
        """Turn the raw log-odds that `margins` gave for a trajectory into its scores."""
        return make_scores(
            self.metadata,
            self.score_id(calibrated=calibrated),
            trajectory,
            rendered,
            margins_P,
            calibrated=calibrated,
        )

    @torch.inference_mode()
    def margins(self, rendered: Sequence[Rendered]) -> list[Array]:
        """Compute the raw log-odds of every scored position, prefixes and calls.

        Parameters
        ----------
        rendered : sequence of Rendered
            As `render` gives them, none longer than `max_length`; batched by length inside.

        Returns
        -------
        list of array, shape (P,)
            In the same order, each as `Rendered.scored` is.
        """
        lengths = [len(row.input_ids) for row in rendered]
        results: dict[int, Array] = {}
        for indices in group_by_length(
            range(len(rendered)), lengths, batch_tokens=self._batch_tokens
        ):
            batch = self._batch([rendered[i] for i in indices])
            logits_PC = logits_at(self._model, batch)
            margins_P = self._checkpoint.head.margin(logits_PC).cpu().double().numpy()
            sizes = [len(rendered[i].scored) for i in indices]
            parts = np.split(margins_P, np.cumsum(sizes)[:-1])
            results.update(zip(indices, parts, strict=True))
        return [results[i] for i in range(len(rendered))]

    def _batch(self, rows: Sequence[Rendered]) -> Batch:
        """Pad rows; targets play no part."""
        pad_id = self._checkpoint.tokenizer.pad_token_id
        assert isinstance(pad_id, int)
        input_ids_BT, attention_mask_BT = pad([row.input_ids for row in rows], pad_id=pad_id)
        scored = [row.scored for row in rows]
        columns_P = torch.tensor([p for places in scored for p in places])
        nothing_P = torch.zeros(len(columns_P))
        asks = self._checkpoint.head.is_log_ratio
        batch = Batch(
            input_ids_BT=input_ids_BT,
            attention_mask_BT=attention_mask_BT,
            rows_P=torch.tensor([i for i, places in enumerate(scored) for _ in places]),
            columns_P=columns_P,
            targets_P=nothing_P,
            weights_P=nothing_P,
            written_BT=mark_written(rows, input_ids_BT) if asks else None,
        )
        return to_device(batch, self._device)


def make_scores(
    metadata: Metadata,
    score_id: str,
    trajectory: Trajectory,
    rendered: Rendered,
    margins_P: Array,
    *,
    calibrated: bool,
) -> StepScores:
    """Turn raw log-odds of a trajectory, wherever they were computed, into its scores.

    Parameters
    ----------
    metadata : Metadata
        Of the reward model.
    score_id : str
        What the scores are marked with.
    trajectory : Trajectory
        What was scored.
    rendered : Rendered
        The same as token ids.
    margins_P : array, shape (P,)
        Raw log-odds, aligned with ``rendered.scored``.
    calibrated : bool
        Whether to apply the calibration. It was fitted on prefixes; calls are mapped alike, so that
        a step's last call has the step's own score.
    """
    calibration = metadata.calibration if calibrated else calibrate.Calibration()
    values_P = calibrate.apply(calibration, margins_P).tolist()
    value_at = dict(zip(rendered.scored, values_P, strict=True))
    return StepScores(
        trajectory_id=trajectory.trajectory_id,
        checkpoint=score_id,
        values=tuple(value_at[p] for p in rendered.positions),
        kind=metadata.kind,
        position=metadata.position,
        calls=tuple(tuple(value_at[p] for p in calls) for calls in rendered.calls),
    )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score every step of trajectories with a process reward model."""

    prm: Path
    """Folder that `prm train` wrote."""
    trajectories: Path
    """JSONL file of trajectories."""
    out: Path
    """JSONL file of scores, in the same order; an interrupted run continues in it."""
    calibrated: bool = True
    """Apply the checkpoint's calibration."""
    device: Device = "auto"


def score(config: ScoreConfig) -> int:
    """Score a file of trajectories into a file of scores.

    Returns
    -------
    int
        Trajectories scored by this call; those already in the file are passed over.

    Raises
    ------
    InputError
        If an input is unusable, or the output holds scores of another model or other trajectories.
    """
    total = sum(1 for _ in read_jsonl(config.trajectories, Trajectory))
    if total == 0:
        raise InputError(f"{config.trajectories} holds no trajectories")
    scorer = Scorer.load(config.prm, device=config.device)
    done = _scored_ids(config, scorer)
    rows = read_jsonl(config.trajectories, Trajectory)
    for number, scored_id in enumerate(done, start=1):
        row = next(rows, None)
        if row is None or row.trajectory_id != scored_id:
            raise InputError(
                f"{config.out}, line {number} scores {scored_id!r}, which is not trajectory "
                f"{number} of {config.trajectories}: give another --out"
            )
    with (
        JsonlWriter(config.out) as writer,
        progress("score", total, done=len(done)) as bar,
    ):
        for chunk in _chunks(rows):
            for scores in scorer.score(chunk, calibrated=config.calibrated):
                writer.append(scores)
            bar.advance(len(chunk))
    return total - len(done)


def _scored_ids(config: ScoreConfig, scorer: Scorer) -> list[str]:
    """Name the trajectories an interrupted run has scored, after checking that it was this run."""
    repair_tail(config.out)
    if not config.out.exists():
        return []
    scored = list(read_jsonl(config.out, StepScores))
    if not scored:
        return []
    wanted = scorer.score_id(calibrated=config.calibrated)
    if scored[0].checkpoint != wanted:
        raise InputError(
            f"{config.out} holds scores of another PRM, or of this one with other calibration "
            f"({scored[0].checkpoint}, not {wanted}): give another --out"
        )
    return [s.trajectory_id for s in scored]


def _chunks(rows: Iterator[Trajectory]) -> Iterator[list[Trajectory]]:
    """Cut a stream into lists."""
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk
