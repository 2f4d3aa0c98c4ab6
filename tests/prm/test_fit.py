import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from prm.data import collate, make_examples
from prm.fit import FitOptions, Fitter
from prm.heads import HEADS
from prm.layout import LAYOUTS
from prm.model import new_model, open_tokenizer
from prm.predict import Predictions, predict
from prm.schedule import default_learning_rate, learning_rate_at
from prm.stages import broken_rows, is_head
from tests.prm.synthetic import label_row, make_example, make_rows, make_turns


class Curves:
    def __init__(self):
        self.entries = []

    def log(self, step, metrics):
        self.entries.append((step, dict(metrics)))


def options_of(**changes):
    settings = {
        "epochs": 2,
        "learning_rate": 3e-3,
        "step_tokens": 600,
        "batch_tokens": 400,
        "patience": 2,
        "seed": 0,
        "bfloat16": False,
        "pad_id": 0,
    }
    return FitOptions(**(settings | changes))


def fitter_of(base, folder, *, head="value", **changes):
    return Fitter(
        new_model(base, HEADS[head], base_rate=0.5, seed=0),
        HEADS[head],
        options=options_of(**changes),
        folder=folder,
        accelerator=Accelerator(cpu=True),
    )


@pytest.fixture
def examples(base):
    return make_examples(make_rows(10), open_tokenizer(base))


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_step_has_the_same_loss_and_gradient_for_any_micro_batch_split(
    base, examples, tmp_path, name
):
    found = []
    for cut in ([20], [1] * 20, [3, 7, 10], [10, 10]):
        fitter = fitter_of(base, tmp_path, head=name)
        batches, start = [], 0
        for size in cut:
            part = examples[start : start + size]
            head = fitter.head
            batches.append(collate(part, head.targets, pad_id=0, written=head.is_log_ratio))
            start += size
        loss = fitter.accumulate(batches)
        gradients = [p.grad.clone() for p in fitter.raw_model.parameters() if p.grad is not None]
        found.append((loss, gradients))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        for one, other in zip(gradients, found[0][1], strict=True):
            assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("packing", sorted(LAYOUTS))
def test_predictions_come_in_the_examples_order_for_any_batch_size(base, examples, packing):
    head = HEADS["value"]
    model = new_model(base, head, base_rate=0.5, seed=0)
    layout = LAYOUTS[packing]
    small = predict(model, examples, head, layout=layout, batch_tokens=150, pad_id=0)
    large = predict(model, examples, head, layout=LAYOUTS["none"], batch_tokens=100_000, pad_id=0)
    assert small.margins_P == pytest.approx(large.margins_P, abs=1e-5)
    assert small.weights_P.tolist() == [float(n) for e in examples for n in e.rollouts]


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_step_trains_the_calls_inside_turns_of_all_heads_that_say_so(base, tmp_path, name):
    rows = [label_row(make_turns("+-", "-++", task=f"t{i}"), "+") for i in range(3)]
    several = make_examples(rows, open_tokenizer(base))
    prefixes = [replace(e, calls=()) for e in several]
    found = []
    for examples in (several, prefixes):
        fitter = fitter_of(base, tmp_path, head=name)
        torch.manual_seed(0)
        model = fitter.raw_model
        layer = model.policy.lm_head if HEADS[name].is_log_ratio else model.score
        torch.nn.init.normal_(layer.weight)
        found.append(fitter._step([examples])[0])
    assert (found[0] == found[1]) is not HEADS[name].inner


def test_predictions_are_of_prefixes_unless_calls_are_asked_for(base):
    turns = (("+-", "-++"), ("", "+"))
    rows = [label_row(make_turns(*t, task=f"t{i}"), "+") for i, t in enumerate(turns)]
    examples = make_examples(rows, open_tokenizer(base))
    head = HEADS["value"]
    model = new_model(base, head, base_rate=0.5, seed=0)
    prefixes, every = (
        predict(
            model,
            examples,
            head,
            layout=LAYOUTS["none"],
            batch_tokens=100,
            pad_id=0,
            inner=inner,
        )
        for inner in (False, True)
    )
    assert prefixes.sizes == (3, 3)
    assert every.sizes == (6, 3)
    last = [0, 2, 5, 6, 7, 8]  # where prefixes stand among all
    assert every.margins_P[last] == pytest.approx(prefixes.margins_P, abs=1e-6)
    assert every.weights_P[1:3].tolist() == [4, 4]  # two calls share 8 rollouts
    assert prefixes.weights_P[1] == 8


def test_a_row_whose_call_inside_a_turn_breaks_the_numbers_is_named():
    examples = [make_example((2, 4, 1), name="a"), make_example((3, 4, 1), name="b")]
    margins = np.array([0.0, 0.0, 0.0, 0.0, math.nan, 0.0, 0.0])
    predictions = Predictions(
        margins_P=margins, targets_P=margins, weights_P=margins, sizes=(3, 4), loss=math.nan
    )
    assert broken_rows(examples, predictions) == "rows without finite scores: b"


def test_training_lowers_both_likelihoods_and_keeps_the_best_weights(base, examples, tmp_path):
    fitter = fitter_of(base, tmp_path, epochs=6, patience=0)
    before = fitter.predict(examples[16:]).nll()
    curves = Curves()
    done = fitter.fit(examples[:16], examples[16:], curves)
    after = fitter.predict(examples[16:]).nll()
    assert done.epoch == 6
    assert after < before
    assert after == pytest.approx(min(h["held_out_loss"] for h in done.history), abs=1e-6)
    assert after == pytest.approx(done.best_loss, abs=1e-6)
    assert done.history[-1]["train_loss"] < done.history[0]["train_loss"]
    steps = [step for step, _ in curves.entries]
    assert steps == list(range(1, done.step + 1))
    assert [round(m["epoch"]) for _, m in curves.entries if "held_out/loss" in m] == [*range(1, 7)]


