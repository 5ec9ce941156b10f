"""The demo as people see it: `python app.py` in a process of its own, in a real browser and through its API."""

import io
import itertools
import json
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
from PIL import ExifTags, Image

from tests.components import make_local_vae, make_upsampler, stable_diffusion_components
from tests.demo_server import ROOT, Visitor, needs_browser, running_browser, running_demo
from tests.hub_server import HubServer
from uplift_diffusers import UPLiFTSuperResolutionPipeline, UPLiFTTextToImagePipeline

SMALL, LARGE = (40, 24), (600, 450)


@pytest.fixture(scope="module")
def pipeline():
    upsampler = make_upsampler("test-local", latent_channels=12)
    return UPLiFTSuperResolutionPipeline(vae=make_local_vae(), upsampler=upsampler)


@pytest.fixture(scope="module")
def demo(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    pipeline.save_pretrained(folder / "model")
    creator = UPLiFTTextToImagePipeline(
        **stable_diffusion_components(folder / "tokenizer"), upsampler=make_upsampler(), requires_safety_checker=False
    )
    creator.save_pretrained(folder / "creator")
    arguments = ("--model", folder / "model", "--text_to_image", folder / "creator")
    with running_demo(folder / "running", *map(str, arguments)) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with running_browser() as running:
        yield running


@pytest.fixture
def visitor(browser, demo):
    arrived = Visitor(browser, demo)
    yield arrived
    arrived.page.context.close()


@pytest.fixture
def client(demo):
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(demo.url, verbose=False)


def save_picture(path, size=SMALL, color=None, **options):
    """A picture of one colour, or a smooth one."""
    if color is None:
        noise = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize(size, Image.BICUBIC)
    else:
        image = Image.new("RGB" if color != "white" else "1", size, color)
    image.save(path, **options)
    return path


def upload(path):
    return pytest.importorskip("gradio_client").handle_file(path)


def enlarged(demo, name):
    """Results of that name, which are wider than what was uploaded."""
    return [path for path in demo.folder.rglob(name) if Image.open(path).width > LARGE[0]]


def colours(count):
    """Colours that stay apart from each other when a small VAE has seen them."""
    return list(itertools.islice(itertools.product((40, 128, 215), repeat=3), count))


def mean_colour(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=float).mean(axis=(0, 1))


# In the browser


@needs_browser
def test_an_upload_becomes_the_pipelines_own_output_with_name_and_metadata(visitor, pipeline, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "somebody"
    source = save_picture(tmp_path / "My photo.jpg", LARGE, exif=exif)
    visitor.choose(source)
    with visitor.seeing(r"Enlarging, about \d+ s left"):
        visitor.press("Enlarge")
        assert visitor.pixels("After") == (1200, 900)
    assert visitor.pixels("Before") == (600, 450)
    figures = visitor.panel.locator(".figures table").inner_text()
    assert re.search(r"My photo.png\s+600 × 450\s+1200 × 900\s+[\d.]+ s\s+[\d.]+ [MG]B", figures)

    result = Image.open(visitor.download(tmp_path))
    assert Path(result.filename).name == "My photo.png"
    assert result.getexif()[ExifTags.Base.Artist] == "somebody"
    with Image.open(source) as image:
        expected = pipeline(image=image, scale=2, generator=torch.Generator().manual_seed(0)).images[0]
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))


@needs_browser
def test_a_size_is_asked_for_instead_of_a_factor(visitor, tmp_path):
    visitor.choose(save_picture(tmp_path / "small.png"))
    visitor.panel.get_by_label("Enlarge", exact=True).first.click()
    visitor.page.get_by_role("option", name="to a long side").click()
    pixels = visitor.panel.get_by_role("spinbutton", name="Pixels")
    assert pixels.input_value() == "3840"
    pixels.fill("90")
    visitor.press("Enlarge")
    assert visitor.pixels("After") == (90, 54)


