"""The tag directories (IFDs) of a TIFF file or an EXIF block, read and patched in place.

TIFF 6.0 sections 2 and 8, BigTIFF (libtiff's design note), EXIF 2.32 section 4.6.2. Patching in
place keeps every other byte where it is: makers' notes hold offsets that rewriting would break.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from evenlight.cache.errors import PhotoError

SUB_IFDS = (330, 34665, 34853, 40965)  # SubIFDs, Exif, GPS, Interoperability
_MAX_IFDS = 1000  # pages and sub-directories; more is a loop or an attack
_MAX_ENTRIES = 1024  # of one directory; real ones have under 200
_MAX_CHANNELS = 16
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_SIZES |= {13: 4, 16: 8, 17: 8, 18: 8}
_CODES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}


@dataclass(frozen=True)
class Entry:
    kind: int  # TIFF field type
    count: int
    at: int  # offset of the first value, in bytes from the start of the block
    where: int  # offset of the entry itself


@dataclass(frozen=True)
class Ifd:
    """One directory, at an offset of data, the whole block. order is '<' or '>'."""

    data: bytes
    at: int
    order: Literal["<", ">"]
    entries: dict[int, Entry]
    next_at: int  # offset of the field that points to the next directory
    page: int  # 0 for the photo (and its sub-directories), 1 for the next page or thumbnail, ...

    def numbers(self, tag: int) -> tuple[int, ...]:
        """Values of an unsigned integer tag; empty when it is absent or of another type."""
        entry = self.entries.get(tag)
        if entry is None or entry.kind not in _CODES:
            return ()
        return struct.unpack_from(
            f"{self.order}{entry.count}{_CODES[entry.kind]}", self.data, entry.at
        )

    def number(self, tag: int) -> int:
        """First value of a tag that must be there."""
        values = self.numbers(tag)
        if not values:
            raise PhotoError(f"the TIFF lacks tag {tag}: it is damaged")
        return values[0]

    def raw(self, tag: int) -> bytes | None:
        """Bytes of a tag as stored, None when it is absent."""
        entry = self.entries.get(tag)
        if entry is None:
            return None
        return self.data[entry.at : entry.at + entry.count * _SIZES[entry.kind]]


def read_ifds(data: bytes) -> list[Ifd]:
    """Every directory reachable from the header, first the photo's own, then depth first.

    Raises PhotoError when a directory or the value of any tag lies past the end of the data.
    """
    order, big, first = _header(data)
    found: list[Ifd] = []
    seen: set[int] = set()
    waiting = [(first, 0, True)]
    while waiting:
        offset, page, chained = waiting.pop()
        if offset in seen or len(found) >= _MAX_IFDS:
            raise PhotoError("the tag directories form a loop: it is damaged")
        seen.add(offset)
        ifd = _read_ifd(data, order, big, offset, page)
        found.append(ifd)
        (following,) = struct.unpack_from(order + ("Q" if big else "I"), data, ifd.next_at)
        if chained and following:
            waiting.append((following, page + 1, True))
        waiting.extend((sub, page, False) for sub in _sub_offsets(ifd))
    return found


def first_ifd(data: bytes) -> Ifd:
    """The photo's own directory alone; what it points to need not be there."""
    order, big, first = _header(data)
    return _read_ifd(data, order, big, first, 0)


def relocated(block: bytes, base: int) -> bytes:
    """An EXIF block (classic TIFF) with every offset raised by base, to stand at byte base of a
    larger file of the same byte order."""
    moved = bytearray(block)
    for ifd in read_ifds(block):
        for tag, entry in ifd.entries.items():
            if entry.at != entry.where + 8:  # the value stands elsewhere
                struct.pack_into(ifd.order + "I", moved, entry.where + 8, entry.at + base)
            if tag in SUB_IFDS:
                offsets = [offset + base for offset in ifd.numbers(tag)]
                struct.pack_into(f"{ifd.order}{len(offsets)}I", moved, entry.at, *offsets)
    return bytes(moved)


