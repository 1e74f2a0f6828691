"""What users wait for, in CPU seconds, each beside its peers in the same run.

    python -m benchmarks.speed [--sections precompute workers correct start onnx scan step train
                                store] [--repeats 3] [--exported FOLDER] [--json FILE]

One thread. Section onnx runs what `evenlight export` wrote into FOLDER (else it is made anew, in
more than a minute) beside torch. Photos are those that installed packages ship, re-exposed, at a
long side of 512. A row is the best of the repeats; `times` is its ratio to the first row of its
section. mambapy and accelerated-scan take part where they can be imported (pip install --no-deps
--target FOLDER mambapy accelerated-scan; PYTHONPATH=FOLDER).
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.store import child, measure_store
from evenlight.pipeline import config
from evenlight.pipeline.demo import PHOTOS, installed_photo
from evenlight.pipeline.export import export
from evenlight.pipeline.load import load_predictor
from evenlight.pipeline.models import Models, load_models
from evenlight.pipeline.parts import PARTS, Part, Tools
from evenlight.pipeline.precompute import precompute, regenerate
from evenlight.pipeline.train import train
from evenlight.stages.arrays import from_numpy
from evenlight.stages.corrector.inputs import rule_corrected
from evenlight.stages.corrector.network import Corrector
from evenlight.stages.corrector.scan import scan, scan_reference
from evenlight.stages.photos.encode import jpeg_bytes
from evenlight.stages.priors import tone
from evenlight.stages.priors.judge import Judge
from evenlight.stages.settings import NetworkSettings

SHIFTS = (-1.0, 0.0, 0.6)  # of the strength of `ev`
MEGAPIXELS = (3000, 4000)  # the large photo
FEW_MANY = (8, 40)  # photos of which the difference counts: start-up, of all workers, left out
FEW_A_UNIT = ("--set", "run.unit_size=4")  # so that two workers have work from the start
STEPS = 10  # of a training
Row = dict[str, str | float]


class Table:
    """Rows of a run, printed as they come."""

    def __init__(self, repeats: int, exported: Path | None) -> None:
        self.repeats, self.exported = repeats, exported
        self.rows: list[Row] = []
        print(f"{'section':12} {'what':44} {'CPU s':>10} {'times':>8}")

    def add(self, section: str, what: str, seconds: float) -> None:
        first = next((row["seconds"] for row in self.rows if row["section"] == section), seconds)
        self.rows.append({"section": section, "what": what, "seconds": seconds})
        print(f"{section:12} {what:44} {seconds:10.4f} {seconds / float(first):8.2f}", flush=True)

    def time(self, section: str, what: str, act: Callable[[], object], per: int = 1) -> None:
        """CPU seconds of this process for each of `per` things that an act does."""
        self.add(section, what, self.best(act) / per)

    def best(self, act: Callable[[], object]) -> float:
        act()  # warm
        taken = []
        for _ in range(self.repeats):
            started = time.process_time()
            act()
            taken.append(time.process_time() - started)
        return min(taken)


def photos() -> list[np.ndarray]:
    """uint8 H,W,3, long side 512 at most."""
    originals = [installed_photo(*where) for where in PHOTOS]
    small = [cv2.resize(x, _fitted(x.shape, 512), interpolation=cv2.INTER_AREA) for x in originals]
    return [tone.on_bytes("ev", x, t) for x in small for t in SHIFTS]


def _fitted(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    height, width = (round(s * side / max(shape[:2]) / 8) * 8 for s in shape[:2])
    return width, height


def clahe(photo_HW3: np.ndarray) -> np.ndarray:
    lab = cv2.cvtColor(photo_HW3, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(2.0, (8, 8)).apply(np.ascontiguousarray(lab[..., 0]))
    return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)


def decode_and_encode(data: bytes) -> bytes:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def measure_precompute(table: Table) -> None:
    """The parts of a photo; what their models take alone; peers; the commands, store and all."""
    pictures = photos()
    data = [jpeg_bytes(picture) for picture in pictures]
    count = len(data)
    models = load_models(config.build())
    made, seconds = parts_made(table, models, data)
    table.add("precompute", "a photo, all parts", sum(seconds.values()))
    for name, taken in seconds.items():
        table.add("precompute", f"  {name}", taken)
    seen = sum(len(x["tones"]) + (x["region_labels"] > 0).sum() for x in made) / count
    crops = torch.rand(round(seen), 3, models.clip.size, models.clip.size)
    table.time("precompute", f"CLIP alone, {len(crops)} images", lambda: models.clip.embed(crops))
    ruled = [rule_corrected(x["photo"]) for x in made]
    segment = models.segmenter.segment
    table.time("precompute", "FastSAM alone", lambda: [*map(segment, ruled)], count)
    table.time("precompute", "CLAHE", lambda: [*map(clahe, pictures)], count)
    table.time("precompute", "decode and encode", lambda: [*map(decode_and_encode, data)], count)
    with tempfile.TemporaryDirectory() as folder:
        source, stores = Path(folder, "photos"), Path(folder, "stores")
        source.mkdir()
        for number, one in enumerate(data):
            (source / f"{number}.jpg").write_bytes(one)
        number = itertools.count()
        stored = partial(lambda: precompute(source, stores / str(next(number))))
        table.time("precompute", "precompute, with its store", stored, count)
        prior = itertools.cycle([0.4, 0.5])
        again = partial(
            lambda: regenerate(stores / "0", settings={"judge.prior_good": next(prior)})
        )
        table.time("precompute", "regenerate", again, count)


def parts_made(
    table: Table, models: Models, data: list[bytes]
) -> tuple[list[dict], dict[str, float]]:
    """What photos become in memory, and the seconds that each part takes for one."""
    tools = Tools(config.build(), models, Judge.shipped(models.clip))
    made: list[dict] = [{"file": ("photo.jpg", one)} for one in data]

    def make(part: Part) -> None:
        for have in made:
            have |= part.make({name: have[name] for name in part.reads}, tools)
            height, width = have["extent"]
            have["photo"] = have["photo"][:height, :width]

    return made, {part.name: table.best(partial(make, part)) / len(data) for part in PARTS}


def measure_workers(table: Table) -> None:
    """A photo of 512 more, whole processes: one worker, then two."""
    with tempfile.TemporaryDirectory() as folder:
        for command in ("precompute", "correct"):
            for workers in (1, 2):
                clocks = [run_on(Path(folder), command, workers, count) for count in FEW_MANY]
                cpu, wall = ((many - few) for few, many in zip(*clocks, strict=True))
                more = FEW_MANY[1] - FEW_MANY[0]
                table.add(f"{command} x{workers}", "a photo more", cpu / more)
                table.add(f"{command} x{workers}", "  by the clock", wall / more)


def run_on(folder: Path, command: str, workers: int, count: int) -> tuple[float, float]:
    """CPU seconds and seconds of a command on so many photos."""
    source, out = folder / f"photos-{count}", folder / f"{command}-{workers}-{count}"
    pictures = photos()
    source.mkdir(exist_ok=True)
    for number in range(count):
        shifted = tone.on_bytes("ev", pictures[number % len(pictures)], number / 1000)
        (source / f"{number}.jpg").write_bytes(jpeg_bytes(shifted))
    into = ["-s", str(out), *FEW_A_UNIT] if command == "precompute" else ["-o", str(out)]
    call = [sys.executable, "-m", "evenlight.cli", command, str(source), *into]
    started = time.perf_counter()
    taken = child([*call, "--workers", str(workers)], OMP_NUM_THREADS="1")
    return taken, time.perf_counter() - started


def measure_correct(table: Table) -> None:
    """A large photo in process, what is read and written left out."""
    photo = cv2.resize(photos()[0], MEGAPIXELS[::-1], interpolation=cv2.INTER_CUBIC)
    data = jpeg_bytes(photo)
    predictor = load_predictor(settings={"judge.prior_good": 0.0})
    convolutions = [nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)]
    network = nn.Sequential(*convolutions, nn.Conv2d(32, 3, 3, padding=1)).eval()
    rgb = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
    table.time("correct", "12 megapixels", lambda: predictor.correct(photo))
    table.time("correct", "decode and encode", lambda: decode_and_encode(data))
    table.time("correct", "CLAHE", lambda: clahe(photo))
    with torch.inference_mode():
        table.time("correct", "a 3x3 network of 11,000 weights", lambda: network(rgb))


def measure_start(table: Table) -> None:
    """Whole processes."""
    with tempfile.TemporaryDirectory() as folder:
        photo, store = Path(folder, "photo.jpg"), Path(folder, "S")
        photo.write_bytes(jpeg_bytes(photos()[0]))
        precompute(photo, store)
        command = [sys.executable, "-m", "evenlight.cli"]
        out = ["-o", str(Path(folder, "out")), "--overwrite", "--all"]
        for what, call in (
            ("--version", [*command, "--version"]),
            ("--help", [*command, "--help"]),
            ("cache info", [*command, "cache", "info", "-s", str(store)]),
            ("correct, one photo of 512", [*command, "correct", str(photo), *out]),
            ("import torch", [sys.executable, "-c", "import torch"]),
            ("import open_clip", [sys.executable, "-c", "import open_clip"]),
        ):
            table.add("start", what, min(child(call) for _ in range(table.repeats + 1)))


def measure_onnx(table: Table) -> None:
    """Models, a large photo, and whole processes: torch, then ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        exported = table.exported or export(None, Path(folder, "base")).folder
        given = {"settings": {"judge.prior_good": 0.0}}
        runtimes = {
            "torch": load_predictor(**given),
            "onnx": load_predictor(exported, runtime="onnx", threads=1, **given),
        }
        small = photos()[0]
        large = cv2.resize(small, MEGAPIXELS[::-1], interpolation=cv2.INTER_CUBIC)
        crops = np.random.default_rng(0).random((25, 3, 160, 160), np.float32)
        for name, predictor in runtimes.items():
            table.time(
                "25 for CLIP", name, lambda p=predictor: p.clip.embed(from_numpy(crops, p.xp))
            )
        for name, predictor in runtimes.items():
            table.time("FastSAM", name, lambda p=predictor: p.segmenter.segment(small))
        for name, predictor in runtimes.items():
            table.time("12 megapixel", name, lambda p=predictor: p.correct(large))
        model = ["-m", str(exported), "--runtime", "onnx"]
        for what, picture in (("512 process", small), ("12 MP process", large)):
            photo = Path(folder, "photo.jpg")
            photo.write_bytes(jpeg_bytes(picture))
            command = [sys.executable, "-m", "evenlight.cli", "correct", str(photo), "--all"]
            command += ["-o", str(Path(folder, "out")), "--overwrite"]
            for name, more in (("torch", []), ("onnx", model)):
                table.add(what, name, min(child(command + more) for _ in range(table.repeats + 1)))


