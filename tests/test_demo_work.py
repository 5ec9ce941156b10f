"""What the demo does beneath its page: jobs one after the other, comparisons, pictures of prompts."""

import asyncio
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from tests.components import make_local_vae, make_upsampler, smooth_images, stable_diffusion_components
from uplift_diffusers import UPLiFTModel, UPLiFTSuperResolutionPipeline, UPLiFTTextToImagePipeline
from uplift_diffusers.demo import jobs as jobs_module
from uplift_diffusers.demo.app import main
from uplift_diffusers.demo.jobs import BusyError, JobQueue, StoppedError
from uplift_diffusers.demo.weights import Source
from uplift_diffusers.demo.work import Enlargement, Request, compare_methods, create, enlarge_files, preview

LIMIT = 10**9


@pytest.fixture
def jobs(tmp_path):
    opened = JobQueue(tmp_path)
    yield opened
    opened.close()


def ignore(fraction, sentence):
    pass


def do(jobs, work):
    """The outcome of one job, and what it reported."""
    reports = []
    outcome = asyncio.run(jobs.run(work, visitor="somebody", report=lambda *report: reports.append(report)))
    return outcome, reports


def test_jobs_are_done_one_after_the_other_in_their_order(jobs):
    events, first_began = [], threading.Event()

    def work(name):
        def run(job):
            events.append(f"{name} begins")
            first_began.set()
            for _ in range(100):
                job.check()
            events.append(f"{name} ends")
            return name

        return run

    async def visit():
        return await asyncio.gather(*(jobs.run(work(n), visitor=n, report=ignore) for n in "abc"))

    assert asyncio.run(visit()) == ["a", "b", "c"]
    assert events == ["a begins", "a ends", "b begins", "b ends", "c begins", "c ends"]


@pytest.mark.parametrize("way", ["cancelled", "left"])
def test_a_job_that_nobody_waits_for_stops_and_leaves_no_files(jobs, way):
    began, ended = threading.Event(), []

    def work(job):
        (job.folder / "half").touch()
        began.set()
        try:
            while True:
                job.check()
        except StoppedError:
            ended.append(True)
            raise

    async def visit():
        task = asyncio.create_task(jobs.run(work, visitor="somebody", report=ignore))
        await asyncio.to_thread(began.wait)
        if way == "cancelled":
            task.cancel()
        else:
            jobs.leave("somebody")
        with pytest.raises((asyncio.CancelledError, StoppedError)):
            await task
        return await jobs.run(lambda job: "served", visitor="another", report=ignore)

    assert asyncio.run(visit()) == "served"
    assert ended == [True]
    assert not list(jobs.root.rglob("half"))


def test_visitors_take_turns(jobs):
    events, first_began, go_on = [], threading.Event(), threading.Event()

    def work(name):
        def run(job):
            first_began.set()
            go_on.wait()
            events.append(name)

        return run

    async def visit():
        tasks = [asyncio.create_task(jobs.run(work(f"greedy {n}"), visitor="greedy", report=ignore)) for n in range(4)]
        await asyncio.to_thread(first_began.wait)
        tasks += [asyncio.create_task(jobs.run(work(name), visitor=name, report=ignore)) for name in ("late", "last")]
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(*tasks)

    asyncio.run(visit())
    assert events == ["greedy 0", "late", "last", "greedy 1", "greedy 2", "greedy 3"]


def test_addresses_take_turns_however_many_visitors_one_of_them_has(jobs):
    events, first_began, go_on = [], threading.Event(), threading.Event()

    async def ask(name, visitor, address):
        def work(job):
            first_began.set()
            go_on.wait()
            events.append(name)

        await jobs.run(work, visitor=visitor, address=address, report=ignore)

    async def visit():
        tasks = [asyncio.create_task(ask(f"flood {n}", f"name {n}", "x")) for n in range(4)]
        await asyncio.to_thread(first_began.wait)
        tasks += [asyncio.create_task(ask(f"honest {n}", "somebody", "y")) for n in range(2)]
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(*tasks)

    asyncio.run(visit())
    assert events == ["flood 0", "honest 0", "flood 1", "honest 1", "flood 2", "flood 3"]
    assert not jobs._turns


def test_a_visitor_is_told_the_place_and_no_one_elses(jobs):
    reports, go_on = {name: [] for name in "abc"}, threading.Event()

    async def visit(name):
        report = lambda fraction, sentence: reports[name].append(sentence)  # noqa: E731
        await jobs.run(lambda job: go_on.wait(), visitor=name, report=report)

    async def all_visit():
        tasks = [asyncio.create_task(visit(name)) for name in "abc"]
        await asyncio.sleep(0.05)
        go_on.set()
        await asyncio.gather(*tasks)

    asyncio.run(all_visit())
    assert reports["a"] == []
    assert set(reports["b"]) == {"Waiting: 1 before this one"}
    assert list(dict.fromkeys(reports["c"])) == ["Waiting: 2 before this one", "Waiting: 1 before this one"]


