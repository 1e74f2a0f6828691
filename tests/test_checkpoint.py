"""A checkpoint is whole or absent, at any kill; damage is refused and the one before is offered."""

import builtins
import json
import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torture import tell, trials

from evenlight.cache.errors import StoreError
from evenlight.stages.corrector import checkpoint
from evenlight.stages.corrector.checkpoint import (
    checkpoint_path,
    checkpoint_steps,
    load_checkpoint,
    load_corrector,
    load_latest,
    load_tensors,
    save_checkpoint,
    save_corrector,
    save_tensors,
)
from evenlight.stages.corrector.network import Corrector
from evenlight.stages.settings import NetworkSettings


def tensors_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "network.weight": torch.randn(64, 33, generator=generator),
        "optimiser.0.step": torch.tensor(float(step)),
        "empty": torch.zeros(0, 3),
    }


def save(folder: Path, step: int, best: int | None = None) -> Path:
    return save_checkpoint(folder, step, tensors_of(step), {"seed": 7}, best)


def assert_is(found: checkpoint.Checkpoint | None, step: int) -> None:
    assert found is not None and found.step == step and found.info["seed"] == 7
    expected = tensors_of(step)
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], x) for name, x in expected.items())


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process; its status, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path, 3)
    assert_is(load_latest(tmp_path), 3)
    assert sorted(x.name for x in checkpoint_path(tmp_path, 3).iterdir()) == [
        "state.json",
        "state.safetensors",
    ]


def test_no_folder_and_an_empty_folder_mean_no_checkpoint(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "absent") is None


def test_the_last_two_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, best=min(step, 2))
    assert checkpoint_steps(tmp_path) == [2, 4, 5]


def test_a_checkpoint_is_whole_before_it_has_its_name_and_its_name_is_on_disk(
    tmp_path, monkeypatch
):
    events = []
    rename = Path.rename

    def traced_rename(path, target):
        load_tensors(path / "state")
        events.append(("rename", target.name))
        return rename(path, target)

    save(tmp_path, 1)
    monkeypatch.setattr(Path, "rename", traced_rename)
    monkeypatch.setattr(
        checkpoint, "sync_folder", lambda folder: events.append(("sync", folder.name))
    )
    save(tmp_path, 2)
    assert events == [("rename", "step_0000002"), ("sync", tmp_path.name)]


def test_channels_last_and_shared_tensors_come_back_equal(tmp_path):
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    save_tensors(tmp_path / "prompts", {"a": x, "b": x}, {"note": "two names"})
    tensors, info = load_tensors(tmp_path / "prompts")
    assert torch.equal(tensors["a"], x) and torch.equal(tensors["b"], x)
    assert info == {"note": "two names"}


def test_a_kill_at_every_io_point_of_a_save_leaves_the_newest_or_the_one_before(tmp_path):
    """The calls that touch the disk are counted; the child is killed at the k-th, for every k."""
    start = tmp_path / "start"
    save(start, 1)
    save(start, 2, best=1)
    save(start, 3, best=1)
    killed = 0
    for k in range(1, 1000):
        folder = tmp_path / f"k{k}"
        shutil.copytree(start, folder)

        def work(folder: Path = folder, k: int = k) -> None:
            kill_at_call(k)
            save(folder, 4, best=1)

        status = in_child(work)
        found = load_latest(folder)
        assert found is not None
        assert_is(found, 4 if found.step == 4 else 3)
        assert all(load_checkpoint(checkpoint_path(folder, s)) for s in checkpoint_steps(folder))
        save(folder, 5, best=1)  # the next save works and clears what the kill left
        assert_is(load_latest(folder), 5)
        assert all(x.name.startswith("step_") for x in folder.iterdir())
        shutil.rmtree(folder)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
    assert tell(killed) >= 20


def kill_at_call(k: int) -> None:
    """From now on this process dies by SIGKILL before its k-th call that touches the disk."""
    count = 0

    def wrap(module: object, name: str) -> None:
        original = getattr(module, name)

        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            if count == k:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, counted)

    for name in ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
        wrap(os, name)
    wrap(builtins, "open")


def test_a_kill_at_random_times_never_leaves_no_checkpoint(tmp_path):
    began = time.monotonic()
    save(tmp_path, 1)
    longest = max(0.04, 6 * (time.monotonic() - began))  # a busy machine takes its time
    rng = random.Random(0)
    last = 1
    for trial in range(trials(100, 1000)):

        def work(first: int = last + 1) -> None:
            for step in range(first, first + 1000):
                save(tmp_path, step, best=1)

        pid = os.fork()
        if pid == 0:
            work()
            os._exit(0)
        time.sleep(rng.uniform(0.001, longest))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = load_latest(tmp_path)
        assert found is not None and found.step >= last, trial
        assert_is(found, found.step)
        last = found.step
    assert last > 1


