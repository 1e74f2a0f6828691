"""The parts that JPEG, PNG and WebP files are made of, for what stands beside the pixels.

JPEG: ITU T.81, annex B.  PNG: W3C, third edition.  WebP: RFC 9649.
"""

import struct
import zlib
from collections.abc import Iterator

from evenlight.cache.errors import PhotoError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, content) of each segment before the first scan, then (SOS, all from that scan on);
    the decoder judges damage, so this ends quietly where no marker stands."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # no length field
            at += 2
        elif marker in (0xD9, 0xDA):
            if marker == 0xDA:
                yield marker, data[at + 2 :]
            return
        else:
            (length,) = struct.unpack_from(">H", data, at + 2)
            yield marker, data[at + 4 : at + 2 + length]
            at += 2 + length


def jpeg_segment(marker: int, content: bytes) -> bytes:
    """One segment with its length.  content: at most 65533 bytes."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def image_resources(blocks: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(number, whole block, content) of each of Photoshop's image resources; ends quietly where
    they are damaged.  Adobe Photoshop File Formats Specification, Image Resources Section."""
    at = 0
    while blocks[at : at + 4] == b"8BIM" and at + 12 <= len(blocks):
        start = at + 6 + (blocks[at + 6] // 2 + 1) * 2  # past the name, of even length
        size = int.from_bytes(blocks[start : start + 4], "big")
        start += 4
        if start + size > len(blocks):
            return
        end = start + size + size % 2
        number = int.from_bytes(blocks[at + 4 : at + 6], "big")
        yield number, blocks[at:end].ljust(end - at, b"\0"), blocks[start : start + size]
        at = end


def image_resource(number: int, content: bytes) -> bytes:
    """One block, without a name."""
    head = b"8BIM" + struct.pack(">HHI", number, 0, len(content))
    return head + content + bytes(len(content) % 2)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, content) of each chunk up to IEND, CRC checked; raises PhotoError on damage."""
    at = len(PNG_SIGNATURE)
    while True:
        if at + 12 > len(data):
            raise PhotoError("the file ends before its IEND chunk: it is truncated")
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 8 + length
        if end + 4 > len(data):
            raise PhotoError(f"the file ends inside a {printable(kind)} chunk: it is truncated")
        (crc,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(memoryview(data)[at + 4 : end]) != crc:
            raise PhotoError(f"the checksum of a {printable(kind)} chunk is wrong: it is damaged")
        yield kind, data[at + 8 : end]
        if kind == b"IEND":
            return
        at = end + 4


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk with its length and checksum."""
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(content)), kind, content, struct.pack(">I", checksum)))


def webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, length) of each chunk inside the RIFF length."""
    (riff,) = struct.unpack_from("<I", data, 4)
    if riff + 8 > len(data):
        raise PhotoError(
            f"the file has {len(data)} bytes but its header promises {riff + 8}: it is truncated"
        )
    at = 12
    while at + 8 <= riff + 8:
        (length,) = struct.unpack_from("<I", data, at + 4)
        if at + 8 + length > riff + 8:
            raise PhotoError(f"a {printable(data[at : at + 4])} chunk ends past the file")
        yield data[at : at + 4], at + 8, length
        at += 8 + length + length % 2


def printable(raw: bytes) -> str:
    """Bytes of a file as ASCII, for a sentence about them."""
    return raw.decode("latin-1").encode("unicode_escape").decode("ascii")
