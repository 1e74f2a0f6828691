"""Where photos come from: files, folders walked recursively, HDF5 files of images."""

import importlib.util
import io
import math
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from evenlight.cache.errors import PhotoError, UsageError
from evenlight.cache.system import READ

_SUFFIXES_OF = {"jpeg": ".jpg .jpeg .jpe .jfif", "png": ".png", "tiff": ".tif .tiff",
                "webp": ".webp", "gif": ".gif", "bmp": ".bmp", "avif": ".avif",
                "heic": ".heic .heif .hif"}  # fmt: skip
FORMAT_OF = {end: format for format, ends in _SUFFIXES_OF.items() for end in ends.split()}
SUFFIXES = tuple(FORMAT_OF)
# Files that a person would call pictures and that are not read: why, and how their names end.
_PASSED_OVER = {
    "raw: develop it first, into TIFF or JPEG": "3fr arw cr2 cr3 crw dcr dng erf fff gpr iiq k25"
    " kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f",
    "a document of an editor: export it as PNG or TIFF": "afphoto clip kra ora pdn psb psd xcf",
    "a drawing: export it as PNG": "ai cdr emf eps svg svgz wmf",
    "a format that is not read: convert it to PNG or TIFF": "cur dds dib dpx exr fit fits hdr ico"
    " icns j2c j2k jls jp2 jpf jpx jxl jxr pbm pcx pfm pgm pnm ppm qoi sgi tga wdp xbm xpm",
}
_REASONS = {f".{end}": reason for reason, ends in _PASSED_OVER.items() for end in ends.split()}
_CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
HDF5_SUFFIXES = (".h5", ".hdf5")
_MAX_BYTES = 2 << 30  # of one file; 250 megapixels of 16-bit RGBA are as many uncompressed

HEIC_NEEDED = "reading HEIC needs the extra of that name: pip install 'evenlight[heic]'"


def heic_is_installed() -> bool:
    """Whether HEIC can be read here; loads nothing."""
    return importlib.util.find_spec("pillow_heif") is not None


