"""Every public layout is read to the same images, and broken files are told apart from missing ones."""

from __future__ import annotations

import gzip
import io
import json
import pickle

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from ghn_service.errors import DataError
from ghn_service.training.data import load_images, require_images
from ghn_service.training.data_layouts import ImageFormat

IMAGES = numpy.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=numpy.uint8)
LABELS = [0, 1, 2, 1, 0, 2]
NAMES = ["ant", "bee", "cat"]


def encode_png(image: numpy.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0) if image.shape[0] == 3 else image[0]).save(file, format="PNG")
    return file.getvalue()


def write_parquet(folder, split="train", blobs=None, label_column="label"):
    blobs = blobs or [encode_png(image) for image in IMAGES]
    table = pyarrow.table(
        {"image": [{"bytes": blob, "path": None} for blob in blobs], label_column: LABELS[: len(blobs)]}
    )
    features = {"info": {"features": {"label": {"names": NAMES}}}}
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


def write_idx(folder, compress=True):
    folder.mkdir(exist_ok=True)
    images = IMAGES[:, 0, :28, :28]
    files = {
        "train-images-idx3-ubyte": bytes((0, 0, 8, 3)) + numpy.array(images.shape, ">u4").tobytes() + images.tobytes(),
        "train-labels-idx1-ubyte": bytes((0, 0, 8, 1)) + numpy.array([6], ">u4").tobytes() + bytes(LABELS),
    }
    for name, content in files.items():
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def write_folder(folder):
    for image, label, number in zip(IMAGES, LABELS, range(6), strict=True):
        home = folder / "train" / NAMES[label]
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{number}.png").write_bytes(encode_png(image))


@pytest.mark.parametrize("write", [write_parquet, write_cifar])
def test_layouts_in_file_order_give_the_same_images(tmp_path, write):
    write(tmp_path)
    read = require_images(tmp_path, "train")
    assert torch.equal(read.images, torch.from_numpy(IMAGES))
    assert read.labels.tolist() == LABELS
    assert read.class_names == tuple(NAMES)


def test_image_folder_names_its_classes(tmp_path):
    write_folder(tmp_path)
    read = require_images(tmp_path, "train")
    assert read.class_names == tuple(NAMES)
    assert sorted(read.labels.tolist()) == sorted(LABELS)
    assert torch.equal(read.images[0], torch.from_numpy(IMAGES[0]))


@pytest.mark.parametrize("compress", [True, False])
def test_idx_files_are_gray(tmp_path, compress):
    write_idx(tmp_path, compress)
    read = require_images(tmp_path, "train")
    assert read.images.shape == (6, 1, 28, 28)
    assert torch.equal(read.images[:, 0], torch.from_numpy(IMAGES[:, 0, :28, :28]))


def test_images_come_in_the_wanted_format(tmp_path):
    write_idx(tmp_path)
    read = require_images(tmp_path, "train", image_format=ImageFormat(size=16, channels=3))
    assert read.images.shape == (6, 3, 16, 16)


def test_gray_images_in_a_colour_set_become_colour(tmp_path):
    gray = encode_png(IMAGES[:1, 0])
    write_parquet(tmp_path, blobs=[encode_png(IMAGES[0]), gray])
    assert require_images(tmp_path, "train").images.shape == (2, 3, 32, 32)


def test_a_missing_split_is_none(tmp_path):
    write_parquet(tmp_path)
    assert load_images(tmp_path, "test") is None


def test_a_missing_split_that_is_needed_is_an_error(tmp_path):
    with pytest.raises(DataError):
        require_images(tmp_path, "train")


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(DataError):
        load_images(tmp_path / "nothing", "train")


def test_no_parquet_inside_is_an_error(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"these are no columns")
    with pytest.raises(DataError):
        load_images(tmp_path, "train")


def test_a_missing_column_is_an_error(tmp_path):
    write_parquet(tmp_path, label_column="answer")
    with pytest.raises(DataError):
        load_images(tmp_path, "train")


def test_an_image_that_is_cut_off_is_an_error(tmp_path):
    write_parquet(tmp_path, blobs=[encode_png(IMAGES[0])[:200]])
    with pytest.raises(DataError):
        load_images(tmp_path, "train")


def test_a_short_idx_file_is_an_error(tmp_path):
    write_idx(tmp_path, compress=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError):
        load_images(tmp_path, "train")


def test_a_broken_gzip_is_an_error(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError):
        load_images(tmp_path, "train")


class Exploit:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    write_cifar(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": Exploit()}))
    with pytest.raises(DataError):
        load_images(tmp_path, "train")
    assert capsys.readouterr().out == ""


def test_an_empty_image_folder_is_an_error(tmp_path):
    (tmp_path / "train" / "ant").mkdir(parents=True)
    with pytest.raises(DataError):
        load_images(tmp_path, "train")
