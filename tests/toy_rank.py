"""One process of a toy training, as torchrun starts it: OUT, then changes of its settings as JSON.

`ranks(...)` starts some, without torchrun, which takes seconds to start itself.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from evenlight.cache.files import Lock

HERE = Path(__file__).parent


def ranks(count: int, out: Path, script: Path = Path(__file__), **train) -> list[subprocess.Popen]:
    """So many processes of one toy training into a folder.  train: changes of its settings."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = os.environ | {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    arguments = [sys.executable, str(script), str(out), json.dumps(train)]
    return [
        subprocess.Popen(
            arguments,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def main(out: Path, train: dict) -> None:
    import logging

    from test_training import KEPT, TOY, toy_data, toy_models

    from evenlight.stages.corrector import training
    from evenlight.stages.corrector.ranks import joined

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    poisoned = train.pop("poisoned", None)
    settings = replace(TOY, train=replace(TOY.train, **train))
    with joined() as own:
        data = toy_data()
        if own.rank == poisoned:
            data.confidence[:] = float("nan")
        out.mkdir(exist_ok=True)
        lock = Lock(out / ".lock", f"run {out}")
        with lock if own.leads else nullcontext():
            training.train(replace(data, ranks=own), toy_models(), settings, lock, KEPT)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