def refuse_missing_strips(ifds: tuple[Ifd, ...]) -> None:
    """Raise PhotoError when image data of any directory of a TIFF lies past its end, or strips or
    tiles of the first are missing."""
    for ifd in ifds:
        for offsets_tag, counts_tag in ((273, 279), (324, 325)):
            offsets, counts = ifd.numbers(offsets_tag), ifd.numbers(counts_tag)
            for offset, count in zip(offsets, counts, strict=False):
                if offset + count > len(ifd.data):
                    raise PhotoError("image data lies past the end of the TIFF: it is truncated")
    _check_strips(ifds[0])


def _check_strips(ifd: Ifd) -> None:
    """Every strip or tile is there: decoders fill the gaps of missing ones with black."""
    width, height = ifd.number(256), ifd.number(257)
    channels = (ifd.numbers(277) or (1,))[0]
    if channels > _MAX_CHANNELS:
        raise PhotoError(f"a TIFF of {channels} channels; at most {_MAX_CHANNELS} are read")
    if ifd.numbers(324):
        tile_width, tile_height = max(ifd.number(322), 1), max(ifd.number(323), 1)
        expected = -(-width // tile_width) * -(-height // tile_height)
        counts = ifd.numbers(325)
    else:
        expected = -(-height // max((ifd.numbers(278) or (height,))[0], 1))
        counts = ifd.numbers(279)
    if (ifd.numbers(284) or (1,))[0] == 2:
        expected *= channels
    if len(counts) < expected or 0 in counts:
        raise PhotoError(f"{len(counts)} of {expected} strips or tiles are there: it is damaged")
    plain = (ifd.numbers(259) or (1,))[0] == 1
    stored = width * height * channels * (ifd.numbers(258) or (1,))[0] // 8
    if plain and sum(counts) < stored:
        raise PhotoError(f"{sum(counts)} bytes of image data, {stored} expected: it is truncated")


def _header(data: bytes) -> tuple[Literal["<", ">"], bool, int]:
    """Byte order, whether it is BigTIFF, offset of the first directory."""
    order: Literal["<", ">"] = "<" if data[:2] == b"II" else ">"
    (magic,) = struct.unpack_from(order + "H", data, 2)
    big = magic == 43
    (first,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    return order, big, first


def _sub_offsets(ifd: Ifd) -> Iterator[int]:
    for tag in SUB_IFDS:
        yield from ifd.numbers(tag)


def _read_ifd(data: bytes, order: Literal["<", ">"], big: bool, offset: int, page: int) -> Ifd:
    past_end = PhotoError("a tag directory lies past the end of the file: it is truncated")
    head, step, inline = ("Q", 20, 8) if big else ("H", 12, 4)
    if offset + struct.calcsize("=" + head) > len(data):
        raise past_end
    (count,) = struct.unpack_from(order + head, data, offset)
    at = offset + struct.calcsize("=" + head)
    end = at + count * step
    if count > _MAX_ENTRIES:
        raise PhotoError(f"a tag directory of {count} entries: it is damaged")
    if end + inline > len(data):
        raise past_end
    entries: dict[int, Entry] = {}
    for where in range(at, end, step):
        tag, kind, length = struct.unpack_from(order + ("HHQ" if big else "HHI"), data, where)
        value_at = where + step - inline
        size = length * _SIZES.get(kind, 1)
        if size > inline:
            (value_at,) = struct.unpack_from(order + ("Q" if big else "I"), data, value_at)
        if value_at + size > len(data):
            raise PhotoError(f"the value of tag {tag} lies past the end: it is truncated")
        if kind in _SIZES:  # readers skip fields of types they do not know (TIFF 6.0, section 2)
            entries.setdefault(tag, Entry(kind, length, value_at, where))
    return Ifd(data, offset, order, entries, end, page)
