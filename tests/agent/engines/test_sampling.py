import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agent.engines.sampling import SamplingColumns, sample, uniforms


def columns(
    rows: int, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> SamplingColumns:
    return SamplingColumns(
        seeds_B=np.arange(rows, dtype=np.uint64),
        temperatures_B=np.full(rows, temperature),
        top_ps_B=np.full(rows, top_p),
        top_ks_B=np.full(rows, top_k, dtype=np.int64),
    )


LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def draw(count: int, **settings: float) -> tuple[np.ndarray, np.ndarray]:
    return sample(LOGITS.expand(count, 4), columns(count, **settings), np.zeros(count, np.int64))


def test_uniforms_pass_a_chi_square_test_over_seeds_and_over_positions():
    zeros, steps = np.zeros(10_000, np.int64), np.arange(10_000)
    for seeds, positions in ((steps, zeros), (zeros, steps)):
        u = uniforms(seeds.astype(np.uint64), positions)
        counts = np.histogram(u, bins=20, range=(0, 1))[0]
        chi_square = ((counts - 500) ** 2 / 500).sum()
        assert chi_square < 43.8  # 99.9 % quantile with 19 degrees of freedom
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.04


def test_streams_of_seeds_a_golden_ratio_apart_do_not_overlap():
    golden = 0x9E3779B97F4A7C15
    seeds = np.array([1] * 50 + [(1 + golden) % 2**64] * 50, dtype=np.uint64)
    u = uniforms(seeds, np.tile(np.arange(50), 2))
    assert len(set(u.tolist())) == 100


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_uniforms_lie_in_the_half_open_unit_interval(seed, position):
    (u,) = uniforms(np.array([seed], dtype=np.uint64), np.array([position]))
    assert 0 <= u < 1


def test_frequencies_follow_the_distribution():
    ids, logprobs = draw(20_000)
    observed = np.bincount(ids, minlength=4) / len(ids)
    assert np.abs(observed - [0.5, 0.3, 0.15, 0.05]).max() < 0.012
    np.testing.assert_allclose(logprobs, np.log([0.5, 0.3, 0.15, 0.05])[ids], atol=1e-6)


def test_temperature_one_half_squares_the_probabilities():
    ids, logprobs = draw(64, temperature=0.5)
    squares = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(logprobs, np.log(squares / squares.sum())[ids], atol=1e-6)


def test_temperature_zero_takes_the_likeliest_under_the_plain_softmax():
    ids, logprobs = draw(3, temperature=0.0, top_k=1, top_p=0.1)
    assert ids.tolist() == [0, 0, 0]
    np.testing.assert_allclose(logprobs, math.log(0.5), atol=1e-6)


def test_top_k_keeps_the_k_likeliest_and_renormalises():
    ids, logprobs = draw(500, top_k=2)
    assert set(ids.tolist()) == {0, 1}
    np.testing.assert_allclose(logprobs, np.log([0.625, 0.375])[ids], atol=1e-6)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.6, 2), (0.94, 3), (0.97, 4)])
def test_top_p_keeps_the_fewest_ids_that_reach_the_mass(top_p, kept):
    ids, _ = draw(2_000, top_p=top_p)
    assert set(ids.tolist()) == set(range(kept))


def test_top_p_applies_after_top_k():
    ids, _ = draw(500, top_k=2, top_p=0.62)  # 0.5 / 0.8 = 0.625 alone reaches 0.62
    assert set(ids.tolist()) == {0}


def test_rows_with_different_settings_do_not_disturb_each_other():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    settings = SamplingColumns(
        seeds_B=np.arange(4, dtype=np.uint64),
        temperatures_B=np.array([0.0, 1.0, 0.7, 1.3]),
        top_ps_B=np.array([1.0, 0.8, 1.0, 0.9]),
        top_ks_B=np.array([0, 0, 5, 7]),
    )
    positions = np.array([3, 1, 4, 1])
    together = sample(logits, settings, positions)
    for i in range(4):
        row = SamplingColumns(
            seeds_B=settings.seeds_B[i : i + 1],
            temperatures_B=settings.temperatures_B[i : i + 1],
            top_ps_B=settings.top_ps_B[i : i + 1],
            top_ks_B=settings.top_ks_B[i : i + 1],
        )
        alone = sample(logits[i : i + 1], row, positions[i : i + 1])
        assert alone[0][0] == together[0][i]
        assert alone[1][0] == pytest.approx(together[1][i], abs=1e-6)


@given(st.integers(0, 2**32), st.integers(2, 30))
def test_an_impossible_id_is_never_drawn(seed, vocabulary):
    logits = torch.full((1, vocabulary), -torch.inf)
    logits[0, seed % vocabulary] = 0.0
    settings = SamplingColumns(
        seeds_B=np.array([seed], dtype=np.uint64),
        temperatures_B=np.ones(1),
        top_ps_B=np.ones(1),
        top_ks_B=np.zeros(1, np.int64),
    )
    ids, logprobs = sample(logits, settings, np.zeros(1, np.int64))
    assert ids[0] == seed % vocabulary
    assert logprobs[0] == 0.0
