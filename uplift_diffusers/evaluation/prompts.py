"""Prompts from a file: one a line, or the captions of COCO."""

import json
from pathlib import Path


def read_prompts(path: str | Path, *, limit: int | None = None) -> list[str]:
    """
    Read prompts, in any script.

    Args:
        path: a .json file of captions as COCO publishes them, of which every image gives its first one, in the order
            of their ids; or any other text file in UTF-8 with a prompt on every line that is not empty.
        limit: only the first so many.
    Raises:
        FileNotFoundError: no such file.
        ValueError: another encoding, another kind of JSON, or no prompt in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`prompts` must be a file, got {str(path)!r}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`prompts` must be in UTF-8, got another encoding in {path}. Save it as UTF-8.") from error
    prompts = _coco_captions(text, path) if path.suffix == ".json" else text.split("\n")
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"`prompts` must hold at least one prompt, got none in {path}.")
    return prompts[:limit]


def _coco_captions(text: str, path: Path) -> list[str]:
    try:
        annotations = json.loads(text)["annotations"]
        first: dict[int, str] = {}
        for annotation in sorted(annotations, key=lambda annotation: (annotation["image_id"], annotation["id"])):
            first.setdefault(annotation["image_id"], str(annotation["caption"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`prompts` must be COCO captions where it is JSON (annotations with image_id, id and caption), got "
            f"something else in {path}."
        ) from error
    return list(first.values())