def test_110_damaged_checkpoints_are_refused_and_the_one_before_is_offered(tmp_path, caplog):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    path = newest / "state.safetensors"
    whole = path.read_bytes()
    rng = random.Random(1)
    damaged = [whole[: int(len(whole) * share / 10)] for share in range(10)]
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(StoreError, match=r"step_0000002 .*step_0000001 is whole"):
            load_checkpoint(newest)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert_is(load_latest(tmp_path), 1)
        assert "step_0000002" in caplog.text and "going on from step_0000001" in caplog.text
        refused += 1
    assert tell(refused) == 110


def test_a_damaged_json_is_refused_or_reads_the_same(tmp_path):
    path = save(tmp_path, 1) / "state.json"
    whole = path.read_bytes()
    rng = random.Random(2)
    for cut in range(0, len(whole) - 2, 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(StoreError):
            load_checkpoint(path.parent)
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(flipped))
        try:
            found = load_checkpoint(path.parent)
        except StoreError:
            continue
        assert_is(found, 1)


@pytest.mark.parametrize("missing", ["state.json", "state.safetensors"])
def test_a_missing_file_is_refused_and_the_one_before_is_used(tmp_path, missing):
    save(tmp_path, 1)
    (save(tmp_path, 2) / missing).unlink()
    assert_is(load_latest(tmp_path), 1)


def test_checkpoints_that_are_all_damaged_stop_with_an_error(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "state.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match=r"no checkpoint in .* is whole"):
        load_latest(tmp_path)


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state.safetensors").write_bytes(b"")
    save(tmp_path, 2)
    assert_is(load_latest(tmp_path), 2)


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
    assert_is(load_latest(tmp_path), 1)
    save(tmp_path, 2)
    assert_is(load_latest(tmp_path), 2)


def test_a_write_that_stores_something_else_is_noticed_at_once(tmp_path, monkeypatch):
    def lossy(path: Path, data: bytes) -> None:
        path.write_bytes(data[:-1])

    monkeypatch.setattr(checkpoint, "atomic_write", lossy)
    with pytest.raises(StoreError, match="damaged"):
        save(tmp_path, 1)
    assert checkpoint_steps(tmp_path) == []


def test_a_corrector_comes_back_with_its_settings_info_and_extra_tensors(tmp_path):
    torch.manual_seed(0)
    network = Corrector(NetworkSettings(size="tiny", attention="channel"), 6)
    scorer = {"text": torch.randn(3, 8)}
    save_corrector(tmp_path, network, {"priors": "abc"}, scorer)
    loaded, info, extra = load_corrector(tmp_path)
    assert loaded.settings == network.settings and not loaded.training
    assert info["priors"] == "abc" and torch.equal(extra["text"], scorer["text"])
    inputs = torch.rand(1, 3, 32, 32), torch.randn(1, 32, 8, 8), torch.randn(1, 6, 4, 4)
    inputs = (*inputs, torch.full((1, 1, 32, 32), -0.5))
    with torch.no_grad():
        assert torch.equal(loaded(*inputs).residual_B3HW, network(*inputs).residual_B3HW)


def test_a_corrector_with_other_weights_or_nan_is_refused(tmp_path):
    network = Corrector(NetworkSettings(size="tiny"), 6)
    save_corrector(tmp_path, network, {})
    tensors, info = load_tensors(tmp_path / "corrector")
    name = next(iter(tensors))
    wrong_shape = tensors | {name: torch.zeros(1)}
    missing = {key: x for key, x in tensors.items() if key != name}
    for bad in (wrong_shape, missing):
        save_tensors(tmp_path / "corrector", bad, info)
        with pytest.raises(StoreError, match="does not know"):
            load_corrector(tmp_path)
    save_tensors(tmp_path / "corrector", tensors | {name: tensors[name] * float("nan")}, info)
    with pytest.raises(StoreError, match="NaN"):
        load_corrector(tmp_path)
    network_info = {"settings": {"size": "huge"}, "p3_channels": 6}
    save_tensors(tmp_path / "corrector", tensors, {"network": network_info})
    with pytest.raises(StoreError, match="does not know"):
        load_corrector(tmp_path)


def test_a_file_of_another_format_is_refused(tmp_path):
    save_tensors(tmp_path / "x", {"a": torch.zeros(1)}, {})
    document = json.loads((tmp_path / "x.json").read_text())
    del document["sha256"]
    document["file"]["format"] = 99
    checkpoint.write_json(tmp_path / "x.json", document)
    with pytest.raises(StoreError, match="has format 99, this version reads 1"):
        load_tensors(tmp_path / "x")