def measure_scan(table: Table) -> None:
    """Forward and backward, 32 channels, a section for each length."""
    for length in (1024, 65536):
        section = f"scan {length}"
        generator = torch.Generator().manual_seed(0)
        steps = torch.empty(1, length, 32).uniform_(1e-3, 1e-1, generator=generator)
        a = torch.exp(-steps).mT.requires_grad_()
        b = torch.randn(1, length, 32, generator=generator).mT.requires_grad_()
        forms: dict[str, Callable] = {"ours": scan, "copy": torch.mul}
        forms |= peer_scans() | ({"loop": scan_reference} if length < 2000 else {})
        for name, form in forms.items():
            table.time(section, name, partial(both_ways, form, a, b))


def both_ways(form: Callable, a: Tensor, b: Tensor) -> None:
    torch.autograd.grad(form(a, b).sum(), (a, b))


def peer_scans() -> dict[str, Callable]:
    """Of a, b (B,D,L), as far as they are installed."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def joined(one: tuple, other: tuple) -> tuple:
        return one[0] * other[0], one[1] * other[0] + other[1]

    generic = partial(associative_scan, joined, dim=2, combine_mode="generic")
    found: dict[str, Callable] = {"torch associative_scan": lambda a, b: generic((a, b))[1]}
    with suppress(ImportError):
        from mambapy.pscan import pscan

        found["mambapy"] = lambda a, b: pscan(a.mT[..., None], b.mT[..., None])
    with suppress(ImportError):
        from accelerated_scan.ref import scan as tree

        found["accelerated-scan's reference"] = lambda a, b: tree(a.contiguous(), b.contiguous())
    return found


def measure_step(table: Table) -> None:
    """Forward and backward of the network, 8 crops of 160, and its floor: three times the FLOP of
    a forward pass at the rate of a matrix product of 1,024."""
    network = Corrector(NetworkSettings(size="small"), p3_channels=64)
    sizes = ((3, 160), (32, 40), (64, 20))
    inputs = [torch.rand(8, channels, side, side) for channels, side in sizes]
    given = torch.full((8,), 0.5)
    with FlopCounterMode(display=False) as counter:
        network(*inputs, given)
    matrix = torch.rand(1024, 1024)
    rate = 2 * 1024**3 / table.best(lambda: matrix @ matrix)

    def step() -> None:
        sum(part.square().mean() for part in network(*inputs, given)).backward()

    table.add("step", "floor", 3 * counter.get_total_flops() / rate)
    table.time("step", "forward and backward, size small", step)


def measure_train(table: Table) -> None:
    """A step of `train`, from the cache; and were its photos made in it."""
    data = [jpeg_bytes(picture) for picture in photos()]
    with tempfile.TemporaryDirectory() as folder:
        source, store = Path(folder, "photos"), Path(folder, "store")
        source.mkdir()
        for number, one in enumerate(data):
            (source / f"{number}.jpg").write_bytes(one)
        precompute(source, store)
        ticks: dict[int, float] = {}

        def tick(what: str, step: int, _: int) -> None:
            if what == "steps":
                ticks.setdefault(step, time.process_time())

        steps = {"steps": STEPS, "log_every": 1, "calibrate": [1, 3]}
        train(store, Path(folder, "run"), settings={"train": steps}, on_progress=tick)
    step = min(after - before for before, after in itertools.pairwise(ticks.values()))
    table.add("train", "a step, size small, from the cache", step)
    _, seconds = parts_made(table, load_models(config.build()), data)
    made = config.build().train.batch * sum(seconds.values())
    table.add("train", "the same, its photos made anew", step + made)


SECTIONS = {
    "precompute": measure_precompute,
    "workers": measure_workers,
    "correct": measure_correct,
    "start": measure_start,
    "onnx": measure_onnx,
    "scan": measure_scan,
    "step": measure_step,
    "train": measure_train,
    "store": lambda table: measure_store(table.add),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--exported", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    table = Table(options.repeats, options.exported)
    for section in options.sections:
        SECTIONS[section](table)
    if options.json:
        options.json.write_text(json.dumps(table.rows, indent=2))


if __name__ == "__main__":
    main()
