"""The policy loss: worked numbers, where the gradient stops, and independence of batching."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from policy.batch import TokenRow, collate
from policy.losses import LossStats, policy_loss
from policy.update import UpdateOptions, action_logprobs, update_policy

VOCABULARY = 23


def log(*values):
    return torch.log(torch.tensor(values, dtype=torch.float64))


def loss_and_gradient(ratio, advantage, *, old=0.25, sampler=0.25, denominator=1):
    new = log(old * ratio).requires_grad_()
    loss, stats = policy_loss(
        new,
        torch.tensor([advantage], dtype=torch.float64),
        old_logprobs_N=log(old),
        sampler_logprobs_N=log(sampler),
        denominator=denominator,
    )
    loss.backward()
    return loss.item(), new.grad.item(), stats


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.2, 1.0, -1.2, -1.2),
        (1.3, 1.0, -1.28, 0.0),  # good action already 28 % likelier: no further push
        (0.7, 1.0, -0.7, -0.7),  # good action made less likely: always corrected
        (0.9, -1.0, 0.9, 0.9),
        (0.7, -1.0, 0.8, 0.0),  # bad action already 20 % less likely
        (1.5, -1.0, 1.5, 1.5),  # bad action made likelier: always corrected
    ],
)
def test_the_clip_stops_the_gradient_on_the_right_side_only(ratio, advantage, loss, gradient):
    found_loss, found_gradient, stats = loss_and_gradient(ratio, advantage)
    assert found_loss == pytest.approx(loss)
    assert found_gradient == pytest.approx(gradient)
    assert stats.clipped == (gradient == 0.0)


def test_the_sampler_weight_is_truncated_and_carries_no_gradient():
    _, gradient, stats = loss_and_gradient(1.0, 1.0, old=0.5, sampler=0.4)
    assert gradient == pytest.approx(-1.25)
    assert stats.weight_sum == pytest.approx(1.25)
    _, gradient, stats = loss_and_gradient(1.0, 1.0, old=0.5, sampler=0.1)
    assert gradient == pytest.approx(-2.0)
    assert stats.weight_sum == pytest.approx(2.0)


def test_the_denominator_is_that_of_the_whole_step():
    loss, gradient, _ = loss_and_gradient(1.0, 2.0, denominator=8)
    assert (loss, gradient) == pytest.approx((-0.25, -0.25))


def test_kl_estimate_is_zero_without_movement_and_positive_with_it():
    assert loss_and_gradient(1.0, 1.0)[2].kl_sum == pytest.approx(0, abs=1e-12)
    assert loss_and_gradient(2.0, 1.0)[2].kl_sum == pytest.approx(2 - 1 - math.log(2))


def test_stats_of_parts_add_up_to_those_of_the_whole():
    new, old, advantages = log(0.2, 0.5, 0.9), log(0.3, 0.3, 0.8), torch.tensor([1.0, 1.0, -2.0])

    def stats(part):
        return policy_loss(
            new[part],
            advantages[part].double(),
            old_logprobs_N=old[part],
            sampler_logprobs_N=old[part],
            denominator=3,
        )[1]

    whole = stats(slice(None)).metrics()
    parts = (stats(slice(0, 1)) + stats(slice(1, 3))).metrics()
    assert parts == pytest.approx(whole)
    assert LossStats().metrics() == {}


def test_mismatched_shapes_and_empty_denominators_are_refused():
    good = log(0.5, 0.5)
    with pytest.raises(ValueError, match="one shape"):
        policy_loss(good, good[:1], old_logprobs_N=good, sampler_logprobs_N=good, denominator=2)
    with pytest.raises(ValueError, match="denominator"):
        policy_loss(good, good, old_logprobs_N=good, sampler_logprobs_N=good, denominator=0)


def tiny_model(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def random_rows(seed, number):
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(number):
        length = int(rng.integers(3, 20))
        mask = rng.random(length) < 0.5
        mask[0], mask[-1] = False, True
        rows.append(
            TokenRow(
                trajectory_id=str(index),
                input_ids=rng.integers(1, VOCABULARY, length),
                action_mask=mask,
                advantages=np.where(mask, rng.normal(size=length), 0.0),
                logprobs=np.where(mask, np.log(rng.uniform(0.02, 0.1, length)), 0.0),
            )
        )
    return rows


def gradient_of(model, rows, split, extra=0):
    """Return the flat gradient of the step's loss, computed in the given micro-batches."""
    model.zero_grad()
    denominator = sum(r.num_actions for r in rows)
    for part in split:
        chosen = [rows[i] for i in part]
        width = max(len(r.input_ids) for r in chosen) + extra
        batch = collate(chosen, pad_id=0, length=width)
        logprobs_N, _ = action_logprobs(model, batch, temperature=0.7)
        loss, _ = policy_loss(
            logprobs_N,
            batch.advantages[batch.action_mask],
            old_logprobs_N=logprobs_N.detach(),
            sampler_logprobs_N=batch.logprobs[batch.action_mask],
            denominator=denominator,
        )
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.sets(st.integers(1, 5)), extra=st.integers(0, 7))
def test_the_gradient_is_the_same_for_any_micro_batch_split_and_padding(seed, cuts, extra):
    model, rows = tiny_model(), random_rows(seed, 6)
    order = np.random.default_rng(seed).permutation(6).tolist()
    edges = [0, *sorted(cuts), 6]
    split = [order[a:b] for a, b in itertools.pairwise(edges) if a < b]
    whole = gradient_of(model, rows, [list(range(6))])
    parts = gradient_of(model, rows, split, extra)
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