@dataclass(frozen=True, slots=True)
class PhotoSource:
    """Where the bytes of one photo come from.

    name: path relative to the folder searched (POSIX), or name of the dataset; fit for JSON,
    UTF-8 and one line of a table, and unique: backslashes, control characters and bytes that
    are not UTF-8 are written as backslash escapes.  path: the file to open.  output_name: the
    relative path, exactly, under which a corrected copy belongs; never leaves its folder.
    """

    name: str
    path: Path
    output_name: str
    dataset: str | None = None  # of an HDF5 file
    max_megapixels: float = math.inf  # of a dataset; a larger one is refused from its header

    def read_bytes(self) -> bytes:
        """The whole file, or for HDF5 the array in NumPy's .npy format (so that a digest covers
        shape and type too).  Raises PhotoError; never waits on a pipe or a device."""
        if self.dataset is not None:
            import numpy as np  # and h5py: only where a source is HDF5

            from evenlight.stages.photos.hdf5 import read_image

            image = read_image(self.path, self.dataset, self.max_megapixels)
            stream = io.BytesIO()
            np.save(stream, image.astype(image.dtype.newbyteorder("=")), allow_pickle=False)
            return stream.getvalue()
        try:
            with os.fdopen(os.open(self.path, READ), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise PhotoError("not a regular file")
                if status.st_size > _MAX_BYTES:
                    raise PhotoError(f"a file of {status.st_size} bytes; at most {_MAX_BYTES}")
                return file.read()
        except OSError as error:
            raise PhotoError(f"cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Found:
    """photos: sorted by relative path.  passed_over: (name, reason) of pictures that cannot be
    read, sorted.  skipped: how many files that are no pictures were, by reason."""

    photos: list[PhotoSource]
    passed_over: list[tuple[str, str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def also_there(passed_over: list[tuple[str, str]]) -> str:
    """For a sentence that says no photos were found: the pictures that were, if any."""
    if not passed_over:
        return ""
    counts = Counter(reason for _, reason in passed_over)
    return "; passed over: " + ", ".join(f"{n} ({reason})" for reason, n in counts.items())


def find_photos(source: Path, max_megapixels: float = math.inf) -> Found:
    """Photos of a file, of a folder and all folders in it, or of an HDF5 file.

    In folders, files count as photos, and as pictures to pass over, by suffix (any case); a file
    named itself is always listed.  Links to folders are followed once each.  Files and folders
    that cannot be opened are listed all the same, so that reading them reports them by name.
    max_megapixels: of one image of an HDF5 file, which has to be read before it can be decoded.
    Raises UsageError when source does not exist or is neither file nor folder.
    """
    try:
        mode = source.stat().st_mode
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        found = Found([])
        _walk(source, found)
        found.photos.sort(key=lambda photo: photo.output_name)
        found.passed_over.sort()
        return found
    if not stat.S_ISREG(mode):
        raise UsageError(f"{source} is neither a file, a folder nor an HDF5 file of images")
    if source.suffix.lower() in HDF5_SUFFIXES:
        return _find_in_hdf5(source, max_megapixels)
    return Found([PhotoSource(_printable(source.name), source, source.name)])


def _find_in_hdf5(source: Path, max_megapixels: float) -> Found:
    from evenlight.stages.photos.hdf5 import list_images  # h5py only where a source is HDF5

    def output_name(name: str) -> str:  # datasets can be called anything
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        return "/".join(parts) + ".png"

    names, passed_over = list_images(source)
    printed = ((name, _printable(name)) for name in names)
    photos = [
        PhotoSource(text, source, output_name(text), name, max_megapixels) for name, text in printed
    ]
    return Found(photos, [(_printable(name), reason) for name, reason in passed_over])


def _walk(root: Path, found: Found) -> None:
    """Depth first; folders behind links last, so that a photo is named by its true place."""
    seen: set[tuple[int, int]] = set()
    folders, linked = [root], list[Path]()
    while folders or linked:
        folder = folders.pop() if folders else linked.pop(0)
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                found.skipped["link to a folder already searched"] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            found.photos.append(_source(root, folder))  # read_bytes says why it cannot be read
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in ("desktop.ini", "thumbs.db"):
                found.skipped["hidden"] += 1
            elif _is_folder(entry):
                (linked if entry.is_symlink() else folders).append(Path(entry.path))
            elif reason := _reason_to_pass_over(entry.name):
                found.passed_over.append((_source(root, Path(entry.path)).name, reason))
            elif not entry.name.lower().endswith(SUFFIXES):
                found.skipped["not named as a photo"] += 1
            elif _is_special(entry):
                found.skipped["not a regular file"] += 1
            else:
                found.photos.append(_source(root, Path(entry.path)))


def _reason_to_pass_over(name: str) -> str | None:
    suffix = PurePath(name).suffix.lower()
    if FORMAT_OF.get(suffix) == "heic" and not heic_is_installed():
        return HEIC_NEEDED
    return _REASONS.get(suffix)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether it exists and is a pipe, socket or device; broken links are for read_bytes."""
    try:
        return not stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return False


def _source(root: Path, path: Path) -> PhotoSource:
    relative = path.relative_to(root).as_posix()
    return PhotoSource(_printable(relative), path, relative)


def _printable(name: str) -> str:
    """Injective: a backslash of the name itself is doubled."""
    return without_controls(name.replace("\\", "\\\\"))


def without_controls(text: str) -> str:
    """On one line, and harmless to a terminal: what would move, colour or turn text, and bytes
    that are not UTF-8, as backslash escapes."""
    return _CONTROLS.sub(_escaped, text)


def _escaped(char: re.Match[str]) -> str:
    lone = "surrogateescape" if "\udc80" <= char[0] <= "\udcff" else "surrogatepass"
    return char[0].encode("utf-8", lone).decode("latin-1").encode("unicode_escape").decode("ascii")
