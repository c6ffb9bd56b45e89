"""Image sets: cache, splits, normalisation and augmented batches."""

from __future__ import annotations

import pytest
import torch

from ghn_client.finetune.images import ImageSet, measure_normalization
from ghn_service.errors import DataError
from ghn_service.training import images as images_module
from ghn_service.training.images import Augmentation, Batches, digest_images, require_split, split_validation
from tests.finetune.test_images import write_folder, write_parquet
from tests.training.made_images import coloured_images


def test_the_second_load_comes_from_the_cache(tmp_path, monkeypatch):
    write_parquet(tmp_path / "data")
    first = require_split(tmp_path / "data", "train", cache=tmp_path / "cache")
    monkeypatch.delattr(images_module, "read_images")
    second = require_split(tmp_path / "data", "train", cache=tmp_path / "cache")
    assert torch.equal(first.images, second.images)
    assert second.class_names == first.class_names


def test_changed_files_are_read_again(tmp_path):
    write_folder(tmp_path / "data")
    before = require_split(tmp_path / "data", "train", cache=tmp_path / "cache")
    next((tmp_path / "data" / "train" / "ant").iterdir()).unlink()
    after = require_split(tmp_path / "data", "train", cache=tmp_path / "cache")
    assert len(after) == len(before) - 1


def test_a_broken_cache_file_is_read_anew(tmp_path):
    write_parquet(tmp_path / "data")
    before = require_split(tmp_path / "data", "train", cache=tmp_path / "cache")
    next((tmp_path / "cache").iterdir()).write_bytes(b"broken")
    assert torch.equal(require_split(tmp_path / "data", "train", cache=tmp_path / "cache").images, before.images)


def test_a_missing_split_that_is_needed_is_an_error(tmp_path):
    with pytest.raises(DataError):
        require_split(tmp_path, "train")


def test_validation_images_are_held_out():
    images = coloured_images(50)
    training, validation = split_validation(images, 10)
    assert len(training) == 40
    together = torch.cat([training.images, validation.images]).flatten(1).long().sum(1).sort().values
    assert torch.equal(together, images.images.flatten(1).long().sum(1).sort().values)


def test_a_digest_changes_with_each_pixel_label_and_shape():
    images = coloured_images(5000)  # more than one block
    pixels, labels = images.images.clone(), images.labels.clone()
    pixels[-1, 0, 0, 0] ^= 1
    labels[-1] ^= 1
    others = [
        (pixels, images.labels),
        (images.images, labels),
        (images.images.reshape(5000, 3, 8, 32), images.labels),
    ]
    digests = {digest_images(ImageSet(*parts, images.class_names)) for parts in others}
    assert len(digests | {digest_images(images)}) == 4
    assert digest_images(coloured_images(5000)) == digest_images(images)


def test_too_many_validation_images_are_an_error():
    with pytest.raises(DataError):
        split_validation(coloured_images(10), 10)


def test_normalised_images_have_mean_0_and_deviation_1():
    images = coloured_images(200)
    pixels = measure_normalization(images).apply(images.images)
    assert pixels.mean((0, 2, 3)).abs().max() < 1e-3
    assert (pixels.std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_batches_depend_on_the_generator_alone():
    images = coloured_images()
    batches = Batches(images, measure_normalization(images), Augmentation(), 8)
    first, again = (batches.draw(generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_augmented_image_is_a_shifted_or_mirrored_one():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    seen = set()
    for seed in range(60):
        out = Augmentation(pad=1).apply(images, generator=torch.Generator().manual_seed(seed))
        middle = out[0, 0, 1:-1, 1:-1]
        steps = {int(middle[0, 1]) - int(middle[0, 0]), int(middle[1, 0]) - int(middle[0, 0])}
        seen.add(tuple(sorted(steps)))
    assert seen == {(1, 8), (-1, 8)}


def test_no_augmentation_leaves_images_as_they_are():
    images = coloured_images().images
    assert Augmentation(pad=0, flip=False).apply(images, generator=torch.Generator()) is images
