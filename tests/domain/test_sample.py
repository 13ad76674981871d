from collections import Counter

from flexolmo_megatron.domain.sample import reservoir_sample


def test_seed_decides():
    first = reservoir_sample(iter(range(10_000)), 100, seed=1)
    assert first == reservoir_sample(iter(range(10_000)), 100, seed=1)
    assert first != reservoir_sample(iter(range(10_000)), 100, seed=2)
    assert len(set(first)) == 100
    # Guards the promise that the sample is the same on any machine and with any version.
    assert reservoir_sample(range(100), 5, seed=0) == [45, 1, 8, 30, 57]


def test_takes_all_where_there_are_fewer():
    assert reservoir_sample("abc", 5, seed=0) == ["a", "b", "c"]
    assert reservoir_sample("abc", 3, seed=0) == ["a", "b", "c"]
    assert reservoir_sample([], 5, seed=0) == []


def test_uniform():
    counts = Counter(item for seed in range(3000) for item in reservoir_sample(range(10), 3, seed))
    assert set(counts) == set(range(10))
    # Each is in 3 of 10 samples: 900, standard deviation 25.
    assert all(abs(count - 900) < 100 for count in counts.values()), counts
