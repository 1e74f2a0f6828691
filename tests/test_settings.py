"""Every setting is bounded where it is declared, and refused in one sentence beyond its bounds."""

from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from evenlight.cache.errors import UsageError
from evenlight.stages.priors.tone import CURVES
from evenlight.stages.settings import FAMILIES, ClipSettings, LadderSettings, Settings

SECTIONS = get_type_hints(Settings)
# of any text: names and paths, whose own rooms say what is wrong with them
FREE = {"regions.segmenter", "clip.model", "clip.weights", "train.start", "run.device"}
DECLARED = {
    f"{name}.{one.name}": (section, one, get_type_hints(section)[one.name])
    for name, section in SECTIONS.items()
    for one in fields(section)
}
NUMBERS = {k: v for k, v in DECLARED.items() if v[1].metadata["allowed"].low is not None}


def with_value(key: str, value: Any) -> Any:
    """A section with one value changed; where the setting is a list, one of its items."""
    section, one, _ = DECLARED[key]
    if isinstance(one.default, tuple):
        value = (value, *(one.default[1:] or (value, value)))
    return section(**{one.name: value})


@pytest.mark.parametrize("key", DECLARED)
def test_every_setting_has_bounds_or_choices(key):
    _, one, kind = DECLARED[key]
    allowed = one.metadata["allowed"]
    if kind is str:
        assert bool(allowed.choices) == (key not in FREE)
    elif kind is not bool:
        assert allowed.low < allowed.high


@pytest.mark.parametrize("key", NUMBERS)
def test_what_lies_beyond_the_bounds_is_refused_by_name(key):
    allowed = DECLARED[key][1].metadata["allowed"]
    for value in (allowed.low - allowed.multiple, allowed.high + allowed.multiple, -(10.0**11)):
        with pytest.raises(UsageError, match=rf"^{key} must be .*, got .*{value}"):
            with_value(key, value)
    if allowed.multiple > 1:
        with pytest.raises(UsageError, match=f"{key} must be .*a multiple of {allowed.multiple} "):
            with_value(key, allowed.low + 1)


@pytest.mark.parametrize("key", [k for k in NUMBERS if "float" in str(DECLARED[k][2])])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused(key, value):
    with pytest.raises(UsageError, match=rf"^{key} must be .*, got .*{value}"):
        with_value(key, value)


@pytest.mark.parametrize("key", [k for k, v in DECLARED.items() if v[2] is str and k not in FREE])
def test_a_choice_that_is_not_offered_is_refused_with_those_that_are(key):
    offered = DECLARED[key][1].metadata["allowed"].choices
    for value in offered:
        with_value(key, value)
    with pytest.raises(UsageError, match=f"^{key} must be one of {', '.join(offered)}, got 'odd'"):
        with_value(key, "odd")


@pytest.mark.parametrize(
    "key", [k for k in NUMBERS if not isinstance(DECLARED[k][1].default, tuple)]
)
def test_the_bounds_themselves_are_taken(key):
    allowed = DECLARED[key][1].metadata["allowed"]
    for value in (allowed.low, allowed.high, *allowed.choices):
        with_value(key, value)


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, -1.0, 1.0), (0.1, 0.2, 0.3), (0.0, 0.0, 1.0)])
def test_a_ladder_rises_through_zero(values):
    with pytest.raises(UsageError, match=r"ladder.offsets must be 3 to 64 rising numbers with 0"):
        LadderSettings(offsets=values)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_clip_has_three_channels(name):
    with pytest.raises(UsageError, match=f"clip.{name} must be three numbers"):
        ClipSettings(**{name: (0.5, 0.5)})


def test_the_families_of_settings_are_those_of_the_tone_operators():
    assert set(FAMILIES) == set(CURVES)