def test_it_stops_when_the_held_out_likelihood_stops_improving(
    base, examples, tmp_path, monkeypatch
):
    losses = iter([0.5, 0.4, 0.45, 0.41, 0.3])

    class Fixed:
        @property
        def loss(self):
            return next(losses)

    monkeypatch.setattr("prm.fit.predict", lambda *a, **k: Fixed())
    done = fitter_of(base, tmp_path, epochs=5, patience=2).fit(examples, examples, Curves())
    assert (done.epoch, done.best_epoch, done.best_loss) == (4, 2, 0.4)


def test_broken_numbers_stop_training_with_the_best_weights(base, examples, tmp_path, monkeypatch):
    fitter = fitter_of(base, tmp_path, epochs=3, patience=0)
    steps = len(fitter._plan(examples, 0))
    monkeypatch.setattr(
        "prm.fit.learning_rate_at", lambda step, total, peak: 1e30 if step >= steps else 1e-3
    )
    done = fitter.fit(examples, examples, Curves())
    assert done.diverged is not None
    assert "nan" in done.diverged
    assert (done.epoch, done.best_epoch) == (1, 1)
    assert all(torch.isfinite(p).all() for p in fitter.raw_model.parameters())
    after = fitter.predict(examples).nll()
    assert after == pytest.approx(done.best_loss, abs=1e-6)


def test_the_first_stage_trains_the_head_alone_and_the_second_all(base, examples, tmp_path):
    fitter = fitter_of(base, tmp_path, epochs=1, head_first=2, patience=0)
    before = {n: p.detach().clone() for n, p in fitter.raw_model.named_parameters()}
    moved, saved, rates = [], fitter._save, Curves()

    def spy(*, better):
        moved.append({n for n, p in fitter.raw_model.named_parameters() if (p != before[n]).any()})
        saved(better=better)

    fitter._save = spy
    done = fitter.fit(examples[:16], examples[16:], rates)
    assert done.epoch == 3
    assert moved[0] == moved[1] == {"score.weight", "score.bias"}
    assert {is_head(name) for name in moved[2]} == {True, False}
    lr = [m["train/lr"] for _, m in rates.entries]
    main = len(lr) // 3
    assert lr == [  # each stage warms up and decays by itself
        *(learning_rate_at(step, 2 * main, 3e-3) for step in range(2 * main)),
        *(learning_rate_at(step, main, 3e-3) for step in range(main)),
    ]


def test_patience_counts_from_the_end_of_the_first_stage(base, examples, tmp_path, monkeypatch):
    losses = iter([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])

    class Fixed:
        @property
        def loss(self):
            return next(losses)

    monkeypatch.setattr("prm.fit.predict", lambda *a, **k: Fixed())
    fitter = fitter_of(base, tmp_path, epochs=3, head_first=3, patience=2)
    done = fitter.fit(examples, examples, Curves())
    assert (done.epoch, done.best_epoch) == (5, 1)


def spoil_token(fitter, examples, row):
    """Break the embedding of a token that only one row has."""
    embedding = fitter.raw_model.get_input_embeddings().weight
    others = {i for e in examples if e is not row for i in e.input_ids}
    alone = next(i for i in row.input_ids if i not in others)
    with torch.no_grad():
        embedding[alone] = math.nan


def test_a_row_that_breaks_the_loss_is_named(base, tmp_path):
    rows = [*make_rows(6), *make_rows(1, per_task=1, prefix="ZÄ")]
    examples = make_examples(rows, open_tokenizer(base))
    fitter = fitter_of(base, tmp_path, step_tokens=10_000)
    spoil_token(fitter, examples, examples[-1])
    done = fitter.fit(examples, examples[:4], Curves())
    assert done.diverged.endswith("at step 0; rows without finite scores: ZÄ0/0")
    assert (done.epoch, done.step) == (0, 0)


def test_a_row_that_breaks_the_held_out_likelihood_is_named(base, tmp_path):
    rows = [*make_rows(6), *make_rows(1, per_task=1, prefix="ZÄ")]
    examples = make_examples(rows, open_tokenizer(base))
    fitter = fitter_of(base, tmp_path)
    spoil_token(fitter, examples, examples[-1])
    done = fitter.fit(examples[:8], examples[8:], Curves())
    assert "held-out loss nan after epoch 1; rows without finite scores: ZÄ0/0" in (done.diverged)


def test_the_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate_at(s, 100, 2.0) for s in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)


@given(total=st.integers(1, 500), peak=st.floats(1e-6, 1.0))
def test_the_rate_stays_between_zero_and_its_peak(total, peak):
    rates = [learning_rate_at(s, total, peak) for s in range(total)]
    assert all(0 <= r <= peak * (1 + 1e-9) for r in rates)
    assert rates[0] > 0
    assert all(math.isfinite(r) for r in rates)


def test_the_default_rate_falls_with_size():
    def sized(parameters):
        return torch.nn.Linear(parameters, 1, bias=False)

    assert default_learning_rate(sized(1000), lora=False) == 1e-3
    assert default_learning_rate(sized(4_000_000), lora=False) == pytest.approx(5e-4)
    assert default_learning_rate(sized(4_000_000), lora=True) == 2e-4
