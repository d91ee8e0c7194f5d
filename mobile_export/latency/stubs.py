"""A stand-in for libraries that a program links to and never calls, as an ELF file for aarch64.

It defines what the other libraries ask for and nobody has: functions that return the address of 64 KiB
of zeros, such zeros for virtual tables, and named type descriptors. Structures are those of the ELF-64
specification, of the ELF supplement for AArch64, and of GNU's symbol versioning.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

_STRTAB, _SYMTAB, _STRSZ, _SYMENT, _HASH, _RELA, _RELASZ, _RELAENT = 5, 6, 10, 11, 4, 7, 8, 9
_VERSYM, _VERDEF, _VERDEFNUM = 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFD
_DYNSYM, _GNU_VERNEED, _GNU_VERSYM = 11, 0x6FFFFFFE, 0x6FFFFFFF
_R_AARCH64_RELATIVE = 1027
_WEAK, _OBJECT, _FUNC, _GLOBAL = 2, 1, 2, 1
_PAGE = 0x10000
_TYPE_BYTES = 32


def missing(libraries: Iterable[Path], others: Iterable[Path]) -> dict[bytes, bytes]:
    """Symbols that `libraries` must have and neither they nor `others` define, each with its version."""
    wanted: dict[bytes, bytes] = {}
    defined: set[bytes] = set()
    for path in libraries:
        asked, given = symbols(path.read_bytes())
        wanted |= asked
        defined |= given
    for path in others:
        defined |= symbols(path.read_bytes())[1]
    return {name: version for name, version in wanted.items() if name not in defined}


def symbols(data: bytes) -> tuple[dict[bytes, bytes], set[bytes]]:
    """A shared library's undefined dynamic symbols with versions, weak ones left out; the defined ones."""
    offset = struct.unpack_from("<Q", data, 0x28)[0]
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + size * index) for index in range(count)]
    kinds = {section[1]: section for section in sections}
    versions = {0: b"", 1: b""}
    if _GNU_VERNEED in kinds:
        versions |= _versions(data, kinds[_GNU_VERNEED][4], sections[kinds[_GNU_VERNEED][6]][4])
    table = kinds[_DYNSYM]
    strings = sections[table[6]][4]
    asked, given = {}, set()
    for index in range(1, table[5] // 24):
        name, info, _, section = struct.unpack_from("<IBBH", data, table[4] + 24 * index)
        text = _string(data, strings + name)
        if section:
            given.add(text)
        elif info >> 4 != _WEAK:
            at = kinds[_GNU_VERSYM][4] + 2 * index if _GNU_VERSYM in kinds else 0
            asked[text] = versions.get(struct.unpack_from("<H", data, at)[0], b"") if at else b""
    return asked, given


def library(wanted: dict[bytes, bytes]) -> bytes:
    """A shared library that defines those symbols, each with its version; empty: none."""
    names = sorted(wanted)
    types = [name for name in names if name.startswith(b"_ZTI")]
    versions = [b"stub", *sorted({version for version in wanted.values() if version})]
    strings, at = bytearray(b"\0"), {}
    for text in (*names, *versions):
        at[text] = len(strings)
        strings += text + b"\0"
    count = len(names) + 1
    sizes = {
        "head": 64 + 3 * 56,
        "symbols": 24 * count,
        "strings": len(strings),
        "hash": 4 * (3 + count),
        "relocations": 24 * len(types),
        "versions": 2 * count,
        "definitions": 28 * len(versions),
        "code": 8,
    }
    place, end = {}, 0
    for part, size in sizes.items():
        place[part] = end
        end += -(-size // 8) * 8
    base = -(-end // _PAGE) * _PAGE
    descriptors = {name: base + _PAGE + _TYPE_BYTES * index for index, name in enumerate(types)}
    dynamic = base + _PAGE + _TYPE_BYTES * len(types)

    def symbol(name: bytes) -> bytes:
        value, kind, size = place["code"], _FUNC, 8
        if name in descriptors:
            value, kind, size = descriptors[name], _OBJECT, _TYPE_BYTES
        elif name.startswith((b"_ZTV", b"_ZTS")):
            value, kind, size = base, _OBJECT, _PAGE
        return struct.pack("<IBBHQQ", at[name], _GLOBAL << 4 | kind, 0, 1, value, size)

    relocations = [(descriptors[name] + 8, place["strings"] + at[name] + len(b"_ZTI")) for name in types]
    entries = {
        _STRTAB: place["strings"],
        _SYMTAB: place["symbols"],
        _STRSZ: len(strings),
        _SYMENT: 24,
        _HASH: place["hash"],
        _RELA: place["relocations"],
        _RELASZ: sizes["relocations"],
        _RELAENT: 24,
        _VERSYM: place["versions"],
        _VERDEF: place["definitions"],
        _VERDEFNUM: len(versions),
        0: 0,
    }
    tail = b"".join(struct.pack("<QQ", *entry) for entry in entries.items())
    whole = dynamic - base + len(tail)
    parts = {
        0: _head(end, base, whole, dynamic, len(tail)),
        place["symbols"]: bytes(24) + b"".join(map(symbol, names)),
        place["strings"]: bytes(strings),
        place["hash"]: struct.pack(f"<{3 + count}I", 1, count, count - 1, 0, *range(count - 1)),
        place["relocations"]: b"".join(
            struct.pack("<QQq", where, _R_AARCH64_RELATIVE, value) for where, value in relocations
        ),
        place["versions"]: struct.pack(
            f"<{count}H", 0, *(versions.index(wanted[name] or b"stub") + 1 for name in names)
        ),
        place["definitions"]: b"".join(
            _definition(index, version, at[version], index == len(versions) - 1)
            for index, version in enumerate(versions)
        ),
        place["code"]: _return_address(base - place["code"]),
        dynamic: tail,
    }
    data = bytearray(base + whole)
    for where, content in parts.items():
        data[where : where + len(content)] = content
    return bytes(data)


def _head(end: int, base: int, whole: int, dynamic: int, tail: int) -> bytes:
    """The ELF header and three program headers: what is read, what is written, the dynamic section."""

    def segment(kind: int, flags: int, start: int, size: int, align: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, flags, start, start, start, size, size, align)

    shared, aarch64 = 3, 183
    header = struct.pack("<HHIQQQIHHHHHH", shared, aarch64, 1, 0, 64, 0, 0, 64, 56, 3, 64, 0, 0)
    return b"".join(
        [
            b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + header,
            segment(1, 5, 0, end, _PAGE),
            segment(1, 6, base, whole, _PAGE),
            segment(2, 6, dynamic, tail, 8),
        ]
    )


def _return_address(ahead: int) -> bytes:
    """`adr x0, #ahead; ret`."""
    return struct.pack("<II", 0x10000000 | (ahead & 3) << 29 | (ahead >> 2) << 5, 0xD65F03C0)


def _definition(index: int, version: bytes, name: int, last: bool) -> bytes:
    """A Verdef and its Verdaux; the first is the file's own."""
    code = 0
    for byte in version:
        code = (code << 4) + byte
        code = (code ^ (code >> 24 & 0xF0)) & 0x0FFFFFFF
    own = index == 0
    return struct.pack("<HHHHIII", 1, own, index + 1, 1, code, 20, 0 if last else 28) + struct.pack(
        "<II", name, 0
    )


def _versions(data: bytes, at: int, strings: int) -> dict[int, bytes]:
    """What the numbers in .gnu.version stand for in a library that needs them."""
    found = {}
    while True:
        _, count, _, ahead, following = struct.unpack_from("<HHIII", data, at)
        one = at + ahead
        for _ in range(count):
            _, _, number, name, step = struct.unpack_from("<IHHII", data, one)
            found[number] = _string(data, strings + name)
            one += step
        if not following:
            return found
        at += following


def _string(data: bytes, at: int) -> bytes:
    return data[at : data.index(b"\0", at)]
