"""Every setting in words, from what the settings say of themselves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenlight.pipeline import config
from evenlight.stages.photos.find import without_controls
from evenlight.stages.settings import AFFECTS, Settings

WIDEST = 44  # characters of a column; a longer text pushes the rest of its line


@dataclass(frozen=True, kw_only=True)
class SettingRow:
    """One setting.  default and value are as TOML writes them: value is that of the store or run
    which was asked about.  stale: what a change makes so."""

    setting: str
    default: str
    value: str | None = None
    allowed: str
    stale: str
    meaning: str


def settings(diff: str | Path | None = None) -> list[SettingRow]:
    """Every setting; with diff, a store or a training run, those in which it is not the default.

    Raises UsageError where diff is neither, StoreError where it is damaged.
    """
    defaults = config.flatten(config.to_dict(Settings()))
    there = defaults if diff is None else config.flatten(config.to_dict(config.recorded(diff)))
    return [
        SettingRow(
            setting=key,
            default=config.toml_value(default),
            value=None if diff is None else config.toml_value(there[key]),
            allowed=_allowed(key),
            stale=AFFECTS[config.affected_by(key)],
            meaning=config.about(key)["meaning"],
        )
        for key, default in defaults.items()
        if diff is None or there[key] != default
    ]


def to_text(rows: list[SettingRow]) -> str:
    """A line per setting under headings; columns that no row has anything for are left out."""
    if not rows:
        return "every setting is the default"
    headings: dict[str, Any] = {name: name for name in SettingRow.__annotations__}
    headings |= {"value": "here", "stale": "makes stale"}
    lines = [headings, *(vars(row) for row in rows)]
    columns = [
        [line[name] and without_controls(line[name]) for line in lines]
        for name in headings
        if any(vars(row)[name] is not None for row in rows)
    ]
    widths = [min(WIDEST, max(map(len, column))) for column in columns]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in zip(*columns, strict=True)
    )


def completions(incomplete: str) -> list[tuple[str, str]]:
    """What a shell offers behind --set: keys, or values of a key that has choices; each with what
    the setting means."""
    key, equals, _ = incomplete.partition("=")
    found = [(f"{name}=", name) for name in config.setting_types()]
    if equals and key in config.setting_types():
        found = [(f"{key}={choice}", key) for choice in config.about(key)["allowed"].choices]
    return [
        (text, config.about(name)["meaning"]) for text, name in found if text.startswith(incomplete)
    ]


def _allowed(key: str) -> str:
    if config.setting_types()[key] is bool:
        return "true or false"
    return str(config.about(key)["allowed"]) or "any text"
