from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prm.checkpoint import load_checkpoint
from prm.heads import HEADS
from prm.model import pick_device
from prm.score import AGGREGATIONS, ScoreConfig, Scorer, aggregate, score
from tests.prm.synthetic import make_trajectory, make_turns
from trajectory.errors import InputError
from trajectory.records import Step, StepScores
from trajectory.store import read_jsonl, write_jsonl


@pytest.fixture(scope="module")
def scorer(prm_folder):
    return Scorer.load(prm_folder, device="cpu")


def trajectories(count=7):
    marks = ["+", "-", "++-", "", "-+", "+++", "+-"]
    return [make_trajectory(marks[i % 7], task=f"s{i}") for i in range(count)]


def test_one_score_per_prefix_in_the_order_given(scorer):
    found = scorer.score(trajectories())
    assert [s.trajectory_id for s in found] == [f"s{i}/0" for i in range(7)]
    assert [len(s.values) for s in found] == [t.num_steps + 1 for t in trajectories()]
    assert all(0 <= v <= 1 for s in found for v in s.values)
    assert {(s.kind, s.position, s.checkpoint) for s in found} == {
        ("value", "observation", scorer.checkpoint_hash)
    }


def test_a_call_has_the_score_of_its_turn_with_the_results_up_to_it(scorer):
    whole = make_turns("+-+", "", "-+")
    scores = scorer.score([whole])[0]
    assert [len(c) for c in scores.calls] == [3, 0, 2]
    assert len({v for c in scores.calls for v in c}) == 5
    for t, turn in enumerate(whole.steps):
        for j, found in enumerate(scores.calls[t], start=1):
            seen = replace(turn, calls=turn.calls[:j], observations=turn.observations[:j])
            cut = replace(whole, steps=(*whole.steps[:t], seen))
            assert found == pytest.approx(scorer.score([cut])[0].values[-1], abs=1e-6)
    assert (scores.calls[0][-1], scores.calls[2][-1]) == (scores.values[1], scores.values[3])


def test_one_call_per_turn_says_nothing_new(scorer):
    scores = scorer.score([make_trajectory("+-")])[0]
    assert scores.calls == (scores.values[1:2], scores.values[2:3], ())


def test_calls_share_the_score_of_a_turn_that_is_scored_before_its_results(scorer):
    metadata = scorer.metadata.model_copy(update={"position": "action"})
    before = Scorer(replace(scorer.checkpoint, metadata=metadata), torch.device("cpu"))
    scores = before.score([make_turns("+-+", "-")])[0]
    assert scores.calls == ((scores.values[1],) * 3, (scores.values[2],))


def test_scores_do_not_depend_on_padding_or_company(prm_folder, scorer):
    together = scorer.score(trajectories())
    tight = Scorer(load_checkpoint(prm_folder), pick_device("cpu"), batch_tokens=1)
    alone = tight.score(trajectories())
    for one, other in zip(together, alone, strict=True):
        assert one.values == pytest.approx(other.values, abs=1e-5)


def test_calibration_changes_scores_but_not_their_ranking(scorer):
    raw = [v for s in scorer.score(trajectories(), calibrated=False) for v in s.values]
    calibrated = [v for s in scorer.score(trajectories()) for v in s.values]
    order = sorted(range(len(raw)), key=lambda i: raw[i])
    assert raw != calibrated
    marks = [scorer.score(trajectories(1), calibrated=c)[0].checkpoint for c in (True, False)]
    assert marks == [scorer.checkpoint_hash, f"{scorer.checkpoint_hash}+raw"]
    assert [calibrated[i] for i in order] == sorted(calibrated)


def test_no_trajectories_give_no_scores(scorer):
    assert scorer.score([]) == []


def test_a_trajectory_without_steps_has_the_prompt_score(scorer):
    bare = replace(make_trajectory("+"), steps=())
    full = scorer.score([make_trajectory("+")])[0]
    assert scorer.score([bare])[0].values == pytest.approx(full.values[:1], abs=1e-6)