@needs_browser
def test_what_the_slider_says_reaches_the_upsampler_and_shows_only_without_automatic(visitor, tmp_path):
    visitor.choose(save_picture(tmp_path / "small.png"))
    slider = visitor.panel.get_by_role("spinbutton", name=re.compile("Denoise"))
    visitor.panel.get_by_role("button", name="Noise").click()
    assert not slider.is_visible()
    visitor.panel.get_by_label("Automatic").uncheck()
    slider.fill("0.4")
    visitor.press("Enlarge")
    visitor.sees("must be 0 or 'auto' for an upsampler without `denoise_channel`, got 0.4")


@needs_browser
def test_several_pictures_become_a_gallery_and_one_zip(visitor, tmp_path):
    paths = [save_picture(tmp_path / name, color=name.split(".")[0]) for name in ("red.png", "blue.png")]
    broken = tmp_path / "broken.png"
    broken.write_bytes(paths[0].read_bytes()[:60])
    visitor.choose(*paths, broken)
    visitor.press("Enlarge")
    visitor.sees("broken.png: the image is damaged or cut off")
    assert visitor.pixels("After") == (80, 48)
    first = visitor.picture("After").get_attribute("src")
    visitor.panel.get_by_label("Thumbnail 2 of 2").or_(visitor.panel.locator(".thumbnail-lg").nth(1)).first.click()
    visitor.page.wait_for_function(
        "src => [...document.querySelectorAll('img[alt^=After]')].every(img => img.src != src)", arg=first
    )
    with zipfile.ZipFile(visitor.download(tmp_path, "Download all (zip)")) as archive:
        assert archive.namelist() == ["red.png", "blue.png"]
        means = [mean_colour(io.BytesIO(archive.read(name))) for name in archive.namelist()]
    assert np.argmax(means[0]) == 0
    assert np.argmax(means[1]) == 2


@needs_browser
def test_what_cannot_be_enlarged_is_told_in_a_sentence(visitor, demo, tmp_path):
    visitor.press("Enlarge")
    visitor.sees("Choose an image first")

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture at all")
    for path, sentence in (
        (broken, "Not an image, or an unsupported format"),
        (save_picture(tmp_path / "wide.png", (9_000, 4_000), "white"), "more than the limit of 64 megapixels"),
    ):
        visitor.panel.locator("input[type=file]").set_input_files(path)
        if path.stem == "wide":
            visitor.picture("Before").wait_for()
        else:
            visitor.sees(sentence)
            for close in visitor.page.get_by_test_id("toast-close").all():
                close.click()
        visitor.press("Enlarge")
        visitor.sees(sentence)
        visitor.clear()
    assert "Traceback" in demo.log.read_text()


@needs_browser
def test_a_cancelled_job_ends_and_the_next_one_is_served(visitor, demo, tmp_path):
    visitor.choose(save_picture(tmp_path / "large.png", LARGE))
    visitor.panel.get_by_role("spinbutton", name="Factor").fill("8")
    visitor.press("Enlarge")
    visitor.sees("Enlarging, about")
    visitor.press("Cancel")
    visitor.sees("Cancelled")
    visitor.page.get_by_text("Enlarging, about").wait_for(state="hidden")
    visitor.clear()
    visitor.choose(save_picture(tmp_path / "small.png"))
    visitor.press("Enlarge")
    assert visitor.pixels("After") == (320, 192)
    assert not enlarged(demo, "large.png")


@needs_browser
def test_two_visitors_are_served_one_after_the_other_with_their_own_pictures(browser, demo, tmp_path):
    visitors = [Visitor(browser, demo) for _ in range(2)]
    for visitor, colour, size in zip(visitors, ("red", "blue"), (LARGE, SMALL)):
        visitor.choose(save_picture(tmp_path / f"{colour}.png", size, colour))
    visitors[0].press("Enlarge")
    with visitors[1].seeing("Waiting: 1 before this one"):
        visitors[1].press("Enlarge")
    for visitor, colour, size in zip(visitors, ("red", "blue"), (LARGE, SMALL)):
        assert visitor.pixels("After") == (2 * size[0], 2 * size[1])
        path = visitor.download(tmp_path)
        assert path.name == f"{colour}.png"
        assert np.argmax(mean_colour(path)) == {"red": 0, "blue": 2}[colour]
        visitor.page.context.close()


