"""Correct in a browser: a page on this machine (serve.html) that shows photos before and after.

Threats: another page in the same browser (refused: serve_guard.py), a hostile photo (read as
`correct` reads it; uploads are bounded), a request for other files (photos are numbers of a list,
no request names a path).  Who reaches the port can do all that the page does: only this machine
can, unless another host is asked for.
"""

import asyncio
import gc
import logging
import queue
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from evenlight.cache.errors import EnvironmentLacks, EvenlightError, PhotoError, UsageError
from evenlight.cache.files import private_folder
from evenlight.pipeline import config
from evenlight.pipeline.config import Given
from evenlight.pipeline.console import print_passed_over
from evenlight.pipeline.outputs import Job, Options, list_jobs, refuse_strength
from evenlight.pipeline.page import page
from evenlight.stages.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evenlight.pipeline.serve_photos import Album, Opened

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    from evenlight.pipeline.serve_guard import HERE, Guard
except ImportError as error:
    raise EnvironmentLacks(
        "evenlight serve needs the extra of that name: pip install 'evenlight[serve]'"
    ) from error

log = logging.getLogger(__name__)

PORT = 8765
KEPT = 3  # opened photos
UPLOAD_BYTES, ALL_UPLOADS = 1 << 29, 1 << 32  # of one dropped photo, of all of them
WINDOW_PIXELS = 1 << 24  # of what one request may ask for at full size
GONE = 499  # whoever asked has hung up; nobody reads it
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Serving:
    """url: of the page.  photos: how many the folder holds.  passed_over: name and reason of other
    pictures in it.  out: where photos are saved."""

    url: str
    photos: int
    passed_over: list[tuple[str, str]]
    out: Path | None


def serve(
    photos: str | Path | None = None,
    *,
    out: str | Path | None = None,
    model: str | Path | None = None,
    settings: Given = None,
    host: str = HERE,
    port: int = PORT,
    on_start: Callable[[Serving], None] = lambda serving: None,
) -> None:
    """Serve the page until SIGINT or SIGTERM; call it in the main thread, which does the work.

    photos: a folder to go through; None: only photos that are dropped onto the page.  out: where
    its photos are saved; default: the folder's name with "-corrected".  model, settings: as in
    `correct_files`.  host: an address to listen on; any but 127.0.0.1 lets others in.  port: 0 is
    any free one.  on_start: called once the page can be opened.
    Raises UsageError for a folder without photos or a port that is taken, EnvironmentLacks where
    weights are missing.
    """
    given = config.to_dict(settings) if isinstance(settings, Settings) else settings
    flat, jobs, target = config.flatten(given or {}), list[Job](), None
    passed_over = list[tuple[str, str]]()
    if photos is not None:
        folder = Path(photos).resolve()
        target = folder.with_name(f"{folder.name}-corrected") if out is None else Path(out)
        limit = config.resolve(settings).photo.max_megapixels
        jobs, passed_over = list_jobs([Path(photos)], target, Options(), limit)
    with _listening(host, port) as listener:
        from evenlight.pipeline.serve_photos import Album  # torch

        named = None if model is None else str(model)
        log.info("loading the model")
        album = Album(jobs, private_folder("evenlight-serve-"), named, flat)
        album.load()
        site = _Site(album)
        app = Guard(site.app, host)
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, lifespan="off", ws="none", http="h11", server_header=False
            )
        )
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        gc.freeze()  # of what is loaded nothing goes before the end, which then takes no second
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}"
        if host not in (HERE, "localhost"):
            log.warning("whoever reaches %s can see these photos and save corrections", url)
        log.info("%d photos; open %s (Ctrl-C ends it)", len(jobs), url)
        print_passed_over(passed_over)
        on_start(Serving(url=url, photos=len(jobs), passed_over=passed_over, out=target))
        try:
            site.turns.take_all()
        finally:
            logging.getLogger("uvicorn.error").disabled = True  # who still waits gets no answer
            server.should_exit = server.force_exit = True
            thread.join(0.5)


