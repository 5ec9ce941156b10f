"""Fetching photographs from a server on this machine that misbehaves."""

import hashlib
import io
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from uplift_diffusers.cli.main import main
from uplift_diffusers.data import unsplash
from uplift_diffusers.data.unsplash import Failed, ImageDownloader, Photo, fetch_photos, parse_retry_after, read_photos

SIZE = (96, 64)


def jpeg(width=SIZE[0], height=SIZE[1]):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=50)
    return buffer.getvalue()


class ImageServer:
    """
    Answers with a JPEG of the width that is asked for, but for paths with troubles, each of which is used up once.

    Attributes:
        troubles: by path, what goes wrong: an HTTP status, (status, headers), or one of `stall`, `cut`, `html`,
            `html with a type`, `reset`, `garbage`.
        requests: (path, query, time) of every request.
    """

    def __init__(self):
        self.troubles: dict[str, list] = {}
        self.requests = []
        self.delay = 0.0
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *request: None  # where a client is killed
        self._http.images = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._http.shutdown()
        self._http.server_close()

    def asked(self, path):
        return [request for request in self.requests if request[0] == path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, parts = self.server.images, urlsplit(self.path)
        server.requests.append((parts.path, parse_qs(parts.query), time.monotonic()))
        time.sleep(server.delay)
        troubles = server.troubles.get(parts.path, [])
        trouble = troubles.pop(0) if troubles else None
        width = int(parse_qs(parts.query)["w"][0])
        body = jpeg(width, round(width * SIZE[1] / SIZE[0]))
        if isinstance(trouble, int | tuple):
            status, headers = trouble if isinstance(trouble, tuple) else (trouble, {})
            return self._send(status, b"", "text/plain", headers)
        if trouble == "html":
            return self._send(200, b"<html>log in</html>", "text/html")
        if trouble == "html with a type":
            return self._send(200, b"<html>log in</html>", "image/jpeg")
        if trouble == "garbage":
            return self._send(200, body[: len(body) // 2], "image/jpeg")
        if trouble == "reset":
            self.close_connection = True
            return self.connection.close()
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if trouble in ("cut", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if trouble == "stall":
                time.sleep(2)
            self.close_connection = True
            return None
        return self.wfile.write(body)

    def _send(self, status, body, kind, headers=None):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    with ImageServer() as images:
        yield images


def photos_of(server, *names, size=SIZE):
    return [Photo(name, f"{server.url}/{name}", *size) for name in names]


def fetch(server, folder, *names, attempts=3, seconds=0.4, size=32, **settings):
    downloader = ImageDownloader(connections=4, attempts=attempts, seconds=seconds, pause=0.05, **settings)
    return fetch_photos(photos_of(server, *names), folder, size=size, jobs=4, downloader=downloader)


def write_table(path, server, names):
    lines = ["photo_id\tphoto_url\tphoto_image_url\tphoto_width\tphoto_height\tphoto_description"]
    lines += [f'{name}\tx\t{server.url}/{name}\t{SIZE[0]}\t{SIZE[1]}\t"a ""quoted""\nline"' for name in names]
    path.write_text("\n".join(lines) + "\n")


def report(folder):
    lines = (folder / "unavailable.tsv").read_text().splitlines()
    return {line.split("\t")[0]: line.split("\t")[1:3] for line in lines[1:]}


def whole_images(folder):
    for path in folder.glob("*.jpg"):
        Image.open(path).load()
    return {path.stem for path in folder.glob("*.jpg")}


@pytest.mark.parametrize("trouble", ["stall", "cut", "html", "html with a type", "reset", "garbage", 500, 429])
def test_a_photograph_is_fetched_in_spite_of(server, tmp_path, trouble):
    server.troubles["/a"] = [trouble]
    summary = fetch(server, tmp_path, "a", "b")
    assert (summary.fetched, summary.gone, summary.failed) == (2, 0, 0)
    assert whole_images(tmp_path) == {"a", "b"}
    assert len(server.asked("/a")) == 2
    assert len(server.asked("/b")) == 1


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("stall", "ReadTimeout"),
        ("cut", "RemoteProtocolError"),
        ("html", "The answer is not an image (text/html)."),
        ("html with a type", "does not decode: not an image"),
        ("garbage", "does not decode: the image is damaged or cut off"),
        (503, "HTTP 503."),
    ],
)
def test_what_keeps_failing_is_given_up_and_reported(server, tmp_path, trouble, reason):
    server.troubles["/a"] = [trouble] * 9
    summary = fetch(server, tmp_path, "a", "b")
    assert (summary.fetched, summary.gone, summary.failed) == (1, 0, 1)
    assert whole_images(tmp_path) == {"b"}
    assert report(tmp_path)["a"][0] == "failed"
    assert reason in report(tmp_path)["a"][1]
    assert len(server.asked("/a")) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.jpg", "fetch.json", "unavailable.tsv"]


def test_dead_addresses_are_asked_for_once_and_reported(server, tmp_path):
    server.troubles |= {"/a": [404], "/b": [410], "/c": [403]}
    photos = [*photos_of(server, "a", "b", "c", "d"), Photo("e", "nowhere", 10, 10)]
    summary = fetch_photos(photos, tmp_path, size=32, jobs=2)
    assert (summary.fetched, summary.gone, summary.failed) == (1, 4, 0)
    assert {name: outcome[0] for name, outcome in report(tmp_path).items()} == dict.fromkeys("abce", "gone")
    assert report(tmp_path)["a"][1] == "HTTP 404."
    assert Counter(path for path, _, _ in server.requests) == dict.fromkeys(["/a", "/b", "/c", "/d"], 1)


def test_every_download_waits_as_long_as_the_server_asks(server, tmp_path):
    server.troubles["/a"] = [(429, {"Retry-After": "1"})]
    server.delay = 0.05
    names = ["a", *(f"p{number}" for number in range(20))]
    assert fetch(server, tmp_path, *names).fetched == 21
    refused = server.asked("/a")[0][2]
    # Those that were under way with it are answered; nothing new is asked for within the second.
    assert [moment for _, _, moment in server.requests if refused + 0.2 < moment < refused + 0.95] == []
    assert max(moment for _, _, moment in server.requests) > refused + 0.95


def test_an_answer_that_drips_is_given_up(server):
    class Drip(httpx.SyncByteStream):
        def __iter__(self):
            while True:
                time.sleep(0.02)
                yield b"x"

    def answer(request):
        return httpx.Response(200, headers={"Content-Type": "image/jpeg"}, stream=Drip())

    with ImageDownloader(connections=1, attempts=1, seconds_per_file=0.2) as downloader:
        downloader._client = httpx.Client(transport=httpx.MockTransport(answer))
        with pytest.raises(Failed, match=r"took longer than 0\.2 s"):
            downloader.download(httpx.URL("http://example.org"))


def test_retry_after_is_a_number_or_a_date():
    assert parse_retry_after("7") == 7
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 28 < parse_retry_after(date) <= 30
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert parse_retry_after("soon") == 0
    assert parse_retry_after(None) == 0


def test_the_short_side_is_as_asked_and_never_enlarged(server, tmp_path):
    fetch(server, tmp_path / "small", "a", size=32)
    assert Image.open(tmp_path / "small" / "a.jpg").size == (48, 32)
    fetch(server, tmp_path / "large", "a", size=1024)
    assert Image.open(tmp_path / "large" / "a.jpg").size == SIZE
    assert Photo("a", "http://x/a?ixid=1", 4000, 3000).resized_url(1024) == "http://x/a?ixid=1&w=1366&fm=jpg&q=95"
    assert "w=1024" in str(Photo("a", "http://x/a", 3000, 4000).resized_url(1024))


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    fetch(server, tmp_path, "a", "b")
    server.requests.clear()
    summary = fetch(server, tmp_path, "a", "b", "c")
    assert (summary.fetched, summary.there) == (1, 2)
    assert [path for path, _, _ in server.requests] == ["/c"]


def test_a_folder_of_another_size_is_refused(server, tmp_path):
    fetch(server, tmp_path, "a", size=32)
    with pytest.raises(ValueError, match="`size` must be 32, as in the folder"):
        fetch(server, tmp_path, "b", size=64)


def test_a_connection_that_fails_ends_the_fetch(server, tmp_path, monkeypatch):
    monkeypatch.setattr(unsplash, "FAILURES_IN_A_ROW", 5)
    names = [f"p{number}" for number in range(100)]
    server.troubles = {f"/{name}": ["reset"] * 9 for name in names}
    with pytest.raises(ConnectionError, match="5 photographs in a row could not be fetched"):
        fetch(server, tmp_path, *names)
    assert len(server.requests) < 60
    assert len(report(tmp_path)) >= 5


def test_a_killed_fetch_is_taken_up_again(server, tmp_path):
    names = [f"p{number}" for number in range(40)]
    write_table(tmp_path / "photos.tsv000", server, names)
    server.delay = 0.05
    command = [sys.executable, "-m", "uplift_diffusers", "fetch", "unsplash-lite", "--dataset", str(tmp_path)]
    command += ["--output", str(tmp_path / "photos"), "--size", "32", "--jobs", "4"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "photos").glob("*.jpg"))) < 10:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = whole_images(tmp_path / "photos")
    assert 10 <= len(there) < 40
    server.requests.clear()
    assert subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    assert whole_images(tmp_path / "photos") == set(names)
    assert not list((tmp_path / "photos").glob(".*"))
    assert {path.removeprefix("/") for path, _, _ in server.requests} == set(names) - there


