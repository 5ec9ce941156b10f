"""
The demo with many visitors, and with a hostile one: python -m benchmarks.visitors --visitors 20 --seed 0

1. `app.py` is started with the embedded model. All visitors upload different images at once; each has to get exactly
   the pipeline's result for it.
2. One address floods the demo: more jobs than may wait, under many names, large images, files that are not images, and
   bad values. Meanwhile, a visitor at another address requests small images. Measured: how much longer each takes than
   the longest hostile job (they run one after another, and the flood slows them down on the same processor) plus its
   own job on an idle demo.
3. In this process, a large image is cancelled at moments spread over its whole duration. Measured: the time until the
   next job starts, and until all work on the cancelled one has ended.
"""

import argparse
import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image

from uplift_diffusers import embedded_bundle
from uplift_diffusers.demo import jobs as demo_jobs
from uplift_diffusers.demo.jobs import JobQueue
from uplift_diffusers.demo.work import SEED, Enlargement, enlarge_files
from uplift_diffusers.loading import load_pipeline

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (True, 0, 1)
"""Of `/enlarge`: automatic denoising, its strength otherwise, consistency."""

SMALL, HOSTILE, LARGE = (48, 32), (640, 480), (2400, 1600)
"""Sizes of pictures in pixels: of visitors, of the hostile one, and of the one that is cancelled."""

MODEL = "Embedded"
HOSTILE_ADDRESS, ADDRESS = "127.0.0.2", "127.0.0.3"
MAX_DELAY_S = 2.0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 1 if a picture is wrong or something takes too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=20, help="at once; 0: none (default: 20)")
    parser.add_argument("--hostile_seconds", type=float, default=60, help="of flooding; 0: none (default: 60)")
    parser.add_argument("--cancels", type=int, default=12, help="of the large picture; 0: none (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures (default: 0)")
    options = parser.parse_args(arguments)
    is_fine = True
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if options.visitors or options.hostile_seconds:
            with running_demo(place) as url:
                if options.visitors:
                    is_fine &= all_at_once(url, options.visitors, options.seed)
                if options.hostile_seconds:
                    is_fine &= beside_a_hostile_one(url, options.hostile_seconds, options.seed)
        if options.cancels:
            is_fine &= cancel_everywhere(place, options.cancels, options.seed)
    return 0 if is_fine else 1


def all_at_once(url: str, count: int, seed: int) -> bool:
    """Whether every one of `count` visitors gets the pipeline's result of their own picture."""
    pipeline = load_pipeline(embedded_bundle())
    pipeline.set_progress_bar_config(disable=True)
    pictures = [picture(SMALL, seed + number) for number in range(count)]
    begun = time.monotonic()
    with ThreadPoolExecutor(count) as threads:
        addresses = [f"127.0.1.{number % 200 + 1}" for number in range(count)]  # of one, fewer may wait
        results = list(threads.map(lambda address, image: Visitor(url, address).enlarge(image), addresses, pictures))
    seconds = time.monotonic() - begun
    num_right = 0
    for image, result in zip(pictures, results, strict=True):
        expected = pipeline(image=image, scale=2, generator=torch.Generator().manual_seed(SEED)).images[0]
        num_right += isinstance(result, Image.Image) and np.array_equal(np.asarray(result), np.asarray(expected))
    print(f"{num_right} of {count} visitors at once got the right picture, in {seconds:.1f} s", flush=True)
    return num_right == count


def beside_a_hostile_one(url: str, seconds: float, seed: int) -> bool:
    """Whether a visitor waits at most for one job of the hostile one, and two seconds."""
    small, large = picture(SMALL, seed), picture(HOSTILE, seed)
    idle = _timed(lambda: Visitor(url, ADDRESS).enlarge(small))
    hostile_alone = _timed(lambda: Visitor(url, HOSTILE_ADDRESS).enlarge(large))
    not_an_image = os.urandom(5_000_000)
    begun = time.monotonic()
    end = begun + seconds
    answers: list[str] = []
    done = [begun]

    def flood(number: int) -> None:
        turn = 0
        while time.monotonic() < end:
            turn += 1
            with suppress(httpx.HTTPError, KeyError):
                visitor = Visitor(url, HOSTILE_ADDRESS, name=f"hostile {number} {turn}")
                kind = (number + turn) % 4
                if kind == 0:
                    noise = visitor.upload("a.png", not_an_image)
                    answers.append(str(visitor.call([[noise], "scale", 2, MODEL, *SETTINGS])))
                elif kind == 1:
                    answers.append(str(visitor.call([None, [1e999], {"a": "<b>" * 10_000}])))
                else:
                    result = visitor.enlarge(large)
                    if isinstance(result, Image.Image):
                        done.append(time.monotonic())
                    answers.append("a picture" if isinstance(result, Image.Image) else str(result))

    times = []
    with ThreadPoolExecutor(40) as threads:
        for number in range(40):
            threads.submit(flood, number)
        time.sleep(min(5, seconds / 4))
        while time.monotonic() < end:
            times.append(_timed(lambda: Visitor(url, ADDRESS).enlarge(small)))
    longest = float(np.diff(done).max())
    delays = [taken - idle - longest for taken in times]
    kinds = {kind: sum(kind in answer for answer in answers) for kind in ("a picture", "jobs from your network")}
    print(
        f"A small picture takes {idle:.2f} s on an idle demo and a hostile one {hostile_alone:.2f} s, "
        f"during the flood up to {longest:.2f} s. "
        f"Beside {len(answers)} hostile requests ({kinds['a picture']} enlarged, "
        f"{kinds['jobs from your network']} refused as too many) "
        f"{len(delays)} small ones took at most {max(delays):+.2f} s more than both together, "
        f"{np.median(delays):+.2f} s in the middle",
        flush=True,
    )
    return max(delays) <= MAX_DELAY_S


