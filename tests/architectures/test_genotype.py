"""Genotypes: what is drawn is connected, learns, and has no dead ends."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ghn_architectures.cells import FREE_OPERATIONS, OPERATIONS, CellGenotype, draw_genotype
from ghn_architectures.draw import Draw

GOLDEN = [33, 24, 83, 37, 79, 51]
seeds = st.integers(0, 10**6)


def cells(seed: int, steps: int) -> tuple[CellGenotype, CellGenotype]:
    genotype = draw_genotype(Draw(f"test/{seed}"), steps=steps)
    return genotype.normal, genotype.reduction


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 6))
def test_every_step_is_read(seed: int, steps: int) -> None:
    for cell in cells(seed, steps):
        read = {value - 2 for step in cell.steps for value in step.inputs} | set(cell.outputs)
        assert read >= set(range(len(cell.steps)))


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 6))
def test_steps_read_earlier_values_only(seed: int, steps: int) -> None:
    for cell in cells(seed, steps):
        assert all(value < 2 + place for place, step in enumerate(cell.steps) for value in step.inputs)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 6))
def test_cells_are_sensible(seed: int, steps: int) -> None:
    normal, reduction = cells(seed, steps)
    assert any(name not in (*FREE_OPERATIONS, "cse") for name in normal.operations)
    for cell in (normal, reduction):
        assert 1 in cell.used_inputs
        assert "none" not in cell.operations
        assert set(cell.operations) <= set(OPERATIONS)
    assert "msa" not in reduction.operations


def test_all_operations_occur() -> None:
    seen = {name for seed in range(200) for cell in cells(seed, 3) for name in cell.operations}
    assert seen == set(OPERATIONS) - {"none"}


def test_streams_of_different_keys_differ() -> None:
    assert [Draw("a").uniform() for _ in range(3)] != [Draw("b").uniform() for _ in range(3)]


def test_draws_are_what_they_were() -> None:
    draw = Draw("golden")
    assert [draw.integer(0, 99) for _ in range(6)] == GOLDEN


def test_samples_are_distinct() -> None:
    assert sorted(Draw("s").sample(range(5), 5)) == list(range(5))


def test_weights_are_shares() -> None:
    draw = Draw("w")
    drawn = [draw.weighted({"a": 3.0, "b": 1.0}) for _ in range(2000)]
    assert 0.7 < drawn.count("a") / 2000 < 0.8
