"""What every row of the head table must keep."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from prm.calibrate import Calibration, apply
from prm.checkpoint import Metadata, Provenance, TaskSplit, save_checkpoint, vocabulary_of
from prm.data import Batch, Example, collate
from prm.heads import HEADS, Head, get_head
from prm.model import new_model, open_tokenizer
from prm.rendering import Rendered
from prm.score import AGGREGATIONS
from prm.score import Scorer as PrmScorer
from tests.prm.synthetic import make_base, make_example, make_trajectory
from trajectory.errors import InputError


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


NAMES = sorted(HEADS)
LIKELIHOODS = sorted(set(NAMES) - {"ranking"})
"""Heads whose margin is trained to be a log-odds; those of the ranking head only order."""

EXAMPLES = [
    Example(
        input_ids=tuple(range(1, length + 1)),
        positions=(1, 3, length - 1),
        rollouts=rollouts,
        correct=correct,
        values=values,
        task_id=f"t{length}",
        trajectory_id=f"t{length}/0",
    )
    for length, rollouts, correct, values in (
        (6, (8, 0, 4), (3, 0, 4), (0.3, None, 1.0)),
        (9, (64, 2, 1), (60, 1, 0), (0.9, 0.5, 0.0)),
        (5, (0, 0, 3), (0, 0, 1), (None, None, 0.25)),
        (12, (5, 5, 5), (0, 2, 5), (0.0, 0.4, 1.0)),
    )
]


class Scorer(torch.nn.Module):
    """Logits that depend on token and place, as a model's do."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(20, classes, generator=generator).double())

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        places_T = torch.arange(ids_BT.shape[1]).double()
        return self.table[ids_BT] * (1 + 0.1 * places_T)[None, :, None]


def exact(batch: Batch) -> Batch:
    """The batch in double precision."""
    return replace(batch, targets_P=batch.targets_P.double(), weights_P=batch.weights_P.double())


def loss_and_gradient(
    name: str, split: list[list[int]], examples: list[Example] = EXAMPLES
) -> tuple[float, torch.Tensor]:
    head, model = HEADS[name], Scorer(len(HEADS[name].classes))
    batches = [
        exact(collate([examples[i] for i in b], head.targets, pad_id=0, inner=head.inner))
        for b in split
    ]
    denominator = sum(b.weights_P.sum() for b in batches)
    total = 0.0
    for batch in batches:
        logits_PC = model(batch.input_ids_BT)[batch.rows_P, batch.columns_P]
        part = head.loss(logits_PC, batch)
        (part / denominator).backward()
        total += float(part.detach() / denominator)
    assert model.table.grad is not None
    return total, model.table.grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "split", [[[0], [1], [2], [3]], [[3, 0], [2, 1]], [[1, 2, 3], [0]]], ids=str
)
def test_loss_and_gradient_do_not_depend_on_the_micro_batch_split(name, split):
    whole_loss, whole_gradient = loss_and_gradient(name, [[0, 1, 2, 3]])
    loss, gradient = loss_and_gradient(name, split)
    assert loss == pytest.approx(whole_loss, abs=1e-6)
    assert torch.allclose(gradient, whole_gradient, atol=1e-6)


