"""Settings from plain values, TOML and key=value, with presets; back to plain values.

Every command takes `settings` in one way (`Given`): plain values that come on top of what the
store, or the corrector, was made with; or a complete Settings, which is taken as it is.
"""

import dataclasses
import difflib
import functools
import logging
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_type_hints

from evenlight.cache.errors import StoreError, UsageError
from evenlight.cache.place import is_url
from evenlight.cache.schema import PARTS
from evenlight.stages.settings import Settings
from evenlight.stages.weights import shipped

log = logging.getLogger(__name__)

BY_CONTENT = ("regions.segmenter", "clip.weights")  # files, covered by the models' fingerprints
Given = Settings | Mapping[str, Any] | None
"""Complete settings, or changes: {"train.steps": 200} or {"train": {"steps": 200}}."""

PRESETS: dict[str, dict[str, Any]] = {
    # The faithful baseline (docs/method.md 9): global gamma, chosen by the CLIP score.
    "paper": {
        "ladder.family": "gamma",
        "pseudo_gt.regional": False,
        "pseudo_gt.search": "grid",
        "network.size": "paper",
        "network.head": "residual",
        "losses.faithful": True,
        "losses.data": 0.6,
        "losses.edges": 0.0,
        "losses.colour": 0.1,
        "losses.clipped": 0.0,
        "losses.semantic": 0.15,
        "losses.prompt": 0.15,
        "train.good": 0,
        "train.scenes": 0,
        "train.bad": 8,
    },
}


def build(
    config: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    base: Mapping[str, Any] | None = None,
) -> Settings:
    """Complete settings: defaults, then `base`, then the TOML file, then key=value overrides.

    base: nested plain values, as `to_dict` gives and a store records.
    """
    return resolve(read(config, overrides), base)


