from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prm.checkpoint import load_metadata
from prm.data import collate, make_examples
from prm.heads import HEADS
from prm.model import logits_at, new_model, open_tokenizer
from prm.packing import check_packing, collate_packed, fill_lines, group_packed
from prm.recipe import RecipeConfig
from prm.train import train
from tests.prm.synthetic import label_row, make_trajectory, make_turns, small_config
from trajectory.errors import InputError


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_every_row_has_a_place_and_no_line_is_too_wide(lengths):
    lines = fill_lines(lengths)
    assert sorted(i for line in lines for i in line) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in line) <= max(lengths) for line in lines)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), batch_tokens=st.integers(1, 200)
)
def test_batches_hold_every_row_within_the_budget(lengths, batch_tokens):
    batches = group_packed(range(len(lengths)), lengths, batch_tokens=batch_tokens)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[i] for i in batch]
        assert len(batch) == 1 or len(fill_lines(sizes)) * max(sizes) <= batch_tokens


def mixed_examples(base):
    """Rows of which the short ones fit beside each other in the width of the long ones."""
    marks = ["+-+", "", "-", "++", "+", ""]
    rows = [label_row(make_trajectory(m, task=f"t{i}"), m) for i, m in enumerate(marks)]
    turns = [("+-", "", "-"), ("-++",), ("+",)]
    for i, made in enumerate(turns):  # the last state of these has no rollouts
        rows.append(label_row(make_turns(*made, task=f"m{i}"), "+" * (len(made) - 1)))
    return make_examples(rows, open_tokenizer(base))


def both(base, head):
    examples = mixed_examples(base)
    batches = [
        f(examples, head.targets, pad_id=0, inner=head.inner, written=head.is_log_ratio)
        for f in (collate, collate_packed)
    ]
    return examples, *batches


@pytest.mark.parametrize("name", sorted(HEADS))
def test_packed_rows_have_the_loss_and_gradient_of_padded_ones(base, name):
    head = HEADS[name]
    examples, padded, packed = both(base, head)
    assert len(packed.input_ids_BT) < len(padded.input_ids_BT) == len(examples)
    calls = sum(max(0, len(c) - 1) for e in examples for c in e.calls)
    assert len(padded.rows_P) == sum(len(e.positions) for e in examples) + calls * head.inner
    for name in ("rows_P", "targets_P", "weights_P"):
        assert torch.equal(getattr(padded, name), getattr(packed, name))
    found = []
    for batch in (padded, packed):
        model = new_model(base, head, base_rate=0.5, seed=0)
        logits_PC = logits_at(model, batch)
        loss = head.loss(logits_PC, batch) / batch.weights_P.sum()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        found.append((logits_PC.detach(), loss.item(), gradients))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6)
    for one, other in zip(found[0][2], found[1][2], strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_row_does_not_see_what_is_packed_beside_it(base):
    head = HEADS["value"]
    model = new_model(base, head, base_rate=0.5, seed=0).eval()
    model.score.weight.data.mul_(50)
    examples = mixed_examples(base)
    lines = fill_lines([len(e.input_ids) for e in examples])
    shared = next(line for line in lines if len(line) > 1)
    other = [
        replace(e, input_ids=tuple(7 for _ in e.input_ids)) if i == shared[0] else e
        for i, e in enumerate(examples)
    ]
    with torch.no_grad():
        one, two = (
            logits_at(model, collate_packed(e, head.targets, pad_id=0)) for e in (examples, other)
        )
    rows_P = collate_packed(examples, head.targets, pad_id=0).rows_P
    kept = rows_P != shared[0]
    assert torch.allclose(one[kept], two[kept], atol=1e-6)
    assert not torch.allclose(one[~kept], two[~kept], atol=1e-2)


def test_training_packed_gives_the_weights_of_training_padded(base, labels, tmp_path):
    padded = small_config(base, labels, tmp_path / "padded", epochs=1)
    train(padded)
    train(replace(padded, out=tmp_path / "packed", recipe=RecipeConfig(packing="rows")))
    one, two = (load_metadata(tmp_path / n).training for n in ("padded", "packed"))
    assert one["held_out_loss"] == pytest.approx(two["held_out_loss"], abs=1e-4)
    assert one["steps"] == two["steps"]


def test_an_encoder_would_mix_rows_and_is_refused(encoder):
    model = new_model(encoder, HEADS["binary"], base_rate=0.5, seed=0)
    with pytest.raises(InputError, match="packed rows would see each other"):
        check_packing(model, vocabulary=20)
