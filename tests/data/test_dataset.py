"""Photographs from folders, tar shards and datasets: the same pixels, in an order that follows from the seed."""

import io
import re
import shutil
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from uplift_diffusers.data.dataset import Crop, EpochSampler, Photographs, StreamedPhotographs, decode
from uplift_diffusers.data.sources import FolderSource, TarSource, find_images, load_dataset, open_source
from uplift_diffusers.training.config import TrainingConfig
from uplift_diffusers.training.train import main


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for index in range(7):
        blocks = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        (folder / f"set-{index % 2}").mkdir(exist_ok=True)
        path = folder / f"set-{index % 2}" / f"{index}.{('png', 'jpg')[index % 2]}"
        blocks.resize((120 + index, 90), Image.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module")
def shards(photographs, tmp_path_factory):
    """The same files in two tars, not in order, with labels beside them."""
    folder = tmp_path_factory.mktemp("shards")
    paths = sorted(photographs.rglob("*.*"), reverse=True)
    for number, part in enumerate((paths[:3], paths[3:])):
        with tarfile.open(folder / f"{number:03}.tar", "w") as archive:
            for path in part:
                archive.add(path, f"./{path.relative_to(photographs)}")
                label = tarfile.TarInfo(f"{path.stem}.txt")
                archive.addfile(label, io.BytesIO())
    return folder


@pytest.fixture(scope="module")
def stream(photographs, tmp_path_factory):
    """The same photographs as a stream of three tar shards, all of them JPEG."""
    folder = tmp_path_factory.mktemp("stream")
    for number in range(3):
        with tarfile.open(folder / f"{number:03}.tar", "w") as archive:
            for index, path in list(enumerate(find_images(photographs)))[number::3]:
                Image.open(path).save(folder / f"{index}.jpg")
                archive.add(folder / f"{index}.jpg", f"{index}.jpg")
                (folder / f"{index}.jpg").unlink()
    return load_dataset(str(folder), image_column="jpg", streaming=True)


@pytest.fixture(scope="module")
def parquet(photographs, tmp_path_factory):
    """The same files as a dataset of several parquet shards."""
    folder = tmp_path_factory.mktemp("parquet")
    paths = [str(path) for path in find_images(photographs)]
    dataset = datasets.Dataset.from_dict({"photo": paths, "n": range(len(paths))})
    dataset = dataset.cast_column("photo", datasets.Image())
    for number in range(3):
        dataset.shard(3, number, contiguous=True).to_parquet(folder / f"train-{number:05}-of-00003.parquet")
    return folder


def damage(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def crops_of(source, **settings):
    photographs = Photographs(source, Crop(resolution=32, **settings))
    return [photographs[pair] for pair, _ in zip(EpochSampler(len(photographs), seed=3), range(10))]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


def test_crops_follow_from_seed_epoch_and_index_alone(photographs):
    def dataset(**settings):
        return Photographs(FolderSource(photographs), Crop(resolution=32, max_reduction=2.0, **settings))

    assert torch.equal(dataset(seed=1)[2, 3], dataset(seed=1)[2, 3])
    assert not torch.equal(dataset(seed=1)[2, 3], dataset(seed=1)[3, 3])
    assert not torch.equal(dataset(seed=1)[2, 3], dataset(seed=2)[2, 3])
    assert dataset()[0, 0].shape == (3, 32, 32)
    assert dataset()[0, 0].dtype == torch.uint8


def test_crops_may_be_larger_than_the_photographs(photographs):
    for random_crop in (True, False):
        dataset = Photographs(FolderSource(photographs), Crop(resolution=128, random_crop=random_crop))
        assert dataset[0, 0].shape == (3, 128, 128)


def test_centre_squares_are_flipped_half_of_the_time_if_asked(photographs):
    plain = Photographs(FolderSource(photographs), Crop(resolution=32, random_crop=False))
    flipping = Photographs(FolderSource(photographs), Crop(resolution=32, random_crop=False, augment_flip=True))
    assert torch.equal(plain[0, 2], plain[9, 2])
    flipped = [torch.equal(flipping[epoch, 2], plain[0, 2].flip(-1)) for epoch in range(40)]
    kept = [torch.equal(flipping[epoch, 2], plain[0, 2]) for epoch in range(40)]
    assert all(a != b for a, b in zip(flipped, kept))
    assert 8 <= sum(flipped) <= 32


def test_an_epoch_shows_every_photograph_once_whatever_the_start_or_the_processes():
    whole = [pair for pair, _ in zip(EpochSampler(5, seed=3), range(15))]
    for epoch in range(3):
        assert sorted(index for e, index in whole if e == epoch) == list(range(5))
    resumed = EpochSampler(5, seed=3, start=7)
    assert [pair for pair, _ in zip(resumed, range(8))] == whole[7:]
    split = [
        [pair for pair, _ in zip(EpochSampler(5, seed=3, rank=rank, world_size=2), range(7))] for rank in range(2)
    ]
    assert [pair for pairs in zip(*split) for pair in pairs] == whole[:14]


def test_tar_shards_and_datasets_give_the_crops_of_the_folder(photographs, shards, parquet, tmp_path):
    expected = crops_of(open_source(photographs))
    assert same(crops_of(open_source(shards / "*.tar")), expected)
    assert same(crops_of(open_source(dataset_name=str(parquet), image_column="photo")), expected)
    on_disk = datasets.load_dataset(str(parquet), split="train")
    on_disk.save_to_disk(tmp_path / "saved")
    assert same(crops_of(open_source(dataset_name=str(tmp_path / "saved"), image_column="photo")), expected)
    assert same(crops_of(open_source(dataset_name=str(photographs))), expected)  # as `datasets` reads image folders


def test_one_tar_is_a_source_too(shards):
    assert len(TarSource(str(shards / "000.tar"))) == 3
    assert len(TarSource(str(shards / "00[01].tar"))) == 7


def test_unreadable_files_are_left_out_and_named(photographs, shards, tmp_path):
    for path in find_images(photographs):
        shutil.copy(path, tmp_path)
    expected = crops_of(FolderSource(tmp_path))
    (tmp_path / "00.jpg").write_text("<html>")
    (tmp_path / "empty.png").touch()
    source = FolderSource(tmp_path)
    assert same(crops_of(source), expected)
    assert [problem.removeprefix(f"{tmp_path}/") for problem in source.unreadable] == [
        "00.jpg: not an image, or an unsupported format.",
        "empty.png: the file is empty.",
    ]
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for path in find_images(tmp_path):
            archive.add(path, path.name)
    source = TarSource(str(tmp_path / "all.tar"))
    assert same(crops_of(source), expected)
    assert [problem.removeprefix(f"{tmp_path}/") for problem in source.unreadable] == [
        "all.tar/00.jpg: not an image, or an unsupported format.",
        "all.tar/empty.png: not an image, or an unsupported format.",
    ]


def test_the_next_photograph_takes_the_place_of_one_damaged_further_on(photographs, tmp_path, caplog):
    for index, path in enumerate(find_images(photographs)):
        shutil.copy(path, tmp_path / f"{index}{path.suffix}")
    expected = Photographs(FolderSource(tmp_path), Crop(resolution=32, random_crop=False))
    expected = [expected[0, index] for index in range(7)]
    damage(tmp_path / "2.png")
    damage(tmp_path / "6.jpg")
    actual = Photographs(FolderSource(tmp_path), Crop(resolution=32, random_crop=False))
    assert torch.equal(actual[0, 2], expected[3])
    assert torch.equal(actual[0, 6], expected[0])
    actual[1, 2]
    first, second = caplog.messages  # each is logged once
    assert re.search(r"2\.png: the image is damaged or cut off .* \S+3\.png takes its place", first)
    assert re.search(r"6\.jpg: .* \S+0\.png takes its place", second)


def test_where_no_photograph_can_be_read_it_is_said_so(photographs, tmp_path):
    shutil.copy(find_images(photographs)[0], tmp_path / "cut.png")
    damage(tmp_path / "cut.png")
    dataset = Photographs(FolderSource(tmp_path), Crop(resolution=32))
    with pytest.raises(ValueError, match=r"None of the 1 photographs .*cut\.png: the image is damaged or cut off"):
        dataset[0, 0]


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No images below"):
        find_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_images(tmp_path / "missing")


def test_the_command_ends_with_one_line_where_there_is_nothing_to_train_on(tmp_path, shards, parquet, capsys):
    (tmp_path / "bad").mkdir()
    for name in "ab":
        (tmp_path / "bad" / f"{name}.jpg").write_text("<html>")
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.add(tmp_path / "bad")
    (tmp_path / "empty").mkdir()
    whole = (shards / "000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 3])
    for flags, message in (
        (["--train_data_dir", tmp_path / "empty"], "No images below"),
        (["--train_data_dir", tmp_path / "bad"], r"None of the files below"),
        (["--train_data_dir", tmp_path / "bad.tar"], "No images that can be read in"),
        (["--train_data_dir", tmp_path / "cut.tar"], "must be a whole, uncompressed tar file"),
        (["--train_data_dir", tmp_path / "no-*.tar"], "No tar files match"),
        (["--dataset_name", tmp_path / "none"], "none"),
        (["--dataset_name", parquet], "`image_column` must be a column of"),
        (["--dataset_name", parquet, "--image_column", "n"], "`image_column` must hold images, got 'n'"),
    ):
        assert main([*map(str, flags), "--output_dir", str(tmp_path / "run")]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error
        assert not error.startswith(" ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Either `train_data_dir` or `dataset_name` must be given"),
        ({"train_data_dir": "a", "dataset_name": "b"}, "Either `train_data_dir` or `dataset_name` must be given"),
        ({"train_data_dir": "a", "streaming": True}, "`streaming` must be off without `dataset_name`"),
        ({"dataset_name": "a", "streaming": True, "dataloader_num_workers": 1}, "must be 0 with `streaming`"),
        (
            {"dataset_name": "a", "streaming": True, "num_train_epochs": 2, "max_train_steps": None},
            "`streaming` must be used with steps, not epochs",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(output_dir="out", **settings)


def take(stream, count, *, start=0, rank=0, world_size=1, **settings):
    photographs = StreamedPhotographs(stream, "jpg", Crop(resolution=32, **settings), seed=5)
    photographs.seek(start, rank=rank, world_size=world_size)
    return [crop for crop, _ in zip(photographs, range(count))]


def test_a_stream_shows_every_photograph_once_an_epoch_in_an_order_of_its_own(stream):
    shown = [crop.numpy().tobytes() for crop in take(stream, 21, random_crop=False)]
    epochs = [shown[:7], shown[7:14], shown[14:]]
    assert len(set(shown)) == 7
    assert all(set(epoch) == set(shown) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[1] != epochs[2]


@pytest.mark.parametrize("start", [1, 6, 7, 8, 14, 17])
def test_a_stream_goes_on_where_it_was(stream, start):
    expected = take(stream, 24)
    assert same(take(stream, 24 - start, start=start), expected[start:])


def test_processes_share_a_stream(stream):
    expected = take(stream, 16)
    split = [take(stream, 8, rank=rank, world_size=2) for rank in range(2)]
    assert same([crop for pair in zip(*split) for crop in pair], expected)


def test_a_damaged_photograph_of_a_stream_is_replaced_by_the_next(stream, caplog):
    def cut(record):
        content, path = record["jpg"]["bytes"], record["jpg"]["path"]
        kept = len(content) // 2 if path.endswith(("1.jpg", "4.jpg")) else len(content)
        return {"jpg": {"bytes": content[:kept], "path": path}}

    damaged = stream.map(cut)
    expected = take(stream, 21, random_crop=False)
    actual = take(damaged, 21, random_crop=False)
    assert len(caplog.messages) == 2
    assert all("the image is damaged or cut off" in message for message in caplog.messages)
    replaced = [index for index in range(21) if not torch.equal(actual[index], expected[index])]
    assert len(replaced) == 6
    for index in replaced[:4]:
        following = next(place for place in range(index, 21) if place not in replaced)
        assert torch.equal(actual[index], expected[following])
    for rank in range(2):
        caplog.clear()
        assert same(take(damaged, 10, rank=rank, world_size=2, random_crop=False), actual[rank:20:2])
        assert "damaged" in caplog.messages[0]


def test_a_stream_of_damaged_photographs_ends_with_an_error(stream, caplog):
    damaged = stream.map(lambda record: {"jpg": {"bytes": b"<html>", "path": record["jpg"]["path"]}})
    with pytest.raises(ValueError, match="None of the photographs of the stream can be read"):
        take(damaged, 1)
    assert "not an image" in caplog.messages[0]


def test_every_mode_becomes_rgb():
    def png(array, **settings):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG", **settings)
        return np.asarray(decode(buffer.getvalue()))

    grey16 = np.array([[0, 257 * 100], [257 * 100 + 200, 65535]], dtype=np.uint16)
    assert (png(grey16)[..., 0] == [[0, 100], [101, 255]]).all()
    half = np.full((2, 2, 4), (200, 0, 0, 128), dtype=np.uint8)
    assert abs(png(half)[0, 0].astype(int) - (227, 127, 127)).max() <= 1  # laid on white
    assert (png(np.array([[10, 20]], dtype=np.uint8))[0, 1] == 20).all()
    buffer = io.BytesIO()
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(buffer, "TIFF")
    with pytest.raises(ValueError, match="floating-point pixels"):
        decode(buffer.getvalue())