def test_log_probabilities_and_entropy_are_those_of_the_tempered_softmax():
    model, rows = tiny_model(), random_rows(1, 3)
    batch = collate(rows, pad_id=0)
    logprobs_N, entropy_N = action_logprobs(model, batch, temperature=0.5)
    wanted, entropies = [], []
    for row in rows:
        ids = torch.from_numpy(row.input_ids)
        logp_TV = torch.log_softmax(model(ids[None]).logits[0] / 0.5, dim=-1)
        for t in np.flatnonzero(row.action_mask):
            wanted.append(logp_TV[t - 1, ids[t]].item())
            entropies.append(-(logp_TV[t - 1].exp() * logp_TV[t - 1]).sum().item())
    assert logprobs_N.tolist() == pytest.approx(wanted, abs=1e-5)
    assert entropy_N.tolist() == pytest.approx(entropies, abs=1e-5)


def test_prompt_and_observation_tokens_do_not_enter_the_gradient_as_targets():
    model, rows = tiny_model(), random_rows(2, 1)
    row = rows[0]
    before = gradient_of(model, [row], [[0]])
    doctored = TokenRow(
        trajectory_id=row.trajectory_id,
        input_ids=row.input_ids,
        action_mask=row.action_mask,
        advantages=np.where(row.action_mask, row.advantages, 1e6),
        logprobs=np.where(row.action_mask, row.logprobs, -1e6),
    )
    torch.testing.assert_close(gradient_of(model, [doctored], [[0]]), before, atol=0, rtol=0)


def options(**changes):
    fields = {"batch_tokens": 40, "temperature": 1.0, "pad_id": 0, "max_grad_norm": 1e9}
    return UpdateOptions(**(fields | changes))


def updated(rows, **changes):
    model = tiny_model(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    metrics = update_policy(model, optimizer, rows, options(**changes))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), metrics


def test_the_update_does_not_depend_on_the_micro_batch_budget():
    rows = random_rows(3, 6)
    small, one = updated(rows, batch_tokens=1)
    large, two = updated(rows, batch_tokens=10_000)
    torch.testing.assert_close(small, large, atol=1e-7, rtol=0)
    assert one == pytest.approx(two, rel=1e-5)


def test_the_first_pass_is_on_policy_and_a_second_pass_is_not():
    rows = random_rows(4, 6)
    _, first = updated(rows)
    _, second = updated(rows, epochs=2)
    assert first["ratio_mean"] == pytest.approx(1, abs=1e-12)
    assert first["clip_share"] == 0
    assert second["ratio_max"] > 1.01


def test_an_update_makes_better_actions_likelier():
    model, rows = tiny_model(), random_rows(5, 4)
    rows = [
        TokenRow(
            trajectory_id=r.trajectory_id,
            input_ids=r.input_ids,
            action_mask=r.action_mask,
            advantages=np.where(r.action_mask, 1.0 if i < 2 else -1.0, 0.0),
            logprobs=r.logprobs,
        )
        for i, r in enumerate(rows)
    ]

    def total(part):
        with torch.no_grad():
            batch = collate(part, pad_id=0)
            return action_logprobs(model, batch, temperature=1.0)[0].sum().item()

    good, bad = total(rows[:2]), total(rows[2:])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    update_policy(model, optimizer, rows, options())
    assert total(rows[:2]) > good
    assert total(rows[2:]) < bad


def test_the_gradient_norm_is_bounded():
    rows = random_rows(6, 6)
    start = torch.cat([p.detach().flatten() for p in tiny_model(torch.float64).parameters()])
    after, metrics = updated(rows, max_grad_norm=1e-3)
    assert metrics["gradient_norm"] > 1e-3
    assert (after - start).norm().item() == pytest.approx(0.5e-3, rel=1e-2)


def test_bfloat16_passes_give_nearly_the_same_step_and_leave_the_weights_in_float32():
    def moved(bfloat16):
        model = tiny_model()
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        metrics = update_policy(model, optimizer, random_rows(7, 6), options(bfloat16=bfloat16))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - start, metrics

    exact, _ = moved(bfloat16=False)
    rounded, metrics = moved(bfloat16=True)
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.999
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-6)  # old values come from the same pass
