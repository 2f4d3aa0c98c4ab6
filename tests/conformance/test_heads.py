"""What every row of the head table must keep."""

import math

import pytest
import torch

from prm.data import Example, collate
from prm.heads import HEADS, get_head
from prm.score import AGGREGATIONS
from trajectory.errors import InputError

NAMES = sorted(HEADS)

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


def loss_and_gradient(name: str, split: list[list[int]]) -> tuple[float, torch.Tensor]:
    head, model = HEADS[name], Scorer(len(HEADS[name].classes))
    batches = [collate([EXAMPLES[i] for i in b], head.targets, pad_id=0) for b in split]
    denominator = sum(b.weights_P.sum() for b in batches)
    total = 0.0
    for batch in batches:
        logits_PC = model(batch.input_ids_BT)[batch.rows_P, batch.columns_P]
        part = head.loss(logits_PC, batch.targets_P.double(), batch.weights_P.double())
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


@pytest.mark.parametrize("name", NAMES)
def test_the_margin_is_the_log_odds_a_server_would_give(name):
    head = HEADS[name]
    logits = torch.randn(7, len(head.classes), generator=torch.Generator().manual_seed(1))
    # A pooling server applies a sigmoid to one class and a softmax to more; right comes last.
    served = logits.sigmoid() if len(head.classes) == 1 else logits.softmax(-1)
    assert torch.allclose(head.margin(logits).sigmoid(), served[:, -1], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_least_where_the_prediction_is_the_target(name):
    head = HEADS[name]
    target, weight = torch.tensor([0.3]), torch.tensor([4.0])

    def loss_at(p: float) -> float:
        z = math.log(p / (1 - p))
        logits = torch.tensor([[0.0] * (len(head.classes) - 1) + [z]])
        return head.loss(logits, target, weight).item()

    losses = {p: loss_at(p) for p in (0.05, 0.2, 0.3, 0.4, 0.9)}
    assert min(losses, key=lambda p: losses[p]) == 0.3


@pytest.mark.parametrize("name", NAMES)
def test_unknown_prefixes_are_masked_and_soft_targets_stay_soft(name):
    targets = HEADS[name].targets(EXAMPLES[0])
    assert targets.weights[1] == 0
    assert targets.weights[0] > 0
    assert 0 < targets.values[0] < 1


def test_only_the_value_head_weighs_by_rollouts():
    assert HEADS["value"].targets(EXAMPLES[1]).weights == (64, 2, 1)
    assert HEADS["binary"].targets(EXAMPLES[1]).weights == (1, 1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_row_describes_itself(name):
    head = HEADS[name]
    assert head.name == name
    assert head.kind in ("value", "correctness")
    assert head.aggregation in AGGREGATIONS
    assert 1 <= len(head.classes) <= 2


def test_an_unknown_head_is_refused_with_the_valid_names():
    with pytest.raises(InputError, match="'worth'; heads: binary, value"):
        get_head("worth")
