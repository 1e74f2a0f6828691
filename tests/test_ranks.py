"""A training of several processes is that of one: its losses, its end, its refusals."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training import STEPS, halt_at, log_lines, run, toy_data, with_train
from toy_corrector import run_cli
from toy_rank import HERE, ended, told, toy_training
from toys import ToyClip, ToySegmenter, write_photos

from evenlight.cache.errors import EnvironmentLacks, StoreError, UsageError
from evenlight.pipeline import config
from evenlight.pipeline.models import Models, choose_device
from evenlight.pipeline.precompute import precompute
from evenlight.stages.corrector.checkpoint import load_corrector
from evenlight.stages.corrector.launch import Launch, launched
from evenlight.stages.corrector.ranks import Ranks


def numbers(values: dict, of: str = "") -> dict[str, float]:
    """Every number of a line of the log, by its name."""
    found: dict[str, float] = {}
    for name, value in values.items():
        inner = numbers(value, f"{of}{name}.") if isinstance(value, dict) else {of + name: value}
        found |= inner
    return found


def assert_same_training(one: Path, other: Path) -> None:
    """Its log to rounding: a sum over ranks is in another order."""
    lines = [[numbers(line) for line in log_lines(out)] for out in (one, other)]
    assert len(lines[0]) == len(lines[1]) > STEPS
    for expected, found in zip(*lines, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
        for name in {"loss", "gradient", "validation_psnr"} & expected.keys():
            assert math.isclose(found[name], expected[name], rel_tol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, Path]:
    """A whole toy training of one process, and what lay on disk after step 6 was saved."""
    folder = tmp_path_factory.mktemp("alone")

    def keep(step: int, steps: int, record: dict) -> None:
        if step == 7 and not (folder / "stopped").exists():
            shutil.copytree(folder / "whole", folder / "stopped")

    run(folder / "whole", on_progress=keep)
    return folder / "whole", folder / "stopped"


@pytest.mark.slow
def test_three_ranks_train_as_one_process_does(alone, tmp_path):
    """Four rows for three ranks: they do not divide, and two have none that frozen models see."""
    out = tmp_path / "three"
    assert [code for code, _, _ in ended(toy_training(3, out))] == [0, 0, 0]
    assert_same_training(alone[0], out)
    one, three = (load_corrector(folder)[0].state_dict() for folder in (alone[0], out))
    assert all(torch.allclose(three[name], x, atol=1e-4) for name, x in one.items())


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_and_says_so(alone, tmp_path, caplog):
    out = tmp_path / "resumed"
    shutil.copytree(alone[1], out)
    (code, _, said), _ = ended(toy_training(2, out))
    assert said.count("trained by 1 process until now, by 2 from here on: the steps are the ") == 1
    assert code == 0
    assert_same_training(alone[0], out)
    shutil.rmtree(out / "checkpoints" / f"step_{STEPS:07d}")
    with caplog.at_level("INFO", logger="evenlight"):  # which a command may have made quieter
        run(out)
    assert "trained by 2 processes until now, by 1 from here on" in caplog.text
    assert_same_training(alone[0], out)


@pytest.mark.slow
def test_a_nan_of_one_rank_stops_all_before_the_update(tmp_path):
    said = ended(toy_training(2, tmp_path / "run", poisoned=1))
    for code, _, stderr in said:
        assert code == 1 and "NonFinite: the loss of step 0 is nan: stopped before" in stderr
    report = json.loads((tmp_path / "run" / "nonfinite_step_0000000.json").read_text())
    assert len(report["photos"]) == 4


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(tmp_path):
    out = tmp_path / "killed"
    started = toy_training(2, out, steps=4000)
    log, begun = out / "log.jsonl", time.monotonic()
    while not (log.exists() and len(log.read_bytes().splitlines()) > 4):
        assert time.monotonic() - begun < 240 and started[0].poll() is None
        time.sleep(0.02)
    started[1].send_signal(signal.SIGKILL)
    (code, _, stderr), (killed, _, _) = ended(started)
    assert killed == -signal.SIGKILL and code == 1
    assert "Lost: another process of this training is gone" in stderr
    last = log_lines(out)[-1]["step"]
    with pytest.raises(KeyboardInterrupt):
        run(out, with_train(steps=4000), on_progress=halt_at(last + 2))
    assert [x["step"] for x in log_lines(out) if "loss" in x] == list(range(1, last + 3))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_photos(folder / "photos", 12, gammas=(0.7, 1.4))
    settings = config.build(overrides=["photo.size=64", "run.unit_size=2", "ladder.regions=3"])
    models = Models(ToySegmenter(), ToyClip())
    precompute(folder / "photos", folder / "S", settings=settings, models=models)
    return folder / "S"


TOLD = [
    "network.size=tiny", "train.size=32", "train.crop=32", "train.steps=12", "train.log_every=1",
    "train.validate_every=6", "train.good=1", "train.scenes=0", "train.bad=1",
    "run.memory_gb=8e-5",
]  # fmt: skip


@pytest.mark.slow
def test_torchrun_trains_and_only_the_first_rank_speaks(store, tmp_path):
    def train(*before: str, name: str, more: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        given = [word for text in (*TOLD, *more) for word in ("--set", text)]
        command = [
            *before,
            HERE / "toy_cli.py",
            "train",
            "-s",
            store,
            "-o",
            tmp_path / name,
            *given,
        ]
        return subprocess.run(
            [sys.executable, *map(str, command), "--json"],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        )

    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    one = train(name="one", more=("run.memory_gb=0",))
    two = train(*torchrun, name="two")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert json.loads(two.stdout)["best_step"] == json.loads(one.stdout)["best_step"]
    assert two.stderr.count(": 12 steps, ") == two.stderr.count("read ahead of the steps") == 1
    assert_same_training(tmp_path / "one", tmp_path / "two")

    refused = train(*torchrun, name="two", more=("train.bad=2", "run.memory_gb=0"))
    assert refused.returncode != 0
    assert refused.stderr.count("was begun otherwise (train.bad 1 -> 2)") == 1
    assert json.loads(refused.stdout)["exit"] == 3


def test_every_row_of_a_batch_is_one_ranks_and_each_finds_its_own_of_a_range():
    for count in (1, 2, 3, 5):
        ranks = [Ranks(rank, count) for rank in range(count)]
        for num_rows in (5, 8, 11):
            assert sorted(row for r in ranks for row in r.rows(num_rows)) == list(range(num_rows))
            for first, stop in ((0, num_rows), (2, 5), (4, 5), (3, 3)):
                for r in ranks:
                    own = r.rows(num_rows)[r.own(first, stop)]
                    assert list(own) == [x for x in r.rows(num_rows) if first <= x < stop]


def test_what_torchrun_tells_is_heeded_whole_or_not_at_all(monkeypatch):
    for name, value in told(rank=3, count=4).items():
        monkeypatch.setenv(name, value)
    assert launched() == Launch(rank=3, count=4, local_rank=3, here=4)
    monkeypatch.delenv("MASTER_ADDR")
    assert launched() == Launch(rank=0, count=1, local_rank=0, here=1)


def test_a_rank_has_a_cuda_device_of_its_own_or_is_refused(monkeypatch):
    for name, value in told(rank=1, count=2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    for devices, name in ((1, "auto"), (2, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        with pytest.raises(EnvironmentLacks, match=f"2 processes were started here for {devices} "):
            choose_device(name)


def test_more_ranks_than_a_batch_has_photos_are_refused(tmp_path):
    data = replace(toy_data(), ranks=Ranks(0, 5))
    with pytest.raises(
        UsageError, match="5 processes for the 4 photos of a batch: start 4 at most"
    ):
        run(tmp_path, data=data)


class Apart(Ranks):
    """Two ranks of which the other sees another folder."""

    def each(self, value: float) -> list[float]:
        return [value, value + 3]


def test_ranks_that_see_different_folders_are_refused(tmp_path):
    data = replace(toy_data(), ranks=Apart(0, 2))
    with pytest.raises(StoreError, match=r"not the same to every process .*steps 0, 3\): name a"):
        run(tmp_path, data=data)


def test_what_all_ranks_meet_alike_the_first_says_and_what_one_meets_it_says(
    tmp_path, monkeypatch, capsys
):
    for rank in (0, 1):
        for name, value in told(rank, count=2).items():
            monkeypatch.setenv(name, value)
        assert run_cli(monkeypatch, "settings", "--diff", tmp_path) == 2
        assert ("it holds no settings" in capsys.readouterr().err) == (rank == 0)
        assert run_cli(monkeypatch, "cache", "info", "-s", tmp_path / "none", "--json") == 3
        said = capsys.readouterr()
        assert said.err.startswith("evenlight: process 1: there is no" if rank else "evenlight: th")
        assert (json.loads(said.out)["exit"] == 3) if rank == 0 else said.out == ""


def test_ultralytics_does_not_take_the_ranks_for_its_own():
    code = (
        "import os, evenlight.stages.priors.fastsam, ultralytics.utils as u; "
        "print(u.LOCAL_RANK, os.environ['WORLD_SIZE'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | told(rank=1, count=2),
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["-1", "2"], done.stderr
