"""The command line: parse, call one function of the pipeline, print, exit with a code."""

import logging
import sys
import webbrowser
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from evenlight import __version__
from evenlight.cache.errors import EvenlightError, UsageError
from evenlight.pipeline import exits
from evenlight.pipeline.console import (
    emit,
    end,
    finish,
    listen,
    print_failures,
    print_tree,
    ready_streams,
    stderr,
    watched,
)

log = logging.getLogger("evenlight")

# What click raises, of which newer versions of typer have their own copy.
BadUsage: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Mend badly exposed photographs; learn to do so from unlabelled photos.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(help="Look into a store of priors.", no_args_is_help=True)
weights_app = typer.Typer(help="Official weights.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
app.add_typer(weights_app, name="weights")
StoreOption = Annotated[
    str, typer.Option("-s", "--store", help="The store: a folder, or s3://BUCKET/FOLDER.")
]
ModelOption = Annotated[
    Path | None, typer.Option("-m", "--model", help="Folder of a training run; default: shipped.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")]


def _completed(incomplete: str) -> list[tuple[str, str]]:
    from evenlight.pipeline.settings_list import completions

    return completions(incomplete)


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="section.key=value; repeatable.", autocompletion=_completed),
]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Say only what failed.")]
VerboseOption = Annotated[
    bool, typer.Option("-v", "--verbose", help="Say more of all that is done.")
]


