"""A disk that fills up at any size, and memory over a long run."""

import errno
import gc
import os

import psutil
import pytest
import torch
from test_precompute import SETTINGS, toys
from test_training import run as train_toy
from test_training import with_train
from torture import trials
from toy_corrector import run_cli, save_toy_corrector, toy_models
from toys import write_photos

from evenlight.cache.errors import StoreError
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.precompute import precompute
from evenlight.stages.corrector.checkpoint import load_latest

SIZES = 10


class Disk:
    """os.write on a disk with room for so many bytes: what fits is written, then it is full."""

    def __init__(self, room: float = float("inf")) -> None:
        self.write, self.room, self.written = os.write, room, 0

    def __call__(self, descriptor, data):
        fits = min(len(data), self.room - self.written)
        if fits <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.written += int(fits)
        return self.write(descriptor, data[: int(fits)])


def sizes(needed: int, least: int = 0) -> list[int]:
    count = trials(SIZES, 10 * SIZES)
    return [least + (needed - least) * number // (count + 1) for number in range(1, count + 1)]


def with_disk(room, work):
    disk = Disk(room)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", disk)
        work()
    return disk


def test_a_disk_that_fills_up_in_precompute_costs_the_unit_in_hand(folder):
    write_photos(folder / "photos", 6)

    def make(store):
        precompute(folder / "photos", store, settings=SETTINGS, models=toys())

    needed = with_disk(float("inf"), lambda: make(folder / "whole")).written
    digest = Store.open(folder / "whole").digest()
    kept = []
    judge = (folder / "whole" / "evenlight" / "judge.json").stat().st_size  # most of this store
    for number, room in enumerate([judge // 2, *sizes(needed, judge)]):
        store = folder / f"S{number}"
        with pytest.raises(StoreError, match=r"No space left on device .*run the same command"):
            with_disk(room, lambda store=store: make(store))
        if (store / "evenlight" / "index.json").exists():
            assert Store.open(store).verify() == []
            kept.append(sum(record.complete for record in Store.open(store).records()))
        make(store)
        assert Store.open(store).digest() == digest
    assert kept == sorted(kept) and {0, 1} <= set(kept)  # the more room, the more is kept


@pytest.mark.slow
def test_a_disk_that_fills_up_in_training_leaves_whole_checkpoints(folder):
    short = with_train(steps=4, validate_every=2)
    needed = with_disk(float("inf"), lambda: train_toy(folder / "whole", short)).written
    corrector = (folder / "whole" / "corrector.safetensors").read_bytes()
    for number, room in enumerate(sizes(needed)):
        out = folder / f"run{number}"
        with pytest.raises(OSError, match="No space left on device"):
            with_disk(room, lambda out=out: train_toy(out, short))
        load_latest(out / "checkpoints")  # None, or whole
        train_toy(out, short)
        assert (out / "corrector.safetensors").read_bytes() == corrector


@pytest.mark.slow
def test_a_disk_that_fills_up_in_correct_leaves_whole_outputs(folder, monkeypatch, capsys):
    write_photos(folder / "photos", 4)
    model = save_toy_corrector(folder / "model")
    monkeypatch.setattr("evenlight.pipeline.load.load_models", toy_models)

    def correct(out):
        return run_cli(monkeypatch, "correct", folder / "photos", "-o", out, "-m", model, "-q")

    def outputs(out):
        return {file.name: file.read_bytes() for file in out.iterdir()}

    needed = with_disk(float("inf"), lambda: correct(folder / "whole")).written
    whole = outputs(folder / "whole")
    for number, room in enumerate(sizes(needed)):
        out, codes = folder / f"out{number}", []
        with_disk(room, lambda out=out, codes=codes: codes.append(correct(out)))
        said = capsys.readouterr().err.splitlines()
        assert codes == [1] and len(said) == 1 and "No space left on device; " in said[0]
        assert outputs(out).items() < whole.items()  # each one whole, and no temporary
        assert correct(out) == 0 and outputs(out) == whole


@pytest.mark.slow
def test_a_disk_that_fills_up_under_a_csv_leaves_none_and_prints_the_table(
    folder, monkeypatch, capsys
):
    write_photos(folder / "photos", 1)
    rows = folder / "rows.csv"
    arguments = ("evaluate", "--data", f"unpaired:{folder / 'photos'}", "--csv", rows)
    needed = with_disk(float("inf"), lambda: run_cli(monkeypatch, *arguments)).written
    whole, table = rows.read_text(), capsys.readouterr().out
    rows.unlink()
    for number, room in enumerate(sizes(needed)):
        codes, left = [], {"rows.csv": "old"} if number % 2 else {}
        if left:
            rows.write_text("old")
        with_disk(room, lambda codes=codes: codes.append(run_cli(monkeypatch, *arguments)))
        said = capsys.readouterr()
        assert codes == [1] and said.out == table
        assert said.err.splitlines()[-1].endswith(f"No space left on device: '{rows}'")
        assert {p.name: p.read_text() for p in folder.iterdir() if p.is_file()} == left
        rows.unlink(missing_ok=True)
    assert run_cli(monkeypatch, *arguments) == 0 and rows.read_text() == whole


def test_memory_stays_level_over_many_photos(folder):
    count = trials(120, 2000)
    write_photos(folder / "photos", count, size=32)
    seen = []

    def watch(what, done, _):
        if what == "photos":
            gc.collect()
            seen.append((done, psutil.Process().memory_info().rss))

    small = config.build(overrides=["photo.size=64", "run.unit_size=8", "ladder.regions=3"])
    torch.set_num_threads(1)
    precompute(folder / "photos", folder / "S", settings=small, models=toys(), on_progress=watch)
    (first, before), (last, after) = seen[len(seen) // 3], seen[-1]
    assert after - before < 5e6 * (last - first) / 1000 + 8e6
