"""A reward model learns which call of a turn went wrong, from counts at the ends of turns alone."""

import random
from dataclasses import replace

import numpy as np
import pytest

from prm.checkpoint import load_metadata, load_tasks
from prm.incremental import EpisodeScorer
from prm.score import Scorer
from prm.train import train
from tests.prm.synthetic import label_row, make_turns, small_config, write_label_folder

ROLLOUTS = 8


def two_call_rows(num_tasks):
    """Turns of two calls whose results are drawn at random; the second one decides.

    The first result has the same texts and says nothing, so that a score after it can only be right
    by not judging yet.
    """
    rng = random.Random(0)
    rows = []
    for task in range(num_tasks):
        for number in range(2):
            marks = "".join(rng.choice("+-") for _ in range(2))
            row = label_row(make_turns(marks, "", task=f"t{task}", number=number), "+")
            chance = 0.9 if marks[1] == "+" else 0.1
            after = sum(rng.random() < chance for _ in range(ROLLOUTS))
            evidence = replace(
                row.evidence, rollouts=(ROLLOUTS, ROLLOUTS, 0), correct=(ROLLOUTS // 2, after, 0)
            )
            values = (0.5, after / ROLLOUTS, None)
            labels = replace(row.labels, values=values, low=values, high=values)
            rows.append(replace(row, evidence=evidence, labels=labels))
    return rows


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """A reward model trained on them."""
    labels = write_label_folder(tmp_path_factory.mktemp("calls") / "labels", two_call_rows(200))
    out = labels.parent / "prm"
    # With fewer tasks so small a base learns their names by heart instead.
    train(small_config(base, labels, out, epochs=16, patience=0))
    return out


@pytest.fixture(scope="module")
def scorer(folder):
    return Scorer.load(folder, device="cpu")


@pytest.mark.slow
def test_the_second_call_is_blamed_and_not_the_first(scorer):
    marks = ("++", "+-", "-+", "--")
    scores = scorer.score([make_turns(m, task="new") for m in marks])
    first = {m: s.calls[0][0] for m, s in zip(marks, scores, strict=True)}
    second = {m: s.calls[0][1] for m, s in zip(marks, scores, strict=True)}
    assert list(first.values()) == pytest.approx([0.5] * 4, abs=0.12)
    assert first["++"] == pytest.approx(first["+-"], abs=1e-6)  # the second result is not seen yet
    assert [second["++"], second["-+"]] == pytest.approx([0.9, 0.9], abs=0.12)
    assert [second["+-"], second["--"]] == pytest.approx([0.1, 0.1], abs=0.12)


@pytest.mark.slow
def test_held_out_metrics_and_calibration_are_of_prefixes(folder):
    metadata, tasks = load_metadata(folder), load_tasks(folder)
    # Two trajectories a task, each with its measured end of the turn; their task state counts once.
    measured = 3 * len(tasks.validation)
    assert metadata.training["held_out_positions"] == measured
    assert metadata.calibration.positions == measured
    assert metadata.training["held_out_nll"] < 0.8 * metadata.training["base_rate_nll"]


@pytest.mark.slow
def test_a_growing_episode_shows_the_failure_when_it_comes(scorer):
    whole = make_turns("+-", task="new")
    (turn,) = whole.steps
    episode, found = EpisodeScorer(scorer).begin(), []
    for count in (1, 2):
        seen = replace(turn, calls=turn.calls[:count], observations=turn.observations[:count])
        found.append(episode.extend(replace(whole, steps=(seen,))).values[-1])
    assert found == pytest.approx(scorer.score([whole])[0].calls[0], abs=1e-5)
    assert np.diff(found) < -0.2
