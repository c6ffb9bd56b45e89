"""Every public layout is read to the same images, and broken files are told apart from missing ones."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil
import sys

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from ghn_client.errors import FileError, InvalidOptionError, MissingExtraError
from ghn_client.finetune.images import ImageBatches, ImageSet, load_images, read_images
from tests.shared_data import shared_path

IMAGES = numpy.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=numpy.uint8)
LABELS = [0, 1, 2, 1, 0, 2]
NAMES = ["ant", "bee", "cat"]


def encode_png(image: numpy.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0) if image.shape[0] == 3 else image[0]).save(file, format="PNG")
    return file.getvalue()


def write_parquet(folder, split="train", blobs=None, label_column="label", names=NAMES):
    blobs = blobs or [encode_png(image) for image in IMAGES]
    table = pyarrow.table(
        {"image": [{"bytes": blob, "path": None} for blob in blobs], label_column: LABELS[: len(blobs)]}
    )
    features = {"info": {"features": {"label": {"names": names}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(table, folder / f"{split}.parquet")


def write_cifar(folder):
    home = folder / "cifar-10-batches-py"
    home.mkdir(parents=True)
    for number, rows in enumerate((slice(0, 3), slice(3, 6)), start=1):
        batch = {b"data": IMAGES[rows].reshape(-1, 3072), b"labels": LABELS[rows]}
        (home / f"data_batch_{number}").write_bytes(pickle.dumps(batch))
    (home / "batches.meta").write_bytes(pickle.dumps({b"label_names": [name.encode() for name in NAMES]}))


def write_idx(folder, compress=True, prefix="train"):
    folder.mkdir(exist_ok=True)
    images = IMAGES[:, 0, :28, :28]
    files = {
        f"{prefix}-images-idx3-ubyte": bytes((0, 0, 8, 3))
        + numpy.array(images.shape, ">u4").tobytes()
        + images.tobytes(),
        f"{prefix}-labels-idx1-ubyte": bytes((0, 0, 8, 1)) + numpy.array([6], ">u4").tobytes() + bytes(LABELS),
    }
    for name, content in files.items():
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def write_folder(folder, split="train", names=NAMES):
    for image, label, number in zip(IMAGES, LABELS, range(6), strict=True):
        home = folder / split / names[label]
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{number}.png").write_bytes(encode_png(image))


@pytest.mark.parametrize("write", [write_parquet, write_cifar])
def test_layouts_in_file_order_give_the_same_images(tmp_path, write):
    write(tmp_path)
    read = read_images(tmp_path, "train")
    assert torch.equal(read.images, torch.from_numpy(IMAGES))
    assert read.labels.tolist() == LABELS
    assert read.class_names == tuple(NAMES)


def test_image_folder_names_its_classes(tmp_path):
    write_folder(tmp_path)
    read = read_images(tmp_path, "train")
    assert read.class_names == tuple(NAMES)
    known = {image.tobytes(): label for image, label in zip(IMAGES, LABELS, strict=True)}
    assert [known.pop(image.numpy().tobytes()) for image in read.images] == read.labels.tolist()
    assert not known


@pytest.mark.parametrize("write", [write_folder, write_parquet])
def test_images_that_are_stored_class_by_class_are_mixed(tmp_path, monkeypatch, write):
    """The first of them are taken as a part of the set, which would have the first classes alone."""
    monkeypatch.setattr(sys.modules[__name__], "LABELS", sorted(LABELS))
    write(tmp_path)
    assert read_images(tmp_path, "train").labels.tolist() != sorted(LABELS)


def test_held_out_images_have_the_labels_of_their_classes_in_training(tmp_path):
    write_folder(tmp_path)
    write_folder(tmp_path, "val")
    shutil.rmtree(tmp_path / "val" / "bee")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "val" / "cat" / "._2.png").write_bytes(b"what a Mac leaves behind")
    training, held_out = load_images(tmp_path, image_size=8)
    assert training.class_names == held_out.class_names == tuple(NAMES)
    assert held_out.labels.tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("write", "names"),
    [(write_folder, ["ant", "bee", "dog"]), (write_parquet, ["ant", "bee", "dog"]), (write_parquet, [*NAMES, "dog"])],
)
def test_held_out_images_of_other_classes_are_refused(tmp_path, write, names):
    write(tmp_path)
    write(tmp_path, "val", names=names)
    with pytest.raises(FileError):
        load_images(tmp_path, image_size=8)


@pytest.mark.parametrize("compress", [True, False])
def test_idx_files_are_gray(tmp_path, compress):
    write_idx(tmp_path, compress)
    read = read_images(tmp_path, "train")
    assert read.images.shape == (6, 1, 28, 28)
    assert torch.equal(read.images[:, 0], torch.from_numpy(IMAGES[:, 0, :28, :28]))


def test_images_come_in_the_wanted_format(tmp_path):
    write_idx(tmp_path)
    read = read_images(tmp_path, "train", image_size=16, channels=3)
    assert read.images.shape == (6, 3, 16, 16)


def test_gray_images_in_a_colour_set_become_colour(tmp_path):
    gray = encode_png(IMAGES[:1, 0])
    write_parquet(tmp_path, blobs=[encode_png(IMAGES[0]), gray])
    assert read_images(tmp_path, "train").images.shape == (2, 3, 32, 32)


def test_a_missing_split_is_none(tmp_path):
    write_parquet(tmp_path)
    assert read_images(tmp_path, "test") is None


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(InvalidOptionError):
        read_images(tmp_path / "nothing", "train")


def test_an_unknown_split_is_an_error(tmp_path):
    with pytest.raises(InvalidOptionError):
        read_images(tmp_path, "holiday")


def test_no_parquet_inside_is_an_error(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"these are no columns")
    with pytest.raises(FileError):
        read_images(tmp_path, "train")


def test_a_missing_column_is_an_error(tmp_path):
    write_parquet(tmp_path, label_column="answer")
    with pytest.raises(FileError):
        read_images(tmp_path, "train")


def test_an_image_that_is_cut_off_is_an_error(tmp_path):
    write_parquet(tmp_path, blobs=[encode_png(IMAGES[0])[:200]])
    with pytest.raises(FileError):
        read_images(tmp_path, "train")


def test_a_short_idx_file_is_an_error(tmp_path):
    write_idx(tmp_path, compress=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError):
        read_images(tmp_path, "train")


def test_a_broken_gzip_is_an_error(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileError):
        read_images(tmp_path, "train")


class Exploit:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    write_cifar(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": Exploit()}))
    with pytest.raises(FileError):
        read_images(tmp_path, "train")
    assert capsys.readouterr().out == ""


def test_an_empty_image_folder_is_an_error(tmp_path):
    (tmp_path / "train" / "ant").mkdir(parents=True)
    with pytest.raises(FileError):
        read_images(tmp_path, "train")


@pytest.mark.parametrize("write", [write_parquet, write_cifar, write_idx])
def test_layouts_may_lie_in_a_subfolder(tmp_path, write):
    (tmp_path / "below").mkdir()
    write(tmp_path / "below")
    assert len(read_images(tmp_path, "train")) == 6


def test_parquet_files_in_parts_are_read_in_order(tmp_path):
    write_parquet(tmp_path, "train-00000-of-00002")
    write_parquet(tmp_path, "train-00001-of-00002", blobs=[encode_png(IMAGES[5])])
    read = read_images(tmp_path, "train")
    assert read.labels.tolist() == [*LABELS, LABELS[0]]
    assert torch.equal(read.images[6], torch.from_numpy(IMAGES[5]))


def test_cifar_100_is_read(tmp_path):
    home = tmp_path / "cifar-100-python"
    home.mkdir()
    (home / "test").write_bytes(pickle.dumps({b"data": IMAGES.reshape(6, -1), b"fine_labels": LABELS}))
    (home / "meta").write_bytes(pickle.dumps({b"fine_label_names": NAMES}))
    for folder in (tmp_path, home):
        assert read_images(folder, "test").labels.tolist() == LABELS
    assert read_images(tmp_path, "train") is None


def test_a_limit_takes_a_random_part(tmp_path):
    write_parquet(tmp_path)
    part = read_images(tmp_path, "train", limit=4)
    assert len(part) == 4
    where = [
        next(number for number in range(6) if torch.equal(image, torch.from_numpy(IMAGES[number])))
        for image in part.images
    ]
    assert [LABELS[number] for number in where] == part.labels.tolist()


def test_images_of_another_shape_lose_what_is_outside_the_centre_square(tmp_path):
    wide = numpy.zeros((3, 32, 64), numpy.uint8)
    wide[:, :, 16:48] = 200
    write_parquet(tmp_path, blobs=[encode_png(wide)])
    assert read_images(tmp_path, "train", image_size=16).images.min() > 150


def test_test_images_stand_in_for_validation_images(tmp_path):
    write_parquet(tmp_path)
    with pytest.raises(InvalidOptionError):
        load_images(tmp_path, image_size=8)
    write_parquet(tmp_path, "test", blobs=[encode_png(IMAGES[0])])
    training, held_out = load_images(tmp_path, image_size=8)
    assert (len(training), len(held_out)) == (6, 1)


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    write_folder(tmp_path / "files")
    write_parquet(tmp_path / "table")
    for library, folder in (("PIL", "files"), ("pyarrow", "table")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(MissingExtraError):
            read_images(tmp_path / folder, "train")


def test_public_parquet_is_read():
    training, validation = load_images(shared_path("data/clothing-10"), image_size=16, limit=20)
    assert training.images.shape == (20, 3, 16, 16)
    assert len(validation.labels) == 20


def test_batches_are_seeded_and_augmentation_keeps_shapes(tmp_path):
    write_parquet(tmp_path)
    training = read_images(tmp_path, "train", image_size=8)
    first, second = (ImageBatches(training, batch_size=4, augment=True, seed=1) for _ in range(2))
    assert len(first) == 2
    for (a, labels_a), (b, labels_b) in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(labels_a, labels_b)
        assert a.shape[1:] == (3, 8, 8)


def test_gray_images_stay_gray_and_are_normalised(tmp_path):
    write_idx(tmp_path)
    write_idx(tmp_path, prefix="t10k")
    training, _ = load_images(tmp_path, image_size=28, channels=1)
    ((images, _),) = ImageBatches(training, batch_size=6, augment=False)
    assert torch.allclose(images[:, 0], (torch.from_numpy(IMAGES[:, 0, :28, :28]) / 255 - 0.449) / 0.226, atol=1e-5)
    assert images.shape[1] == 1


@pytest.mark.parametrize(
    ("count", "batch_size", "augment", "sizes"),
    [
        (5, 4, True, [5]),
        (9, 4, True, [4, 5]),
        (6, 4, True, [4, 2]),
        (8, 4, True, [4, 4]),
        (9, 4, False, [4, 4, 1]),
        (3, 1, True, [1, 1, 1]),
        (1, 4, True, [1]),
    ],
)
def test_no_training_batch_is_a_single_left_over_image(count, batch_size, augment, sizes):
    data = ImageSet(torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(count), ("any",))
    batches = ImageBatches(data, batch_size=batch_size, augment=augment)
    labels = [part for _, part in batches]
    assert [len(part) for part in labels] == sizes
    assert len(batches) == len(sizes)
    assert sorted(torch.cat(labels).tolist()) == list(range(count))
