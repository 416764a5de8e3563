"""What a file is by its first bytes, and whether its header can be true of a file of its size.

The C library of NetCDF allocates what a header asks for, and reads what lies beyond the end of a file as zeros; a file
that is damaged or cut short is therefore found out here, before the library sees it.
"""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import NamedTuple, NoReturn

import xarray as xr

from probmodels.datasets.checks import existing_file
from probmodels.errors import DataError

__all__ = ["check_declared_sizes", "check_netcdf"]

_OTHERS = {
    b"\x1f\x8b": "is compressed; unpack it first with gunzip",
    b"PK\x03\x04": "is compressed; unpack it first with unzip",
    b"BZh": "is compressed; unpack it first with bunzip2",
    b"\xfd7zXZ": "is compressed; unpack it first with unxz",
    b"GRIB": "is a GRIB file; convert it with 'cdo -f nc copy IN OUT'",
    b"\x0e\x03\x13\x01": "is an HDF4 file; convert it with 'h4tonccf IN OUT'",
    b"<": "is a web page, perhaps about an error; download the file anew",
    b"version https://git-lfs": "is a pointer of Git LFS; fetch the file itself with 'git lfs pull'",
}
_TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 6: 8, 7: 1, 8: 2, 9: 4, 10: 8, 11: 8}  # bytes of a value
_DIMENSIONS, _VARIABLES, _ATTRIBUTES = 10, 11, 12
_MOST_PACKED = 2000  # times that compression makes values smaller; deflate stops at 1032
_NO_HARM = 1 << 26  # bytes
_SCANNED = 1 << 27  # bytes at the start of a file in which heaps are looked for; the library puts them there


def check_netcdf(path: str | os.PathLike[str]) -> Path:
    """Check that a file is NetCDF and long enough for what its header declares.

    Raises
    ------
    DataError
        If there is no such file, it is of another kind, or it is damaged or cut short.
    """
    path = existing_file(path)
    size = path.stat().st_size
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic = data[:32]
        for start, what in _OTHERS.items():
            if magic.lstrip().startswith(start):
                raise DataError(f"{path} {what}")
        try:
            if magic[:3] == b"CDF" and magic[3:4] in (b"\x01", b"\x02", b"\x05"):
                _Classic(data, size).check()
            elif magic[:8] == b"\x89HDF\r\n\x1a\n":
                _check_hdf5(data, size)
            else:
                raise DataError(
                    f"{path} is not a NetCDF file (it starts with {magic[:4]!r}); convert it to NetCDF first"
                )
        except _DamagedError as error:
            raise DataError(f"{path} cannot be read as NetCDF: {error}; is it complete? Copy it anew") from error
    return path


def check_declared_sizes(variables: xr.Dataset, path: Path) -> None:
    """Check that a file can hold what its variables declare, however well it is compressed.

    Raises
    ------
    DataError
        If it cannot.
    """
    most = max(_NO_HARM, _MOST_PACKED * path.stat().st_size)
    for name, variable in variables.variables.items():
        if variable.nbytes > most:
            raise DataError(
                f"{path}: '{name}' declares {variable.size} values, which a file of {path.stat().st_size} bytes cannot "
                "hold; is it complete? Copy it anew"
            )


class _DamagedError(Exception):
    """A header that cannot be true."""


def _damaged(why: str) -> NoReturn:
    raise _DamagedError(why)


def _check_hdf5(data: mmap.mmap, size: int) -> None:
    """Check the version of an HDF5 file, that it ends where it says, and its heaps of texts."""
    version = data[8] if size > 48 else _damaged(f"it has only {size} bytes")
    if version > 3:
        _damaged(f"there is no HDF5 of version {version}")
    address, length = (data[9], data[10]) if version >= 2 else (data[13], data[14])
    if not {address, length} <= {2, 4, 8}:
        _damaged(f"it has addresses of {address} and lengths of {length} bytes")
    start = 12 if version >= 2 else 24 + 4 * version
    end = int.from_bytes(data[start + 2 * address : start + 3 * address], "little")
    if end > size:
        _damaged(f"it is cut short, {size} of {end} bytes")
    at = data.find(b"GCOL\x01\0\0\0", 0, _SCANNED)
    while at >= 0:
        _check_heap(data, at, length, size)
        at = data.find(b"GCOL\x01\0\0\0", at + 8, _SCANNED)


