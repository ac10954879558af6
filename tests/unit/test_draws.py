from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_pipeline.rng import NamedRNG, derive_seed, hash_bits, permutation


def test_hash_is_splitmix64() -> None:
    # The published first outputs of SplitMix64 from state 0.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    got = [int(x) & (2**64 - 1) for x in hash_bits(torch.arange(3), 0)]
    assert got == expected


@given(st.integers(0, 2**31), st.integers(0, 100), st.integers(0, 3))
def test_a_draw_depends_on_its_sample_alone(seed: int, epoch: int, view: int) -> None:
    index = torch.tensor([3, 1, 4, 15])
    whole = NamedRNG(index, seed, "views", epoch, view).uniform("hue")
    alone = NamedRNG(index[2:3], seed, "views", epoch, view).uniform("hue")
    assert torch.equal(whole[2:3], alone)
    assert bool(((whole >= 0) & (whole < 1)).all())


def test_every_part_of_the_name_counts() -> None:
    index = torch.arange(64)
    names = [(0, "views", 0, 0), (1, "views", 0, 0), (0, "order", 0, 0), (0, "views", 1, 0), (0, "views", 0, 1)]
    drawn = [NamedRNG(index, *name).uniform("crop") for name in names] + [NamedRNG(index, *names[0]).uniform("flip")]
    for i, first in enumerate(drawn):
        for second in drawn[i + 1 :]:
            assert not torch.equal(first, second)


def test_seed_plus_epoch_is_not_the_name() -> None:
    index = torch.arange(64)
    assert not torch.equal(NamedRNG(index, 1, "views", 0).bits("a"), NamedRNG(index, 0, "views", 1).bits("a"))
    assert derive_seed(1, 0) != derive_seed(0, 1)
    assert derive_seed("1") != derive_seed(1)


def test_epochs_never_repeat() -> None:
    # torch's own generator keeps the low 32 bits of a seed, so that `epoch << 32` repeats every epoch.
    low = {derive_seed(0, "model", step) & 0xFFFFFFFF for step in range(10_000)}
    assert len(low) > 9_990


def test_uniform_is_uniform_and_independent_of_neighbors() -> None:
    drawn = NamedRNG(torch.arange(100_000), 0, "test").uniform("x", 2.0, 4.0)
    assert abs(float(drawn.mean()) - 3) < 0.01
    counts = torch.histc(drawn, 20, 2, 4)
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 45  # chi-squared, 19 degrees of freedom, p < 0.001
    assert abs(float(torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1])) < 0.02


@given(st.integers(0, 300), st.integers(0, 10))
def test_permutation_holds_each_once(count: int, seed: int) -> None:
    assert permutation(count, seed).sort().values.tolist() == list(range(count))


def test_permutation_is_stable_across_versions() -> None:
    assert permutation(8, 0, "order", 0).tolist() == permutation(8, 0, "order", 0).tolist()
    assert permutation(8, 0, "order", 0).tolist() != permutation(8, 0, "order", 1).tolist()


def test_many_draws_at_once_are_the_single_ones() -> None:
    draws = NamedRNG(torch.tensor([3, 1, 4, 15]), 7, "views", 2, 1)
    together = draws.uniforms(["hue", "grayscale"], -0.2, 0.7)
    assert torch.equal(
        together, torch.stack([draws.uniform("hue", -0.2, 0.7), draws.uniform("grayscale", -0.2, 0.7)], 1)
    )