@needs_browser
def test_a_prompt_becomes_a_small_and_a_large_picture_that_the_seed_brings_back(visitor, tmp_path):
    visitor.open("Create")
    visitor.panel.get_by_label("Prompt", exact=True).fill("a cat")
    visitor.panel.get_by_role("spinbutton", name="Steps").fill("2")
    visitor.press("Create")
    assert visitor.pixels("Stable Diffusion") == (64, 64)
    assert visitor.pixels("Enlarged") == (128, 128)
    first = visitor.download(tmp_path)
    visitor.press("Keep this seed")
    seed = re.fullmatch(r"seed (\d+) large.png", first.name)[1]
    visitor.page.wait_for_function(
        "seed => [...document.querySelectorAll('textarea, input')].some(input => input.value == seed)", arg=seed
    )
    address = visitor.picture("Enlarged").get_attribute("src")
    visitor.press("Create")
    visitor.page.wait_for_function(
        "src => [...document.querySelectorAll('img[alt^=Enlarged]')].some(img => img.src != src)", arg=address
    )
    second = visitor.download(tmp_path / "again")
    assert first.read_bytes() == second.read_bytes()


@needs_browser
def test_three_methods_are_seen_at_one_zoom_by_keyboard(visitor, tmp_path):
    visitor.open("Compare")
    visitor.choose(save_picture(tmp_path / "small.png"))
    visitor.press("Compare")
    for label in ("Bicubic", "Latents, bilinear", "UPLiFT"):
        assert visitor.pixels(label) == (160, 96)
    visitor.panel.get_by_role("group", name=re.compile("Plus and minus zoom")).focus()
    visitor.page.keyboard.press("+")
    visitor.page.keyboard.press("ArrowRight")
    transforms = visitor.panel.locator(".frame img").evaluate_all(
        "images => images.map(img => getComputedStyle(img).transform)"
    )
    assert len(transforms) == 3
    assert len(set(transforms)) == 1
    zoom, _, _, _, x, y = (float(number) for number in re.findall(r"-?[\d.]+", transforms[0]))
    assert zoom == 1.5
    assert x < -40
    assert y < 0


@needs_browser
def test_the_divider_moves_by_keyboard_and_by_pointer(visitor, tmp_path):
    visitor.choose(save_picture(tmp_path / "small.png"))
    visitor.press("Enlarge")
    divider = visitor.panel.get_by_label("Divider")
    divider.focus()
    visitor.page.keyboard.press("ArrowRight")
    frame = visitor.panel.locator("figure + figure .frame")
    assert frame.evaluate("frame => getComputedStyle(frame).clipPath") == "inset(0px 0px 0px 51%)"
    box = frame.bounding_box()
    visitor.page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    assert divider.input_value() == "25"


@needs_browser
def test_a_picture_is_pasted(visitor, tmp_path):
    content = list(save_picture(tmp_path / "small.png").read_bytes())
    visitor.page.evaluate(
        """content => {
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([new Uint8Array(content)], "pasted.png", { type: "image/png" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
        }""",
        content,
    )
    visitor.picture("Before").wait_for()
    visitor.sees("pasted")


@needs_browser
def test_an_example_takes_one_click(visitor):
    visitor.panel.locator("button.gallery-item").first.click()
    visitor.picture("Before").wait_for()


@needs_browser
def test_a_phone_scrolls_in_one_direction(browser, demo, tmp_path):
    width = 360
    visitor = Visitor(browser, demo, width=width, height=800)
    path = save_picture(tmp_path / "a picture with quite a long name, as cameras and people give them.png")
    for tab in ("Create", "Compare", "Enlarge"):
        visitor.open(tab)
        if tab != "Create":
            visitor.choose(path)
            visitor.press(tab)
            visitor.picture("After" if tab == "Enlarge" else "UPLiFT").wait_for()
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
    visitor.page.context.close()


