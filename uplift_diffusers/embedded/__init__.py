"""The small bundle that works offline, and how it was made."""

from pathlib import Path


def embedded_bundle() -> Path:
    """Directory of the embedded super-resolution pipeline, for `UPLiFTSuperResolutionPipeline.from_pretrained`."""
    return Path(__file__).resolve().parent / "bundle"