def cancel_everywhere(place: Path, count: int, seed: int) -> bool:
    """Whether a job that is cancelled ends within two seconds, at `count` moments."""
    pipeline = load_pipeline(embedded_bundle())
    pipeline.set_progress_bar_config(disable=True)
    source = place / "large.png"
    image = picture(LARGE, seed)
    image.putalpha(image.getchannel("R"))  # which has to be filled first
    image.save(source)
    stages: list[str] = []

    def work(job):
        wanted = Enlargement("scale", 2)
        return enlarge_files(job, [source], pipeline=pipeline, wanted=wanted, max_pixels=64_000_000)

    async def measure(moment: float | None) -> tuple[float, float, str]:
        """Seconds until the next job begins and until all work has ended, in wall-clock and processor time."""
        jobs = JobQueue(Path(tempfile.mkdtemp(dir=place)))
        stages.clear()
        began = time.perf_counter()
        task = asyncio.create_task(
            jobs.run(work, visitor="a", report=lambda fraction, sentence: stages.append(f"{fraction:.0%}, {sentence}"))
        )
        if moment is None:
            await task
            jobs.close()
            return time.perf_counter() - began, 0, ""
        await asyncio.sleep(moment)
        stage = stages[-1].split(",")[0:2] if stages else ["0%", " Opening"]
        cancelled, processor = time.perf_counter(), time.process_time()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await jobs.run(lambda job: None, visitor="b", report=lambda *_: None)
        following = time.perf_counter() - cancelled
        processor = time.process_time() - processor
        while demo_jobs._asides._value < 3:
            await asyncio.sleep(0.01)
        ended = time.perf_counter() - cancelled
        jobs.close()
        print(
            f"cancelled after {moment:.2f} s ({','.join(stage)}): the next job begins {following:.2f} s later "
            f"({processor:.2f} s of processor time), all work has ended {ended:.2f} s later",
            flush=True,
        )
        return following, ended, ""

    whole, _, _ = asyncio.run(measure(None))
    times = [asyncio.run(measure(whole * (number + 0.5) / count)) for number in range(count)]
    slowest, last = max(time[0] for time in times), max(time[1] for time in times)
    print(
        f"A picture of {LARGE[0]} x {LARGE[1]} pixels takes {whole:.1f} s; cancelled at {count} moments the next job "
        f"begins at most {slowest:.2f} s later, and all work has ended at most {last:.2f} s later",
        flush=True,
    )
    return slowest <= MAX_DELAY_S


class Visitor:
    """A program that uses the demo over HTTP, from an address of its own."""

    def __init__(self, url: str, address: str, *, name: str | None = None):
        transport = httpx.HTTPTransport(local_address=address, verify=False)  # which costs time and is not needed
        self._http = httpx.Client(base_url=f"{url}/gradio_api", transport=transport, timeout=600)
        self._name = name

    def upload(self, name: str, data: bytes) -> dict:
        """What stands for an uploaded file in a call."""
        paths = self._http.post("/upload", files={"files": (name, data)}).json()
        return {"path": paths[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def call(self, values: list) -> object:
        """What `/enlarge` answers: the values that it returns, or the sentence of its error."""
        session = {} if self._name is None else {"session_hash": self._name}
        request = json.dumps({"data": values, **session})  # with Infinity too
        headers = {"Content-Type": "application/json"}
        event = self._http.post("/call/enlarge", content=request, headers=headers).json()["event_id"]
        lines = self._http.get(f"/call/enlarge/{event}").text.splitlines()
        messages = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        return messages[-1] if messages else None

    def enlarge(self, image: Image.Image) -> Image.Image | object:
        """The result, or what else was answered."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        answer = self.call([[self.upload("photo.png", buffer.getvalue())], "scale", 2, MODEL, *SETTINGS])
        if not isinstance(answer, list):
            return answer
        data = self._http.get(f"/file={answer[2]['path']}").content
        self._http.close()
        return Image.open(io.BytesIO(data))


@contextmanager
def running_demo(folder: Path):
    """The address of `app.py`, open to other machines, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "app.py", "--host", "0.0.0.0", "--port", str(port), "--device", "cpu"]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "TMPDIR": str(folder)}, stdout=log, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        client = httpx.Client(verify=False, timeout=60)
        for _ in range(3000):
            with suppress(httpx.HTTPError):
                client.get(url)
                break
            if process.poll() is not None:
                raise RuntimeError(f"The demo has ended: {(folder / 'log.txt').read_text()}")
            time.sleep(0.2)
        Visitor(url, ADDRESS).enlarge(picture(SMALL, 0))  # loads the model
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """A smooth one, different for every seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.BICUBIC)


def _timed(function) -> float:
    begun = time.perf_counter()
    result = function()
    if not isinstance(result, Image.Image):
        raise RuntimeError(f"A picture was expected, got {result}.")
    return time.perf_counter() - begun


if __name__ == "__main__":
    sys.exit(main())
