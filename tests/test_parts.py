"""The table of parts: layouts are facts, reads come first, the architecture page is its copy."""

from pathlib import Path

import numpy as np
import pytest

from evenlight.cache import schema
from evenlight.pipeline.parts import ARRAY, PARTS


def test_a_map_is_placed_and_cut_by_its_axes_and_stride_alone():
    """P3 of 24 pixels' width has three columns, as a photo has three channels."""
    p3 = ARRAY["p3"].spec("regions", {"S": 64, "C": 5})
    entry = np.zeros(p3.shape, p3.dtype)
    value = np.arange(5 * 8 * 3, dtype=np.float16).reshape(5, 8, 3)
    ARRAY["p3"].put(entry, value, np.array([64, 24]))
    assert np.array_equal(entry[:, :, :3], value) and not entry[:, :, 3:].any()
    assert np.array_equal(ARRAY["p3"].cut(entry, np.array([64, 24])), value)
    with pytest.raises(AssertionError):
        ARRAY["p3"].put(entry, value, np.array([64, 32]))


def test_the_architecture_page_shows_the_table_as_it_is():
    page = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| photo | file |")]
    start = page.splitlines().index(rows[0])
    expected = []
    for part in PARTS:
        arrays = "; ".join(f"`{array.name}` {array.describe({})}" for array in part.arrays)
        expected.append(
            f"| {part.name} | {', '.join(part.reads)} | {part.by or 'decoding'} | {arrays} |"
        )
    assert page.splitlines()[start : start + len(PARTS)] == expected


def test_the_table_has_the_parts_of_the_store_in_their_order():
    assert tuple(part.name for part in PARTS) == schema.PARTS


def test_every_part_reads_only_what_parts_before_it_hold():
    held = {"file"}
    for part in PARTS:
        assert set(part.reads) <= held, part.name
        held |= {array.name for array in part.arrays}
