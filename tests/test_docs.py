"""The pages of docs/: their commands and their Python run, their links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from evenlight.pipeline.demo import installed_photo
from evenlight.stages.photos.encode import jpeg_bytes
from evenlight.stages.pixels import to_bytes, to_float
from evenlight.stages.priors import tone

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
STARTED = ("index.md", "own.md", "scaling.md")  # whose blocks are run; text ones are not
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def write_folder(folder: Path) -> None:
    """Photos as users have them: dark, bright and good ones."""
    folder.mkdir()
    shifts = {"dark": -1.3, "bright": 1.0, "good": 0.0, "night": -2.0}
    pixels = to_float(installed_photo("skimage/data", "coffee.png")[::2, ::2])
    for stem, shift in shifts.items():
        copy = to_bytes(tone.apply("ev", pixels, shift)).numpy()
        (folder / f"{stem}.jpg").write_bytes(jpeg_bytes(copy))


@pytest.mark.slow
@pytest.mark.parametrize("page", STARTED)
def test_every_block_of_the_page_runs(page, tmp_path):
    write_folder(tmp_path / "PHOTOS")
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
    }
    blocks = BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert blocks
    for language, block in blocks:
        call = ["bash", "-ec", block] if language == "sh" else [sys.executable, "-c", block]
        done = subprocess.run(
            call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(
    "page", [*PAGES, *ROOT.glob("*.md"), *ROOT.glob("*/README.md")], ids=lambda page: page.name
)
def test_every_link_leads_to_a_file(page):
    made = {ROOT / "docs/commands.md"}  # by make site
    for link in re.findall(r"\]\(([^)#: ]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        target = (page.parent / link).resolve()
        assert target.exists() or target in made, link


@pytest.mark.slow
def test_the_site_builds_and_asks_nobody(tmp_path):
    """Every page is in its menu, and none loads anything from elsewhere."""
    subprocess.run(["make", "--silent", "site"], cwd=ROOT, check=True, capture_output=True)
    pages = list((ROOT / "build/site").glob("*.html"))
    assert {page.stem for page in pages} >= {page.stem for page in PAGES} | {"commands"}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?https?:", text) == [], page