def test_jobs_that_may_wait_are_limited_by_visitor_address_and_in_all(jobs, monkeypatch):
    monkeypatch.setattr(jobs_module, "MAX_JOBS", 6)
    monkeypatch.setattr(jobs_module, "MAX_JOBS_OF_ADDRESS", 5)
    monkeypatch.setattr(jobs_module, "MAX_JOBS_OF_VISITOR", 3)
    go_on = threading.Event()

    def ask(visitor, address=None):
        asked = jobs.run(lambda job: go_on.wait(), visitor=visitor, address=address, report=ignore)
        return asyncio.create_task(asked)

    async def visit():
        tasks = [ask("a", "x") for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="3 of your jobs are waiting already"):
            await ask("a", "y")
        tasks += [ask("b", "x"), ask("c", "x")]
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="from your network"):
            await ask("d", "x")
        tasks += [ask("e"), ask("f")]
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="too many jobs are waiting"):
            await ask("g")
        go_on.set()
        await asyncio.gather(*tasks)
        await ask("a", "x")  # there is room again

    asyncio.run(visit())


def test_what_cannot_be_interrupted_is_not_waited_for(jobs):
    began, go_on = threading.Event(), threading.Event()

    def stubborn():
        began.set()
        go_on.wait(60)

    async def visit():
        task = asyncio.create_task(jobs.run(lambda job: job.aside(stubborn), visitor="a", report=ignore))
        await asyncio.to_thread(began.wait)
        task.cancel()
        return await asyncio.wait_for(jobs.run(lambda job: "served", visitor="b", report=ignore), 30)

    try:
        assert asyncio.run(visit()) == "served"
    finally:
        go_on.set()


def test_what_is_done_aside_gives_its_result_or_raises(jobs):
    assert do(jobs, lambda job: job.aside(sorted, [2, 1], reverse=True))[0] == [2, 1]
    with pytest.raises(ZeroDivisionError):
        do(jobs, lambda job: job.aside(lambda: 1 / 0))


def test_a_report_says_the_stage_and_counts_up_to_one(jobs):
    def work(job):
        job.plan({"Peeling": 1, "Nothing": 0, "Cooking": 3})
        job.advance("Peeling", 0.5)
        job.advance("Peeling", 1)
        job.advance("Cooking", 1)

    _, reports = do(jobs, work)
    assert [fraction for fraction, _ in reports] == [0, 0.125, 0.25, 1]
    assert [sentence.partition(",")[0] for _, sentence in reports] == ["Peeling", "Peeling", "Cooking", "Saving"]
    assert reports[1][1] == "Peeling, about 1 s left"


