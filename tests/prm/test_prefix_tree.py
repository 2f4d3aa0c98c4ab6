from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prm.checkpoint import load_metadata
from prm.data import Example, collate, make_examples
from prm.heads import HEADS
from prm.model import logits_at, new_model, open_tokenizer
from prm.prefix_tree import (
    ancestor_mask,
    check_prefix_sharing,
    collate_tree,
    group_trees,
    merge_prefixes,
    plan_trees,
    tree_size,
)
from prm.recipe import RecipeConfig
from prm.train import train
from tests.prm.synthetic import label_row, make_trajectory, make_turns, small_config
from trajectory.errors import InputError

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), min_size=1)


@given(rows=ROWS)
def test_a_tree_holds_every_prefix_once_and_gives_every_row_back(rows):
    tree = merge_prefixes(rows)
    prefixes = {row[:n] for row in rows for n in range(1, len(row) + 1)}
    assert len(tree.input_ids) == len(prefixes) == tree_size(rows)
    for row, path in zip(rows, tree.columns, strict=True):
        assert tuple(tree.input_ids[c] for c in path) == row
        assert [tree.depths[c] for c in path] == list(range(len(row)))
        assert [tree.parents[c] for c in path] == [-1, *path[:-1]]


@given(rows=ROWS)
def test_a_token_sees_its_own_row_up_to_itself_and_nothing_else(rows):
    tree = merge_prefixes(rows)
    mask_TT = ancestor_mask(tree.parents)
    for path in tree.columns:
        for depth, column in enumerate(path):
            assert mask_TT[column].nonzero().flatten().tolist() == sorted(path[: depth + 1])


@given(rows=ROWS, budget=st.integers(1, 20))
def test_batches_hold_every_row_within_the_budget(rows, budget):
    batches = group_trees(range(len(rows)), rows, batch_tokens=budget)
    assert sorted(i for b in batches for i in b) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or tree_size([rows[i] for i in batch]) <= budget


def example(ids, task):
    return Example(
        input_ids=ids,
        positions=(len(ids) - 1,),
        rollouts=(1,),
        correct=(1,),
        values=(1.0,),
        task_id=task,
        trajectory_id=f"{task}/{ids}",
    )


@given(
    rows=st.lists(st.tuples(st.sampled_from("abc"), ROWS.map(lambda r: r[0])), min_size=1),
    step=st.integers(4, 30),
    seed=st.integers(0, 3),
)
def test_a_plan_uses_every_example_once_and_keeps_tasks_together(rows, step, seed):
    examples = [example(ids, task) for task, ids in rows]
    plan = plan_trees(examples, step_tokens=step, batch_tokens=step, seed=seed)
    used = [i for batches in plan for batch in batches for i in batch]
    assert sorted(used) == list(range(len(examples)))
    for batches in plan:
        texts = [examples[i].input_ids for batch in batches for i in batch]
        assert len(texts) == 1 or tree_size(texts) <= step
    whole = plan_trees(examples, step_tokens=1000, batch_tokens=1000, seed=seed)
    assert len(whole) == 1


def branching_examples(base):
    """Trajectories of two tasks that part after one or two steps; the first two are the same."""
    marks = {"t0": ["+-+", "+-+", "+--", "+", "-"], "t1": ["", "++-"]}
    rows = [
        label_row(make_trajectory(m, task=task), m) for task, group in marks.items() for m in group
    ]
    rows += [label_row(make_turns("+-", "+", task="t2"), "-")]  # two calls in a turn
    return make_examples(rows, open_tokenizer(base))


@pytest.mark.parametrize("name", sorted(HEADS))
def test_rows_of_a_tree_have_the_loss_and_gradient_of_padded_ones(base, name):
    head = HEADS[name]
    examples = branching_examples(base)
    padded, tree = (
        f(examples, head.targets, pad_id=0, inner=head.inner, written=head.is_log_ratio)
        for f in (collate, collate_tree)
    )
    for field in ("rows_P", "targets_P", "weights_P"):
        assert torch.equal(getattr(padded, field), getattr(tree, field))
    assert tree.input_ids_BT.numel() < 0.6 * sum(len(e.input_ids) for e in examples)
    found = []
    for batch in (padded, tree):
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


def test_rows_share_a_prefix_only_where_the_same_one_wrote_it():
    whole, forged = (
        replace(example((3, 4, 5, 6), "t"), written=written) for written in (((1, 3),), ((2, 3),))
    )
    for written, tokens in ((False, 4), (True, 7)):
        batch = collate_tree([whole, forged], HEADS["value"].targets, pad_id=0, written=written)
        assert batch.input_ids_BT.shape == (1, tokens)
    assert batch.input_ids_BT.tolist() == [[3, 4, 5, 6, 4, 5, 6]]
    assert batch.written_BT.int().tolist() == [[0, 0, 1, 0, 1, 1, 0]]
    assert batch.parents_T.tolist() == [-1, 0, 1, 2, 0, 4, 5]


def test_training_on_trees_in_one_step_gives_the_weights_of_training_padded(base, labels, tmp_path):
    # With a step an epoch both take the same rows together, whatever their order.
    padded = replace(small_config(base, labels, tmp_path / "padded", epochs=2), step_tokens=10**6)
    train(padded)
    shared = replace(padded, out=tmp_path / "tree", recipe=RecipeConfig(packing="prefixes"))
    train(shared)
    one, two = (load_metadata(tmp_path / n).training for n in ("padded", "tree"))
    assert one["held_out_loss"] == pytest.approx(two["held_out_loss"], abs=1e-4)
    assert one["steps"] == two["steps"] == 2


def test_a_base_that_looks_ahead_is_refused(encoder):
    model = new_model(encoder, HEADS["binary"], base_rate=0.5, seed=0)
    with pytest.raises(InputError, match="rows of a tree would see each other"):
        check_prefix_sharing(model, vocabulary=20)


def test_attention_that_does_not_follow_the_mask_is_refused(base):
    model = new_model(base, HEADS["value"], base_rate=0.5, seed=0)
    model.set_attn_implementation("eager")  # adds the mask to its scores instead of obeying it
    with pytest.raises(InputError, match="choose another --packing"):
        check_prefix_sharing(model, vocabulary=20)
