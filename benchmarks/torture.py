"""The faults that are promised to be survived, with large counts: `python -m benchmarks.torture`.

Runs the tests of every fault with EVENLIGHT_TORTURE (1: the full counts), then the mutants, and
writes a table: trials, failures, and the bound on the rate of failures that they give (95 %: 3/N).
"""

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# fault -> tests; what it counts as a trial is what its tests say, or one test.
FAULTS = {
    "kill -9 of a run on a store, up to three times": "test_store_kills.py -k random_time",
    "kill -9 of a run on a store, at every operation": "test_store_kills.py -k any_io_point",
    "kill -9 of precompute, up to three times": "test_precompute.py -k killed_at_random",
    "any history of photos, settings, kills and damage (state machine)": "test_store_states.py",
    "a worker killed in the middle of a unit": "test_schedule.py -k in_the_middle_of_a_unit",
    "four writers to one store": "test_store.py -k four_workers",
    "two runs at once; a dead one's lock": "test_files.py -k two_runs",
    "Ctrl-C and SIGTERM": "test_cli.py -k a_signal_ends",
    "the disk full at any size: precompute, training, correct, a table":
        "test_full_disk.py -k fills_up",
    "a flipped bit of a part": "test_store_damage.py -k flipped_bit",
    "a shard deleted, emptied, cut, older, or in another's place":
        "test_store_damage.py -k 'older or changed_places_are_seen'",
    "a damaged record, index or zarr.json": "test_store_damage.py -k records_and_documents",
    "hostile documents": "test_documents.py",
    "malformed photos and bombs": "test_images_malformed.py",
    "hostile weights": "test_fastsam_weights.py test_doors.py",
    "kill -9 while a checkpoint is written, at random": "test_checkpoint.py -k random_times",
    "kill -9 while a checkpoint is written, at every operation": "test_checkpoint.py -k every_io",
    "a damaged checkpoint": "test_checkpoint.py -k 'damaged'",
    "training stopped and resumed: bit-identical": "test_training.py -k bit_identical",
    "NaN or infinity in training": "test_training.py -k nan_stops",
    "a setting makes stale exactly its parts": "test_precompute.py -k every_setting",
    "memory over a long run": "test_full_disk.py -k memory",
    "the network, through every command of the demo": "test_whole_job.py",
}  # fmt: skip


def run(arguments: str, share: float) -> tuple[int, int]:
    """(trials, failed tests) of the tests of one fault."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "trials")
        done = subprocess.run(
            [*PYTEST, *shlex.split(arguments)],
            cwd=ROOT / "tests",
            env=os.environ | {"EVENLIGHT_TORTURE": str(share), "EVENLIGHT_TORTURE_LOG": str(log)},
            capture_output=True,
            text=True,
        )
        lines = log.read_text().splitlines() if log.exists() else []
    told = [line.rsplit("\t", 1) for line in lines]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    tests = failed + counts.get("passed", 0)
    assert tests, done.stdout + done.stderr
    if failed:
        print(done.stdout, file=sys.stderr)
    counted = {test for test, _ in told}
    return sum(int(number) for _, number in told) + tests - len(counted), failed


def machine() -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    python, cpus = platform.python_version(), len(os.sched_getaffinity(0))
    return f"commit {commit}, {date.today()}, Python {python}, {cpus} cores, {platform.platform()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the full counts")
    parser.add_argument("--only", default="", help="faults whose words hold this text")
    parser.add_argument("--no-mutants", action="store_true")
    options = parser.parse_args()
    print(f"{machine()}; {options.share:g} of the full counts\n", flush=True)
    print("| fault | trials | failures | 95 % bound |\n| --- | --- | --- | --- |", flush=True)
    bad = 0
    for fault, tests in FAULTS.items():
        if options.only in fault:
            trials, failed = run(tests, options.share)
            bound = "-" if failed else f"{100 * min(1, 3 / trials):.2g} %"
            print(f"| {fault} | {trials:,} | {failed} | {bound} |", flush=True)
            bad += failed
    if not options.no_mutants:
        bad += subprocess.run([sys.executable, "-m", "benchmarks.mutants"], cwd=ROOT).returncode
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
