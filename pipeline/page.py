"""Pages for a browser: files beside this one, each whole once what they share is put in."""

from pathlib import Path

SHARED = ("viewer.css", "viewer.js")


def page(name: str) -> str:
    """The text of a page; {viewer.css} in it stands for that file, and so on."""
    text = _read(name)
    for shared in SHARED:
        text = text.replace(f"{{{shared}}}", _read(shared).rstrip())
    return text


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="ascii")