def test_the_command_says_the_terms_and_what_it_did(server, tmp_path, capsys):
    write_table(tmp_path / "photos.tsv000", server, ["a", "b", "c"])
    server.troubles = {"/b": [404]}
    command = ["fetch", "unsplash-lite", "--dataset", str(tmp_path), "--output", str(tmp_path / "photos")]
    assert main([*command, "--size", "32"]) == 0
    printed = capsys.readouterr().out
    assert "You must not publish them or pass them on" in printed
    assert "2 fetched, 0 there, 1 gone, 0 failed" in printed


@pytest.mark.parametrize("name", ["photos.tsv000", "photos.csv000"])
def test_the_table_is_read_from_a_folder_or_the_archive(server, tmp_path, name):
    (tmp_path / "folder").mkdir()
    write_table(tmp_path / "folder" / name, server, ["a", "b-_9", "a"])
    with zipfile.ZipFile(tmp_path / "lite.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "folder" / name, f"unsplash-lite/{name}")
    expected = photos_of(server, "a", "b-_9")
    for dataset in (tmp_path / "folder", tmp_path / "folder" / name, tmp_path / "lite.zip"):
        if dataset.suffix != f".{name.partition('.')[2]}":
            assert read_photos(dataset) == expected


def test_the_published_sha256_is_checked(server, tmp_path):
    (tmp_path / "folder").mkdir()
    table = tmp_path / "folder" / "photos.tsv000"
    write_table(table, server, ["a"])
    with zipfile.ZipFile(tmp_path / "lite.zip", "w") as archive:
        archive.write(table, table.name)
    for dataset, hashed in ((tmp_path / "folder", table), (tmp_path / "lite.zip", tmp_path / "lite.zip")):
        sha256 = hashlib.sha256(hashed.read_bytes()).hexdigest()
        assert len(read_photos(dataset, sha256=sha256.upper())) == 1
        with pytest.raises(ValueError, match=f"must have the SHA-256 {'0' * 64}, got {sha256}"):
            read_photos(dataset, sha256="0" * 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("photo_id\tphoto_url\na\tb\n", "lacks the columns photo_image_url, photo_width, photo_height"),
        ("photo_id\tphoto_image_url\tphoto_width\tphoto_height\n../a\tu\t1\t1\n", "line 2: '../a' is not a photo_id"),
        ("photo_id\tphoto_image_url\tphoto_width\tphoto_height\na\tu\t0\t1\n", "line 2: a size of 0 x 1 pixels"),
        ("photo_id\tphoto_image_url\tphoto_width\tphoto_height\na\tu\n", "line 2: a size of None x None"),
        ("photo_id\tphoto_image_url\tphoto_width\tphoto_height\na\tu\tx\t1\n", "line 2: a size of x x 1"),
        ("photo_id\tphoto_image_url\tphoto_width\tphoto_height\na\t\xff\t1\t1\n", "is damaged at line"),
    ],
)
def test_a_damaged_table_is_an_error_before_anything_is_fetched(tmp_path, capsys, content, message):
    (tmp_path / "photos.tsv000").write_text(content, encoding="latin-1")
    output = tmp_path / "photos"
    assert main(["fetch", "unsplash-lite", "--dataset", str(tmp_path), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path(output).exists()


def test_a_dataset_that_is_none_is_an_error(tmp_path, capsys):
    for dataset, message in ((tmp_path, "holds no photos.tsv000"), (tmp_path / "no", "neither a folder nor a zip")):
        assert main(["fetch", "unsplash-lite", "--dataset", str(dataset), "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
