"""Page records and resident map to classes and to a grid."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from common import layout
from lab.pagemap import OUTSIDE, PageClass, classify, grid

N_PAGES = 4096


def blank(n_pages: int = N_PAGES) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
    """A guest that is free in blocks of the top order and was never touched."""
    states = np.zeros(n_pages, np.uint16)
    states[::1024] = layout.FREE | 10
    return states, np.zeros(n_pages, np.uint8)


def slow_classify(states: npt.NDArray[np.uint16], resident: npt.NDArray[np.uint8]) -> list[int]:
    """The obvious loop."""
    classes = [int(PageClass.UNCLEAR)] * len(states)
    kinds = {
        layout.ALLOCATED: PageClass.ALLOCATED,
        layout.IN_FLIGHT: PageClass.IN_FLIGHT,
        layout.ON_PCP: PageClass.PER_CPU,
    }
    unflagged = (PageClass.NEVER_TOUCHED, PageClass.FREE_RESIDENT, PageClass.FREE_RETURNED)
    flagged = (PageClass.REPORTED_UNTOUCHED, PageClass.FREE_RESIDENT, PageClass.REPORTED_RETURNED)
    for head, state in enumerate(int(state) for state in states):
        kind = state & layout.KIND_MASK
        if kind == layout.INTERIOR:
            continue
        for page in range(head, min(len(states), head + (1 << (state & layout.ORDER_MASK)))):
            if page > head and int(states[page]) & layout.KIND_MASK != layout.INTERIOR:
                break
            if kind != layout.FREE:
                classes[page] = kinds[kind]
            else:
                classes[page] = (flagged if state & layout.REPORTED else unflagged)[resident[page]]
    return classes


def random_guest(seed: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
    """Blocks of all kinds and orders, and a few records torn off."""
    rng = np.random.default_rng(seed)
    states, resident = np.zeros(N_PAGES, np.uint16), rng.integers(0, 3, N_PAGES).astype(np.uint8)
    pfn = 0
    while pfn < N_PAGES:
        order = int(rng.integers(0, 11))
        while pfn % (1 << order):
            order -= 1
        kind = int(rng.choice([layout.FREE, layout.ALLOCATED, layout.IN_FLIGHT, layout.ON_PCP]))
        reported = layout.REPORTED if kind == layout.FREE and order >= 9 else 0
        states[pfn] = kind | order | reported | (int(rng.integers(0, 6)) << layout.MT_SHIFT)
        pfn += 1 << order
    states[rng.integers(0, N_PAGES, 5)] = 0
    return states, resident


def test_a_fresh_guest_is_never_touched() -> None:
    assert (classify(*blank()) == PageClass.NEVER_TOUCHED).all()


def test_each_kind_covers_its_whole_block_and_no_more() -> None:
    states, resident = blank()
    states[0], states[512] = layout.ALLOCATED | 9, layout.IN_FLIGHT | 9
    states[1024], states[1025] = layout.ON_PCP | 0, layout.ALLOCATED | 0
    states[1026], states[1028] = layout.FREE | 1, layout.FREE | 2
    states[2048] |= layout.REPORTED
    states[3072] |= layout.REPORTED
    resident[3072:] = layout.RESIDENT
    resident[1028:1030] = layout.RESIDENT
    resident[1030] = resident[2100] = layout.RETURNED
    classes = classify(states, resident)
    assert (classes[:512] == PageClass.ALLOCATED).all()
    assert (classes[512:1024] == PageClass.IN_FLIGHT).all()
    assert list(classes[1024:1032]) == [
        PageClass.PER_CPU,
        PageClass.ALLOCATED,
        PageClass.NEVER_TOUCHED,
        PageClass.NEVER_TOUCHED,
        PageClass.FREE_RESIDENT,
        PageClass.FREE_RESIDENT,
        PageClass.FREE_RETURNED,
        PageClass.NEVER_TOUCHED,
    ]
    assert (classes[1032:2048] == PageClass.UNCLEAR).all(), "no block covers these pages"
    assert (np.delete(classes[2048:3072], 52) == PageClass.REPORTED_UNTOUCHED).all()
    assert classes[2100] == PageClass.REPORTED_RETURNED
    assert (classes[3072:] == PageClass.FREE_RESIDENT).all(), "a flag without a discard frees nothing"


@pytest.mark.parametrize("seed", range(3))
def test_classes_are_those_of_the_obvious_loop(seed: int) -> None:
    states, resident = random_guest(seed)
    assert classify(states, resident).tolist() == slow_classify(states, resident)


def test_a_chunk_boundary_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    states, resident = random_guest(7)
    whole = classify(states, resident)
    monkeypatch.setattr("lab.pagemap._CHUNK_PAGES", 1024)
    assert (classify(states, resident) == whole).all()


def test_arrays_of_different_length_are_refused() -> None:
    states, resident = blank()
    with pytest.raises(ValueError, match="differ in shape"):
        classify(states, resident[:-1])
    assert classify(states[:0], resident[:0]).shape == (0,)


def test_grid_shows_every_page_of_a_small_guest_in_address_order() -> None:
    classes = classify(*random_guest(1))
    folded = grid(classes)
    assert folded.pages_per_cell == 1
    assert folded.cells.T.ravel().tolist() == classes.tolist()
    assert sum(folded.pages) == N_PAGES
    assert folded.pages == tuple(int((classes == page_class).sum()) for page_class in PageClass)


def test_grid_of_a_large_guest_is_thinned_but_its_counts_are_exact() -> None:
    classes = np.zeros(3 * 512 * 1024 + 512, np.uint8)
    classes[: 512 * 1024] = PageClass.ALLOCATED
    folded = grid(classes)
    rows, columns = folded.cells.shape
    assert rows <= 256
    assert columns <= 1024
    assert columns * folded.pages_per_column >= len(classes)
    assert folded.pages[PageClass.ALLOCATED] == 512 * 1024
    flat = folded.cells.T.ravel()
    n_allocated = 512 * 1024 // folded.pages_per_cell
    assert (flat[:n_allocated] == PageClass.ALLOCATED).all()
    assert (flat[n_allocated : len(classes) // folded.pages_per_cell] == PageClass.NEVER_TOUCHED).all()
    assert flat[-1] == OUTSIDE


def test_a_thinned_cell_shows_its_commonest_class() -> None:
    classes = np.tile(np.array([5, 5, 5, 1, 1, 1, 1, 2], np.uint8), 64)
    folded = grid(classes, max_columns=8, max_rows=8)
    assert folded.pages_per_cell == 8
    assert (folded.cells == PageClass.FREE_RESIDENT).all()
