"""Pipelines as diffusers finds them: as custom pipeline files, by class, by name, and from the hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
from diffusers import DiffusionPipeline

import uplift_diffusers
from tests import components
from tests.feature_parts import make_feature_pipeline
from tests.hub_server import HubServer
from uplift_diffusers import (
    CFMLatentUpscalePipeline,
    LatentSpace,
    UPLiFTFeaturePipeline,
    UPLiFTLatentUpscalePipeline,
    UPLiFTSuperResolutionPipeline,
    UPLiFTTextToImagePipeline,
    UPLiFTTextToImageXLPipeline,
)
from uplift_diffusers.cfm import euler_scheduler

ROOT = Path(__file__).resolve().parent.parent
FILES = {path.stem: path for path in sorted((ROOT / "pipelines").glob("*.py"))}
CASES = {
    "cfm_latent_upscale": CFMLatentUpscalePipeline,
    "features": UPLiFTFeaturePipeline,
    "latent_upscale": UPLiFTLatentUpscalePipeline,
    "super_resolution": UPLiFTSuperResolutionPipeline,
    "text_to_image": UPLiFTTextToImagePipeline,
    "text_to_image_xl": UPLiFTTextToImageXLPipeline,
}


def make_pipeline(name, folder):
    if name == "text_to_image":
        parts = {**components.stable_diffusion_components(folder), "upsampler": components.make_upsampler()}
        return UPLiFTTextToImagePipeline(**parts, requires_safety_checker=False)
    if name == "text_to_image_xl":
        parts = components.stable_diffusion_xl_components(folder)
        return UPLiFTTextToImageXLPipeline(**parts, upsampler=components.make_upsampler("sdxl-vae"))
    if name == "features":
        return make_feature_pipeline()
    vae = components.make_local_vae()
    if name == "cfm_latent_upscale":
        return CFMLatentUpscalePipeline(vae, components.make_flow_unet(LatentSpace.of(vae)), euler_scheduler())
    return CASES[name](vae=vae, upsampler=components.make_upsampler("test-local", 12))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of saved pipelines by name, each with the image that it has to give."""
    folder = tmp_path_factory.mktemp("saved")
    for name in CASES:
        pipe = make_pipeline(name, folder / "tokenizer")
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(folder / name)
        np.save(folder / f"{name}.npy", pipe(**components.arguments_of(name))[0])
    return folder


def run_python(code, *, cwd, **environment):
    """Run `code` in a new process that finds the package as it is installed, and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


COMPARE = """
import json, numpy as np, torch
from tests.components import arguments_of
torch.set_num_threads(1)
def difference(pipe, name, expected):
    pipe.set_progress_bar_config(disable=True)
    return float(np.abs(pipe(**arguments_of(name))[0] - np.load(expected)).max())
"""


def test_every_pipeline_is_in_the_list():
    assert sorted(FILES) == sorted(CASES)


@pytest.mark.parametrize("name", FILES)
def test_a_custom_pipeline_is_the_class_of_the_package(saved, name):
    pipe = DiffusionPipeline.from_pretrained(saved / name, custom_pipeline=str(FILES[name]), trust_remote_code=True)
    assert type(pipe) is CASES[name]
    pipe.set_progress_bar_config(disable=True)
    images = pipe(**components.arguments_of(name))[0]
    np.testing.assert_allclose(images, np.load(saved / f"{name}.npy"), rtol=0, atol=1e-4)


def test_a_custom_pipeline_takes_an_upsampler_beside_a_stable_diffusion_directory(saved, tmp_path):
    components.make_stable_diffusion(tmp_path / "tokenizer").save_pretrained(tmp_path / "sd")
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path / "sd",
        custom_pipeline=str(FILES["text_to_image"]),
        trust_remote_code=True,
        upsampler=components.make_upsampler(),
    )
    pipe.set_progress_bar_config(disable=True)
    images = pipe(**components.arguments_of("text_to_image")).images
    np.testing.assert_allclose(images, np.load(saved / "text_to_image.npy"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_pipeline_names_the_package_and_no_module_path(saved, name):
    index = json.loads((saved / name / "model_index.json").read_text())
    assert index["_class_name"] == CASES[name].__name__
    libraries = {entry[0] for entry in index.values() if isinstance(entry, list)} - {None}
    assert "uplift_diffusers" in libraries
    assert libraries <= {"uplift_diffusers", "diffusers", "transformers"}


@pytest.mark.parametrize("name", CASES)
def test_diffusers_finds_a_class_by_its_name(name):
    assert getattr(diffusers, CASES[name].__name__) is CASES[name]


def test_importing_the_package_imports_no_library(tmp_path):
    code = "import sys, uplift_diffusers; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    assert run_python(code, cwd=tmp_path).strip() == "[]"


def test_a_new_process_loads_every_saved_pipeline_by_name_and_by_class(saved, tmp_path):
    classes = {name: pipeline.__name__ for name, pipeline in CASES.items()}
    code = f"""
import uplift_diffusers.pipelines
from diffusers import DiffusionPipeline
by_name = {{name: DiffusionPipeline.from_pretrained(f"{saved}/{{name}}") for name in {classes!r}}}
assert {{name: type(pipe).__name__ for name, pipe in by_name.items()}} == {classes!r}
{COMPARE}
found = {{}}
for name, class_name in {classes!r}.items():
    found[name] = difference(by_name[name], name, f"{saved}/{{name}}.npy")
    pipe = getattr(uplift_diffusers, class_name).from_pretrained(f"{saved}/{{name}}")
    found[class_name] = difference(pipe, name, f"{saved}/{{name}}.npy")
print(json.dumps(found))
"""
    found = json.loads(run_python(code, cwd=tmp_path).splitlines()[-1])
    assert sorted(found) == sorted([*classes, *classes.values()])
    assert max(found.values()) < 1e-4


def test_a_saved_pipeline_loads_from_the_hub(saved, tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        repository = hub.folder("someone/larger")
        for path in (saved / "super_resolution").rglob("*"):
            if path.is_file():
                target = repository / path.relative_to(saved / "super_resolution")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        code = f"""
import uplift_diffusers.pipelines
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("someone/larger")
{COMPARE}
print(difference(pipe, "super_resolution", "{saved}/super_resolution.npy"))
"""
        printed = run_python(
            code,
            cwd=tmp_path,
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path / "cache"),
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
        )
    assert float(printed.split()[-1]) < 1e-4


def test_all_public_names_are_there():
    assert all(getattr(uplift_diffusers, name) is not None for name in uplift_diffusers.__all__)
