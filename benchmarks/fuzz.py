"""Bytes that nobody meant, at the doors that read photos and documents.

    python -m benchmarks.fuzz --what photos --minutes 30
    python -m benchmarks.fuzz --what documents --minutes 30

Photos are of every format that is read, each taken through what `correct` does to it: decoded, and
written in its own format and in another.  Documents are those of a store, a run and a corrected
folder made here, each read as commands read it.  Anything but the documented errors is a finding,
as are more than 20 seconds, more than 2 GB and a crash; its input is kept under --keep.
"""

import argparse
import multiprocessing
import random
import resource
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.fuzz_documents import documents
from benchmarks.fuzz_photos import photos

Trial = Callable[[random.Random, Path], str]
"""One trial: writes what it tries to the path before it tries it; returns how it ended."""
SECONDS, BYTES = 20, 2 << 30
PATIENCE = 600  # seconds until a trial is given up, on a machine that has other work


def serve(what: str, folder: Path, seed: int, pipe: Connection) -> None:
    """Trials in a process of their own, which hostile bytes may end."""
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    rng = random.Random(seed)
    trial = {"photos": photos, "documents": documents}[what](folder)
    while True:
        started = time.process_time()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        try:
            ended = trial(rng, folder / "tried")
        except Exception:
            ended = f"FOUND {traceback.format_exc(limit=-3)}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if peak > max(before, BYTES):
            ended = f"FOUND {peak >> 20} MB, then {ended}"
        if (seconds := time.process_time() - started) > SECONDS:
            ended = f"FOUND {seconds:.0f} s, then {ended}"
        pipe.send(ended)


def fuzz(what: str, folder: Path, minutes: float, seed: int, keep: Path) -> Counter[str]:
    """Trials by how they ended; those that start with FOUND are kept."""
    keep.mkdir(parents=True, exist_ok=True)
    (folder / "tried").touch()
    ends: Counter[str] = Counter()
    context, process = multiprocessing.get_context("spawn"), None
    deadline = time.monotonic() + 60 * minutes
    while time.monotonic() < deadline:
        if process is None:
            pipe, there = context.Pipe()
            number = seed + ends.total()
            process = context.Process(target=serve, args=(what, folder, number, there), daemon=True)
            process.start()
            there.close()
        try:
            ended = pipe.recv() if pipe.poll(PATIENCE) else f"FOUND no end in {PATIENCE} s"
        except EOFError:
            process.join()
            ended = f"FOUND the process ended with {process.exitcode}"
        if ended.startswith("FOUND"):
            kept = keep / f"{what}-{ends.total()}"
            kept.write_bytes((folder / "tried").read_bytes())
            print(f"{kept}: {ended}", flush=True)
        if not process.is_alive() or ended.startswith("FOUND no end"):
            process.kill()
            process = None
        ends[ended.partition("\n")[0][:60]] += 1
    if process is not None:
        process.kill()
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=("photos", "documents"), required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ends = fuzz(arguments.what, Path(folder), arguments.minutes, arguments.seed, arguments.keep)
    print(f"{ends.total()} trials in {arguments.minutes:g} minutes, seed {arguments.seed}")
    for ended, count in ends.most_common():
        print(f"{count:8} {ended}")


if __name__ == "__main__":
    main()
