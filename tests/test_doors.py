"""What must not get in, run or swell: limits and switches that no other test would miss."""

import copy
import os
import signal
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
from photo_makers import picture
from PIL import Image

from evenlight.cache.errors import EnvironmentLacks
from evenlight.pipeline import exits
from evenlight.stages.photos.metadata import read_metadata
from evenlight.stages.priors.fastsam_weights import read_weights


def png_with_profile(path: Path, profile: bytes) -> bytes:
    """A PNG whose iCCP chunk holds a profile, deflated."""
    Image.fromarray(picture(8, 8, 3)).save(path)
    data = path.read_bytes()
    body = b"iCCP" + b"ICC profile\0\0" + zlib.compress(profile)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + chunk + data[33:]


def test_a_colour_profile_that_swells_is_left_packed(tmp_path):
    data = png_with_profile(tmp_path / "x.png", bytes(200 << 20))
    assert len(data) < 1 << 20
    tracemalloc.start()
    found, _ = read_metadata(data, "png", (), {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.icc is None and peak < 64 << 20
    small = png_with_profile(tmp_path / "x.png", bytes(range(200)))
    assert read_metadata(small, "png", (), {})[0].icc == bytes(range(200))


def test_weights_whose_zip_entries_overlap_are_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bomb/data.pkl", bytes(10_000))
        archive.filelist += [copy.copy(archive.filelist[0]) for _ in range(1000)]
    assert path.stat().st_size < 200_000
    with pytest.raises(EnvironmentLacks, match="its entries overlap"):
        read_weights(path)


def test_ultralytics_reads_safely_and_keeps_its_settings_out_of_the_home(tmp_path):
    code = (
        "import os, tempfile, evenlight.stages.priors.fastsam\n"
        "from ultralytics import utils\n"
        "assert utils.SAFE_LOAD is True and utils.ONLINE is False and utils.AUTOINSTALL is False\n"
        "assert str(utils.USER_CONFIG_DIR).startswith(tempfile.gettempdir() + '/evenlight-')\n"
        "assert not any(utils.SETTINGS[x] for x in ('sync', 'clearml', 'comet', 'dvc', 'mlflow'))\n"
    )
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")},
        check=True,
    )
    written = [str(path) for path in tmp_path.rglob("*") if path.is_file()]
    assert [
        path for path in written if "ltralytics" in path or path.endswith("settings.json")
    ] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_unwinds_and_the_second_ends_at_once(number, code):
    before = {stop: signal.getsignal(stop) for stop in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(exits.Stopped) as stopped:
            exits._stop(number, None)
        assert stopped.value.code == code
        assert all(signal.getsignal(stop) == signal.SIG_DFL for stop in before)
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