def test_the_compared_pictures_are_those_of_their_methods(jobs, tmp_path):
    pipeline = UPLiFTSuperResolutionPipeline(
        vae=make_local_vae(), upsampler=make_upsampler("test-local", latent_channels=12)
    )
    color = smooth_images(1, 36, 52)  # no multiples of 8
    image = Image.fromarray((color[0].permute(1, 2, 0) * 255).round().byte().numpy())
    image.save(tmp_path / "picture.png")
    panes, _ = do(
        jobs,
        lambda job: compare_methods(job, tmp_path / "picture.png", pipeline=pipeline, scale=2, max_pixels=LIMIT),
    )

    color = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    padded = F.pad(color, (0, 4, 0, 4), mode="replicate")
    with torch.no_grad():
        latents = pipeline.vae.encode(padded * 2 - 1).latent
        latents = F.interpolate(latents, scale_factor=2, mode="bilinear")
        bilinear = pipeline.vae.decode(latents).sample[0, :, :72, :104] / 2 + 0.5
    uplift = pipeline(image=image, scale=2, generator=torch.Generator().manual_seed(0), output_type="pt").images[0]
    expected = {
        "Bicubic": pil_to_tensor(image.resize((104, 72), Image.Resampling.BICUBIC)) / 255,
        "Latents, bilinear": bilinear,
        "UPLiFT": uplift,
    }
    assert [pane.label for pane in panes] == list(expected)
    for pane in panes:
        made = np.asarray(Image.open(pane.path), dtype=float)
        wanted = (expected[pane.label].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
        assert np.abs(made - wanted).max() <= (1 if pane.label == "Bicubic" else 0.51)  # Pillow rounds too


@pytest.fixture
def jpeg(tmp_path):
    pixels = (smooth_images(1, 36, 52)[0].permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "picture.jpg", quality=60)
    return tmp_path / "picture.jpg"


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    settings = {"encoder_block_out_channels": (8, 8), "decoder_channels": 16, "refiner_channels": 16}
    upsampler = UPLiFTModel(
        latent_channels=12, latent_space="test-local", refiner_layers=1, denoise_channel=True, **settings
    ).eval()
    return UPLiFTSuperResolutionPipeline(vae=make_local_vae(), upsampler=upsampler)


@pytest.mark.parametrize("settings", [{}, {"denoise": 0.2}, {"denoise": 0.0, "consistency": 0.5}], ids=str)
def test_an_enlarged_file_is_the_pipelines_own_output_for_these_settings(jobs, jpeg, denoiser, settings):
    wanted = Enlargement("width", 90, **settings)
    work = lambda job: enlarge_files(job, [jpeg], pipeline=denoiser, wanted=wanted, max_pixels=LIMIT)  # noqa: E731
    (result,), failures = do(jobs, work)[0]
    assert not failures
    seeded = torch.Generator().manual_seed(0)
    expected = denoiser(image=Image.open(jpeg), scale=90 / 52, generator=seeded, **settings).images[0]
    assert expected.size == (90, 62)
    np.testing.assert_array_equal(np.asarray(Image.open(result.path)), np.asarray(expected))


def test_a_jpeg_is_denoised_in_the_comparison_too(jobs, jpeg, denoiser):
    work = lambda job: compare_methods(job, jpeg, pipeline=denoiser, scale=2, max_pixels=LIMIT)  # noqa: E731
    made = np.asarray(Image.open(do(jobs, work)[0][-1].path))
    denoised, as_it_is = (
        np.asarray(denoiser(image=Image.open(jpeg), generator=torch.Generator().manual_seed(0), **settings).images[0])
        for settings in ({}, {"denoise": 0})
    )
    np.testing.assert_array_equal(made, denoised)
    assert (denoised != as_it_is).any()


def test_the_small_picture_is_stable_diffusions_own(jobs, tmp_path):
    components = stable_diffusion_components(tmp_path / "tokenizer")
    plain = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipeline = UPLiFTTextToImagePipeline(**components, upsampler=make_upsampler(), requires_safety_checker=False)
    request = Request("a cat", "", 4, 5.0, seed=3, scale=1.5, refinement=0.5)
    (small, large), reports = do(jobs, lambda job: create(job, request, pipeline=pipeline, max_pixels=LIMIT))
    expected = plain(
        "a cat", num_inference_steps=4, guidance_scale=5.0, generator=torch.Generator().manual_seed(3)
    ).images[0]
    np.testing.assert_allclose(np.asarray(Image.open(small.path), dtype=int), np.asarray(expected, dtype=int), atol=1)
    assert Image.open(large.path).size == large.size == (96, 96)
    assert {sentence.partition(",")[0] for _, sentence in reports} == {"Denoising", "Refining", "Decoding", "Saving"}


@pytest.mark.parametrize("mode", ["L", "LA", "CMYK", "I;16"])
def test_every_kind_of_picture_has_a_preview(tmp_path, mode):
    path = tmp_path / f"picture.{'tif' if mode in ('CMYK', 'I;16') else 'png'}"
    levels = np.linspace(0, 65535, 1200, dtype=np.uint16)[None].repeat(40, axis=0)
    if mode == "I;16":
        Image.fromarray(levels).save(path)
    else:
        Image.fromarray((levels // 257).astype(np.uint8)).convert(mode).save(path)
    pane = preview(path, tmp_path / "previews")
    shown = Image.open(pane.path)
    assert pane.size == (1200, 40)
    assert shown.size == (1024, 34)
    assert shown.mode == ("RGBA" if mode in ("LA", "RGBA") else "RGB")
    values = np.asarray(shown.convert("L"), dtype=float)[17]
    assert np.abs(values[[5, -5]] - [0, 255]).max() < 6


def test_a_folder_that_is_no_stable_diffusion_is_told_so(tmp_path):
    with pytest.raises(ValueError, match="is not a diffusers folder of Stable Diffusion"):
        Source(str(tmp_path)).find()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port", "x"], "argument --port: invalid int value: 'x'"),
        (["--max_pixels", "0"], "--max_pixels must be at least 1, got 0."),
        (["--port", "70000"], "--port must be from 1 to 65535, got 70000."),
        (["--auth", "name"], "--auth must be NAME:PASSWORD."),
        (["--vae", "somebody/vae"], "--vae and --latent_space need a --model."),
        (["--model", "nowhere"], "--model must be a folder or a name on the hub (owner/name), got nowhere"),
    ],
)
def test_a_wrong_argument_is_answered_at_once_in_one_line(arguments, sentence, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:  # of the parser
        code = stop.code
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"uplift-diffusers demo: error: {sentence}")