def _check_heap(data: mmap.mmap, at: int, length: int, size: int) -> None:
    """Check the objects of a heap, which have no checksum, and whose lengths the library follows without end."""
    end = at + int.from_bytes(data[at + 8 : at + 8 + length], "little")
    if not at + 4096 <= end <= size:  # bytes that happen to look like one
        return
    header = -(-(8 + length) // 8) * 8
    at += header
    while at + header <= end:
        index = int.from_bytes(data[at : at + 2], "little")
        count = int.from_bytes(data[at + 8 : at + 8 + length], "little")
        step = header + -(-count // 8) * 8 if index else count
        if not header <= step <= end - at:
            _damaged("its heap of texts is damaged")
        at += step


class _Variable(NamedTuple):
    name: str
    record: bool
    length: int  # bytes, of one record where there are records
    padded: int
    begin: int


class _Classic:
    """Reader of the header of the classic formats: 1 (32 bit), 2 (64-bit offsets) and 5 (64-bit data)."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.at = data, size, 4
        self.wide = 8 if data[3] == 5 else 4
        self.offset = 4 if data[3] == 1 else 8

    def check(self) -> None:
        """Raise where the header or the length of the file is wrong."""
        records = self.number(self.wide)
        if records == 256**self.wide - 1:
            _damaged("it does not say how many records it has, as while it is written")
        dims = [self.dimension() for _ in range(self.count(_DIMENSIONS))]
        self.attributes()
        variables = [self.variable(dims) for _ in range(self.count(_VARIABLES))]
        of_records = [v for v in variables if v.record]
        step = of_records[0].length if len(of_records) == 1 else sum(v.padded for v in of_records)
        for v in variables:
            end = v.begin + v.length + (max(records - 1, 0) * step if v.record else 0)
            if v.length and end > self.size and (records or not v.record):
                _damaged(f"it is cut short: '{v.name}' ends at byte {end} of {self.size}")
            if v.begin < self.at and v.length and (records or not v.record):
                _damaged(f"'{v.name}' begins within the header")

    def dimension(self) -> int:
        self.name()
        return self.number(self.wide)

    def attributes(self) -> None:
        for _ in range(self.count(_ATTRIBUTES)):
            self.name()
            self.skip(self.type() * self.number(self.wide))

    def variable(self, dims: list[int]) -> _Variable:
        name = self.name()
        order = [self.number(self.wide) for _ in range(self.at_most(self.number(self.wide), self.wide))]
        if any(i >= len(dims) for i in order):
            _damaged(f"'{name}' has a dimension that the file lacks")
        self.attributes()
        width = self.type()
        self.number(self.wide)  # the length, which is left to the dimensions
        sizes = [dims[i] for i in order]
        record = bool(sizes) and sizes[0] == 0
        length = width * math.prod(sizes[1:] if record else sizes)
        return _Variable(name, record, length, -(-length // 4) * 4, self.number(self.offset))

    def count(self, tag: int) -> int:
        found, count = self.number(4), self.number(self.wide)
        if found not in (0, tag) or (found == 0 and count):
            _damaged("its header is damaged")
        return self.at_most(count, 8)

    def at_most(self, count: int, each: int) -> int:
        if count * each > self.size - self.at:
            _damaged(f"its header lists {count} entries, which a file of {self.size} bytes cannot hold")
        return count

    def type(self) -> int:
        found = self.number(4)
        return _TYPES[found] if found in _TYPES else _damaged(f"its header names a type {found}")

    def name(self) -> str:
        length = self.number(self.wide)
        start = self.at
        self.skip(length)
        if not length:
            _damaged("its header is damaged")
        return self.data[start : start + length].decode("utf-8", "replace")

    def skip(self, count: int) -> None:
        self.at += -(-self.at_most(count, 1) // 4) * 4

    def number(self, width: int) -> int:
        self.at_most(1, width)
        self.at += width
        return int.from_bytes(self.data[self.at - width : self.at], "big")
