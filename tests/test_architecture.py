"""The rooms of the house: imports point downward only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = [
    {"_version", "registration", "processes"},
    {"functional", "scale", "images", "image_files", "hardware"},
    {"models"},
    {"tiling"},
    {"latent_space"},
    {"upscale_stage", "denoising", "flow_matching"},
    {"pipelines", "data", "modular"},
    {"training"},
    {"embedded"},
    {"evaluation"},
    {"cli", "demo", "__main__"},
]
ABOVE_THE_COMMAND_LINE = {"argparse", "gradio"}


def rank(module):
    for index, layer in enumerate(LAYERS):
        if module in layer:
            return index
    raise AssertionError(f"{module} has no layer: give it one in LAYERS")


def source_files():
    for path in sorted((ROOT / "uplift_diffusers").rglob("*.py")):
        if path != ROOT / "uplift_diffusers" / "__init__.py":
            yield path.relative_to(ROOT / "uplift_diffusers")
    for path in sorted((ROOT / "pipelines").glob("*.py")):
        yield Path("pipelines") / path.name


SOURCE_FILES = list(source_files())


def imports(path):
    root = ROOT if path.parts[0] == "pipelines" else ROOT / "uplift_diffusers"
    for node in ast.walk(ast.parse((root / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; custom pipelines cannot"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCE_FILES, ids=str)
def test_imports_point_downward(path):
    own = path.parts[0].removesuffix(".py")
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "uplift_diffusers" and len(parts) > 1 and (ROOT / "uplift_diffusers" / parts[1]).exists():
            assert rank(parts[1]) <= rank(own), f"{path} imports {name}"


@pytest.mark.parametrize("path", SOURCE_FILES, ids=str)
def test_libraries_know_no_command_line(path):
    if path.stem in ("cli", "__main__", "config", "build") or path.parts[0] == "demo":
        return
    assert not ABOVE_THE_COMMAND_LINE & {name.split(".")[0] for name in imports(path)}