def test_a_trajectory_longer_than_the_model_is_refused(scorer):
    long = replace(make_trajectory("+"), steps=(Step(text="a" * 600),), trajectory_id="long")
    with pytest.raises(InputError, match=r"trajectory long has 6\d\d tokens, the PRM takes 512"):
        scorer.score([make_trajectory("+"), long])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("last", 0.4),
        ("min", 0.1),
        ("mean", 0.5),
        ("geomean", (0.1 * 1.0 * 0.4) ** (1 / 3)),
        ("product", 0.1 * 1.0 * 0.4),
    ],
)
def test_aggregations_of_hand_computed_scores(name, expected):
    assert aggregate([0.1, 1.0, 0.4], name) == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted(AGGREGATIONS.keys() - {"product"}))
@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_aggregations_stay_between_the_lowest_and_the_highest(name, values):
    found = aggregate(values, name)
    assert min(values) - 1e-9 <= found <= max(values) + 1e-9
    assert aggregate([values[0]] * 3, name) == pytest.approx(values[0], abs=1e-9)


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=20), further=st.floats(0, 1))
def test_a_product_never_rises_with_a_further_step_which_is_its_bias(values, further):
    assert aggregate([*values, further], "product") <= aggregate(values, "product")
    assert aggregate(values, "product") <= min(values)


def test_the_default_aggregation_follows_from_the_kind():
    assert {h.aggregation for h in HEADS.values() if h.kind == "value"} == {"last"}
    assert {h.aggregation for h in HEADS.values() if h.kind == "correctness"} == {"min"}


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(InputError, match="'sum'; aggregations: last, min, mean, geomean, product"):
        aggregate([0.5], "sum")


def config_of(prm_folder, tmp_path, **changes):
    return replace(
        ScoreConfig(
            prm=prm_folder,
            trajectories=tmp_path / "trajectories.jsonl",
            out=tmp_path / "scores.jsonl",
            device="cpu",
        ),
        **changes,
    )


def test_a_file_of_trajectories_becomes_a_file_of_scores(prm_folder, scorer, tmp_path):
    config = config_of(prm_folder, tmp_path)
    rows = [*trajectories(), make_turns("+-", "", "-+-", task="several")]
    write_jsonl(config.trajectories, rows)
    assert score(config) == 8
    written = list(read_jsonl(config.out, StepScores))
    for ours, direct in zip(written, scorer.score(rows), strict=True):
        assert ours.trajectory_id == direct.trajectory_id
        assert ours.values == pytest.approx(direct.values, abs=1e-6)
        for calls, wanted in zip(ours.calls, direct.calls, strict=True):
            assert calls == pytest.approx(wanted, abs=1e-6)


def test_an_interrupted_file_is_continued(prm_folder, tmp_path):
    config = config_of(prm_folder, tmp_path)
    write_jsonl(config.trajectories, trajectories())
    score(config)
    whole = config.out.read_bytes()
    lines = whole.splitlines(keepends=True)
    config.out.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # killed while writing
    assert score(config) == 4
    written = list(read_jsonl(config.out, StepScores))
    assert [s.trajectory_id for s in written] == [f"s{i}/0" for i in range(7)]
    assert score(config) == 0


def test_scores_of_another_model_calibration_or_file_are_not_continued(prm_folder, tmp_path):
    config = config_of(prm_folder, tmp_path)
    write_jsonl(config.trajectories, trajectories())
    score(config)
    with pytest.raises(InputError, match="with other calibration"):
        score(replace(config, calibrated=False))
    write_jsonl(config.trajectories, [*trajectories()[:3], *trajectories()[4:]])
    with pytest.raises(InputError, match=r"line 4 scores 's3/0', which is not trajectory 4"):
        score(config)
    first = next(iter(read_jsonl(config.out, StepScores)))
    write_jsonl(config.out, [replace(first, checkpoint="other")])
    with pytest.raises(InputError, match="another PRM"):
        score(config)


def test_bad_files_are_refused(prm_folder, tmp_path):
    config = config_of(prm_folder, tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        score(config)
    config.trajectories.write_text("")
    with pytest.raises(InputError, match="holds no trajectories"):
        score(config)
    config.trajectories.write_text('{"trajectory_id": 3}\n')
    with pytest.raises(InputError, match="line 1"):
        score(config)
