"""The figures of a training as TensorBoard reads them, where that is installed."""

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path


class Events:
    """A file of events in the folder of a run, begun with the first figures.

    step: steps done so far; what earlier files hold of later ones is passed over by TensorBoard.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / f"events.out.tfevents.{time.time():.6f}.evenlight"
        self.step = step

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a step, by name.  Each call leaves the file whole."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()
        values = [summary_pb2.Summary.Value(tag=k, simple_value=x) for k, x in figures.items()]
        events = [event_pb2.Event(wall_time=now, step=step, summary={"value": values})]
        if not self.path.exists():
            session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            events = [
                event_pb2.Event(wall_time=now, file_version="brain.Event:2"),
                event_pb2.Event(wall_time=now, step=self.step + 1, session_log=session),
                *events,
            ]
        with self.path.open("ab") as file:
            for event in events:
                RecordWriter(file).write(event.SerializeToString())


def events(folder: Path, step: int) -> Events | None:
    """Where the figures of a run go, None where TensorBoard is not installed."""
    return Events(folder, step) if importlib.util.find_spec("tensorboard") else None
