"""Downloading image files from servers that stall, break off, answer with something else or ask for patience."""

import email.utils
import io
import random
import threading
import time

import httpx

from uplift_diffusers._version import __version__
from uplift_diffusers.images.files import open_image

MAX_BYTES = 100 * 2**20
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


class Gone(Exception):  # noqa: N818
    """The server's answer will stay the same."""


class Failed(Exception):  # noqa: N818
    """No attempt succeeded; a later one may."""


class Stopped(Exception):  # noqa: N818
    """`stop` was called."""


class ImageDownloader:
    """
    Downloads one image file after the other, from as many threads as like.

    Args:
        connections: at a time.
        attempts: for each file. Where a server asks for a pause (Retry-After), all threads make it.
        pause: seconds before the second attempt, at most; it doubles with each, up to a minute.
        seconds: in which something of an answer has to come.
        seconds_per_file: in which all of an answer has to come, for a server that drips.
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
        """Let every download under way end as `Stopped`."""
        self._stopped.set()

    def download(self, url: httpx.URL) -> bytes:
        """
        A file that decodes as an image.

        Raises:
            Gone, Failed, Stopped: with a sentence on why.
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
                raise Failed(f"The answer is no image ({kind}).")
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


def parse_retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks to wait, which has a number of them or a date; 0 if it says nothing."""
    if value is None:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