@needs_browser
def test_nothing_is_fetched_from_elsewhere_and_every_field_has_a_name(visitor):
    for tab in ("Create", "Compare", "Enlarge"):
        visitor.open(tab)
        for role in ("textbox", "spinbutton", "slider", "radio", "button", "listbox"):
            for element in visitor.panel.get_by_role(role).filter(visible=True).all():
                assert element.evaluate(
                    "e => e.ariaLabel || e.labels?.length || e.innerText.trim() || e.querySelector('img[alt]')"
                ), element.evaluate("e => e.outerHTML")
    assert visitor.hosts == {"127.0.0.1"}


@needs_browser
def test_stable_diffusion_is_downloaded_on_a_click_behind_a_password(browser, tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        folder = hub.folder("somebody/diffusion")
        creator = UPLiFTTextToImagePipeline(
            **stable_diffusion_components(tmp_path / "tokenizer"),
            upsampler=make_upsampler(),
            requires_safety_checker=False,
        )
        creator.save_pretrained(folder)
        arguments = ("--text_to_image", "somebody/diffusion", "--upsampler", str(folder / "upsampler"))
        with running_demo(tmp_path / "running", *arguments, "--auth", "me:secret", HF_ENDPOINT=hub.url) as demo:
            assert httpx.get(f"{demo.url}/config").status_code == 401
            begun = time.perf_counter()
            for password in ("guess", "another"):
                wrong = httpx.post(f"{demo.url}/login", data={"username": "me", "password": password}, timeout=60)
                assert wrong.status_code == 400
            assert time.perf_counter() - begun > 2  # a second each
            page = browser.new_page()
            page.set_default_timeout(60_000)
            page.goto(demo.url)
            page.get_by_label("username").fill("me")
            page.get_by_label("password").fill("secret")
            page.get_by_role("button", name="Login").click()

            hub.broken = True
            page.get_by_role("tab", name="Create").click()
            page.get_by_text("is not on this machine and cannot be downloaded").wait_for()
            hub.broken = False
            page.get_by_role("tab", name="Compare").click()
            page.get_by_role("tab", name="Create").click()
            page.get_by_text(re.compile(r"Not on this machine yet: somebody/diffusion \([\d.]+ MB\)")).wait_for()
            page.get_by_role("button", name=re.compile(r"Download [\d.]+ MB")).click()
            page.get_by_text("Not on this machine yet").wait_for(state="hidden")
            page.get_by_label("Prompt", exact=True).fill("a cat")
            page.get_by_role("spinbutton", name="Steps").fill("1")
            page.get_by_role("button", name="Create", exact=True).click()
            page.get_by_role("img", name="Enlarged, 128 by 128 pixels").wait_for()
            page.close()
            folder = next((tmp_path / "running").glob("uplift-demo-*"))
            assert demo.stop(signal.SIGINT) == 0
            assert not folder.exists()


# Through the API


def test_twenty_visitors_all_get_their_own_picture(demo, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    paths = [save_picture(tmp_path / f"{i}.png", color=colour) for i, colour in enumerate(colours(20))]
    clients = [gradio_client.Client(demo.url, verbose=False) for _ in paths]
    clients[0].predict(files=[upload(paths[0])], amount=2, api_name="/enlarge")  # loads the model
    before = demo.memory_bytes()
    jobs = [client.submit(files=[upload(path)], amount=2, api_name="/enlarge") for client, path in zip(clients, paths)]
    results = [Path(job.result(120)[2]) for job in jobs]
    assert [result.name for result in results] == [path.name for path in paths]
    distances = np.abs(np.array([[mean_colour(a) - mean_colour(b) for b in paths] for a in results])).sum(axis=2)
    assert distances.argmin(axis=1).tolist() == list(range(20))
    assert demo.memory_bytes() < before + 100e6


def test_every_endpoint_has_a_name_and_named_parameters(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    names = {name: [entry["parameter_name"] for entry in info["parameters"]] for name, info in endpoints.items()}
    assert names == {
        "/enlarge": ["files", "by", "amount", "model", "auto_denoise", "denoise", "consistency"],
        "/compare": ["file", "scale", "model"],
        "/create": [
            "prompt", "negative_prompt", "steps", "guidance", "seed", "scale", "refinement", "model",
        ],
        "/download": ["model"],
    }  # fmt: skip


def call(demo, endpoint, values):
    """What a program without Gradio's client gets: the last message of an endpoint, and what it says."""
    address = f"{demo.url}/gradio_api/call/{endpoint}"
    event = httpx.post(address, json={"data": values}, timeout=60).json()["event_id"]
    lines = httpx.get(f"{address}/{event}", timeout=120).text.splitlines()
    return lines[-3:][0].removeprefix("event: "), json.loads(lines[-3:][1].removeprefix("data: "))


def test_every_bad_value_is_answered_with_a_sentence(demo):
    model = "Embedded"
    foreign = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    prompt = ["a cat", "", 2, 7.5, "1", 2, 0, "somebody/else"]
    wanted = ["scale", 2, model, True, 0, 1]
    cases = [
        ("enlarge", [None, *wanted], "Choose an image first."),
        ("enlarge", [[foreign], "scale", None, *wanted[2:]], "`amount` must be a number, got None."),
        ("enlarge", [[foreign], "scale", "2", *wanted[2:]], "`amount` must be a number, got '2'."),
        ("enlarge", [[foreign], "scale", [2], *wanted[2:]], "`amount` must be a number, got [2]."),
        ("enlarge", [[foreign], "depth", *wanted[1:]], "`by` must be one of scale, width, height, long_side, "),
        ("enlarge", [[foreign], "scale", 2, None, *wanted[3:]], "`model` must be one of Embedded, "),
        ("enlarge", [[foreign], "scale", 2, {}, *wanted[3:]], "`model` must be one of Embedded, "),
        ("enlarge", [[foreign], *wanted[:3], "yes", 0, 1], "`auto_denoise` must be true or false, got 'yes'."),
        ("enlarge", [[foreign], *wanted[:3], False, 2, 1], "`denoise` must be a number from 0 to 1, got 2."),
        ("enlarge", [[foreign], *wanted], "Files must be uploaded to this server"),
        ("enlarge", ["small.png", *wanted], "`files` must be an uploaded file, got 'small.png'."),
        ("enlarge", [], "7 values are needed, got 0."),
        ("enlarge", [[foreign] * 21, "scale", 2, "<b>", *wanted[3:]], "`model` must be one of Embedded, "),
        ("compare", [foreign, 3, model], "`scale` must be one of 2, 4, 8, got 3."),
        ("compare", [foreign, True, model], "`scale` must be one of 2, 4, 8, got True."),
        ("create", [None, *prompt[1:]], "`prompt` must be text, got None."),
        ("create", [*prompt[:7], None], "`model` must be text, got None."),
        ("create", [*prompt[:4], "-1", *prompt[5:]], "The seed must be a whole number"),
        ("create", prompt, "somebody/else is not on this machine yet. Download it first."),
        ("create", [*prompt[:4], "'<b>&", *prompt[5:]], 'got "\'‹b›&".'),  # not escaped, and harmless as HTML
    ]
    for endpoint, values, sentence in cases:
        event, message = call(demo, endpoint, values)
        assert event == "error", (values, message)
        assert sentence in message["error"], (values, message)


@pytest.mark.parametrize(
    ("by", "amount", "sentence"),
    [
        ("scale", 0.5, "`scale` must be from 1 to 16, got 0.5."),
        ("width", 90.5, "`width` must be a whole number, got 90.5."),
        (
            "width",
            20,
            "A width of 20 pixels requested for an image of 40 x 24 pixels, which is smaller than the image.",
        ),
        ("megapixels", 12, "12 megapixels requested for an image of 40 x 24 pixels, which is more than 16 times"),
    ],
)
def test_a_size_that_cannot_be_is_answered_with_a_sentence(client, tmp_path, by, amount, sentence):
    small = upload(save_picture(tmp_path / "small.png"))
    with pytest.raises(pytest.importorskip("gradio_client").exceptions.AppError, match=re.escape(sentence)):
        client.predict(files=[small], by=by, amount=amount, api_name="/enlarge")


def test_pictures_of_a_job_and_jobs_of_a_visitor_are_limited(demo, client, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    small = upload(save_picture(tmp_path / "small.png"))
    with pytest.raises(gradio_client.exceptions.AppError, match="At most 20 images at a time, got 21"):
        client.predict(files=[small] * 21, amount=2, api_name="/enlarge")
    large = upload(save_picture(tmp_path / "medium.png", LARGE))
    jobs = [client.submit(files=[large], amount=4, api_name="/enlarge") for _ in range(6)]
    errors = [error for job in jobs if (error := job.exception(120))]
    assert len(errors) == 2
    assert all("4 of your jobs are waiting already" in str(error) for error in errors)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, 200),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "[::1]:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Origin": "http://localhost:{port}"}, 200),
        ({"Host": "other.example:{port}"}, 403),
        ({"Host": "other.example:{port}", "Origin": "http://other.example:{port}"}, 403),
        ({"Host": "127.0.0.1.other.example"}, 403),
        ({"Origin": "http://other.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),  # another server of this machine
        ({"Origin": "null"}, 403),
    ],
)
def test_on_the_loopback_only_its_own_pages_are_answered(demo, headers, code):
    headers = {name: value.format(port=demo.url.rpartition(":")[2]) for name, value in headers.items()}
    answers = [
        httpx.get(f"{demo.url}/config", headers=headers),
        httpx.post(f"{demo.url}/gradio_api/upload", headers=headers, files={"files": ("a.png", b"x")}),
        httpx.options(f"{demo.url}/gradio_api/upload", headers={**headers, "Access-Control-Request-Method": "POST"}),
    ]
    assert [answer.status_code for answer in answers[:2]] == [code, code]
    assert (answers[2].status_code == 403) == (code == 403)
    if code == 403:
        assert not any("access-control-allow-origin" in answer.headers for answer in answers)


def test_a_job_that_is_cancelled_through_the_api_stops(client, demo, tmp_path):
    large = upload(save_picture(tmp_path / "large.png", LARGE))
    job = client.submit(files=[large], amount=8, api_name="/enlarge")
    while not (job.status().progress_data and "Enlarging" in (job.status().progress_data[0].desc or "")):
        assert not job.done()
        time.sleep(0.05)
    assert job.cancel()
    small = upload(save_picture(tmp_path / "small.png"))
    assert client.submit(files=[small], amount=2, api_name="/enlarge").result(60)
    assert not enlarged(demo, "large.png")


def test_no_file_of_the_package_or_the_working_folder_is_served(demo):
    ask = f"{demo.url}/gradio_api/file="
    assert httpx.get(f"{ask}{ROOT / 'examples' / 'coffee.jpg'}").status_code == 200
    for path in ("pyproject.toml", "examples/LICENSES.md", "uplift_diffusers/embedded/bundle/model_index.json"):
        assert httpx.get(f"{ask}{ROOT / path}").status_code == 403, path


def test_it_listens_on_this_machine_only(demo):
    connections = psutil.Process(demo.process.pid).net_connections()
    listening = {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_a_terminal_that_closes_leaves_no_files(tmp_path):
    with running_demo(tmp_path) as demo:
        folder = next(tmp_path.glob("uplift-demo-*"))
        assert demo.stop(signal.SIGHUP) == 0
        assert not folder.exists()
        assert "Traceback" not in demo.log.read_text()


def test_importing_the_command_line_costs_neither_torch_nor_gradio():
    code = "import sys, uplift_diffusers.demo.app; print({'torch', 'gradio', 'diffusers'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
