"""`uplift-diffusers fetch`: download the photographs listed by a dataset."""

import argparse
from pathlib import Path

from uplift_diffusers.console import CommandError, parse_count, say, tell
from uplift_diffusers.wording import reason

NAME = "fetch"
PURPOSE = "download the photographs listed by a dataset"
EPILOG = """\
Unsplash-Lite:
  Unsplash allows internal use of the photographs in its Lite dataset to train machine-learning models. You must not
  publish or redistribute them. By downloading them you accept its terms: https://unsplash.com/data-terms

  Its archive, linked from https://github.com/unsplash/datasets, holds the URLs of 25,000 photographs. They
  are downloaded at --size as JPEG of quality 95, to DIR/<photo_id>.jpg.

  Files are written atomically, after decoding the image. Existing files are kept, so the same command
  continues an interrupted download. Photographs that could not be fetched are listed in DIR/unavailable.tsv: `gone`
  if the URL no longer exists, `failed` if another attempt may succeed.

Exit code:
  0    every photograph is downloaded or gone
  1    some photographs or the connection failed; run the same command again
  2    nothing was started: an argument is wrong, or the dataset is damaged
  130  interrupted by Ctrl-C; 143 and 129 by SIGTERM and SIGHUP

Example:
  uplift-diffusers fetch unsplash-lite --dataset unsplash-lite-1.4.1.zip --output photos \\
      --sha256 aa0fcb859040ed64e93817d1d878d0c6f861763283261ba1a6aa5d8d4af6aec6
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=fetch)
    parser.add_argument("name", choices=("unsplash-lite",), metavar="NAME", help="unsplash-lite")
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="PATH",
        help="the dataset as published: its archive, or the unpacked folder",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the photographs")
    parser.add_argument(
        "--size",
        type=parse_count,
        default=1024,
        help="pixels of the short side; smaller photographs keep their size (default: 1024)",
    )
    parser.add_argument("--jobs", type=parse_count, default=8, metavar="N", help="parallel downloads (default: 8)")
    parser.add_argument(
        "--sha256", metavar="HEX", help="expected SHA-256 of PATH, or of photos.tsv000 if PATH is a folder"
    )


def fetch(options: argparse.Namespace) -> int:
    """Run the command, as specified in its `--help`."""
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
