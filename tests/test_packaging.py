"""What is said in more than one file about the package is the same in all of them."""

import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(lines):
    lines = (line.strip() for line in lines)
    return {Requirement(line).name: Requirement(line) for line in lines if line and not line.startswith("#")}


def test_a_space_installs_the_core_and_the_demo():
    needed = requirements(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["demo"])
    assert requirements((ROOT / "requirements.txt").read_text().splitlines()) == needed


def test_a_space_starts_the_demo_with_a_gradio_that_it_works_with():
    front_matter = yaml.safe_load((ROOT / "README.md").read_text().split("---\n")[1])
    assert front_matter["sdk"] == "gradio"
    assert (ROOT / front_matter["app_file"]).is_file()
    gradio = requirements(PROJECT["optional-dependencies"]["demo"])["gradio"]
    assert gradio.specifier.contains(front_matter["sdk_version"])


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    oldest = requirements((ROOT / ".ci" / "oldest.txt").read_text().splitlines())
    promised = requirements(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["text-to-image"])
    for name, tested in oldest.items():
        (bound,) = promised[name].specifier
        (version,) = tested.specifier
        assert bound.operator == ">=", name
        assert version.version.split(".")[:2] == bound.version.split("."), name
