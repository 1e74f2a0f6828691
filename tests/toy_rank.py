"""Processes of one training, started as torchrun starts them, which itself takes seconds.

As a script it is one of them, on toy data: OUT, then changes of the toy's settings as JSON.
"""

import json
import logging
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from evenlight.cache.files import Lock

HERE = Path(__file__).parent


def told(rank: int, count: int, port: int = 1) -> dict[str, str]:
    """What torchrun puts into the environment of a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def processes(count: int, *command: str | Path) -> list[subprocess.Popen[str]]:
    """So many processes of a Python script with its arguments, which know of each other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | shared | told(rank, count, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def toy_training(count: int, out: Path, **train) -> list[subprocess.Popen[str]]:
    """So many ranks of the toy of test_training.py.  poisoned: of which rank the data is NaN."""
    return processes(count, __file__, out, json.dumps(train))


def ended(started: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    said = [process.communicate() for process in started]
    return [(p.returncode, *texts) for p, texts in zip(started, said, strict=True)]


def main(out: Path, train: dict) -> None:
    from test_training import KEPT, TOY, toy_data, toy_models

    from evenlight.stages.corrector import training
    from evenlight.stages.corrector.ranks import joined

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    poisoned = train.pop("poisoned", None)
    settings = replace(TOY, train=replace(TOY.train, **train))
    with joined() as ranks:
        data = toy_data()
        if ranks.rank == poisoned:
            data.proto[:] = float("nan")
        out.mkdir(exist_ok=True)
        lock = Lock(out / ".lock", f"run {out}")
        with lock if ranks.leads else nullcontext():
            training.train(replace(data, ranks=ranks), toy_models(), settings, lock, KEPT)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
