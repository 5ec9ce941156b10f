"""Probes learn what can be read linearly, and their scores are the usual ones."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from tests.predictive.parts import CHANNELS, TinyBackbone, tiny_uplift, write_scenes
from uplift_diffusers.evaluation.predictive.datasets import Classes, DepthImages, LabelledImages, pair_folders
from uplift_diffusers.evaluation.predictive.drift import compare_pooled, measure_drift
from uplift_diffusers.evaluation.predictive.peers import load_peer
from uplift_diffusers.evaluation.predictive.probes import (
    DepthProbe,
    FeatureSource,
    Schedule,
    SegmentationProbe,
    accuracy,
    count_pixels,
    count_segmentation,
    depth_loss,
    fit,
    intersection_over_union,
    measure_depth,
    score_counts,
    score_depth,
    segmentation_loss,
)
from uplift_diffusers.evaluation.predictive.upsamplers import UPLiFT

QUICK = Schedule(epochs=25, learning_rate=3e-2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def labelled(scenes, part):
    pairs = pair_folders(scenes / part / "images", scenes / part / "labels")
    return LabelledImages(pairs, Classes.in_order(3), size=48)


def depths(scenes, part):
    pairs = pair_folders(scenes / part / "images", scenes / part / "depths", suffixes=(".npy",))
    return DepthImages(pairs, size=48)


def random_labels(count=5, size=20, classes=6):
    rng = torch.Generator().manual_seed(0)
    label = torch.randint(0, classes - 1, (count, size, size), generator=rng)  # the last class never occurs
    predicted = torch.where(torch.rand(label.shape, generator=rng) < 0.6, label, (label + 1) % (classes - 1))
    label[torch.rand(label.shape, generator=rng) < 0.1] = 255
    return predicted, label


def test_scores_equal_torchmetrics():
    predicted, label = random_labels()
    counts = np.stack([count_pixels(*pair, 6) for pair in zip(predicted, label)])
    jaccard = MulticlassJaccardIndex(6, average="macro", ignore_index=255)(predicted, label)
    micro = MulticlassAccuracy(6, average="micro", ignore_index=255)(predicted, label)
    assert intersection_over_union(counts.sum(0)) == pytest.approx(100 * jaccard.item(), abs=1e-4)
    assert accuracy(counts.sum(0)) == pytest.approx(100 * micro.item(), abs=1e-4)


def test_intervals_hold_the_score_and_shrink_with_the_number_of_images():
    predicted, label = random_labels(count=40)
    counts = np.stack([count_pixels(*pair, 6) for pair in zip(predicted, label)])
    few, many = (score_counts(counts[:n], intersection_over_union, seed=0) for n in (10, 40))
    for estimate in (few, many):
        assert estimate.low < estimate.value < estimate.high
    assert many.high - many.low < 0.75 * (few.high - few.low)  # 0.5 in the limit
    assert score_counts(counts, intersection_over_union, seed=0) == many


def test_differences_are_taken_image_by_image():
    predicted, label = random_labels(count=20)
    counts = np.stack([count_pixels(*pair, 6) for pair in zip(predicted, label)])
    same = score_counts(counts, accuracy, seed=0, other=counts)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    perfect = np.stack([count_pixels(torch.where(x == 255, 0, x), x, 6) for x in label])
    better = score_counts(perfect, accuracy, seed=0, other=counts)
    assert better.value == pytest.approx(float(100 - accuracy(counts.sum(0))))
    assert 0 < better.low < better.value < better.high


def test_ignored_pixels_have_no_influence_on_the_loss():
    logits = torch.randn(1, 3, 4, 4)
    label = torch.zeros(1, 4, 4, dtype=torch.long)
    label[0, :2] = 255
    loss = segmentation_loss(logits, label)
    assert loss == pytest.approx(F.cross_entropy(logits[:, :, 2:], label[:, 2:]).item(), rel=1e-6)
    assert segmentation_loss(logits, torch.full_like(label, 255)) == 0


def test_a_probe_learns_what_colours_say(scenes):
    source = FeatureSource(TinyBackbone(), load_peer("bilinear", channels=CHANNELS))
    probe = SegmentationProbe(CHANNELS, 3)
    fit(probe, labelled(scenes, "train"), source, segmentation_loss, QUICK)
    counts = count_segmentation(probe, labelled(scenes, "val"), source, num_classes=3)
    assert counts.shape == (4, 3, 3)
    assert counts[:, 2].sum() == 4 * 48 * 48
    assert intersection_over_union(counts.sum(0)) > 75  # the rest is at the edges of 8-pixel patches


def test_the_cosine_runs_once_over_all_steps(scenes, monkeypatch):
    rates = []

    class Recorded(torch.optim.lr_scheduler.CosineAnnealingLR):
        def step(self, *args):
            super().step(*args)
            rates.append(self.get_last_lr()[0])

    monkeypatch.setattr(torch.optim.lr_scheduler, "CosineAnnealingLR", Recorded)
    source = FeatureSource(TinyBackbone(), None)
    schedule = Schedule(epochs=4, learning_rate=1e-2)
    fit(SegmentationProbe(CHANNELS, 3), labelled(scenes, "train"), source, segmentation_loss, schedule)
    assert len(rates) == 1 + 4 * 3  # one at the beginning
    assert rates[0] == 1e-2
    assert rates == sorted(rates, reverse=True)
    assert rates[6] == pytest.approx(0.5e-2)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_images_and_targets_are_flipped_together(scenes):
    """Each column has a value of its own, in the image and in the target."""
    columns = torch.arange(8.0).expand(8, 8)
    pairs = [(columns.expand(3, 8, 8) / 8, columns)] * 16
    flips = []

    def loss(features, target):
        assert torch.equal(features[:, 0] * 8, target)
        flips.extend((target[:, 0, 0] == 7).tolist())
        return features.sum() * 0

    class Pixels(FeatureSource):
        def __call__(self, image):
            return image

    keep = torch.nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        keep.weight.copy_(torch.eye(3)[:, :, None, None])
    fit(keep, pairs, Pixels(TinyBackbone(), None), loss, Schedule(epochs=4, learning_rate=0))
    assert 0.3 < np.mean(flips) < 0.7


def test_fitting_twice_gives_the_same_probe(scenes):
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        probe = SegmentationProbe(CHANNELS, 3)
        source = FeatureSource(TinyBackbone(), load_peer("nearest", channels=CHANNELS))
        fit(probe, labelled(scenes, "train"), source, segmentation_loss, Schedule(epochs=2))
        weights.append(probe.weight.detach().clone())
    assert torch.equal(*weights)


def test_depth_probes_give_the_mean_of_their_bins():
    probe = DepthProbe(4)
    with torch.no_grad():
        probe.conv.weight.zero_()
        probe.conv.bias.zero_()
        assert torch.allclose(probe(torch.zeros(1, 4, 2, 3)), torch.full((1, 2, 3), (1e-3 + 10) / 2), atol=1e-4)
        probe.conv.bias[10] = 1e6
        assert torch.allclose(probe(torch.zeros(1, 4, 2, 3)), probe.bins[10].expand(1, 2, 3), atol=1e-3)


def test_depth_loss_of_a_wrong_scale_is_its_logarithm():
    """Without gradients or variance the root of 0.15 mean^2 is left."""
    target = torch.full((1, 8, 8), 4.0)
    assert depth_loss(target * 1.5, target) == pytest.approx(math.sqrt(0.15) * math.log(1.5), rel=1e-3)
    assert depth_loss(target, target) < 1e-5


def test_depth_loss_ignores_pixels_without_a_depth():
    torch.manual_seed(0)
    target, depth = 1 + torch.rand(1, 8, 8), 1 + torch.rand(1, 8, 8)
    target[0, :, 4:] = 0
    changed = depth.clone()
    changed[0, :, 4:] = 9
    assert depth_loss(depth, target) == depth_loss(changed, target)
    assert depth_loss(depth, torch.zeros_like(target)) == 0


def test_gradients_of_depth_are_compared_between_neighbours():
    target = torch.ones(1, 16, 16)
    depth = torch.exp(torch.arange(16) / 20.0).expand(1, 16, 16)  # the logarithm grows by 0.05 a column
    difference = torch.log(depth + 1e-3) - math.log(1 + 1e-3)
    variance, mean = torch.var_mean(difference)
    steps = np.mean([0.05 * stride for stride in (1, 2, 4, 8)])
    expected = (variance + 0.15 * mean**2).sqrt() + 0.5 * steps
    assert depth_loss(depth, target) == pytest.approx(expected.item(), rel=1e-3)


def test_depth_scores_of_known_errors():
    target = torch.full((4, 4), 2.0)
    target[0] = 0  # no depth
    depth = target.clone()
    assert score_depth(depth, target, aligned=False) == (100, 0)
    depth[1] = 2.6  # a third of the pixels, beyond 1.25
    delta1, rmse = score_depth(depth, target, aligned=False)
    assert delta1 == pytest.approx(100 * 2 / 3)
    assert rmse == pytest.approx(math.sqrt(0.36 / 3), rel=1e-5)
    assert score_depth(depth, torch.zeros(4, 4), aligned=False) is None


def test_aligned_scores_do_not_depend_on_scale_and_shift():
    torch.manual_seed(0)
    target = 1 + torch.rand(8, 8)
    depth = target + 0.2 * torch.rand(8, 8)
    delta1, rmse = score_depth(depth, target, aligned=True)
    assert score_depth(3 * depth - 7, target, aligned=True) == pytest.approx((delta1, rmse), rel=1e-5)
    assert score_depth(5 * target + 1, target, aligned=True) == pytest.approx((100, 0), abs=1e-5)
    assert rmse < score_depth(depth, target, aligned=False)[1]


def test_the_cls_token_has_length_one_behind_every_position():
    source = FeatureSource(TinyBackbone(), load_peer("nearest", channels=CHANNELS), with_cls=True)
    features = source(torch.rand(2, 3, 48, 48))
    assert features.shape == (2, 2 * CHANNELS, 48, 48)
    assert torch.allclose(features[:, CHANNELS:].norm(dim=1), torch.ones(2, 48, 48))
    source.backbone = TinyBackbone(has_cls_token=False)
    assert source(torch.rand(2, 3, 48, 48)).shape == (2, CHANNELS, 48, 48)


def test_a_depth_probe_learns_depths_that_colours_tell(scenes):
    source = FeatureSource(TinyBackbone(), load_peer("bilinear", channels=CHANNELS), with_cls=True)
    torch.manual_seed(0)
    probe = DepthProbe(2 * CHANNELS)
    before = measure_depth(probe, depths(scenes, "val"), source, aligned=False)
    fit(probe, depths(scenes, "train"), source, depth_loss, Schedule(epochs=15, learning_rate=3e-2))
    after = measure_depth(probe, depths(scenes, "val"), source, aligned=False)
    assert after["rmse"].mean() < 0.4 * before["rmse"].mean()
    assert after["delta1"].mean() > 60  # the rest is at the edges, which the tokens do not tell


def test_nearest_features_do_not_drift_and_blurred_ones_do(scenes):
    torch.manual_seed(0)
    probe = SegmentationProbe(CHANNELS, 3)
    data = labelled(scenes, "val")
    nearest, bilinear, uplift = (
        measure_drift(TinyBackbone(), upsampler, probe, data, num_steps=2, num_classes=3)
        for upsampler in (
            load_peer("nearest", channels=CHANNELS),
            load_peer("bilinear", channels=CHANNELS),
            UPLiFT(tiny_uplift()),
        )
    )
    for steps in (nearest, bilinear, uplift):
        assert [len(step.cosine) for step in steps] == [4, 4, 4]
        assert steps[0].cosine == pytest.approx(1)
        assert steps[0].relative_error == pytest.approx(0)
    assert nearest[2].cosine == pytest.approx(1)
    assert nearest[2].relative_error == pytest.approx(0, abs=1e-6)
    assert bilinear[1].relative_error.mean() > 0.01
    assert uplift[2].relative_error.mean() > uplift[1].relative_error.mean() > 0.01


def test_pooled_features_are_compared_by_direction_and_by_distance():
    tokens = torch.randn(1, 5, 3, 4)
    doubled = 2 * tokens.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert compare_pooled(tokens, doubled) == pytest.approx((1, 1))
