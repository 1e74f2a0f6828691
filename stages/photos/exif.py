"""The tag directories (IFDs) of a TIFF file or an EXIF block, read and patched in place.

TIFF 6.0 sections 2 and 8, BigTIFF (libtiff's design note), EXIF 2.32 section 4.6.2. Patching in
place keeps every other byte where it is: makers' notes hold offsets that rewriting would break.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from evenlight.cache.errors import PhotoError

ORIENTATION = 274
SUB_IFDS = (330, 34665, 34853, 40965)  # SubIFDs, Exif, GPS, Interoperability
_PAIRS = ((256, 257), (40962, 40963))  # width and height, in IFD0 and in the Exif IFD
_MAX_IFDS = 1000  # pages and sub-directories; more is a loop or an attack
_MAX_ENTRIES = 1024  # of one directory; real ones have under 200
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


def upright_exif(exif: bytes) -> tuple[int, bytes]:
    """(orientation as it was, the block for upright pixels): Orientation 1, no thumbnail, and
    width and height exchanged where turning exchanges them.

    exif: a TIFF block.  Raises PhotoError or struct.error when it is damaged.
    """
    if exif[:4] not in (b"II*\0", b"MM\0*"):
        raise PhotoError("no TIFF header")
    block = bytearray(exif)
    ifds = read_ifds(exif)
    stored = ifds[0].numbers(ORIENTATION)
    orientation = stored[0] if stored and 1 <= stored[0] <= 8 else 1
    if stored:
        entry = ifds[0].entries[ORIENTATION]
        struct.pack_into(ifds[0].order + _CODES[entry.kind], block, entry.at, 1)
    for ifd in ifds:
        for wide, high in _PAIRS:
            if orientation >= 5 and ifd.page == 0 and wide in ifd.entries and high in ifd.entries:
                _exchange(block, ifd.entries[wide].where, ifd.entries[high].where)
    thumbnails = [ifd for ifd in ifds if ifd.page == 1]
    struct.pack_into(ifds[0].order + "I", block, ifds[0].next_at, 0)
    return orientation, _without_thumbnail(block, thumbnails)


def lenient_orientation(exif: bytes) -> int:
    """The orientation of a block that is damaged elsewhere, 1 where it cannot be found."""
    if exif[:4] not in (b"II*\0", b"MM\0*") or len(exif) < 10:
        return 1
    order, _, first = _header(exif)
    if first + 2 > len(exif):
        return 1
    (count,) = struct.unpack_from(order + "H", exif, first)
    end = min(first + 2 + 12 * count, len(exif) - 11)
    for where in range(first + 2, end, 12):
        tag, kind, length = struct.unpack_from(order + "HHI", exif, where)
        if tag == ORIENTATION and kind in (1, 3, 4) and length == 1:
            (value,) = struct.unpack_from(order + _CODES[kind], exif, where + 8)
            return value if 1 <= value <= 8 else 1
    return 1


def without_orientation(exif: bytes) -> bytes:
    """The block without its Orientation entry; every other byte that is pointed to stays."""
    ifd = first_ifd(exif)
    if ORIENTATION not in ifd.entries:
        return exif
    block, where = bytearray(exif), ifd.entries[ORIENTATION].where
    (count,) = struct.unpack_from(ifd.order + "H", block, ifd.at)
    struct.pack_into(ifd.order + "H", block, ifd.at, count - 1)
    block[where : ifd.next_at + 4] = block[where + 12 : ifd.next_at + 4] + bytes(12)
    return bytes(block)


def _exchange(block: bytearray, first: int, second: int) -> None:
    """Swap type, count and value of two entries and leave their tags where they are."""
    a, b = slice(first + 2, first + 12), slice(second + 2, second + 12)
    block[a], block[b] = block[b], block[a]


def _without_thumbnail(block: bytearray, thumbnails: list[Ifd]) -> bytes:
    for ifd in thumbnails:
        start, length = ifd.numbers(513), ifd.numbers(514)
        if start and length and start[0] + length[0] <= len(block):
            block[start[0] : start[0] + length[0]] = bytes(length[0])
            if start[0] + length[0] == len(block):
                del block[start[0] :]
    return bytes(block)


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
