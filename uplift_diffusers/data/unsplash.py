"""Download the photographs of an Unsplash dataset, which is published as a list of URLs."""

import csv
import email.utils
import hashlib
import io
import json
import math
import random
import re
import threading
import time
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import httpx
from tqdm.auto import tqdm

from uplift_diffusers._version import __version__
from uplift_diffusers.images.files import open_image
from uplift_diffusers.saving import make_writable_folder, replaced_when_whole

TERMS = (
    "Unsplash lets you use the photographs of its Lite dataset internally, to train machine-learning models. You must "
    "not publish them or pass them on, nor anything that contains them. By downloading them you accept its terms: "
    "https://unsplash.com/data-terms"
)
COLUMNS = ("photo_id", "photo_image_url", "photo_width", "photo_height")
JPEG_QUALITY = 95
FAILURES_IN_A_ROW = 25
"""Consecutive failures after which the connection counts as lost."""

MAX_BYTES = 100 * 2**20
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})

_TABLE = re.compile(r"photos\.[ct]sv\d*")  # 1.3.0 and 1.4.0 call it photos.csv000


@dataclass(frozen=True)
class Photo:
    """A line of the dataset's table; sizes in pixels."""

    photo_id: str
    url: str
    width: int
    height: int

    def resized_url(self, size: int) -> httpx.URL:
        """The URL of a JPEG with a short side of at most `size` pixels, never upsampled. Raises InvalidURL."""
        width = min(self.width, math.ceil(self.width * size / min(self.width, self.height)))
        return httpx.URL(self.url).copy_merge_params({"w": width, "fm": "jpg", "q": JPEG_QUALITY})


@dataclass(frozen=True)
class Outcome:
    """
    The result for one photograph.

    Args:
        photo: the photograph.
        status: `fetched`; `gone`, if another attempt is pointless; or `failed`, if it may succeed.
        reason: the reason for a failure, as a sentence.
    """

    photo: Photo
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Summary:
    """The numbers of photographs that were fetched, existed already, are gone, and failed."""

    fetched: int
    there: int
    gone: int
    failed: int


class Gone(Exception):  # noqa: N818
    """The server's answer is final."""


class Failed(Exception):  # noqa: N818
    """No attempt succeeded; a later one may."""


class Stopped(Exception):  # noqa: N818
    """`stop` was called."""


class ImageDownloader:
    """
    Downloads image files from servers that stall, break off, return something else or ask for a pause.

    It is safe to use from several threads.

    Args:
        connections: maximum number of connections.
        attempts: attempts per file. If a server asks for a pause (Retry-After), all threads wait.
        pause: longest wait before the second attempt, in seconds. It doubles with each attempt, up to a minute.
        seconds: longest wait for the next bytes of a response.
        seconds_per_file: time limit for a whole response, against servers that send very slowly.
    """

    def __init__(
        self,
        *,
        connections: int,
        attempts: int = 6,
        pause: float = 1,
        seconds: float = 30,
        seconds_per_file: float = 120,
    ):
        self.attempts, self.pause, self.seconds_per_file = attempts, pause, seconds_per_file
        self._client = httpx.Client(
            timeout=httpx.Timeout(seconds, pool=None),
            limits=httpx.Limits(max_connections=connections),
            headers={"User-Agent": f"uplift-diffusers/{__version__}"},
            follow_redirects=True,
        )
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._resume_at = 0.0  # by time.monotonic

    def __enter__(self) -> "ImageDownloader":
        return self

    def __exit__(self, *exception) -> None:
        self._client.close()

    def stop(self) -> None:
        """End all running downloads with `Stopped`."""
        self._stopped.set()

    def download(self, url: httpx.URL) -> bytes:
        """
        Download a file that decodes as an image.

        Raises:
            Gone, Failed, Stopped: with a message that says why.
        """
        reason = ""
        for attempt in range(self.attempts):
            if attempt > 0:
                self._sleep(min(60, self.pause * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))
            self._wait_for_turn()
            try:
                body = self._request(url)
                with self._lock:  # Python's filter of warnings, which is changed meanwhile, is one for all threads
                    open_image(io.BytesIO(body))
                return body
            except httpx.UnsupportedProtocol as error:
                raise Gone(str(error)) from error
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}."
            except ValueError as error:  # of open_image
                reason = f"The answer does not decode: {error}"
            except Failed as error:
                reason = str(error)
        raise Failed(reason)

    def _request(self, url: httpx.URL) -> bytes:
        deadline = time.monotonic() + self.seconds_per_file
        with self._client.stream("GET", url) as response:
            if response.status_code in _RETRIED:
                self._hold(parse_retry_after(response.headers.get("Retry-After")))
                raise Failed(f"HTTP {response.status_code}.")
            if response.status_code != 200:
                raise Gone(f"HTTP {response.status_code}.")
            kind = response.headers.get("Content-Type", "of no type")
            if not kind.startswith("image/"):
                raise Failed(f"The answer is not an image ({kind}).")
            body = bytearray()
            for chunk in response.iter_bytes():
                body += chunk
                if self._stopped.is_set():
                    raise Stopped
                if len(body) > MAX_BYTES:
                    raise Gone(f"The answer is larger than {MAX_BYTES / 2**20:.0f} MiB.")
                if time.monotonic() > deadline:
                    raise Failed(f"The answer took longer than {self.seconds_per_file:g} s.")
        return bytes(body)

    def _hold(self, seconds: float) -> None:
        with self._lock:
            self._resume_at = max(self._resume_at, time.monotonic() + seconds)

    def _wait_for_turn(self) -> None:
        while (seconds := self._resume_at - time.monotonic()) > 0:
            self._sleep(seconds)
        self._sleep(0)

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Stopped


