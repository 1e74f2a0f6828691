"""What commands print: progress and sentences on stderr, results on stdout."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from datetime import timedelta
from typing import Any, NoReturn

from rich.console import Console

from evenlight.cache.errors import EnvironmentLacks
from evenlight.pipeline.exits import SOME_FAILED, stop_at_once
from evenlight.stages.corrector.launch import launched
from evenlight.stages.photos.find import without_controls

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
"""(what is counted, done, of how many); called from the main thread."""


# Names of photos are printed as they are: never read as markup or emoji codes.
class _Harmless(Console):
    """What would move, colour or turn the text of a terminal is printed as an escape."""

    def print(self, *objects: Any, **options: Any) -> None:
        lines = [[without_controls(line) for line in str(one).split("\n")] for one in objects]
        super().print(*("\n".join(texts) for texts in lines), **options)


stderr = _Harmless(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
NAMED = 5  # names on a line that speaks of many
INTERVAL = 10  # seconds between lines where stderr is no terminal


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        stderr.print(record.getMessage())


def listen(level: int) -> None:
    """Print what evenlight logs from this level on, above the bars."""
    logger = logging.getLogger("evenlight")
    logger.setLevel(level)
    logger.handlers = [_Lines()]


def silent(what: str, done: int, total: int) -> None:
    """The progress of a run that nobody watches."""


@contextlib.contextmanager
def watched(quiet: bool, verbose: bool) -> Iterator[Progress]:
    """Progress and words of a command: of quiet ones only what failed, of verbose ones more.

    Of several processes that torchrun started, the first speaks for all.
    """
    follows = launched().rank > 0
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    listen(logging.CRITICAL if follows else level)
    quiet = quiet or follows
    with contextlib.nullcontext(silent) if quiet else progress() as on_progress:
        yield on_progress


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """One bar per thing counted, on stderr; where that is no terminal, a line every INTERVAL."""
    if not stderr.is_terminal:
        yield _lines()
        return
    from rich import progress as rich_progress

    with rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[rate]}"),
        rich_progress.TimeRemainingColumn(),
        console=stderr,
    ) as bars:
        tasks: dict[str, Any] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, rate="")
            speed = bars.tasks[tasks[what]].speed
            rate = f"{speed:.1f}/s" if speed else ""
            bars.update(tasks[what], completed=done, total=total, rate=rate)

        yield on_progress


def _lines() -> Progress:
    """Count, rate and time left as plain lines, for a log."""
    started, said = time.monotonic(), time.monotonic()

    def on_progress(what: str, done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= INTERVAL and done < total:
            said, rate = now, done / (now - started)
            left = f", {timedelta(seconds=round((total - done) / rate))} left" if done else ""
            stderr.print(f"{what}: {done} of {total}, {rate:.2f}/s{left}")

    return on_progress


def ready_streams() -> None:
    """Any name can be printed, and what cannot be written is an OSError of the line at fault.

    Raises EnvironmentLacks where a stream is closed: a file opened later would take its place, and
    what is printed would go into that.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        raise EnvironmentLacks("stdin, stdout or stderr is closed: give /dev/null in its place")
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]


def give_up_stdout() -> None:
    """Let go of what could not be written: Python would try again at its end, and complain."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def emit(result: Any, as_json: bool) -> None:
    """The result as one JSON document on stdout, if asked for; of the first process alone."""
    if as_json and not launched().rank:
        plain = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
        print(json.dumps(_without_nan(plain), indent=2, default=str, allow_nan=False))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_failures(failed: list[tuple[str, str]]) -> None:
    """One plain line per item that failed."""
    if failed:
        stderr.print(f"{len(failed)} failed:")
    for name, reason in failed:
        stderr.print(f"  {name}: {reason}")


def print_passed_over(passed_over: list[tuple[str, str]]) -> None:
    """One line per reason: how many pictures it met, and the names of the first few.  Of a quiet
    command, none."""
    names: dict[str, list[str]] = {}
    for name, reason in passed_over:
        names.setdefault(reason, []).append(name)
    for reason, there in names.items():
        more = f" and {len(there) - NAMED} more" if len(there) > NAMED else ""
        log.info(f"passed over {len(there)}: {', '.join(there[:NAMED])}{more} ({reason})")


def finish(report: Any, as_json: bool) -> int:
    """What a run over photos ends with: its summary, what it passed over, what failed.  Returns
    the exit code."""
    log.info(report.summary())
    print_passed_over(report.passed_over)
    print_failures(report.failed)
    emit(report, as_json)
    return SOME_FAILED if report.failed else 0


def end(sentence: str, code: int, as_json: bool) -> NoReturn:
    """End the process with an error in words: those of several say which, but the first; one that
    is left to the first has none."""
    rank = launched().rank
    with contextlib.suppress(OSError):  # stderr or stdout is what failed
        if sentence:
            stderr.print(f"evenlight: {f'process {rank}: ' if rank else ''}{sentence}")
        emit({"error": sentence, "exit": code}, as_json)
    give_up_stdout()
    stop_at_once()  # Stopped would come to nothing but a traceback from here on
    raise SystemExit(code) from None


def print_tree(values: dict[str, Any], indent: int = 0) -> None:
    """Nested values on stdout, one line each."""
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{' ' * indent}{key}:")
            print_tree(value, indent + 2)
        else:
            print(f"{' ' * indent}{key}: {value if value != '' else '-'}")
