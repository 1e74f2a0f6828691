"""One HTML page, pictures inside: before, after, pseudo-GT and regions of every photo."""

import base64
import colorsys
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evenlight.cache.files import atomic_write
from evenlight.pipeline.evaluate import COLUMNS, Evaluation
from evenlight.stages.photos.encode import jpeg_bytes

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; color: #222;
  padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.row { display: grid; grid-template-columns: repeat(4, 1fr); gap: .5rem; margin: .5rem 0 1.5rem; }
figure { margin: 0; } img { width: 100%; display: block; }
figcaption { font-size: .85rem; color: #555; }
"""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One photo of the page.  Pictures: uint8 H,W,3.  regions: uint8 H,W labels."""

    name: str
    before: np.ndarray
    after: np.ndarray
    pseudo_gt: np.ndarray
    regions: np.ndarray
    strength: float


def write_report(
    path: Path,
    *,
    title: str,
    notes: Sequence[str],
    examples: Sequence[Example],
    evaluation: Evaluation,
) -> None:
    """Write the page; everything it shows is inside the one file."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(note)}</p>" for note in notes),
        _table(evaluation),
        *(_example(example) for example in examples),
        "</body></html>",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "\n".join(parts).encode())


def colour_regions(labels_HW: np.ndarray) -> np.ndarray:
    """A picture of a region map: one colour per region, label 0 black."""
    palette = np.zeros((256, 3), np.uint8)
    for label in range(1, 256):
        hue = label * 0.618034 % 1
        palette[label] = np.array(colorsys.hsv_to_rgb(hue, 0.65, 0.95)) * 255
    return palette[labels_HW]


def _table(evaluation: Evaluation) -> str:
    headings = ["method", "side", "photos", *(column["heading"] for column in COLUMNS.values())]
    header = "".join(f"<th>{heading}</th>" for heading in headings)
    rows = "".join(
        f"<tr><td>{html.escape(row.method)}</td><td>{row.side}</td><td>{row.photos}</td>"
        f"{''.join(f'<td>{figure}</td>' for figure in row.shown())}</tr>"
        for row in evaluation.rows
    )
    protocol = html.escape(evaluation.protocol)
    return f"<table><tr>{header}</tr>{rows}</table><p>{protocol}.</p>"


def _example(example: Example) -> str:
    pictures = (
        ("before", example.before),
        ("after", example.after),
        (f"pseudo-GT, t = {example.strength:+.2f}", example.pseudo_gt),
        (f"{int(example.regions.max())} regions", colour_regions(example.regions)),
    )
    figures = "".join(
        f"<figure><img alt='{caption}' src='{_data_uri(picture)}'>"
        f"<figcaption>{caption}</figcaption></figure>"
        for caption, picture in pictures
    )
    return f"<h2>{html.escape(example.name)}</h2><div class='row'>{figures}</div>"


def _data_uri(picture: np.ndarray) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg_bytes(picture)).decode()}"
