"""The rooms of the house: imports point downward only."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "uplift_diffusers"

LAYERS = [
    {"_version", "arguments", "console", "runtime", "saving", "wording"},
    {"scale"},
    {"images", "models", "tiling"},
    {"latent_space", "feature_space"},
    {"pipelines", "data", "cfm"},
    {"loading"},
    {"embedded", "training"},
    {"evaluation"},
    {"cli", "demo", "__main__"},
]
COMMAND_LINES = ("cli", "demo", "__main__")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_downward():
    rank = {module: index for index, layer in enumerate(LAYERS) for module in layer}
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imports(path):
            room = name.split(".")[1] if name.startswith("uplift_diffusers.") else "_version"
            if room in rank or (PACKAGE / room).exists() or (PACKAGE / f"{room}.py").exists():
                assert rank[room] <= rank[own], f"{path} imports {name}"


def test_libraries_know_no_command_line():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        if parts[0].removesuffix(".py") in COMMAND_LINES or path.stem in (
            "cli",
            "console",
            "config",
            "build",
            "evaluate",
        ):
            continue
        assert not {"argparse", "gradio"} & {name.split(".")[0] for name in imports(path)}, path
