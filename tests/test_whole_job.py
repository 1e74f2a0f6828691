"""The whole job with the real small models: it works, and it never opens a connection."""

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

pytestmark = pytest.mark.slow
TINY = [
    "photo.size=128",
    "run.unit_size=8",
    "train.steps=4",
    "train.size=128",
    "train.crop=96",
    "train.good=1",
    "train.scenes=0",
    "train.bad=1",
    "train.calibrate=[1,2]",
    "train.validate_every=2",
    "train.save_every=2",
    "network.size=tiny",
]

AUDITED = """
import json, sys
attempts = []

def listen(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        where = args[1] if event == "socket.connect" else args[0]
        host = where[0] if isinstance(where, tuple) else where
        if host not in ("127.0.0.1", "::1", "localhost"):
            attempts.append([event, str(where)])
    elif event == "subprocess.Popen" and "pip" in str(args[1]):
        attempts.append([event, str(args[1])])

sys.addaudithook(listen)
import torch
torch.set_num_threads(1)
from pathlib import Path
from evenlight.pipeline.demo import PHOTOS, demo
from evenlight.pipeline.doctor import doctor
from evenlight.pipeline.store_info import cache_info, cache_verify

out = Path(sys.argv[1])
result = demo(out, overrides=sys.argv[2:], photos=PHOTOS[-4:])
store = out / "priors.zarr"
info, damages, machine = cache_info(store), cache_verify(store), doctor()
print(json.dumps({
    "attempts": attempts,
    "corrected": result.corrected,
    "rows": [[row.method, row.side, row.psnr] for row in result.evaluation.rows],
    "stale": info["stale"],
    "ok": info["photos"]["ok"],
    "damages": len(damages),
    "lacks": machine["lacks"],
}))
"""


@pytest.fixture(scope="module")
def whole_job(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, str(out), *TINY], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads(done.stdout.splitlines()[-1])


def test_no_command_opens_a_connection_or_installs_anything(whole_job):
    assert whole_job[1]["attempts"] == []


def test_the_audit_hears_a_connection(tmp_path):
    code = AUDITED.split("import torch")[0] + (
        "import socket\n"
        "try: socket.getaddrinfo('example.invalid', 80)\n"
        "except OSError: pass\n"
        "print(json.dumps(attempts))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [["socket.getaddrinfo", "example.invalid"]]


def test_the_store_is_complete_whole_and_fresh(whole_job):
    _, said = whole_job
    assert said["ok"] == 10  # two photos at five exposures
    assert said["stale"] == {} and said["damages"] == 0 and said["lacks"] == []


def test_the_pseudo_gt_of_held_out_photos_is_nearer_to_the_original(whole_job):
    psnr = {(method.split(" of ")[0], side): value for method, side, value in whole_job[1]["rows"]}
    assert psnr["pseudo-GT", "all"] > psnr["identity", "all"] + 2
    assert psnr["best gamma (answer in hand)", "all"] > psnr["identity", "all"]


def test_every_photo_is_corrected_and_the_report_shows_it(whole_job):
    out, said = whole_job
    photos = sorted(p.name for p in (out / "photos").iterdir())
    assert sorted(p.name for p in (out / "corrected").iterdir()) == photos
    assert said["corrected"] == len(photos)
    page = (out / "report.html").read_text(encoding="ascii")
    data = json.loads(re.search('application/json">(.*?)</script>', page, re.DOTALL)[1])
    shown = [Path(photo["name"]).name for photo in data["photos"]]
    assert shown == ["over.jpg", "ref.jpg", "under.jpg"] * 2 + photos
    pictures = [src for photo in data["photos"] for src in photo["photos"].values()]
    assert len(pictures) == 3 * len(shown)
    assert all((out / unquote(src)).stat().st_size for src in pictures)
    assert "film rule" in str(data["tables"]) and data["charts"] and data["notes"]
