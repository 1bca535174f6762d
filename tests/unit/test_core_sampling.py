"""Which tensors are hashed before anything is copied, to see whether a file shares."""

from __future__ import annotations

from weightd_daemon.core.sampling import sample

MIB = 1 << 20


def test_nothing_is_worth_it_where_no_length_is_resident() -> None:
    assert sample([MIB, 2 * MIB, 100], resident={3 * MIB, 100}) == []


def test_it_is_spread_over_all_that_may_be_shared() -> None:
    lengths = [MIB if i % 2 else 2 * MIB for i in range(400)]
    chosen = sample(lengths, resident={MIB})
    assert len(chosen) == 16
    assert all(lengths[i] == MIB for i in chosen)
    assert chosen == sorted(set(chosen))
    assert chosen[0] < 25
    assert chosen[-1] > 350


def test_it_is_a_small_part_of_the_bytes() -> None:
    lengths = [MIB] * 64
    assert sum(lengths[i] for i in sample(lengths, resident={MIB})) <= sum(lengths) // 16


def test_of_few_large_tensors_the_smallest_is_enough() -> None:
    assert sample([8 * MIB, 4 * MIB, 6 * MIB], resident={8 * MIB, 6 * MIB}) == [2]
