"""Stores in a bucket: the bytes of a local one, one writer, kills, and services that fail."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from test_precompute import SETTINGS
from test_store_kills import in_child
from torture import most, tell
from toy_bucket import Service, cut_off, refused
from toy_corrector import run_cli, toy_models
from toy_store import (
    ARRAYS,
    CHANGED,
    CHANGED_NAMES,
    FIRST,
    NAMES,
    RETYPED,
    SPECS,
    precompute,
    rows,
    whole_parts,
)
from toys import write_photos

from evenlight.cache import bucket
from evenlight.cache.bucket import Bucket
from evenlight.cache.errors import EnvironmentLacks, OutOfReach, StoreError, UsageError
from evenlight.cache.schema import ArraySpec
from evenlight.cache.store import Store
from evenlight.pipeline.precompute import precompute as precompute_photos
from evenlight.pipeline.train import train

RUNS = {
    "new": {},
    "stale parts": {"names": CHANGED_NAMES, "versions": CHANGED},
    "other dtype": {"versions": CHANGED, "specs": RETYPED},
    "an array less": {"specs": SPECS[:-1], "names": NAMES[:4]},
}
URL = "s3://photos/some/S"
TINY = {"network.size": "tiny", "train.size": 32, "train.crop": 32, "train.steps": 2}


@pytest.fixture(scope="module")
def running():
    service = Service()
    yield service
    service.stop()


@pytest.fixture
def service(running, monkeypatch):
    """The service with one empty bucket, found by the environment alone."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    running.client = running.make_bucket("photos")
    yield running
    for key in objects(running):
        running.client.delete_object(Bucket="photos", Key=key)


def objects(service) -> dict[str, str]:
    """Keys in the bucket, and what tells versions of each apart."""
    found = service.client.list_objects_v2(Bucket="photos").get("Contents", [])
    return {entry["Key"]: f"{entry['ETag']} {entry['LastModified']}" for entry in found}


def content(service, key) -> bytes:
    return service.client.get_object(Bucket="photos", Key=key)["Body"].read()


def put(service, key, data) -> None:
    service.client.put_object(Bucket="photos", Key=key, Body=data)


class Later(Bucket):
    """The place as it is long after: whatever lock there is has not been renewed for its lease."""

    def look(self):
        return dataclasses.replace(super().look(), age=2 * self.lease)


# The same store


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_store_in_a_bucket_has_the_files_of_a_local_one_byte_for_byte(run, service, folder):
    for store in (URL, folder):
        precompute(store)
        precompute(store, **run)
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert {key.removeprefix("some/S/") for key in objects(service)} == set(files)
    for name, file in files.items():
        assert content(service, f"some/S/{name}") == file.read_bytes(), name
    assert Store.open(URL).digest() == Store.open(folder).digest()
    assert Store.open(URL).verify() == []


def test_units_and_single_photos_are_read_as_they_were_written(service):
    precompute(URL)
    store = Store.open(f"{URL}/")
    names = [store.index.unit_names(unit) for unit in range(2)]
    for spec in SPECS:
        whole = [rows(spec, unit_names, "1") for unit_names in names]
        np.testing.assert_array_equal(store.read(1, [spec.name])[spec.name], whole[1])
        slots = np.array([6, 0, 3, 0])
        found = store.rows(spec.name, slots)
        np.testing.assert_array_equal(found, np.concatenate(whole)[slots])


def test_threads_that_read_single_photos_at_once_get_their_own(service):
    precompute(URL)
    store = Store.open(URL)
    names = [store.index.unit_names(unit) for unit in range(store.index.num_units)]
    everything = np.concatenate([rows(SPECS[0], of_unit, "1") for of_unit in names])
    slots = np.random.default_rng(0).integers(0, len(everything), 200)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda slot: store.rows(SPECS[0].name, [slot])[0], slots))
    np.testing.assert_array_equal(np.stack(found), everything[slots])


