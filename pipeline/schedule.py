"""Where units are made: in this process, in local processes, or on a Dask cluster.

Only ids and small plans travel; a worker loads the models once and writes whole units itself.
The scheduler runs pickled functions: use clusters on trusted networks only.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from evenlight.cache.errors import EnvironmentLacks, EvenlightError, StoreError

Task = TypeVar("Task")
Done = TypeVar("Done")
# Dask makes workers hand freed memory back at once, and torch then faults every page in again:
# measured 3.7 s a photo instead of 0.6.  Large blocks stay in the worker's own heap instead.
KEEP_MEMORY = {
    f"distributed.nanny.pre-spawn-environ.{name}": value
    for name, value in {
        "MALLOC_TRIM_THRESHOLD_": 2**33,
        "MALLOC_MMAP_THRESHOLD_": 2**30,
        "MALLOC_TOP_PAD_": 2**28,
    }.items()
}
TRIES = 3  # a task whose worker died is given to another this often


def run(
    here: Callable[[Task], Done],
    in_worker: Callable[[Task], Done],
    tasks: Sequence[Task],
    *,
    workers: int,
    scheduler: str,
) -> Iterator[Done]:
    """Yield tasks as they are finished, in any order.

    here: does a task in this process; in_worker: the same in another one (picklable).
    workers: local processes; 1 without a scheduler means this process.
    """
    if workers <= 1 and not scheduler:
        yield from map(here, tasks)
    elif tasks:
        yield from _on_dask(in_worker, tasks, workers, scheduler)


def _on_dask(
    work: Callable[[Task], Done], tasks: Sequence[Task], workers: int, scheduler: str
) -> Iterator[Done]:
    import dask
    from distributed import Client, LocalCluster, as_completed
    from distributed.client import FutureCancelledError
    from distributed.comm import CommClosedError

    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log pages of traceback
    cluster = None
    if not scheduler:
        dask.config.set(KEEP_MEMORY)
        cluster = LocalCluster(
            n_workers=min(workers, len(tasks)),
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address=None,
            silence_logs="CRITICAL",
        )
    try:
        with _client(Client, cluster or scheduler) as client:
            futures = client.map(work, tasks, pure=False, retries=TRIES - 1)
            for future in as_completed(futures):
                try:
                    yield future.result()
                except EvenlightError:
                    raise
                except (FutureCancelledError, CommClosedError) as error:
                    raise StoreError(
                        f"the scheduler {scheduler} is gone: complete units are kept, "
                        "run the same command again to go on"
                    ) from error
                except Exception as error:
                    raise StoreError(
                        f"a worker failed {TRIES} times ({error!r}): complete units are kept, "
                        "run the same command again to go on"
                    ) from error
    finally:
        if cluster is not None:
            cluster.close()


def _client(connect: Callable[[Any], Any], cluster: Any) -> Any:
    try:
        return connect(cluster)
    except (OSError, ValueError) as error:  # nobody there; no address
        raise EnvironmentLacks(f"no Dask scheduler answers at {cluster} ({error})") from error