class Overwrite(StrEnum):
    changed = "changed"
    all = "all"


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def precompute(
    photos: Annotated[Path, typer.Argument(help="A photo, a folder, or an HDF5 file of images.")],
    store: StoreOption,
    workers: Annotated[int | None, typer.Option(min=1, help="Local processes.")] = None,
    scheduler: Annotated[str, typer.Option(help="Address of a Dask cluster.")] = "",
    prune: Annotated[
        bool, typer.Option("--prune", help="Take away photos of the store that are not in PHOTOS.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try photos again that failed as they are.")
    ] = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make or complete a store of priors: regions, embeddings, pseudo-ground-truth.

    Photos of another folder are added to those that a store holds.
    """
    from evenlight.pipeline.precompute import precompute as run

    overrides = [*(set_ or []), *([f"run.workers={workers}"] if workers else [])]
    overrides += ["run.retry_failed=true"] if retry_failed else []
    settings = _read(config, overrides)
    with watched(quiet, verbose) as on_progress:
        report = run(
            photos,
            store,
            settings=settings,
            scheduler=scheduler,
            prune=prune,
            on_progress=on_progress,
        )
    raise typer.Exit(finish(report, as_json))


@app.command("tune-clip")
def tune_clip(
    store: StoreOption,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tune the judge, its strengths and its words, from the cached tensors of a store."""
    from evenlight.pipeline.judge import tune_clip as run

    with watched(quiet, verbose):
        report = run(store, settings=_read(config, set_))
    for sentence in report.sentences():
        log.info(sentence)
    emit(report, as_json)


@app.command()
def regenerate(
    store: StoreOption,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remake scores and pseudo-ground-truth from the cache, where what chooses them changed."""
    from evenlight.pipeline.precompute import regenerate as run

    settings = _read(config, set_)
    with watched(quiet, verbose) as on_progress:
        report = run(store, settings=settings, on_progress=on_progress)
    finish(report, as_json)  # photos that failed did so in precompute: not a failure here


@app.command()
def train(
    store: StoreOption,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the run.")],
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a corrector from a store; goes on where an earlier run in the folder stopped."""
    from evenlight.pipeline.train import train as run

    settings = _read(config, set_)
    with watched(quiet, verbose) as on_progress:
        result = run(store, out, settings=settings, on_progress=on_progress)
    log.info(result.summary())
    emit(result, as_json)


@app.command()
def evaluate(
    data: Annotated[
        list[str],
        typer.Option("--data", help="LAYOUT:PATH; an unknown layout lists all. Repeatable."),
    ],
    model: Annotated[
        list[Path] | None, typer.Option("-m", "--model", help="Folder of a run; repeatable.")
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the rows here too.")] = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure models, their pseudo-ground-truth and baselines on sets of photos."""
    from evenlight.cache.files import atomic_write, try_to_write
    from evenlight.pipeline.evaluate import evaluate as run

    if csv is not None:
        try_to_write(csv)
    with watched(quiet, verbose) as on_progress:
        result = run(model or [], data, settings=_read(config, set_), on_progress=on_progress)
    try:
        if not as_json:
            typer.echo(result.to_text())
        emit(result, as_json)
    finally:
        if csv is not None:
            atomic_write(csv, result.to_csv().encode())


@app.command()
def correct(
    photos: Annotated[
        list[Path], typer.Argument(help="Photos, folders, HDF5 files, or - (stdin).")
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="Folder; or, for one photo, a file, or - (stdout)."),
    ],
    model: ModelOption = None,
    strength: Annotated[
        float, typer.Option(min=0, max=1.5, help="0 leaves photos as they are, 1 is all.")
    ] = 1.0,
    overwrite: Annotated[
        Overwrite,
        typer.Option(help="Replace outputs that are there: of what changed, or all (--overwrite)."),
    ] = Overwrite.changed,
    skip: Annotated[bool, typer.Option("--skip", help="Replace no output that is there.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Correct good photos too, as published protocols do.")
    ] = False,
    suffix: Annotated[str, typer.Option(help="Put behind the name of every output.")] = "",
    format_: Annotated[
        str, typer.Option("--format", help="jpeg, png, tiff, webp, or same.")
    ] = "same",
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Of lossy formats; default: as it came.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "",
    runtime: Annotated[str, typer.Option(help="torch; or onnx, with -m of `export`.")] = "torch",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would be done.")
    ] = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Correct photos of any size; inputs are never touched."""
    if as_json and str(out) == "-":
        raise UsageError("stdout takes one of -o - and --json")
    overrides = [*(set_ or []), *(["judge.prior_good=0"] if everything else [])]
    overrides += [f'run.device="{device}"'] if device else []
    with watched(quiet, verbose) as on_progress:
        log.info("looking for photos")
        from evenlight.pipeline.correct import correct_files as run

        report = run(
            photos,
            out,
            model=model,
            settings=_read(config, overrides),
            on_progress=on_progress,
            strength=strength,
            overwrite=False if skip else overwrite is Overwrite.all or "changed",
            suffix=suffix,
            format=format_,
            quality=quality,
            workers=workers,
            runtime=runtime,
            dry_run=dry_run,
        )
    raise typer.Exit(finish(report, as_json))


@app.command()
def export(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the graphs.")],
    model: Annotated[Path | None, typer.Argument(help="A run's folder; default: shipped.")] = None,
    to: Annotated[str, typer.Option(help="onnx.")] = "onnx",
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a corrector and its priors as ONNX graphs: `correct --runtime onnx` needs no torch."""
    from evenlight.pipeline.export import export as run

    with watched(quiet, verbose) as on_progress:
        made = run(model, out, to=to, on_progress=on_progress)
    log.info(made.summary())
    emit(made, as_json)


@app.command()
def report(
    target: Annotated[
        str, typer.Argument(help="A store, a training run, or a folder of corrected photos.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The page; default: TARGET.html, here for s3://."),
    ] = None,
    photos: Annotated[
        list[Path] | None,
        typer.Option(
            "--photos",
            help="Photos for a run to correct; or what a folder was corrected from, where its "
            "files do not say. Repeatable.",
        ),
    ] = None,
    side: Annotated[int, typer.Option(min=64, help="Longer side of pictures, pixels.")] = 2048,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """One HTML page to look at: photos before and after, what the judge said, training curves."""
    from evenlight.pipeline.report import report as run

    with watched(quiet, verbose) as on_progress:
        made = run(target, out, photos=photos or [], side=side, on_progress=on_progress)
    log.info(f"{made.photos} photos; look at {made.page}")
    print_failures(made.failed)
    emit(made, as_json)
    if made.failed:
        raise typer.Exit(exits.SOME_FAILED)


@app.command()
def settings(
    diff: Annotated[
        str | None,
        typer.Option("--diff", help="A store or training run: only what differs there."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Every setting: its default, which values it takes, what a change of it makes stale."""
    from evenlight.pipeline.settings_list import settings as run
    from evenlight.pipeline.settings_list import to_text

    rows = run(diff)
    if not as_json:
        typer.echo(to_text(rows))
    emit([asdict(row) for row in rows], as_json)


@app.command()
def serve(
    photos: Annotated[Path | None, typer.Argument(help="A folder to go through.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="For what is saved; default: PHOTOS-corrected."),
    ] = None,
    model: ModelOption = None,
    host: Annotated[
        str, typer.Option(help="Listen here: other machines may get in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8765,
    show: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Correct photos in a browser: before and after, at any strength."""
    from evenlight.pipeline.serve import serve as run

    def on_start(serving: Any) -> None:
        emit(serving, as_json)
        if show:
            webbrowser.open(serving.url)

    given = _read(config, set_)
    run(photos, out=out, model=model, settings=given, host=host, port=port, on_start=on_start)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """What is installed, which scan would run and why, which weights are there."""
    from evenlight.pipeline.doctor import doctor as run

    found = run()
    if not as_json:
        print_tree(found)
    emit(found, as_json)
    if found["lacks"]:
        raise typer.Exit(exits.ENVIRONMENT)


@cache_app.command("info")
def cache_info(
    store: StoreOption,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sizes, units and what is stale under these settings; --json has fingerprints and arrays."""
    from evenlight.pipeline.store_info import cache_info as run
    from evenlight.pipeline.store_info import info_text

    info = run(store, settings=_read(config, set_))
    if not as_json:
        typer.echo(info_text(info))
    emit(info, as_json)


@cache_app.command("verify")
def cache_verify(
    store: StoreOption,
    repair: Annotated[bool, typer.Option(help="Forget what is damaged, to be remade.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every stored byte against its record."""
    from evenlight.pipeline.store_info import cache_verify as run
    from evenlight.pipeline.store_info import sentences

    damages = run(store, repair=repair)
    for sentence in sentences(damages, repair):
        stderr.print(sentence)
    emit([asdict(damage) for damage in damages], as_json)
    if damages and not repair:
        raise typer.Exit(exits.STORE)


@cache_app.command("show")
def cache_show(
    photo: Annotated[str, typer.Argument(help="A photo, as the store names it.")],
    store: StoreOption,
    out: Annotated[Path, typer.Option("-o", "--out", help="The picture, a PNG.")],
    as_json: JsonOption = False,
) -> None:
    """All that a store holds of one photo, in one picture."""
    from evenlight.pipeline.store_picture import cache_show as run

    picture = run(store, photo, out)
    stderr.print(f"look at {picture}")
    emit({"picture": picture}, as_json)


@cache_app.command("forget")
def cache_forget(
    names: Annotated[list[str], typer.Argument(help="Photos, as `precompute` names them.")],
    store: StoreOption,
    as_json: JsonOption = False,
) -> None:
    """Take photos out of a store; what training sees goes at once, the rest when it is remade."""
    from evenlight.pipeline.store_info import cache_forget as run

    left = run(store, names)
    stderr.print(f"forgot {len(set(names))} photos, {left} are left")
    emit({"forgotten": len(set(names)), "left": left}, as_json)


@weights_app.command("fetch")
def weights_fetch(
    name: Annotated[str, typer.Argument(help="FastSAM-s, FastSAM-x or ViT-B-32-openai.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the file.")],
    as_json: JsonOption = False,
) -> None:
    """Download official weights: the only command that opens a connection."""
    from evenlight.pipeline.doctor import fetch_weights

    fetched = fetch_weights(name, out)
    stderr.print(f"wrote {fetched.path}, sha256 {fetched.sha256}")
    stderr.print("use it with " + " ".join(f"--set {text}" for text in fetched.use))
    emit(fetched, as_json)


def _read(config: Path | None, overrides: list[str] | None) -> dict[str, Any]:
    """The settings that --config and --set ask for, by key."""
    from evenlight.pipeline.config import read

    return read(config, overrides or [])


def main() -> None:
    """Run the command line and map errors to exit codes."""
    listen(logging.INFO)
    exits.stop_on_signals()
    # click gives an option without a value the next word: a photo
    arguments = ["--overwrite=all" if word == "--overwrite" else word for word in sys.argv[1:]]
    as_json = "--json" in arguments
    try:
        ready_streams()
        # typer says what is wrong with the usage and exits 2, but knows no JSON
        raise SystemExit(app(arguments, standalone_mode=not as_json))
    except EvenlightError as error:
        code = next(code for kind, code in exits.EXIT_CODES if isinstance(error, kind))
        end("" if exits.left_to_first(error) else str(error), code, as_json)
    except (MemoryError, ModuleNotFoundError) as error:
        end(exits.lacks(error), exits.ENVIRONMENT, as_json)
    except BadUsage as error:
        end(error.format_message(), exits.USAGE, as_json)  # type: ignore[attr-defined]
    except OSError as error:  # a full disk, say, where nobody knew better
        end(str(error), exits.SOME_FAILED, as_json)
    except exits.Stopped as stopped:
        said = "stopped; what is complete is kept: run the same command again to go on"
        end("" if exits.left_to_first(stopped) else said, int(stopped.code or 0), as_json)


if __name__ == "__main__":
    main()
