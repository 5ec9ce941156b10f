"""`uplift-diffusers demo`, or `python app.py`: serves the page until Ctrl-C."""

import argparse
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from uplift_diffusers.console import Parser, as_flags, tell
from uplift_diffusers.demo.weights import STABLE_DIFFUSION, UPSAMPLER, Model, Models, Source
from uplift_diffusers.embedded import embedded_bundle
from uplift_diffusers.runtime import choose_device

DEFAULT_MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 100_000_000
MAX_FILES = 20
EMBEDDED = "Embedded"
PROGRAM = "uplift-diffusers demo"


def main(arguments: list[str] | None = None, *, examples: Path | None = None) -> int:
    """
    Serve the page until Ctrl-C, SIGTERM or SIGHUP.

    Args:
        arguments: the command line, by default that of the process.
        examples: folder of example images, all of which visitors can read.
    Returns:
        The exit code: 0, or 2 with one line on stderr for an error that the user can fix.
    """
    options = _build_parser().parse_args(arguments)
    if sentence := _what_is_wrong(options):
        tell(f"{PROGRAM}: error: {sentence}")
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    folder = Path(tempfile.mkdtemp(prefix="uplift-demo-"))
    interrupted = _interruption()
    try:
        return _serve(options, folder, examples, interrupted)
    except KeyboardInterrupt:
        return 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description="Upscale and generate images in the browser.", allow_abbrev=False)
    parser.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        help="another model to offer: a saved UPLiFTSuperResolutionPipeline, or a UPLiFTModel with --vae",
    )
    parser.add_argument("--vae", metavar="DIR_OR_HUB_ID", help="VAE for --model, if it does not include one")
    parser.add_argument("--latent_space", metavar="NAME", help="which latent space --vae belongs to")
    parser.add_argument(
        "--text_to_image",
        metavar="DIR_OR_HUB_ID",
        default=STABLE_DIFFUSION,
        help=f"Stable Diffusion 1.x for the tab Create (default: {STABLE_DIFFUSION}, downloaded on a click)",
    )
    parser.add_argument(
        "--upsampler",
        metavar="DIR_OR_HUB_ID",
        default=UPSAMPLER,
        help=f"UPLiFTModel for the tab Create, if --text_to_image does not include one (default: {UPSAMPLER})",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda:1, ... (default: auto)"
    )
    parser.add_argument(
        "--max_pixels",
        type=int,
        default=DEFAULT_MAX_PIXELS,
        metavar="N",
        help=f"limit on the output in pixels (default: {DEFAULT_MAX_PIXELS})",
    )
    parser.add_argument("--port", type=int, metavar="N", help="default: the first free port from 7860")
    parser.add_argument(
        "--host",
        default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        help="0.0.0.0 lets other machines in (default: only this one, or the variable GRADIO_SERVER_NAME)",
    )
    parser.add_argument("--share", action="store_true", help="make a public address, through Gradio's server")
    parser.add_argument("--auth", metavar="NAME:PASSWORD", help="require a login")
    return parser


def _what_is_wrong(options: argparse.Namespace) -> str | None:
    """A message on the first invalid argument; models are only checked when they are loaded."""
    if options.max_pixels < 1:
        return f"--max_pixels must be at least 1, got {options.max_pixels}."
    if options.port is not None and not 1 <= options.port <= 65535:
        return f"--port must be from 1 to 65535, got {options.port}."
    if options.auth is not None and not all(options.auth.partition(":")):
        return "--auth must be NAME:PASSWORD."
    if options.model is None and (options.vae or options.latent_space):
        return "--vae and --latent_space need a --model."
    for name in ("model", "vae", "text_to_image", "upsampler"):
        place = getattr(options, name)
        if place is not None and not os.path.exists(place) and place.count("/") != 1:
            return f"--{name} must be a folder or a name on the hub (owner/name), got {place}, which is neither."
    if options.model is None and not embedded_bundle().is_dir():
        return "the embedded model is not installed. Name another one with --model."
    return None


def _serve(options: argparse.Namespace, folder: Path, examples: Path | None, interrupted: threading.Event) -> int:
    # Gradio reads these when it is imported. Nothing is sent to or fetched from the network.
    os.environ.update(
        GRADIO_TEMP_DIR=str(folder),
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_RUN_HISTORY="False",
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    try:
        from uplift_diffusers.demo.guard import Guard, is_loopback
        from uplift_diffusers.demo.jobs import JobQueue
        from uplift_diffusers.demo.page import CSS, THEME, build
        from uplift_diffusers.demo.tabs import Limits
    except ModuleNotFoundError as error:
        tell(f"{PROGRAM}: error: {error.name} is missing: pip install 'uplift-diffusers[demo]'")
        return 2
    try:
        choose_device(options.device)
    except ValueError as error:
        tell(f"{PROGRAM}: error: {as_flags(error)}")
        return 2

    offered = {EMBEDDED: Model()} if embedded_bundle().is_dir() else {}
    if options.model is not None:
        offered[options.model] = Model(options.model, options.vae, options.latent_space)
    models = Models(options.device, offered)
    jobs = JobQueue(folder)
    is_local = is_loopback(options.host) and not options.share
    page = build(
        jobs=jobs,
        models=models,
        source=Source(options.text_to_image, options.upsampler),
        limits=Limits(options.max_pixels, MAX_FILES, is_local=is_local),
        examples=_pictures_in(examples),
    )

    @asynccontextmanager
    async def guarded(app) -> AsyncIterator[None]:
        # Around everything else, which is the only place before Gradio's own middleware.
        app.middleware_stack = Guard(app.middleware_stack, loopback_only=is_local)
        yield

    try:
        page.launch(
            server_name=options.host,
            server_port=options.port,
            share=options.share,
            auth=tuple(options.auth.split(":", 1)) if options.auth else None,
            max_file_size=MAX_FILE_BYTES,
            allowed_paths=[str(path) for path in _pictures_in(examples)],
            theme=THEME,
            css=CSS,
            footer_links=["api"],
            ssr_mode=False,
            prevent_thread_lock=True,
            app_kwargs={"lifespan": guarded},
        )
        if not interrupted.is_set():
            jobs.prepare(lambda: models.enlarger(list(offered)[-1]))  # while somebody looks for a picture
        while not interrupted.wait(0.2):
            pass
    except OSError as error:  # no free port
        tell(f"{PROGRAM}: error: {error}")
        return 2
    finally:
        jobs.close()
        page.close(verbose=False)
    return 0


def _pictures_in(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    return sorted(path.resolve() for path in folder.glob("*") if path.suffix in (".jpg", ".png"))


def _interruption() -> threading.Event:
    """
    An event that is set by the first Ctrl-C, SIGTERM or SIGHUP; a second one raises an exception.

    An exception in the middle of `launch` would leave a server running that cannot be closed, and Python would wait
    for its threads.
    """
    interrupted = threading.Event()
    # What is ignored, as SIGHUP under nohup, stays ignored.
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]

    def interrupt(*_) -> None:
        interrupted.set()
        for number in numbers:
            signal.signal(number, signal.default_int_handler)

    for number in numbers:
        signal.signal(number, interrupt)
    return interrupted