@st.composite
def turns(draw):
    """Turns of mixed numbers of calls, with rollouts or without."""
    n = draw(st.sampled_from((0, 1, 4, 64)))
    return draw(st.integers(0, 4)), n, draw(st.integers(0, n))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.lists(turns(), min_size=1, max_size=4), min_size=1, max_size=6), data=st.data()
)
def test_loss_and_gradient_do_not_depend_on_the_split_of_rows_with_several_calls(name, rows, data):
    examples = [make_example(*row, name=f"t{i}") for i, row in enumerate(rows)]
    order = data.draw(st.permutations(range(len(rows))))
    cuts = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    split: list[list[int]] = []
    for index, cut in zip(order, cuts, strict=True):
        if cut or not split:
            split.append([])
        split[-1].append(index)
    whole_loss, whole_gradient = loss_and_gradient(name, [[*range(len(rows))]], examples)
    loss, gradient = loss_and_gradient(name, split, examples)
    assert loss == pytest.approx(whole_loss, abs=1e-6)
    assert torch.allclose(gradient, whole_gradient, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@given(rows=st.lists(st.lists(turns(), min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_turn_weighs_the_same_however_many_calls_it_makes(name, rows):
    head = HEADS[name]
    examples = [make_example(*row) for row in rows]
    batch = collate(examples, head.targets, pad_id=0, inner=head.inner)
    assert float(batch.weights_P.sum()) == pytest.approx(
        sum(sum(head.targets(e).weights) for e in examples), rel=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_at_most_one_call_per_turn_have_the_loss_of_prefixes_alone(name):
    head = HEADS[name]
    rows = [make_example((1, 8, 3), (0, 64, 60), (1, 0, 0)), make_example((1, 3, 1), (1, 7, 7))]
    with_calls, without = (
        collate(rows, head.targets, pad_id=0, inner=inner) for inner in (head.inner, False)
    )
    targets = [head.targets(e) for e in rows]
    assert with_calls.columns_P.tolist() == [p for e in rows for p in e.positions]
    assert with_calls.weights_P.tolist() == [w for t in targets for w in t.weights]
    logits_PC = torch.randn(len(with_calls.rows_P), len(head.classes))
    # To the last digit.
    assert head.loss(logits_PC, with_calls).item() == head.loss(logits_PC, without).item()


def test_the_loss_of_a_turn_with_two_calls_computed_by_hand():
    batch = collate([make_example((2, 4, 1))], HEADS["value"].targets, pad_id=0, inner=True)
    logits_PC = torch.tensor([[0.0], [1.0], [-2.0]])
    expected = (
        (6 * math.log(2) - 3 * 0.0)  # the task: 3 of 6
        + (2 * math.log1p(math.exp(1.0)) - 0.5 * 1.0)  # half of 1 of 4 after either call
        + (2 * math.log1p(math.exp(-2.0)) - 0.5 * -2.0)
    )
    assert HEADS["value"].loss(logits_PC, batch).item() == pytest.approx(expected, rel=1e-6)


def test_heads_that_leave_the_calls_inside_a_turn_out():
    assert [name for name in NAMES if not HEADS[name].inner] == ["implicit", "ranking"]


@pytest.mark.parametrize("name", NAMES)
def test_the_margin_is_the_log_odds_a_server_would_give(name):
    head = HEADS[name]
    logits = torch.randn(7, len(head.classes), generator=torch.Generator().manual_seed(1))
    # A pooling server applies a sigmoid to one class and a softmax to more; right comes last.
    served = logits.sigmoid() if len(head.classes) == 1 else logits.softmax(-1)
    assert torch.allclose(head.margin(logits).sigmoid(), served[:, -1], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_do_not_depend_on_padding(name):
    head, found = HEADS[name], []
    for padding in (0, 7):
        model = Scorer(len(head.classes))
        batch = exact(collate(EXAMPLES, head.targets, pad_id=0))
        ids_BT = torch.nn.functional.pad(batch.input_ids_BT, (0, padding))
        loss = head.loss(model(ids_BT)[batch.rows_P, batch.columns_P], batch)
        loss.backward()
        found.append((float(loss.detach()), model.table.grad))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_weights_has_no_loss_and_no_gradient(name):
    head, model = HEADS[name], Scorer(len(HEADS[name].classes))
    batch = exact(collate(EXAMPLES, head.targets, pad_id=0))
    batch = replace(batch, weights_P=torch.zeros_like(batch.weights_P))
    loss = head.loss(model(batch.input_ids_BT)[batch.rows_P, batch.columns_P], batch)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not model.table.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_down_the_gradient_separates_right_from_wrong(name):
    head, model = HEADS[name], Scorer(len(HEADS[name].classes))
    marked = Example(
        input_ids=(1, 2),
        positions=(0, 1),
        rollouts=(8, 8),
        correct=(8, 0),
        values=(1.0, 0.0),
        task_id="t",
        trajectory_id="t/0",
    )
    batch = exact(collate([marked], head.targets, pad_id=0))

    def gap() -> torch.Tensor:
        right, wrong = head.margin(model(batch.input_ids_BT)[batch.rows_P, batch.columns_P])
        return right - wrong

    before = gap().item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    head.loss(model(batch.input_ids_BT)[batch.rows_P, batch.columns_P], batch).backward()
    optimizer.step()
    assert gap().item() > before


@torch.no_grad()
def trained(model: torch.nn.Module) -> torch.nn.Module:
    """Move every free parameter, as training does."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def plain_logits(head: Head, folder: Path, rendered: Rendered) -> torch.Tensor:
    """Compute the logits of a checkpoint at the scored positions with transformers alone."""
    ids_BT = torch.tensor([rendered.input_ids])
    if head.beta is None:
        network = AutoModelForTokenClassification.from_pretrained(folder)
        return network(input_ids=ids_BT).logits[0, list(rendered.positions)]
    logs = [
        AutoModelForCausalLM.from_pretrained(place)(input_ids=ids_BT).logits[0].log_softmax(-1)
        for place in (folder, folder / "reference")
    ]
    constant = json.loads((folder / "prm.json").read_text())["base_log_odds"]
    written = [t for begin, end in rendered.written for t in range(begin, end)]
    return torch.tensor(
        [
            [
                constant
                + head.beta
                * sum(
                    float(logs[0][t - 1, ids_BT[0, t]] - logs[1][t - 1, ids_BT[0, t]])
                    for t in written
                    if t <= position
                )
            ]
            for position in rendered.positions
        ]
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_gives_the_same_scores_and_loads_without_this_package(name, base, tmp_path):
    head, tokenizer = get_head(name), open_tokenizer(base)
    model = trained(new_model(base, head, base_rate=0.4, seed=0)).eval()
    calibration = Calibration(scale=0.5, shift=0.1, fitted=True)
    metadata = Metadata(
        head=name,
        kind=head.kind,
        position="observation",
        aggregation=head.aggregation,
        calibration=calibration,
        base_model="base",
        vocabulary=vocabulary_of(tokenizer),
        provenance=Provenance(labels="", parents={}, estimators=(), completers=()),
        training={},
    )
    tasks = TaskSplit(train=(), validation=())
    save_checkpoint(tmp_path, model=model, tokenizer=tokenizer, metadata=metadata, tasks=tasks)
    scorer = PrmScorer.load(tmp_path, device="cpu")
    rows = [make_trajectory(marks, task=f"t{i}") for i, marks in enumerate(("+-", "+++", ""))]
    found = scorer.score(rows)
    assert len({v for scores in found for v in scores.values}) > 5
    for rendered, scores in zip(scorer.render(rows), found, strict=True):
        with torch.no_grad():
            logits_PC = plain_logits(head, tmp_path, rendered)
        values = apply(calibration, head.margin(logits_PC).double().numpy())
        assert scores.values == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_loss_is_least_where_the_prediction_is_the_target(name):
    head = HEADS[name]
    target, weight = torch.tensor([0.3]), torch.tensor([4.0])
    batch = collate(EXAMPLES[:1], head.targets, pad_id=0)

    def loss_at(p: float) -> float:
        z = math.log(p / (1 - p))
        logits = torch.tensor([[0.0] * (len(head.classes) - 1) + [z]])
        return head.loss(logits, replace(batch, targets_P=target, weights_P=weight)).item()

    losses = {p: loss_at(p) for p in (0.05, 0.2, 0.3, 0.4, 0.9)}
    assert min(losses, key=lambda p: losses[p]) == 0.3


@pytest.mark.parametrize("name", NAMES)
def test_unknown_prefixes_are_masked_and_soft_targets_stay_soft(name):
    targets = HEADS[name].targets(EXAMPLES[0])
    assert targets.weights[1] == 0
    assert targets.weights[0] > 0
    assert 0 < targets.values[0] < 1


@pytest.mark.parametrize("name", NAMES)
def test_values_are_weighed_by_rollouts_and_labels_are_not(name):
    wanted = (64, 2, 1) if HEADS[name].kind == "value" else (1, 1, 1)
    assert HEADS[name].targets(EXAMPLES[1]).weights == wanted


@pytest.mark.parametrize("name", NAMES)
def test_the_row_describes_itself(name):
    head = HEADS[name]
    assert head.name == name
    assert head.kind in ("value", "correctness")
    assert head.aggregation in AGGREGATIONS
    assert 1 <= len(head.classes) <= 2


def test_an_unknown_head_is_refused_with_the_valid_names():
    with pytest.raises(InputError, match="'worth'; heads: binary, implicit, ranking, token, value"):
        get_head("worth")