@contextmanager
def _listening(host: str, port: int) -> "Iterator[socket.socket]":
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}, port {port}: {error.strerror}; --port 0 takes any free one"
        ) from error
    with listener:
        yield listener


class _Turns:
    """Work that one thread does, piece by piece: corrections are made in the main thread, where
    Ctrl-C ends them as it ends every command."""

    def __init__(self) -> None:
        self._waiting = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]]()

    def take_all(self) -> None:
        """Do what comes, for ever."""
        while True:
            try:
                future, work = self._waiting.get(timeout=0.5)  # Windows hears no Ctrl-C within it
            except queue.Empty:
                continue
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

    async def do(self, work: Callable[[], Result]) -> Result:
        """The result of work, once its turn has come."""
        future = Future[Result]()
        self._waiting.put((future, work))
        return await asyncio.wrap_future(future)


class _Site:
    """What the page asks for."""

    def __init__(self, album: "Album") -> None:
        self.album, self.turns = album, _Turns()
        self._opened: OrderedDict[int, Opened] = OrderedDict()  # at most KEPT, the newest last
        self._opening, self._working = asyncio.Lock(), asyncio.Lock()
        self._shrinking, self._uploading = asyncio.Lock(), asyncio.Lock()
        one = "/photos/{number:int}"
        routes = [
            Route("/", self.page),
            Route("/photos", self.list),
            Route("/photos", self.upload, methods=["POST"]),
            Route(one, self.open),
            Route(f"{one}/thumb", self.thumb),
            Route(f"{one}/before", self.before),
            Route(f"{one}/after", self.after),
            Route(f"{one}/save", self.save, methods=["POST"]),
            Route(f"{one}/saved", self.saved),
        ]
        kinds = (EvenlightError, OSError, HTTPException, ClientDisconnect)
        self.app = Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, _failed))

    async def page(self, request: Request) -> Response:
        return HTMLResponse(page("serve.html"))

    async def list(self, request: Request) -> Response:
        names = [job.source.name for job in self.album.jobs]
        dropped = [self.album.is_dropped(number) for number in range(len(names))]
        rows = [{"number": n, "name": x, "dropped": dropped[n]} for n, x in enumerate(names)]
        return JSONResponse({"photos": rows, "most": UPLOAD_BYTES})

    async def upload(self, request: Request) -> Response:
        """A dropped photo: the body is its file, `name` its name."""
        name = request.query_params.get("name", "photo")[:255]
        async with self._uploading:
            path = self.album.upload_path()
            used = sum(file.stat().st_size for file in path.parent.iterdir())
            room = min(UPLOAD_BYTES, ALL_UPLOADS - used)
            try:
                with path.open("wb") as file:
                    async for chunk in request.stream():
                        if file.tell() + len(chunk) > room:
                            raise HTTPException(413, f"{name} is larger than {room >> 20} MB")
                        file.write(chunk)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return JSONResponse({"number": self.album.take_upload(name)}, 201)

    async def open(self, request: Request) -> Response:
        photo = await self._photo(request)
        if 1.0 in photo.missing:
            await self._do(request, partial(photo.draw, 1.0))
        height, width = photo.whole.pixels.shape[:2]
        said = {"size": [width, height], "good": photo.is_good}
        return JSONResponse(said, background=BackgroundTask(self._draw_rest, photo))

    async def _draw_rest(self, photo: "Opened") -> None:
        """All that the slider will need, as long as the photo is looked at."""
        while photo.missing and photo is next(reversed(self._opened.values())):
            async with self._working:
                if photo.missing:
                    await self.turns.do(partial(photo.draw, photo.missing[0]))

    async def thumb(self, request: Request) -> Response:
        async with self._shrinking:
            await _refuse_gone(request)
            return _jpeg(await run_in_threadpool(self.album.thumb, self._number(request)))

    async def before(self, request: Request) -> Response:
        photo = await self._photo(request)
        return _jpeg(await run_in_threadpool(photo.before, _window(request, photo)))

    async def after(self, request: Request) -> Response:
        """At screen size, what was done in a header, and whether it will be better; or a window."""
        strength, photo = _strength(request), await self._photo(request)
        window = _window(request, photo)
        if window is not None:
            return _jpeg(await self._do(request, partial(photo.window_after, strength, window)))
        rough = photo.is_rough(strength)
        data, change = await run_in_threadpool(photo.after, strength)
        about = {"evenlight-change": str(change), "evenlight-rough": str(int(rough))}
        return _jpeg(data, about)

    async def save(self, request: Request) -> Response:
        number, strength = self._number(request), _strength(request)
        overwrite = "overwrite" in request.query_params
        outcome = await self._do(request, partial(self.album.save, number, strength, overwrite))
        if outcome is None:
            target = self.album.jobs[number].target
            raise HTTPException(409, f"{target} is there already, not made here or edited since")
        said = {"change": str(outcome.change), "kept": outcome.kept, "notes": outcome.notes}
        return JSONResponse(said | {"output": str(outcome.job.target)})

    async def saved(self, request: Request) -> Response:
        """What became of a dropped photo, to be downloaded."""
        number = self._number(request)
        job = self.album.jobs[number]
        if not (self.album.is_dropped(number) and job.target.is_file()):
            raise HTTPException(404, "nothing was saved that could be downloaded")
        name = Path(job.source.name)
        return FileResponse(job.target, filename=f"{name.stem}_even{name.suffix}")

    def _number(self, request: Request) -> int:
        number: int = request.path_params["number"]
        if number >= len(self.album.jobs):
            raise HTTPException(404, f"there is no photo {number}")
        return number

    async def _photo(self, request: Request) -> "Opened":
        """The photo that is asked for; opened, and another one closed, where it is not."""
        number = self._number(request)
        async with self._opening:
            if number not in self._opened:
                while len(self._opened) >= KEPT:
                    self._opened.popitem(last=False)
                opened = await self._do(request, partial(self.album.open, number))
                self._opened[number] = opened
            self._opened.move_to_end(number)
            return self._opened[number]

    async def _do(self, request: Request, work: Callable[[], Result]) -> Result:
        """One correction at a time, and none for those who have hung up."""
        async with self._working:
            await _refuse_gone(request)
            return await self.turns.do(work)


