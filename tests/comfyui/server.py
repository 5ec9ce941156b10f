"""A running ComfyUI, asked over HTTP and listened to over its websocket, as a browser does."""

import base64
import io
import json
import os
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load

from tests.comfyui.fetch import paths_of_this_environment, python_of

ROOT = Path(__file__).resolve().parents[2]
ENDINGS = ("execution_success", "execution_error", "execution_interrupted")


class RejectedError(Exception):
    """ComfyUI did not accept a prompt."""


@contextmanager
def run_comfyui(folder: Path, base: Path) -> Iterator["ComfyUI"]:
    """
    Start ComfyUI and stop it at the end.

    Args:
        folder: where `fetch` has put it.
        base: its folder for nodes, models, inputs and outputs.
    """
    page = base / "page"
    page.mkdir()
    (page / "index.html").write_text("<!doctype html>")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python_of(folder), "main.py", "--cpu", "--port", str(port), "--base-directory", base]
    command += ["--front-end-root", page, "--database-url", "sqlite:///:memory:"]
    command += ["--disable-api-nodes", "--disable-auto-launch"]
    log = base / "comfyui.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder / "comfyui",
            env={**os.environ, **paths_of_this_environment(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            comfyui = ComfyUI(port, log)
            comfyui.wait(process)
            yield comfyui
        finally:
            process.terminate()
            process.wait(timeout=30)


class ComfyUI:
    """
    Args:
        port: where it listens.
        log: file with what it prints.
    """

    def __init__(self, port: int, log: Path):
        self.port, self.log = port, log

    def wait(self, process: subprocess.Popen) -> None:
        """Until it answers."""
        while True:
            try:
                return self.get("/system_stats")
            except urllib.error.URLError:
                if process.poll() is not None:
                    raise RuntimeError(self.log.read_text()) from None
                time.sleep(0.2)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as response:
            return response.read()

    def post(self, path: str, content: object) -> bytes:
        url, body = f"http://127.0.0.1:{self.port}{path}", json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise RejectedError(error.read().decode()) from error

    def watch(self, prompt: dict) -> Iterator[tuple[str, dict]]:
        """
        Queue `prompt`, nodes by their names as ComfyUI's API takes them; the events until it ends.

        Raises:
            RejectedError: ComfyUI found a fault in it before running it.
        """
        client = uuid.uuid4().hex
        with WebSocket(self.port, f"/ws?clientId={client}") as websocket:
            answer = json.loads(self.post("/prompt", {"prompt": prompt, "client_id": client}))
            for message in websocket:
                if message["data"].get("prompt_id") != answer["prompt_id"]:
                    continue
                yield message["type"], message["data"]
                if message["type"] in ENDINGS:
                    return

    def run(self, prompt: dict) -> dict[str, list]:
        """What the nodes of `prompt` saved, images and latents, by the nodes' names."""
        saved = {}
        for kind, data in self.watch(prompt):
            if kind == "executed":
                saved[data["node"]] = [self.load(file) for files in data["output"].values() for file in files]
            if kind == "execution_error":
                raise RuntimeError(data["exception_message"])
            assert kind != "execution_interrupted"
        return saved

    def error(self, prompt: dict) -> str:
        """What the node that fails says."""
        for kind, data in self.watch(prompt):
            if kind == "execution_error":
                return data["exception_message"]
        raise AssertionError("nothing failed")

    def load(self, file: dict) -> Image.Image | torch.Tensor:
        content = self.get("/view?" + urllib.parse.urlencode(file))
        if file["filename"].endswith(".latent"):
            return load(content)["latent_tensor"]
        return Image.open(io.BytesIO(content))


class WebSocket:
    """The messages of a websocket that are JSON (RFC 6455; servers send frames without masks)."""

    def __init__(self, port: int, path: str):
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=300)
        self.stream = self.connection.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        request += f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        self.connection.sendall(request.encode())
        assert b" 101 " in self.stream.readline()
        while self.stream.readline().strip():
            pass

    def __enter__(self) -> "WebSocket":
        return self

    def __exit__(self, *_error: object) -> None:
        self.stream.close()
        self.connection.close()

    def __iter__(self) -> Iterator[dict]:
        text = 1
        while head := self.stream.read(2):
            opcode, length = head[0] & 15, head[1] & 127
            if length == 126:
                (length,) = struct.unpack(">H", self.stream.read(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", self.stream.read(8))
            content = self.stream.read(length)
            if opcode == text:
                yield json.loads(content)