def read_photos(dataset: str | Path, *, sha256: str | None = None) -> list[Photo]:
    """
    The photographs listed by a dataset.

    Args:
        dataset: the published archive (.zip), or the folder it was unpacked to.
        sha256: expected SHA-256 of the archive, or of the folder's table of photographs.
    Raises:
        FileNotFoundError: there is no archive, or no table of photographs in it.
        ValueError: the SHA-256 differs, or the table is not one of photographs.
    """
    dataset = Path(dataset)
    if dataset.is_dir():
        tables = sorted(path for path in dataset.iterdir() if _TABLE.fullmatch(path.name))
        if sha256 is not None and len(tables) == 1:
            _check_sha256(tables[0], sha256)
        elif sha256 is not None and tables:
            raise ValueError("`sha256` can be checked for an archive or a single table, got a folder of several.")
        photos = {photo.photo_id: photo for table in tables for photo in _read_table(table.open("rb"), table.name)}
    elif zipfile.is_zipfile(dataset):
        if sha256 is not None:
            _check_sha256(dataset, sha256)
        with zipfile.ZipFile(dataset) as archive:
            tables = sorted(name for name in archive.namelist() if _TABLE.fullmatch(PurePosixPath(name).name))
            photos = {photo.photo_id: photo for table in tables for photo in _read_table(archive.open(table), table)}
    else:
        raise FileNotFoundError(f"`{dataset}` is neither a folder nor a zip archive.")
    if not tables:
        raise FileNotFoundError(f"`{dataset}` holds no photos.tsv000, which lists the photographs.")
    return list(photos.values())


def fetch_photos(
    photos: Iterable[Photo],
    folder: str | Path,
    *,
    size: int,
    jobs: int = 8,
    downloader: ImageDownloader | None = None,
) -> Summary:
    """
    Download photographs to `folder/<photo_id>.jpg`, several at a time. Existing files are kept.

    Files are written atomically, after decoding the image. Photographs that could not be fetched are listed in
    `folder/unavailable.tsv`, which is rewritten each time. `folder/fetch.json` describes the folder. Only one fetch at
    a time may use a folder.

    Args:
        photos: from `read_photos`.
        folder: created if needed.
        size: pixels of the short side; smaller photographs keep their size.
        jobs: number of parallel downloads.
        downloader: closed at the end; by default one with default settings.
    Raises:
        ValueError: the folder holds photographs of another size.
        ConnectionError: `FAILURES_IN_A_ROW` photographs failed in a row.
        OSError: the folder cannot be written.
    """
    folder, photos = Path(folder), list(photos)
    check_folder(folder, size)
    for path in folder.glob(".uplift-*.partial"):  # of a fetch that was killed as it wrote
        path.unlink()
    there = {path.name for path in folder.iterdir()}
    waiting = [photo for photo in photos if _file_name(photo) not in there]
    missing: list[Outcome] = []
    in_a_row = 0
    with (
        downloader or ImageDownloader(connections=jobs) as downloader,
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(photos), initial=len(photos) - len(waiting), unit="photo", mininterval=5) as progress,
    ):
        futures = [pool.submit(_fetch, photo, folder, size, downloader) for photo in waiting]
        try:
            for future in as_completed(futures):
                outcome = future.result()
                progress.update()
                if outcome.status != "fetched":
                    missing.append(outcome)
                    progress.set_postfix(unavailable=len(missing), refresh=False)
                in_a_row = in_a_row + 1 if outcome.status == "failed" else 0
                if in_a_row == FAILURES_IN_A_ROW:
                    raise ConnectionError(
                        f"{in_a_row} photographs in a row could not be fetched, the last one because: "
                        f"{outcome.reason} Check the connection and run the same command again."
                    )
        finally:
            downloader.stop()
            pool.shutdown(cancel_futures=True)
            _write_report(folder / "unavailable.tsv", missing)
    gone = sum(outcome.status == "gone" for outcome in missing)
    return Summary(
        fetched=len(waiting) - len(missing),
        there=len(photos) - len(waiting),
        gone=gone,
        failed=len(missing) - gone,
    )


