import pytest
import torch

from agent.engines.kv_cache import Plan, SlotCache, lazy_zeros

HEADS, WIDTH = 3, 2


def make_cache(num_slots=4, width=6):
    return SlotCache(1, num_slots=num_slots, width=width, device=torch.device("cpu"))


def states(rows, tokens, start):
    """Distinct numbers, shape (N, H, T, D)."""
    count = rows * HEADS * tokens * WIDTH
    return torch.arange(start, start + count, dtype=torch.float32).view(rows, HEADS, tokens, WIDTH)


def write(cache, kind, slots, positions, length, start):
    cache.plan = Plan(
        kind=kind,
        slots_N=torch.tensor(slots),
        positions_NT=torch.tensor(positions),
        length=length,
    )
    keys = states(len(slots), len(positions[0]), start)
    return keys, cache.update(keys, -keys, 0)


def test_fresh_states_are_returned_as_given_and_stored_in_their_slots():
    cache = make_cache()
    keys, (returned, _) = write(cache, "fresh", [2, 0], [[0, 1], [0, 1]], 2, start=100)
    assert returned is keys
    torch.testing.assert_close(cache.layers[0].keys[2, :, :2], keys[0])
    torch.testing.assert_close(cache.layers[0].values[0, :, :2], -keys[1])
    assert cache.layers[0].keys[1].abs().sum() == 0


def test_extending_returns_the_prefix_and_the_new_states_of_each_slot():
    cache = make_cache()
    old, _ = write(cache, "fresh", [3, 1], [[0, 1], [0, 1]], 2, start=100)
    new, (keys, values) = write(cache, "extend", [1, 3], [[2], [1]], 3, start=500)
    assert keys.shape == (2, HEADS, 3, WIDTH)
    torch.testing.assert_close(keys[0], torch.cat([old[1], new[0]], dim=1))
    torch.testing.assert_close(keys[1, :, 1], new[1, :, 0])  # overwrote position 1 of slot 3
    torch.testing.assert_close(values, -keys)


def test_decoding_writes_one_position_per_slot_and_reads_a_view():
    cache = make_cache()
    write(cache, "fresh", [0, 1, 2], [[0, 1]] * 3, 2, start=100)
    new, (keys, _) = write(cache, "decode", [0, 1], [[2], [1]], 3, start=500)
    assert keys.shape == (2, HEADS, 3, WIDTH)
    assert keys.data_ptr() == cache.layers[0].keys.data_ptr()
    torch.testing.assert_close(keys[0, :, 2], new[0, :, 0])
    torch.testing.assert_close(keys[1, :, 1], new[1, :, 0])


def test_a_swap_is_one_copy():
    cache = make_cache()
    write(cache, "fresh", [0, 3], [[0, 1]] * 2, 2, start=100)
    before = cache.layers[0].keys.clone()
    cache.copy([0, 3], [3, 0], length=2)
    torch.testing.assert_close(cache.layers[0].keys, before[[3, 1, 2, 0]])


def test_resizing_keeps_the_chosen_slots_in_their_new_order():
    cache = make_cache()
    write(cache, "fresh", [0, 1, 3], [[0, 1]] * 3, 2, start=100)
    before = cache.layers[0].keys.clone()
    cache.resize([3, 0], num_slots=5, width=9, length=2)
    after = cache.layers[0].keys
    assert after.shape == (5, HEADS, 9, WIDTH)
    torch.testing.assert_close(after[:2, :, :2], before[[3, 0], :, :2])
    assert after[2:].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lazy_zeros_are_zero_and_aligned(dtype):
    zeros = lazy_zeros((3, 5, 7), dtype=dtype, device=torch.device("cpu"))
    assert zeros.shape == (3, 5, 7)
    assert zeros.dtype == dtype
    assert zeros.data_ptr() % 64 == 0
    assert not zeros.any()
