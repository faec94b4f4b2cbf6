"""The picture: what is drawn is what was seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lab.figure import _LABELS, GuestPicture, build_figure, draw
from lab.pagemap import PageClass
from lab.sampler import Observation
from lab.samples import SeriesRecorder
from tests.lab.build import MIB, observation

REPORTS = np.array([[6.0, 32.0 * MIB], [6.001, 16.0 * MIB], [8.0, 8.0 * MIB]])


def pictures(count: int) -> list[GuestPicture]:
    """``count`` guests that were seen alike."""
    return [GuestPicture(f"guest-{index}", 64 * MIB, observation(), REPORTS) for index in range(1, count + 1)]


def axes_titled(figure: Figure, text: str) -> Axes:
    """The panel whose title starts with ``text``."""
    (found,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(text)]
    return found


def test_lines_are_the_series() -> None:
    guest = pictures(1)[0]
    axes = axes_titled(build_figure([guest], title="t", subtitle="s"), "guest-1")
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    series = guest.observation.series
    for label, column in (("resident on the host", series.resident_bytes), ("allocated", series.allocated_bytes)):
        assert np.array_equal(np.asarray(lines[label].get_xdata()), series.time_s)
        assert np.array_equal(np.asarray(lines[label].get_ydata()), column / MIB)


def test_stems_add_up_to_the_reports_and_each_report_has_a_tick() -> None:
    axes = axes_titled(build_figure(pictures(1), title="t", subtitle="s"), "guest-1")
    collections = {str(one.get_label()): one for one in axes.collections}
    heights = [np.asarray(path.vertices)[:, 1].max() for path in collections["_stems"].get_paths()]
    assert sum(heights) == pytest.approx(REPORTS[:, 1].sum() / MIB)
    ticks = [np.asarray(path.vertices)[0, 0] for path in collections["_rug"].get_paths()]
    assert ticks == pytest.approx(REPORTS[:, 0].tolist())


def test_maps_are_the_snapshots() -> None:
    guest = pictures(1)[0]
    figure = build_figure([guest], title="t", subtitle="s")
    for moment, snapshot in (("at its peak", guest.observation.peak_map), ("at the end", guest.observation.last_map)):
        assert snapshot is not None
        (drawn,) = axes_titled(figure, moment).get_images()
        assert np.array_equal(np.asarray(drawn.get_array()), snapshot.grid.cells)
        allocated = drawn.to_rgba(np.array([[PageClass.ALLOCATED]]))[0, 0, :3]
        assert allocated == pytest.approx(to_rgb(_LABELS[PageClass.ALLOCATED][1]))


def test_title_and_sizes_of_the_file(tmp_path: Path) -> None:
    figure = build_figure(pictures(2), title="two guests gave back 112 MiB", subtitle="memhog")
    assert "two guests gave back 112 MiB" in [text.get_text() for text in figure.texts]
    path = tmp_path / "demo.png"
    path.write_bytes(draw(pictures(2), title="two guests gave back 112 MiB", subtitle="memhog"))
    pixels = image.imread(path)
    assert pixels.shape[1] == 2400
    assert pixels.shape[0] > 1000
    assert path.stat().st_size > 20_000


def test_every_page_class_has_its_own_colour_and_label() -> None:
    assert set(_LABELS) == set(PageClass)
    assert len(set(_LABELS.values())) == len(PageClass)


@pytest.mark.parametrize("count", [3, 9])
def test_many_guests_are_drawn_up_to_a_limit_and_the_rest_is_told(count: int) -> None:
    figure = build_figure(pictures(count), title="t", subtitle="s")
    assert len(figure.axes) == 3 * min(count, 8)
    assert any("1 more not drawn" in text.get_text() for text in figure.texts) == (count == 9)


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_guest_that_was_never_seen_still_gives_a_picture(suffix: str, magic: bytes) -> None:
    unseen = Observation(SeriesRecorder().series(), None, None, None, None)
    guest = GuestPicture("guest-1", 64 * MIB, unseen, np.zeros((0, 2)))
    assert draw([guest], title="t", subtitle="s", suffix=suffix).startswith(magic)
