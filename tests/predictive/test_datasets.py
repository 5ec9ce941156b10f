"""Data sets in their published layouts, and one sentence for each thing that can be wrong with them."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.predictive.parts import write_scenes
from uplift_diffusers.evaluation.predictive.datasets import (
    DATASETS,
    Classes,
    DepthImages,
    LabelledImages,
    open_dataset,
    pair_folders,
    square,
)

LAYOUTS = {
    "voc": ("VOCdevkit/VOC2012/JPEGImages/a.jpg", "VOCdevkit/VOC2012/SegmentationClass/a.png"),
    "ade20k": ("ADEChallengeData2016/images/validation/a.jpg", "ADEChallengeData2016/annotations/validation/a.png"),
    "cityscapes": ("leftImg8bit/val/ulm/a_leftImg8bit.png", "gtFine/val/ulm/a_gtFine_labelIds.png"),
    "cocostuff27": ("images/val2017/a.jpg", "annotations/val2017/a.png"),
    "camvid": ("test/a.png", "testannot/a.png"),
}


def write_pair(folder, image, label, values, *, palette=False):
    values = np.asarray(values, np.uint8)
    for path, pixels in ((image, np.zeros((*values.shape, 3), np.uint8)), (label, values)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels)
        if palette and path == label:
            picture = Image.fromarray(pixels, mode="P")
            picture.putpalette(list(range(256)) * 3)
        picture.save(folder / path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts_are_found(name, tmp_path):
    image, label = LAYOUTS[name]
    values = np.full((30, 40), 7)
    values[:, 20:] = 255 if name != "camvid" else 11
    write_pair(tmp_path, image, label, values, palette=name == "voc")
    if name == "voc":
        lists = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation"
        lists.mkdir(parents=True)
        (lists / "val.txt").write_text("a\n")
    data = open_dataset(name, tmp_path, "val", size=30)
    picture, classes = data[0]
    assert picture.shape == (3, 30, 30)
    expected = {"cityscapes": 0, "cocostuff27": 11}.get(name, 7)  # road; a train is a vehicle
    assert classes.unique().tolist() == [expected, 255]


def test_classes_are_those_of_the_data_sets():
    counts = {name: classes().count for name, (_, classes) in DATASETS.items()}
    assert counts == {"voc": 21, "ade20k": 151, "cityscapes": 19, "cocostuff27": 27, "camvid": 11}
    coco = DATASETS["cocostuff27"][1]().of_value
    # person, bicycle, toothbrush, sky (clouds), water (sea), wood
    assert coco[[0, 1, 89, 105, 154, 181]].tolist() == [9, 11, 4, 23, 26, 24]
    assert np.bincount(coco[:182]).tolist() == [
        6,
        6,
        10,
        10,
        8,
        8,
        8,
        10,
        6,
        1,
        10,
        8,
        2,
        6,
        4,
        11,
        4,
        11,
        7,
        2,
        6,
        11,
        9,
        2,
        6,
        5,
        5,
    ]


def test_squares_scale_the_short_side_and_crop_the_centre():
    image = torch.zeros(3, 40, 90)
    image[:, :, 45] = 1
    cropped = square(image, 20)
    assert cropped.shape == (3, 20, 20)
    assert cropped[0, 10].argmax() in (9, 10)
    assert square(image.mT, 20).shape == (3, 20, 20)


def test_labels_are_not_mixed_when_they_are_scaled(tmp_path):
    write_scenes(tmp_path, train=1, val=1)
    pairs = pair_folders(tmp_path / "train/images", tmp_path / "train/labels")
    _, label = LabelledImages(pairs, Classes.in_order(3), size=37)[0]
    assert set(label.unique().tolist()) <= {0, 1, 2}
    _, depth = DepthImages(pair_folders(tmp_path / "train/images", tmp_path / "train/depths", suffixes=(".npy",)))[0]
    assert set(depth.unique().tolist()) <= {1.0, 2.0, 4.0}


def test_depths_of_16_bit_files_are_divided_by_the_units(tmp_path):
    write_scenes(tmp_path, train=1, val=1)
    depths = np.full((48, 64), 2560, np.uint16)
    depths[0] = 0
    (tmp_path / "depths").mkdir()
    Image.fromarray(depths).save(tmp_path / "depths" / "scene0.png")
    pairs = pair_folders(tmp_path / "train/images", tmp_path / "depths")
    _, depth = DepthImages(pairs, units_per_metre=256, size=48)[0]
    assert depth.unique().tolist() == [0.0, 10.0]


@pytest.mark.parametrize("value", [3, 200])
def test_labels_out_of_range_are_refused(value, tmp_path):
    write_pair(tmp_path, "images/a.png", "labels/a.png", np.full((20, 20), value))
    data = LabelledImages(pair_folders(tmp_path / "images", tmp_path / "labels"), Classes.in_order(3), size=20)
    with pytest.raises(ValueError, match=f"labels of the 3 classes, got the value {value}"):
        data[0]


def test_labels_in_colours_are_refused(tmp_path):
    write_pair(tmp_path, "images/a.png", "labels/b.png", np.zeros((20, 20)))
    (tmp_path / "images" / "a.png").rename(tmp_path / "labels" / "a.png")
    (tmp_path / "labels" / "b.png").rename(tmp_path / "images" / "a.png")
    data = LabelledImages(pair_folders(tmp_path / "images", tmp_path / "labels"), Classes.in_order(3), size=20)
    with pytest.raises(ValueError, match="one whole number per pixel"):
        data[0]


def test_labels_of_another_size_are_refused(tmp_path):
    write_pair(tmp_path, "images/a.png", "other/a.png", np.zeros((20, 20)))
    write_pair(tmp_path, "other/b.png", "labels/a.png", np.zeros((20, 21)))
    data = LabelledImages(pair_folders(tmp_path / "images", tmp_path / "labels"), Classes.in_order(3), size=20)
    with pytest.raises(ValueError, match="size of its photograph"):
        data[0]


def test_suffixes_of_targets_may_be_upper_case(tmp_path):
    write_scenes(tmp_path, train=1, val=1)
    for part, suffix in (("images", "PNG"), ("labels", "PNG"), ("depths", "NPY")):
        (file,) = (tmp_path / "train" / part).iterdir()
        file.rename(file.with_suffix(f".{suffix}"))
    for part, suffix in (("labels", ".png"), ("depths", ".npy")):
        pairs = pair_folders(tmp_path / "train/images", tmp_path / "train" / part, suffixes=(suffix,))
        data = DepthImages(pairs) if part == "depths" else LabelledImages(pairs, Classes.in_order(3))
        assert len(data[0][1].unique()) == 3


def test_folders_that_do_not_fit_are_refused_in_one_sentence(tmp_path):
    write_scenes(tmp_path, train=2, val=3)
    with pytest.raises(FileNotFoundError, match="got none for 1 of 3, the first of them scene2"):
        pair_folders(tmp_path / "val/images", tmp_path / "train/labels")
    with pytest.raises(FileNotFoundError, match=r"got none that matches, such as scene0\.tif"):
        pair_folders(tmp_path / "val/images", tmp_path / "val/labels", suffixes=(".tif",))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        pair_folders(tmp_path / "val/images", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="must hold photographs"):
        pair_folders(tmp_path / "empty", tmp_path / "val/labels")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_of_another_layout_is_refused(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="published layout"):
        open_dataset(name, tmp_path, "val")


def test_an_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`dataset` must be one of"):
        open_dataset("pascal", tmp_path, "val")