def read(config: Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The changes that a TOML file and then key=value texts ask for, by dotted key.

    A `preset = "paper"` in the file or among the texts is applied first among its own source.
    """
    changes = {} if config is None else _expanded(flatten(_read_toml(config)))
    return changes | _expanded(dict(_parse_override(text) for text in overrides))


def resolve(given: Given, base: Mapping[str, Any] | None = None) -> Settings:
    """Complete settings: `given` on top of `base` (nested plain values) on top of the defaults."""
    if isinstance(given, Settings):
        return given
    return from_flat(flatten(base or {}) | _expanded(flatten(given or {})))


def of_store(store: str | Path, given: Given = None, *, making: bool = False) -> Settings:
    """Complete settings: `given` on top of those that the store was made with.

    making: the store may be new, or damaged and about to be mended: then a warning says that the
    defaults are taken.  Raises StoreError where the store is missing or damaged, unless making.
    """
    if isinstance(given, Settings):
        return given
    from evenlight.cache.store import Store  # not for `correct`, which reads no store

    base: dict[str, Any] = {}
    if not making or Store.exists(store):
        try:
            with Store.open(store) as opened:
                base = known(opened.index.settings)
        except StoreError as error:
            if not making:
                raise
            log.warning("%s\nits settings are unknown: taking the defaults", error)
    return resolve(given, base)


def of_run(run: Path, store: str | Path, given: Given = None) -> Settings:
    """As `of_store`, with what the run in that folder, where there is one, was told of training:
    who goes on with it need not say it again."""
    if isinstance(given, Settings) or not (run / "settings.toml").exists():
        return of_store(store, given)
    before = known(_read_toml(run / "settings.toml"))
    told = {key: value for key, value in before.items() if affected_by(key) == "training"}
    return of_store(store, told | _expanded(flatten(given or {})))


def recorded(path: str | Path) -> Settings:
    """The settings that a store or a training run was made with; the defaults of what is unknown.

    Raises UsageError where there is neither, StoreError where it is damaged.
    """
    if is_url(path) or (Path(path) / "zarr.json").exists():
        from evenlight.cache.store import Store

        with Store.open(path) as opened:
            return resolve(None, known(opened.index.settings))
    path = Path(path)
    if (path / "settings.toml").exists():
        return resolve(None, known(_read_toml(path / "settings.toml")))
    raise UsageError(f"{path} is no store and no training run: it holds no settings")


def absolute_paths(settings: Settings) -> Settings:
    """The settings with files of weights named from the root on, for workers started elsewhere."""
    flat = flatten(to_dict(settings))
    for key in BY_CONTENT:
        path = Path(flat[key]).expanduser()
        if path.is_file() and not shipped(flat[key]).is_file():
            flat[key] = str(path.absolute())
    return from_flat(flat)


def known(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Of recorded settings those that this version knows, by key; a warning names the others.

    Those of an older evenlight may be gone, or allow other values: the defaults take their place,
    and what they decided is made anew.
    """
    found: dict[str, Any] = {}
    for key, value in flatten(recorded).items():
        try:
            _sections({key: value})
        except UsageError as error:
            log.warning(
                "a setting recorded there is of another version of evenlight: %.200s", error
            )
        else:
            found[key] = value
    return found


def to_dict(settings: Settings) -> dict[str, Any]:
    """Nested plain values that JSON and TOML can hold."""
    nested = dataclasses.asdict(settings)
    return {
        section: {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        for section, fields in nested.items()
    }


def store_settings(settings: Settings) -> dict[str, Any]:
    """Nested plain values of the settings that decide parts of a store: what a store records."""
    return {
        section: kept
        for section, fields in to_dict(settings).items()
        if (kept := {k: v for k, v in fields.items() if affected_by(f"{section}.{k}") in PARTS})
    }


def differing(recorded: Mapping[str, Any], settings: Settings) -> dict[str, str]:
    """Settings that are not as recorded: key -> "key was -> is"."""
    now = flatten(to_dict(settings))
    return {
        key: f"{key} {toml_value(was)} -> {toml_value(now[key])}"
        for key, was in flatten(recorded).items()
        if key in now and was != now[key]
    }


def to_toml(settings: Settings) -> str:
    """The resolved settings as TOML, read back by `build`."""
    lines = []
    for section, fields in to_dict(settings).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {toml_value(value)}" for key, value in fields.items()]
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return repr(value)


def flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """{"photo": {"size": 512}} -> {"photo.size": 512}."""
    flat: dict[str, Any] = {}
    for section, fields in nested.items():
        if isinstance(fields, Mapping):
            flat |= {f"{section}.{key}": value for key, value in fields.items()}
        else:
            flat[section] = fields
    return flat


def from_flat(flat: Mapping[str, Any]) -> Settings:
    """Settings from dotted keys; unknown keys and wrong types are refused with the nearest key."""
    return Settings(**_sections(flat))


def of_training(
    folder: Path, recorded: dict[str, Any], given: Given, open_: tuple[str, ...]
) -> Settings:
    """The settings of training, with those that are open changed as asked; where it ran, and which
    photos were too large there, does not count."""
    recorded = {section: dict(fields) for section, fields in recorded.items() if section != "run"}
    recorded.get("photo", {}).pop("max_megapixels", None)
    try:
        trained = resolve(None, recorded)
    except UsageError as error:
        raise StoreError(
            f"{folder} holds a corrector whose settings this version does not know ({error}): "
            "use the version of evenlight that wrote it, or train again"
        ) from error
    settings = resolve(given, recorded)
    before, now = (flatten(to_dict(s)) for s in (trained, settings))
    for key, value in now.items():
        if value != before[key] and key not in open_:
            raise UsageError(
                f"{key} = {value!r} cannot be changed after training: corrector {folder} learned "
                f"with {before[key]!r}; open to change are {', '.join(open_)}"
            )
    return settings


def _sections(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that some keys speak of, each checked by itself."""
    types = setting_types()
    sections: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        if key not in types:
            near = difflib.get_close_matches(key, [*types, "preset"], n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"unknown setting {key!r}{hint}")
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = _coerced(key, value, types[key])
    section_types = get_type_hints(Settings)
    return {name: section_types[name](**fields) for name, fields in sections.items()}


@functools.cache
def setting_types() -> dict[str, Any]:
    """Every dotted key and its type."""
    return {
        f"{section}.{name}": hint
        for section, section_type in get_type_hints(Settings).items()
        for name, hint in get_type_hints(section_type).items()
    }


def affected_by(key: str) -> str:
    """What a setting decides: a part of the store, "prompts", "training" or "run"."""
    return about(key)["affects"]


@functools.cache
def about(key: str) -> Mapping[str, Any]:
    """What a setting says of itself: "affects", "meaning", "allowed"."""
    section, name = key.split(".")
    section_type = get_type_hints(Settings)[section]
    return next(f for f in dataclasses.fields(section_type) if f.name == name).metadata


@functools.lru_cache(64)  # asked for every unit of a store
def values_affecting(settings: Settings, part: str) -> dict[str, Any]:
    """The settings that decide one part, by dotted key: what its fingerprint covers."""
    flat = flatten(to_dict(settings))
    return {key: value for key, value in flat.items() if affected_by(key) == part}


def _expanded(flat: dict[str, Any]) -> dict[str, Any]:
    preset = flat.pop("preset", None)
    if preset is None:
        return flat
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    return PRESETS[preset] | flat


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read settings from {path}: {error}") from error


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    if not equals:
        raise UsageError(f"--set takes key=value, got {text!r}")
    try:
        return key.strip(), tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), raw.strip()  # a bare word is a string


def _coerced(key: str, value: Any, wanted: Any) -> Any:
    if isinstance(value, list | tuple) and getattr(wanted, "__origin__", None) is tuple:
        item = wanted.__args__[0]
        return tuple(_coerced(key, v, item) for v in value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    if isinstance(wanted, type) and type(value) is wanted:
        return value
    name = getattr(wanted, "__name__", str(wanted))
    raise UsageError(f"{key} must be {name}, got {value!r}")
