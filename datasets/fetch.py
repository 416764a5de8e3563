"""Downloads of the public sea surface temperature analyses, into a cache, through pooch.

The files grow every month, so that no checksum can be written down here: the one found at the first download is kept
in a JSON file beside the data and verified whenever they are used. A broken transfer goes on where it stopped.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from annotated_types import Interval

from probmodels.datasets.checks import AnyPath
from probmodels.datasets.headers import check_netcdf
from probmodels.errors import DataError
from probmodels.options import NonNegative, checked, hint, refuse_unused

__all__ = ["SOURCES", "ResumingDownloader", "Source", "cache_folder", "cached_path", "fetch"]


_MOST_BYTES = 1 << 35  # of a download or what it unpacks to; the largest of these files have a few 2**30
_MOST_PACKED = 200  # times that gzip makes a field smaller; the fields here, less than 10


@dataclass(frozen=True)
class Source:
    """A public file: where it lies, what it is and on which terms it may be used."""

    name: str
    title: str
    url: str
    page: str
    terms: str
    citation: str


SOURCES = {
    source.name: source
    for source in (
        Source(
            "ersstv5",
            "NOAA Extended Reconstructed SST v5, monthly from 1854, 2 degrees",
            "https://downloads.psl.noaa.gov/Datasets/noaa.ersst.v5/sst.mnmean.nc",
            "https://psl.noaa.gov/data/gridded/data.noaa.ersst.v5.html",
            "no constraints on data access or use",
            "Huang et al. (2017), https://doi.org/10.1175/JCLI-D-16-0836.1",
        ),
        Source(
            "hadisst",
            "Met Office Hadley Centre HadISST1, monthly from 1870, 1 degree",
            "https://www.metoffice.gov.uk/hadobs/hadisst/data/HadISST_sst.nc.gz",
            "https://www.metoffice.gov.uk/hadobs/hadisst/",
            "Crown copyright, Non-Commercial Government Licence",
            "Rayner et al. (2003), https://doi.org/10.1029/2002JD002670",
        ),
        Source(
            "oisst",
            "NOAA OISST v2.1 high resolution, monthly from 1981, 0.25 degrees, above 2 GB",
            "https://downloads.psl.noaa.gov/Datasets/noaa.oisst.v2.highres/sst.mon.mean.nc",
            "https://psl.noaa.gov/data/gridded/data.noaa.oisst.v2.highres.html",
            "no constraints on data access or use",
            "Huang et al. (2021), https://doi.org/10.1175/JCLI-D-20-0166.1",
        ),
        Source(
            "cobe2",
            "JMA COBE-SST 2, monthly from 1850, 1 degree",
            "https://downloads.psl.noaa.gov/Datasets/COBE2/sst.mon.mean.nc",
            "https://psl.noaa.gov/data/gridded/data.cobe2.html",
            "see its page; cite the paper",
            "Hirahara et al. (2014), https://doi.org/10.1175/JCLI-D-12-00837.1",
        ),
    )
}


@checked(DataError)
def fetch(
    name: str,
    *,
    cache_dir: AnyPath | None = None,
    base_url: str | None = None,
    sha256: str | None = None,
    update: bool = False,
    offline: bool = False,
    progress: bool = True,
    retries: Annotated[int, Interval(ge=1, le=1000)] = 5,
    wait: NonNegative = 1.0,
    timeout: Annotated[float, Interval(gt=0, le=86_400)] = 30.0,
) -> Path:
    """Download a data set, or find it in the cache.

    Parameters
    ----------
    name
        One of `SOURCES`: "ersstv5", "hadisst", "oisst", "cobe2".
    cache_dir
        Folder of the cache, see `cache_folder`.
    base_url
        Mirror that serves the same paths in place of the source's host.
    sha256
        Checksum that the file as served (compressed where it is) must have.
    update
        Download again, as the files grow every month; the old file stays until the new one is complete.
    offline
        Use the cache only; it cannot be updated then, and options of transfers are not used.
    progress
        Whether to show a progress bar.
    retries, wait, timeout
        How often in a row to try without receiving anything, seconds before the next try (doubled every time), and
        seconds without an answer that count as a failure.

    Returns
    -------
    Path
        The NetCDF file, decompressed; `load_sst` reads it by this path or by its name.

    Raises
    ------
    DataError
        If the name is unknown, the file cannot be downloaded (the message says where to put it by hand), a checksum
        does not agree, or an option is out of range or not used.
    """
    source = _find(name)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise DataError(f"sha256={sha256!r}; give its 64 hexadecimal digits")
    if offline:
        refuse_unused(fetch, "offline=True", update=update, progress=progress, retries=retries)
        refuse_unused(fetch, "offline=True", wait=wait, timeout=timeout)
    folder = cache_folder(cache_dir)
    path = folder / f"{name}.nc"
    url = source.url if base_url is None else base_url.rstrip("/") + urlsplit(source.url).path
    if not update and (path.exists() or _unpack_by_hand(path, source)):
        record = _verify(path)
        if sha256 is not None and record["sha256"].lower() != sha256.lower():
            raise DataError(
                f"{path} has sha256 {record['sha256']}, not {sha256} as asked; download it anew with update=True"
            )
        return path
    by_hand = f"download it by hand from {url} and put it at {path}" + (".gz" if url.endswith(".gz") else "")
    if offline:
        raise DataError(f"'{name}' is not in the cache and offline=True forbids to download it; {by_hand}")
    _download(
        source,
        url,
        path,
        sha256,
        by_hand,
        ResumingDownloader(path.with_suffix(".part"), progress=progress, retries=retries, wait=wait, timeout=timeout),
    )
    return path


@checked(DataError)
def cache_folder(cache_dir: AnyPath | None = None) -> Path:
    """Folder of downloads: as given, else the environment's PROBMODELS_CACHE, else the system's place for caches."""
    import pooch

    folder = cache_dir or os.environ.get("PROBMODELS_CACHE") or pooch.os_cache("probmodels")
    return Path(os.path.expanduser(folder))


@checked(DataError)
def cached_path(name: str, *, cache_dir: AnyPath | None = None) -> Path:
    """The downloaded file of a data set, its checksum verified.

    Raises
    ------
    DataError
        If it is not in the cache, or not as it was when downloaded.
    """
    path = cache_folder(cache_dir) / f"{_find(name).name}.nc"
    if not path.exists():
        raise DataError(f"'{name}' is not downloaded yet; run 'probmodels sst fetch {name}' (it would lie at {path})")
    _verify(path)
    return path


def _find(name: str) -> Source:
    if name not in SOURCES:
        raise DataError(f"unknown data set {name!r}{hint(name.lower(), SOURCES)}")
    return SOURCES[name]


def _download(
    source: Source, url: str, path: Path, sha256: str | None, by_hand: str, downloader: ResumingDownloader
) -> None:
    """Fetch through pooch into a file of its own, check it, unpack it, and only then put it in place."""
    import pooch
    import requests

    fresh = path.with_suffix(".new")
    logger = pooch.get_logger()
    level = logger.level
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.unlink(missing_ok=True)
        logger.setLevel("WARNING")  # it would advise to write the checksum down, which is done here
        pooch.retrieve(
            url,
            known_hash=None if sha256 is None else f"sha256:{sha256}",
            fname=fresh.name,
            path=path.parent,
            downloader=downloader,
        )
        checksum = _sha256(fresh)
        _unpack(fresh, source)
        _refuse_other_formats(fresh, url)
        os.replace(fresh, path)
        _write_record(path, url=url, served_from=downloader.served_from, sha256=checksum, **downloader.validators)
    except requests.RequestException as error:
        raise DataError(
            f"'{source.name}' could not be downloaded ({error}); check the network, or {by_hand}"
        ) from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"'{source.name}' as served by {url} does not have the sha256 asked for ({error}); "
            "the file may have been updated: leave sha256 out to accept it"
        ) from error
    except _RefusedError as error:
        downloader.forget()
        raise DataError(f"'{source.name}': {error}; {by_hand}") from error
    except OSError as error:
        raise DataError(
            f"cannot write to the cache {path.parent} ({error}); choose another with cache_dir= or PROBMODELS_CACHE"
        ) from error
    finally:
        logger.setLevel(level)
        if fresh.exists():
            fresh.unlink()


def _unpack(path: Path, source: Source) -> None:
    """Decompress a gzip file in place."""
    with path.open("rb") as stream:
        if stream.read(2) != b"\x1f\x8b":
            return
    plain = path.with_suffix(".unpacked")
    try:
        most = min(_MOST_BYTES, _MOST_PACKED * path.stat().st_size)
        with gzip.open(path, "rb") as packed, plain.open("wb") as out:
            while chunk := packed.read(1 << 20):
                if out.tell() + len(chunk) > most:
                    raise DataError(
                        f"the compressed file of '{source.name}' unpacks to more than {most} bytes, which no field "
                        "does; download it again"
                    )
                out.write(chunk)
        os.replace(plain, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"the compressed file of '{source.name}' is damaged ({error}); download it again") from error
    finally:
        plain.unlink(missing_ok=True)


def _unpack_by_hand(path: Path, source: Source) -> bool:
    """Whether the user has put a compressed file into the cache, which then becomes the file itself."""
    packed = path.with_name(path.name + ".gz")
    if not packed.exists():
        return False
    fresh = path.with_suffix(".new")
    shutil.copyfile(packed, fresh)
    try:
        checksum = _sha256(fresh)
        _unpack(fresh, source)
        _refuse_other_formats(fresh, str(packed))
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    _write_record(path, url="put there by hand", sha256=checksum)
    return True


def _refuse_other_formats(path: Path, origin: str) -> None:
    try:
        check_netcdf(path)
    except DataError as error:
        raise DataError(f"{origin} gave no NetCDF file that is whole: {error}") from error


# ------------------------------------------------------------------------------------------------------ checksums


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_record(path: Path, **entries: str) -> dict[str, str]:
    record = {"file_sha256": _sha256(path), "recorded": datetime.now(UTC).isoformat(timespec="seconds"), **entries}
    _record_path(path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _verify(path: Path) -> dict[str, str]:
    """The record of a cached file, made now for one that was put there by hand."""
    if not _record_path(path).exists():
        _refuse_other_formats(path, str(path))
        return _write_record(path, url="put there by hand", sha256=_sha256(path))
    try:
        record = json.loads(_record_path(path).read_text(encoding="utf-8"))
        expected = record["file_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{_record_path(path)} cannot be read ({error}); delete it to accept the file beside it"
        ) from error
    found = _sha256(path)
    if found != expected:
        raise DataError(
            f"{path} has changed since it was downloaded (sha256 {found}, recorded {expected}); download it again with "
            f"update=True, or delete {_record_path(path).name} to accept the file as it is"
        )
    return record


# ------------------------------------------------------------------------------------------------------- transfer


class _RefusedError(Exception):
    """An answer that is not to be taken, however often one asks."""


class ResumingDownloader:
    """A downloader for pooch that goes on where a broken transfer stopped.

    The bytes received so far stay in ``partial``, with the identity of the served file (ETag, date, size) beside it,
    even when the process ends. The next try asks for the rest on condition that the file is still the same; a server
    that does not support ranges, or has another file by now, sends the whole file.

    Parameters
    ----------
    partial
        File that collects what has arrived.
    progress
        Whether to show a progress bar.
    retries
        Tries in a row that may bring nothing before giving up.
    wait
        Seconds before the second such try, doubled for every further one.
    timeout
        Seconds without an answer that count as a failure.

    Attributes
    ----------
    served_from
        Where the file came from after redirections, without their query.
    """

    def __init__(
        self, partial: Path, *, progress: bool = True, retries: int = 5, wait: float = 1.0, timeout: float = 30.0
    ) -> None:
        self.partial = partial
        self.progress = progress
        self.retries = retries
        self.wait = wait
        self.timeout = timeout
        self.validators: dict[str, str] = {}
        self.served_from = ""

    def forget(self) -> None:
        """Delete what has arrived."""
        self.partial.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def __call__(self, url: str, output_file: Any, pooch: Any = None, check_only: bool = False) -> None:
        """Download ``url`` to ``output_file``; the signature is pooch's.

        Raises
        ------
        requests.RequestException
            If the server refuses, or too many tries in a row brought nothing.
        """
        import requests
        from tqdm import tqdm

        fruitless = 0
        with tqdm(
            unit="B", unit_scale=True, unit_divisor=1024, disable=not self.progress, desc=self.partial.stem
        ) as bar:
            while True:
                before = self._arrived()
                try:
                    if self._transfer(url, bar):
                        break
                except requests.HTTPError as error:
                    status = 0 if error.response is None else error.response.status_code
                    if 400 <= status < 500 and status != 429:
                        raise
                    failure: requests.RequestException = error
                except requests.RequestException as error:
                    failure = error
                else:
                    failure = requests.ConnectionError(f"{url} ended after {self._arrived()} bytes")
                fruitless = 0 if self._arrived() > before else fruitless + 1
                if fruitless >= self.retries:
                    raise failure
                time.sleep(self.wait * 2 ** max(fruitless - 1, 0))
        os.replace(self.partial, output_file)
        self._note.unlink(missing_ok=True)

    @property
    def _note(self) -> Path:
        return self.partial.with_name(self.partial.name + ".json")

    def _arrived(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0

    def _noted(self, url: str) -> dict[str, str]:
        """What identifies the file of which a part has arrived; nothing where that is not known."""
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) and note.get("url") == url else {}

    def _transfer(self, url: str, bar: Any) -> bool:
        """One request, from where the last one stopped; True when the file is complete."""
        import requests

        note = self._noted(url)
        start = self._arrived() if note else 0
        with requests.get(url, headers=_headers(note, start), stream=True, timeout=self.timeout) as response:
            self.served_from = response.url.partition("?")[0]
            if urlsplit(url).scheme == "https" and any(
                urlsplit(answer.url).scheme != "https" for answer in (*response.history, response)
            ):
                raise _RefusedError(
                    f"{url} redirects to {self.served_from} without encryption, where anyone may change it"
                )
            size = note.get("size", "")
            if response.status_code == 416:  # nothing is left to send, or the file has become shorter
                if size and int(size) == start:
                    self.validators = _validators(note)
                    return True
                self.partial.unlink(missing_ok=True)
                return False
            response.raise_for_status()
            if response.status_code != 206:  # the file from its start
                start, note = 0, _note_of(url, response.headers)
                size = note["size"]
            elif not _continues(response.headers.get("Content-Range", ""), start, size):
                self.partial.unlink(missing_ok=True)
                return False
            self.validators = _validators(note)
            bar.total = int(size) if size else None
            bar.n = start
            bar.refresh()
            with self.partial.open("ab" if start else "wb") as out:
                self._note.write_text(json.dumps(note), encoding="utf-8")
                for chunk in response.iter_content(1 << 16):
                    if out.tell() + len(chunk) > _MOST_BYTES:
                        raise _RefusedError(f"{self.served_from} sends more than {_MOST_BYTES} bytes")
                    out.write(chunk)
                    bar.update(len(chunk))
        return not size or self._arrived() == int(size)


def _headers(note: Mapping[str, str], start: int) -> dict[str, str]:
    """Headers of a request for what is left of a file after ``start`` bytes, if it is still the same file."""
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator := note.get("etag") or note.get("last_modified"):
            headers["If-Range"] = validator
    return headers


def _continues(content_range: str, start: int, size: str) -> bool:
    """Whether an answer of part of a file goes on after ``start`` bytes, with the same size of the whole."""
    part = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range)
    return part is not None and int(part[1]) == start and (not size or part[2] in (size, "*"))


def _note_of(url: str, headers: Mapping[str, str]) -> dict[str, str]:
    """What identifies the file of an answer."""
    etag = headers.get("ETag", "")
    return {
        "url": url,
        "size": headers.get("Content-Length", ""),
        "etag": "" if etag.startswith("W/") else etag,  # a weak one does not vouch for bytes
        "last_modified": headers.get("Last-Modified", ""),
    }


def _validators(note: Mapping[str, str]) -> dict[str, str]:
    """What a server compares to tell whether a file has changed."""
    return {key: value for key, value in note.items() if key in ("etag", "last_modified")}
