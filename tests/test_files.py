"""Files are whole or absent, sealed JSON shows every changed bit, one writer holds a lock."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torture import trials

from evenlight.cache import files
from evenlight.cache.errors import StoreError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)  # fmt: skip


@pytest.fixture
def tmp_path():
    """A folder in memory where there is one: thousands of writes with fsync."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    files.atomic_write(path, b"old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        files.atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_write_that_the_system_cuts_into_pieces_is_whole(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:3]))
    files.atomic_write(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_file_and_name_are_on_disk_in_that_order_when_a_write_returns(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(file):
        events.append(("fsync", str(Path(f"/proc/self/fd/{file}").readlink())))
        fsync(file)

    def traced_replace(source, target):
        events.append(("replace", str(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    files.atomic_write(tmp_path / "file", b"data")
    temporary = events[1][1]
    assert temporary.endswith(files.TEMPORARY_SUFFIX)
    assert events == [("fsync", temporary), ("replace", temporary), ("fsync", str(tmp_path))]


def test_what_a_killed_writer_left_goes_but_not_what_is_being_written(tmp_path, monkeypatch):
    left = tmp_path / f".x.0011223344556677{files.TEMPORARY_SUFFIX}"
    left.touch()
    fsync, kept = os.fsync, []

    def cleaning_fsync(file):  # as a second run would, just then
        written = [path for path in tmp_path.iterdir() if path != left]
        for path in tmp_path.glob(f".*{files.TEMPORARY_SUFFIX}"):
            files.remove_left(path)
        kept.extend(path.exists() for path in written)
        fsync(file)

    monkeypatch.setattr(os, "fsync", cleaning_fsync)
    files.atomic_write(tmp_path / "file", b"data")
    assert kept[0] and not left.exists() and (tmp_path / "file").read_bytes() == b"data"


def test_a_new_folder_is_on_disk_name_by_name(tmp_path, monkeypatch):
    events = []
    mkdir = os.mkdir

    def traced_mkdir(path, *args):
        mkdir(path, *args)
        events.append(("mkdir", Path(path).name))

    monkeypatch.setattr(os, "mkdir", traced_mkdir)
    monkeypatch.setattr(files, "sync_folder", lambda folder: events.append(("sync", folder.name)))
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    assert events == [("mkdir", "a"), ("sync", tmp_path.name), ("mkdir", "b"), ("sync", "a")]


def test_litter_is_removed_and_nothing_else(tmp_path):
    ours = tmp_path / "a" / f".x.0011223344556677{files.TEMPORARY_SUFFIX}"
    zarrs = tmp_path / "a" / "b" / f"zarr.{'0123456789abcdef' * 2}.partial"
    others = [tmp_path / "a" / "film.partial", tmp_path / "a" / "b" / "evenlight-tmp"]
    zarrs.parent.mkdir(parents=True)
    for path in (ours, zarrs, *others):
        path.touch()
    assert sorted(files.clean_temporaries(tmp_path)) == sorted([ours, zarrs])
    assert not ours.exists() and not zarrs.exists()
    assert all(path.exists() for path in others)


@given(document=st.dictionaries(st.text().filter(lambda key: key != "sha256"), JSON_VALUES))
def test_sealed_json_reads_back_as_written(document):
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: None)  # a hundred of them are slow
            files.write_json(Path(file.name), document)
        assert files.read_json(Path(file.name)) == document


def test_any_flipped_bit_of_sealed_json_is_an_error_or_changes_nothing(tmp_path):
    path = tmp_path / "sealed.json"
    document = {"names": ["a.jpg", None, "\udcff.jpg"], "size": 32, "share": 0.25, "on": True}
    files.write_json(path, document)
    whole = path.read_bytes()
    refused = 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            assert files.read_json(path) == document
        except StoreError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 0.9 * 8 * len(whole)  # the rest is indentation


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"a": NaN}', b'{"a": 1e999}', b"{}"]
)
def test_what_is_no_sealed_json_is_refused_by_name(tmp_path, content):
    path = tmp_path / "sealed.json"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=str(path)):
        files.read_json(path)


def test_numbers_that_json_does_not_have_are_never_written(tmp_path):
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            files.write_json(tmp_path / "sealed.json", {"a": [number]})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_unreadable_json_file_is_refused_by_name(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(StoreError, match=str(path)):
            files.read_json(path)


def test_digests_are_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_bytes(b"abc") == files.sha256_file(tmp_path / "file") == expected


def contend(path, start, answers):
    """Forked: wait for start, try the lock, say how it went; the winner holds it until killed."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.read(start, 1)
        begin = time.monotonic()
        try:
            files.Lock(path, "the store").__enter__()
            answer = {"won": os.getpid()}
        except StoreError as error:
            answer = {"lost": str(error)}
        line = json.dumps(answer | {"seconds": time.monotonic() - begin}) + "\n"
        os.write(answers, line.encode())
        if "won" in answer:
            time.sleep(60)
    finally:
        os._exit(0)


def test_of_two_runs_one_is_refused_by_name_and_a_killed_one_is_taken_over(tmp_path):
    """Both start at once, the winner is killed with -9, a third takes over."""
    path = tmp_path / "lock"
    for _ in range(trials(50, 500)):
        (start, begin), (reading, answers) = os.pipe(), os.pipe()
        pids = [contend(path, start, answers) for _ in range(2)]
        os.write(begin, b"xx")
        with os.fdopen(reading) as lines:
            first, second = (json.loads(lines.readline()) for _ in pids)
        won, lost = (first, second) if "won" in first else (second, first)
        assert f"process {won['won']} on host {socket.gethostname()}" in lost["lost"]
        assert lost["seconds"] < 2
        os.kill(won["won"], signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        for descriptor in (start, begin, answers):
            os.close(descriptor)
        with files.Lock(path, "the store") as lock:
            assert json.loads(files.read_token(path))["pid"] == os.getpid()
            assert lock.held
        assert files.read_token(path) == ""


def test_a_child_that_outlives_a_killed_holder_does_not_keep_its_lock(tmp_path):
    path = tmp_path / "lock"
    reading, answers = os.pipe()
    holder = os.fork()
    if holder == 0:
        files.Lock(path, "the store").__enter__()
        grandchild = os.fork()
        if grandchild == 0:
            time.sleep(60)
        os.write(answers, f"{grandchild}\n".encode())
        time.sleep(60)
    with os.fdopen(reading) as lines:
        orphan = int(lines.readline())
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    try:
        with files.Lock(path, "the store") as lock:
            assert lock.held
    finally:
        os.kill(orphan, signal.SIGKILL)
        os.close(answers)


def test_leaving_a_lock_in_a_forked_child_does_not_free_it(tmp_path):
    with files.Lock(tmp_path / "lock", "the store") as lock:
        child = os.fork()
        if child == 0:
            lock.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(StoreError, match="is in use by"):
            files.Lock(tmp_path / "lock", "the store").__enter__()


PREFIX = "evenlight-test-"
HOLD = f"""
import sys, time
from evenlight.cache.files import private_folder
print(private_folder({PREFIX!r}), flush=True)
(time.sleep if len(sys.argv) > 1 else int)(60)
"""


def holder(tmp_path, *arguments):
    """A process with a private folder under tmp_path, and that folder, an hour old."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, *arguments],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    folder = Path(child.stdout.readline().strip())
    if folder.exists():
        os.utime(folder, (time.time() - 3600,) * 2)
    return child, folder


def test_private_folders_go_with_their_process_and_those_of_killed_ones_with_the_next(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "evenlight-other").mkdir()
    ended, folder = holder(tmp_path)
    assert ended.wait() == 0 and not folder.exists()
    (killed, left), (living, used) = (holder(tmp_path, "stay") for _ in range(2))
    killed.kill()
    killed.wait()
    assert left.exists()
    mine = files.private_folder(PREFIX)
    try:
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"evenlight-other", used.name, mine.name}
    finally:
        living.kill()
        living.wait()
    fresh = tmp_path / f"{PREFIX}fresh"
    fresh.mkdir()
    files.private_folder(PREFIX)
    assert fresh.exists() and not used.exists()
