"""`uplift-diffusers fetch`: download the photographs that a dataset lists."""

import argparse
from pathlib import Path

from uplift_diffusers.cli.arguments import parse_count
from uplift_diffusers.cli.console import CommandError, say, tell
from uplift_diffusers.wording import reason

NAME = "fetch"
PURPOSE = "download the photographs that a dataset lists"
EPILOG = """\
Unsplash-Lite:
  Unsplash lets you use the photographs of its Lite dataset internally, to train machine-learning models. You must not
  publish them or pass them on. By downloading them you accept its terms: https://unsplash.com/data-terms

  Its archive, which https://github.com/unsplash/datasets links to, holds the addresses of 25,000 photographs. They
  are fetched at --size as JPEG of quality 95, to DIR/<photo_id>.jpg.

  Every file appears whole, after its image was decoded. What is there already is left as it is, so the same command
  takes an interrupted one up again. What cannot be had is listed in DIR/unavailable.tsv: `gone` for addresses that
  lead nowhere any more, `failed` for what may be there the next time.

Exit code:
  0    every photograph is there, or gone
  1    some photographs failed, or the connection did; run the same command again
  2    nothing was begun: an argument is wrong, or the dataset is damaged
  130  interrupted by Ctrl-C; 143 and 129 by SIGTERM and SIGHUP

Example:
  uplift-diffusers fetch unsplash-lite --dataset unsplash-lite-1.4.1.zip --output photos \\
      --sha256 aa0fcb859040ed64e93817d1d878d0c6f861763283261ba1a6aa5d8d4af6aec6
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=fetch)
    parser.add_argument("name", choices=("unsplash-lite",), metavar="NAME", help="unsplash-lite")
    parser.add_argument(
        "--dataset", required=True, metavar="PATH", help="the dataset as published: its archive, or the folder of it"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the photographs")
    parser.add_argument(
        "--size",
        type=parse_count,
        default=1024,
        help="pixels of the short side, or as many as there are (default: 1024)",
    )
    parser.add_argument("--jobs", type=parse_count, default=8, metavar="N", help="downloads at a time (default: 8)")
    parser.add_argument(
        "--sha256", metavar="HEX", help="what the SHA-256 of PATH must be; of a folder, of its photos.tsv000"
    )


def fetch(options: argparse.Namespace) -> int:
    """The command; its `--help` is its contract."""
    if not options.output:
        raise CommandError("--output must be a folder, got an empty name.")
    try:
        from uplift_diffusers.data.unsplash import TERMS, check_folder, fetch_photos, read_photos
    except ImportError as error:
        raise CommandError("fetch needs httpx: pip install 'uplift-diffusers[train]'.") from error

    try:
        photos = read_photos(options.dataset, sha256=options.sha256)
    except (OSError, ValueError) as error:
        raise CommandError(f"--dataset: {error}") from error
    try:
        check_folder(Path(options.output), options.size)
    except (OSError, ValueError) as error:
        raise CommandError(f"--output: {error}") from error
    say(TERMS)
    try:
        summary = fetch_photos(photos, options.output, size=options.size, jobs=options.jobs)
    except OSError as error:
        tell(f"{options.output}: {reason(error)}")
        return 1
    counts = {"fetched": summary.fetched, "there": summary.there, "gone": summary.gone, "failed": summary.failed}
    said = say(", ".join(f"{count} {what}" for what, count in counts.items()))
    return 0 if said and not summary.failed else 1
