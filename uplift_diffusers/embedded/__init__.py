"""The embedded bundle, a small pipeline that works offline. README.md is its model card."""

from pathlib import Path


def embedded_bundle() -> Path:
    """Folder of the embedded super-resolution pipeline, for `UPLiFTSuperResolutionPipeline.from_pretrained`."""
    return Path(__file__).resolve().parent / "bundle"