async def _refuse_gone(request: Request) -> None:
    if await request.is_disconnected():
        raise HTTPException(GONE)


def _strength(request: Request) -> float:
    try:
        strength = float(request.query_params.get("strength", "1"))
    except ValueError as error:
        raise HTTPException(400, "strength is a number") from error
    refuse_strength(strength)
    return strength


def _window(request: Request, photo: "Opened") -> tuple[slice, slice] | None:
    """?window=left,top,width,height in pixels of the whole photo; what lies outside is left off."""
    text = request.query_params.get("window")
    if text is None:
        return None
    try:
        left, top, width, height = map(int, text.split(","))
    except ValueError as error:
        raise HTTPException(400, "a window is left,top,width,height") from error
    full = photo.whole.pixels.shape
    rows, columns = (
        slice(max(0, start), min(start + length, side))
        for start, length, side in ((top, height, full[0]), (left, width, full[1]))
    )
    area = max(0, rows.stop - rows.start) * max(0, columns.stop - columns.start)
    if not 0 < area <= WINDOW_PIXELS:
        raise HTTPException(400, f"a window of {area} pixels")
    return rows, columns


def _jpeg(data: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(data, headers=headers, media_type="image/jpeg")


def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)
    codes = {PhotoError: 422, UsageError: 400, ClientDisconnect: GONE}
    return JSONResponse({"error": str(error)}, codes.get(type(error), 500))