def check_folder(folder: Path, size: int) -> None:
    """
    Create `folder` if needed and record its size setting in it.

    Raises:
        ValueError: the folder holds photographs of another size.
        OSError: the folder cannot be written.
    """
    make_writable_folder(folder)
    note = folder / "fetch.json"
    if note.exists():
        before = json.loads(note.read_text())["size"]
        if before != size:
            raise ValueError(f"`size` must be {before}, as in the folder {folder}, got {size}. Name another folder.")
        return
    with replaced_when_whole(note) as file:
        file.write(json.dumps({"size": size, "jpeg_quality": JPEG_QUALITY, "terms": TERMS}, indent=2).encode())


def _fetch(photo: Photo, folder: Path, size: int, downloader: ImageDownloader) -> Outcome:
    try:
        body = downloader.download(photo.resized_url(size))
    except (Gone, httpx.InvalidURL) as error:
        return Outcome(photo, "gone", str(error))
    except Failed as error:
        return Outcome(photo, "failed", str(error))
    with replaced_when_whole(folder / _file_name(photo)) as file:
        file.write(body)
    return Outcome(photo, "fetched")


def _file_name(photo: Photo) -> str:
    return f"{photo.photo_id}.jpg"


def _read_table(file: IO[bytes], name: str) -> Iterable[Photo]:
    with io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        try:
            reader = csv.DictReader(text, delimiter="\t")
            if lacking := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
                raise ValueError(f"`{name}` lacks the columns {', '.join(lacking)}.")
            for row in reader:
                photo_id = row["photo_id"]
                if not re.fullmatch(r"[A-Za-z0-9_-]+", photo_id):
                    raise ValueError(f"`{name}`, line {reader.line_num}: {photo_id!r} is not a photo_id.")
                try:
                    width, height = int(row["photo_width"]), int(row["photo_height"])
                except (TypeError, ValueError):  # TypeError: None, of a line cut off
                    width = height = 0
                if min(width, height) < 1:
                    size = f"{row['photo_width']} x {row['photo_height']}"
                    raise ValueError(f"`{name}`, line {reader.line_num}: a size of {size} pixels.")
                yield Photo(photo_id, row["photo_image_url"], width, height)
        except (csv.Error, UnicodeDecodeError, zipfile.BadZipFile) as error:
            raise ValueError(f"`{name}` is damaged at line {reader.line_num}: {error}.") from error


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected.lower():
        raise ValueError(f"`{path}` must have the SHA-256 {expected.lower()}, got {actual}. Download it again.")


def _write_report(path: Path, missing: list[Outcome]) -> None:
    lines = ["photo_id\tstatus\treason\turl"]
    for outcome in sorted(missing, key=lambda outcome: outcome.photo.photo_id):
        reason = " ".join(outcome.reason.split())
        lines.append(f"{outcome.photo.photo_id}\t{outcome.status}\t{reason}\t{outcome.photo.url}")
    with replaced_when_whole(path) as file:
        file.write(("\n".join(lines) + "\n").encode())


def parse_retry_after(value: str | None) -> float:
    """The wait in seconds given by a Retry-After header, as a number or a date; 0 if there is none."""
    if value is None:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
