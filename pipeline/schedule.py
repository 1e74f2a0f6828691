"""Where units are made: in this process, in processes of our own, or on a Dask cluster.

Only ids and small plans travel; a worker loads the models once and writes whole units itself.
The scheduler of a cluster runs pickled functions: use clusters on trusted networks only.
"""

import contextlib
import logging
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from evenlight.cache.errors import EnvironmentLacks, EvenlightError, StoreError

log = logging.getLogger(__name__)
Task = TypeVar("Task")
Done = TypeVar("Done")
TRIES = 3  # a task that failed, or whose worker died, is given to another this often
PATIENCE = 10  # seconds that workers have to clean up after themselves
GO_ON = "what is complete is kept, run the same command again to go on"


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
    workers: local processes; 1 without a scheduler means this process.  Raises EvenlightError
    where a task does, StoreError where one fails TRIES times.
    """
    if scheduler and tasks:
        yield from _on_dask(in_worker, tasks, scheduler)
    elif workers > 1 and tasks:
        yield from _in_processes(in_worker, tasks, workers)
    else:
        yield from map(here, tasks)


class _Worker(Generic[Task, Done]):
    """A process of our own that does one task at a time; where it died, the next has a new one.

    A Dask cluster may never replace a worker that dies as it starts, and waits; a pool of
    concurrent.futures ends with its first death.
    """

    def __init__(self, work: Callable[[Task], Done]) -> None:
        self.work = work
        self.process: multiprocessing.process.BaseProcess | None = None
        self.pipe: Connection

    def give(self, task: Task) -> Connection:
        """Start on a task; what is returned can be read when the answer is there."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")  # torch's threads survive no fork
            self.pipe, there = context.Pipe()
            self.process = context.Process(target=_serve, args=(self.work, there), daemon=True)
            self.process.start()
            there.close()  # the process alone holds it, so the pipe ends with the process
        with contextlib.suppress(OSError):  # it died, which the answer tells
            self.pipe.send(task)
        return self.pipe

    def answer(self) -> tuple[Done | None, str]:
        """The task as done, or what went wrong.  Raises EvenlightError where the task did."""
        try:
            done, error = self.pipe.recv()
        except (EOFError, OSError):
            assert self.process is not None
            self.process.join()
            done, error = None, f"its process died with exit code {self.process.exitcode}"
            self.process = None
        if isinstance(error, EvenlightError):
            raise error
        return done, error

    def stop(self) -> None:
        """Ask it to clean up and end."""
        if self.process is not None:
            self.process.terminate()

    def end(self, patience: float) -> None:
        """Wait so many seconds until it has; then it is killed."""
        if self.process is not None:
            self.process.join(patience)
            self.process.kill()


def _serve(work: Callable[[Task], Done], pipe: Connection) -> None:
    """Do tasks from the pipe until the run ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends this
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # what is being written is cleaned up
    with contextlib.suppress(EOFError, OSError):  # the run was killed
        while True:
            task = pipe.recv()
            answer: tuple[Done | None, str | EvenlightError]
            try:
                answer = work(task), ""
            except EvenlightError as error:
                answer = None, error
            except Exception as error:
                answer = None, repr(error)
            pipe.send(answer)


def _in_processes(
    work: Callable[[Task], Done], tasks: Sequence[Task], workers: int
) -> Iterator[Done]:
    team = [_Worker(work) for _ in tasks[:workers]]
    idle, waiting = list(team), [(task, TRIES) for task in reversed(tasks)]
    busy: dict[Any, tuple[_Worker[Task, Done], Task, int]] = {}
    try:
        while waiting or busy:
            while waiting and idle:
                worker, (task, tries) = idle.pop(), waiting.pop()
                busy[worker.give(task)] = worker, task, tries
            for pipe in wait(list(busy)):
                worker, task, tries = busy.pop(pipe)
                idle.append(worker)
                done, error = worker.answer()
                if not error:
                    yield done  # type: ignore[misc]
                elif tries > 1:
                    waiting.insert(0, (task, tries - 1))  # after all that waits
                else:
                    raise StoreError(f"a worker failed {TRIES} times ({error}): {GO_ON}")
    finally:
        for worker in team:
            worker.stop()
        until = time.monotonic() + PATIENCE
        for worker in team:
            worker.end(max(0, until - time.monotonic()))


def _on_dask(work: Callable[[Task], Done], tasks: Sequence[Task], scheduler: str) -> Iterator[Done]:
    from distributed import Client, as_completed
    from distributed.client import FutureCancelledError
    from distributed.comm import CommClosedError

    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log pages of traceback
    try:
        client = Client(scheduler)
    except (OSError, ValueError) as error:  # nobody there; no address
        raise EnvironmentLacks(f"no Dask scheduler answers at {scheduler} ({error})") from error
    with client:
        with contextlib.suppress(KeyError):  # it has none
            log.info("dashboard, unless started without: %s", client.dashboard_link)
        # Futures are let go one by one: the results of a worker that dies are made anew otherwise.
        for future in as_completed(client.map(work, tasks, pure=False, retries=TRIES - 1)):
            try:
                yield future.result()
            except EvenlightError:
                raise
            except (FutureCancelledError, CommClosedError) as error:
                raise StoreError(f"the scheduler {scheduler} is gone: {GO_ON}") from error
            except Exception as error:
                raise StoreError(f"a worker failed {TRIES} times ({error!r}): {GO_ON}") from error