def test_any_zarr_client_reads_it(service):
    precompute(URL)
    options = {"client_kwargs": {"endpoint_url": service.url}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", zarr.errors.ZarrUserWarning)
        group = zarr.open_group(URL, mode="r", storage_options=options)
        assert {name for name, _ in group.arrays()} == set(ARRAYS)
        np.testing.assert_array_equal(group["photo"][:4], rows(SPECS[0], NAMES[:4], "1"))


def test_notes_are_kept_and_forgotten(service):
    precompute(URL)
    with Store.create_or_open(URL) as store:
        store.write_note("judge", {"weights": np.arange(3.0)})
    np.testing.assert_array_equal(Store.open(URL).note("judge")["weights"], np.arange(3.0))
    with Store.create_or_open(URL) as store:
        store.forget_note("judge")
        assert store.note("judge") is None and store.notes() == []


def test_a_bucket_itself_can_be_a_store_and_others_beside_it_stay_apart(service):
    precompute("s3://photos")
    assert Store.open("s3://photos/").verify() == []
    with pytest.raises(StoreError, match="there is no store at s3://photos/phot:"):
        Store.open("s3://photos/phot")


# What it costs


def test_a_unit_is_one_request_for_its_record_and_one_for_each_array(service):
    precompute(URL)
    store = Store.open(URL)
    with service.counted() as first:
        store.read(0, ARRAYS)
    with service.counted() as second:
        store.read(1, ARRAYS)
    shards = {"GET record": 1, "GET shard": len(ARRAYS)}
    assert first == shards | {"GET document": len(ARRAYS)} and second == shards
    with service.counted() as photo_by_photo:
        for slot in range(4):
            store.rows("photo", [slot])
    assert photo_by_photo == {"GET record": 1, "GET shard": 1}


def test_what_a_store_of_many_units_holds_takes_a_request_for_each_record_and_few_more(service):
    names = [f"{number:04}" for number in range(4 * 70)]
    precompute(URL, names)
    with service.counted() as requests:
        info = Store.open(URL).info()
    assert info["units"] == {"all": 70, "complete": 70}
    assert requests == {"GET record": 70, "LIST": 2, "GET document": 2, "GET index": 1}


# One writer


def test_a_second_run_is_refused_and_readers_are_not(service):
    precompute(URL)
    with Store.create_or_open(URL):
        with pytest.raises(StoreError) as refusal:
            Store.create_or_open(URL)
        assert f"store {URL} is in use by process {os.getpid()} on host" in str(refusal.value)
        assert "if it was killed, its lock is free in " in str(refusal.value)
        assert Store.open(URL).verify() == []
    Store.create_or_open(URL).close()
    with pytest.raises(StoreError, match="not being written to"):
        Store.attach(URL)


def test_the_lock_of_a_killed_run_is_taken_over_after_its_lease_and_not_before(service):
    code = (
        "import sys, time; from evenlight.cache.store import Store\n"
        f"store = Store.create_or_open({URL!r})\n"
        "print('taken', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "taken\n"
    child.kill()
    child.wait()
    lease = 4
    with pytest.raises(StoreError, match=f"in use by process {child.pid} .* free in [234] seconds"):
        Store.create_or_open(Bucket(URL, lease=lease))
    time.sleep(lease)
    with Store.create_or_open(Bucket(URL, lease=lease)) as store:
        assert json.loads(store._place.holder())["pid"] == os.getpid()


def test_a_run_that_lives_longer_than_a_lease_keeps_its_lock(service):
    lease = 3
    with Store.create_or_open(Bucket(URL, lease=lease)) as store:
        time.sleep(lease + 1.5)
        with pytest.raises(StoreError, match="in use by process"):
            Store.create_or_open(Bucket(URL, lease=lease))
        store.write_note("x", {})


def test_a_run_that_was_taken_over_writes_nothing_more(service):
    precompute(URL)
    with Store.create_or_open(URL) as first:
        worker = Store.attach(URL)
        with Store.create_or_open(Later(URL)) as second:
            before = objects(service)
            for store in (first, worker):
                photos = store.record(0).photos
                parts = {"pseudo_gt": ("2", {"strength": np.zeros(4, np.float32)})}
                for write in (
                    lambda s=store, p=photos, d=parts: s.write_parts(0, p, d),
                    lambda s=store: s.drop(0, "photo"),
                    lambda s=store: s.write_index(s.index),
                    lambda s=store: s.write_note("x", {}),
                ):
                    with pytest.raises(StoreError, match="taken over by another run: this one"):
                        write()
            first.close()
            assert objects(service) == before  # its end leaves the lock of the other, too
            second.write_note("x", {})


def test_a_run_that_is_taken_over_between_shards_and_record_writes_no_record(service):
    precompute(URL)
    with Store.create_or_open(URL) as first:
        parts = {"pseudo_gt": ("2", {"strength": np.zeros(4, np.float32)})}

        def take_over(method, key, number):
            if (method, key) == ("PUT", "some/S/strength/c.0"):
                put(service, "some/S/evenlight/lock", b"another run\n1\n")

        with service.failing(after=take_over), pytest.raises(StoreError, match="taken over"):
            first.write_parts(0, first.record(0).photos, parts)
    assert "pseudo_gt" not in Store.open(URL).record(0).parts


def test_a_lock_that_is_renewed_meanwhile_is_not_taken_over(service):
    class Slow(Later):
        """Sees a lock that is due, and takes a second to act on it."""

        def look(self):
            state = super().look()
            time.sleep(1)
            return state

    with Store.create_or_open(Bucket(URL, lease=3)) as store:
        with pytest.raises(StoreError, match="in use by process"):
            Store.create_or_open(Slow(URL))
        store.write_note("x", {})


@pytest.mark.parametrize("found", ["nothing", "a lock that was given back", "one of a dead run"])
def test_of_two_runs_that_see_a_free_lock_one_gets_it(found, service, monkeypatch):
    if found != "nothing":
        text = b"" if "back" in found else b'{"pid": 1, "host": "gone", "started": "then"}\n1\n'
        put(service, "some/S/evenlight/lock", text)
    seen = threading.Barrier(2)
    look, outcomes = Bucket.look, []

    def look_together(self):
        state = look(self)
        if threading.current_thread().name not in looked:
            looked.add(threading.current_thread().name)
            seen.wait(10)  # both have looked before either writes
        return state

    looked: set[str] = set()
    monkeypatch.setattr(Bucket, "look", look_together)
    done = threading.Barrier(2)

    def contend():
        try:
            with Later(URL).lock():
                outcomes.append("won")
                done.wait(10)
        except StoreError as error:
            outcomes.append(str(error))
            done.wait(10)

    contenders = [threading.Thread(target=contend) for _ in range(2)]
    for contender in contenders:
        contender.start()
    for contender in contenders:
        contender.join()
    assert outcomes.count("won") == 1
    assert any(f"in use by process {os.getpid()}" in outcome for outcome in outcomes)


def test_a_lock_whose_answer_was_lost_is_held_all_the_same(service):
    """boto3 repeats the PUT, and finds the condition broken by its own first one."""
    lost = []

    def lose(method, key, number):
        if method == "PUT" and key.endswith("lock") and len(lost) < wanted:
            lost.append(key)
            return refused(500, "InternalError")
        return None

    wanted = 1
    with service.failing(after=lose), Store.create_or_open(Bucket(URL, lease=3)) as store:
        wanted = 2  # and a renewal
        time.sleep(2)
        store.write_note("x", {})
    assert len(lost) == 2
    Store.create_or_open(URL).close()  # it was given back


@pytest.mark.parametrize("condition", ["HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"])
def test_a_service_without_conditional_writes_is_refused(condition, service, monkeypatch):
    monkeypatch.setattr(service, "unconditional", condition)
    with pytest.raises(StoreError, match="cannot be locked: its service knows no conditional"):
        Store.create_or_open(URL)
    assert set(objects(service)) <= {"some/S/evenlight/lock"}


def test_a_lock_that_says_nothing_is_waited_for_and_then_taken_over(service):
    put(service, "some/S/evenlight/lock", b"\xff\xfe")
    with pytest.raises(StoreError, match="another process that has not said its name; if it was"):
        Store.create_or_open(URL)
    Store.create_or_open(Later(URL)).close()


# Kills


@pytest.mark.slow
@pytest.mark.parametrize("name", ["new", "other dtype"])
def test_a_run_killed_at_any_request_leaves_whole_units_and_is_resumed(name, service, folder):
    """The service kills it, before or after the request takes effect."""
    run = {"names": NAMES, "versions": FIRST, "specs": SPECS} | RUNS[name]
    precompute(folder / "S")
    precompute(folder / "S", **run)
    expected = Store.open(folder / "S").digest()
    made = folder / "made"
    killed = 0
    for number in range(1, 1000, 7 // most(1, 7)):
        for key in objects(service):
            service.client.delete_object(Bucket="photos", Key=key)
        if name != "new":
            precompute(URL)
        pid = in_child(lambda: precompute(URL, **run))

        def kill(method, key, now, pid=pid, number=number):
            if now == number:
                os.kill(pid, signal.SIGKILL)

        with service.failing(**{"before" if number % 2 else "after": kill}):
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
        whole = whole_parts(URL, **run)
        made.unlink(missing_ok=True)
        precompute(Later(URL), made=made, **run)
        again = set(made.read_text().split("\n")) if made.exists() else set()
        store = Store.open(URL)
        assert not again & whole and store.digest() == expected and store.verify() == []
    assert tell(killed) >= 4


# The whole job


def files_of(service) -> dict[str, bytes]:
    """What a run may not change where there is nothing to do."""
    return {key: content(service, key) for key in objects(service) if not key.endswith("/lock")}


def test_every_command_takes_a_store_in_a_bucket(service, toys, tmp_path, monkeypatch, capsys):
    photos = tmp_path / "photos"
    write_photos(photos, 5)
    models = toy_models(None)
    for store in (URL, tmp_path / "S"):
        precompute_photos(photos, store, settings=SETTINGS, models=models)
    digest = Store.open(tmp_path / "S").digest()
    assert Store.open(URL).digest() == digest
    before = files_of(service)
    report = precompute_photos(photos, URL, settings=SETTINGS, models=models)
    assert (report.units_kept, report.units_made) == (3, 0) and files_of(service) == before

    shard = "some/S/pseudo_gt/c.1.0.0.0"
    data = content(service, shard)
    put(service, shard, data[:9] + bytes([data[9] ^ 1]) + data[10:])
    service.client.delete_object(Bucket="photos", Key="some/S/p3/c.2.0.0.0")
    assert run_cli(monkeypatch, "cache", "verify", "-s", URL) == 3
    said = capsys.readouterr().err
    assert f"unit 1 pseudo_gt pseudo_gt: array 'pseudo_gt' of unit 1 (s3://photos/{shard}" in said
    assert f"({URL}/p3/c.2.0.0.0) is missing" in said and "2 damaged" in said
    with pytest.raises(StoreError, match="sha256"):
        train(URL, tmp_path / "no", settings=TINY, models=models)
    assert run_cli(monkeypatch, "cache", "verify", "-s", URL, "--repair") == 0
    assert precompute_photos(photos, URL, settings=SETTINGS, models=models).parts_made == {
        "regions": 1, "embeddings": 1, "pseudo_gt": 2
    }  # fmt: skip
    assert Store.open(URL).digest() == digest
    assert run_cli(monkeypatch, "cache", "verify", "-s", URL) == 0

    assert run_cli(monkeypatch, "regenerate", "-s", URL, "--set", "judge.prior_good=0.2") == 0
    assert Store.open(URL).digest() != digest
    train(URL, tmp_path / "run", settings=TINY, models=models)
    assert (tmp_path / "run" / "corrector.safetensors").exists()
    page, picture = tmp_path / "page.html", tmp_path / "x.png"
    assert run_cli(monkeypatch, "report", URL, "-o", page) == 0 and URL in page.read_text()
    name = str(Store.open(URL).index.names[0])
    assert run_cli(monkeypatch, "cache", "show", name, "-s", URL, "-o", picture) == 0
    assert run_cli(monkeypatch, "settings", "--diff", URL) == 0
    assert "judge.prior_good" in capsys.readouterr().out
    assert run_cli(monkeypatch, "cache", "forget", name, "-s", URL) == 0
    assert run_cli(monkeypatch, "cache", "info", "-s", URL, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["path"] == URL and info["photos"]["ok"] == 4


@pytest.mark.slow
def test_two_workers_and_a_resume_after_a_kill_end_in_the_local_store(
    service, tmp_path, monkeypatch
):
    """With the real small models."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # workers have one thread; sums depend on it
    write_photos(tmp_path / "photos", 4, size=128)
    options = ["--set", "photo.size=128", "--set", "run.unit_size=1"]
    command = [sys.executable, "-m", "evenlight.cli", "precompute", str(tmp_path / "photos")]
    subprocess.run([*command, "-s", str(tmp_path / "S"), *options], check=True)
    child = subprocess.Popen([*command, "-s", URL, "--workers", "2", *options])

    def kill(method, key, number):
        if method == "PUT" and "/units/" in key:
            child.kill()

    with service.failing(after=kill):
        assert child.wait() == -signal.SIGKILL
    made = {record.unit for record in Store.open(URL).records()}
    assert made and len(made) < 4
    settings = {"photo.size": 128, "run.unit_size": 1, "run.workers": 2}
    report = precompute_photos(tmp_path / "photos", Later(URL), settings=settings)
    assert report.units_kept >= len(made) and report.failed == []
    assert Store.open(URL).digest() == Store.open(tmp_path / "S").digest()
    assert Store.open(URL).verify() == []


# Services that fail


@pytest.fixture
def finished(service):
    precompute(URL)
    with Store.create_or_open(URL) as store:
        store.write_note("judge", {"x": 1})
    return Store.open(URL)


LOOKS = {
    "record": lambda store: store.record(0),
    "records": lambda store: list(store.records()),
    "info": lambda store: store.info(),
    "verify": lambda store: store.verify(),
    "read": lambda store: store.read(0, ARRAYS),
    "note": lambda store: store.note("judge"),
    "open": lambda store: Store.open(URL),
    "open to write": lambda store: Store.create_or_open(Later(URL)),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_what_cannot_be_looked_at_is_not_taken_for_lost(look, finished, service):
    """Whichever request is refused: the store is as it was, and no unit is made again."""
    before = {key: x for key, x in objects(service).items() if not key.endswith("lock")}
    for number in range(1, 100):
        with service.failing(before=lambda *asked, number=number: (
            refused() if asked[2] == number and asked[0] == "GET" else None
        )):  # fmt: skip
            try:
                done = look(finished)
            except OutOfReach as error:
                assert re.match(
                    f"store {URL} cannot be reached .(Get|List).*: Access Denied", str(error)
                )
                assert "toy-secret" not in str(error)
            else:
                if isinstance(done, Store):
                    done.close()
                if len(service.requests) < number:
                    break
                assert service.requests[number - 1][0] != "GET"
        finished = Store.open(URL)
    assert number > 1
    assert {k: x for k, x in objects(service).items() if not k.endswith("lock")} == before


def test_a_service_that_fails_for_a_moment_is_asked_again(finished, service):
    def busy(method, key, number):
        return refused(503, "SlowDown") if number % 2 else None

    with service.failing(before=busy):
        finished.read(0, ARRAYS)


def test_an_answer_that_is_cut_off_is_asked_for_again(finished, service):
    def cut(method, key, number):
        if key.endswith("photo/c.0.0.0.0") and len(service.requests) <= most:
            return cut_off(b"half", 400)
        return None

    most = 3  # requests: record and twice the shard
    with service.failing(before=cut):
        finished.read(0, ["photo"])
    most = 99
    with service.failing(before=cut), pytest.raises(OutOfReach, match="cannot be reached"):
        finished.read(0, ["photo"])


def test_nobody_there_no_bucket_and_no_credentials_are_one_sentence(service, monkeypatch):
    for make in (Store.open, Store.create_or_open):
        with pytest.raises(OutOfReach, match=r"store s3://none/S cannot .*bucket does not exist"):
            make("s3://none/S")
    service.client.put_object(Bucket="photos", Key="other/a.txt", Body=b"")
    for make in (Store.open, Store.create_or_open):
        with pytest.raises(StoreError, match=r"s3://photos/other (is not a store|holds something)"):
            make("s3://photos/other")
    monkeypatch.setattr(bucket.boto3, "DEFAULT_SESSION", None)  # which knows the credentials
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(OutOfReach, match=r"cannot be reached .*credentials"):
        Store.open(URL)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setattr(bucket.boto3, "DEFAULT_SESSION", None)
    with pytest.raises(OutOfReach, match=r"cannot be reached .*nobody"):
        Store.open(URL)


def test_nobody_who_listens_is_one_sentence(service, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(OutOfReach, match=r"cannot be reached .*Could not connect"):
        Store.open(URL)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1")
    with pytest.raises(OutOfReach, match=r"cannot be reached .*Invalid endpoint"):
        Store.open(URL)


def test_other_urls_and_a_missing_package_are_told_of(monkeypatch):
    for url in ("gs://a/b", "file:///a", "S3://a/b", Path("s3://a/b")):
        with pytest.raises(UsageError, match=r"cannot hold a store: .*s3://BUCKET/FOLDER"):
            Store.open(url)
    with pytest.raises(UsageError, match="names no bucket"):
        Store.open("s3://")
    monkeypatch.setitem(sys.modules, "evenlight.cache.bucket", None)
    monkeypatch.delitem(sys.modules, "evenlight.cache.bucket")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(EnvironmentLacks, match=r"needs boto3: pip install 'evenlight\[s3\]'"):
        Store.open(URL)


def test_photos_and_runs_at_urls_are_refused_and_nothing_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_cli(monkeypatch, "precompute", "s3://photos/x", "-s", "S") == 2
    assert run_cli(monkeypatch, "train", "-s", "S", "-o", "s3://photos/run") == 2
    said = capsys.readouterr().err
    assert "photos lie on a disk, not at s3:" in said and "training runs lie on a disk" in said
    assert list(tmp_path.iterdir()) == []


def test_a_large_shard_comes_back(service):
    """Larger than what a connection takes in one piece."""
    spec = ArraySpec("photo", "photo", (512, 512, 3), "uint8")
    precompute(URL, specs=(spec,))
    assert Store.open(URL).verify() == []
