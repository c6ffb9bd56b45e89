"""Image folders for ``ghn-client finetune``: the usual public layouts, decoded once into memory.

| layout | files |
|---|---|
| parquet (Hugging Face) | ``train*.parquet`` with ``test``, ``validation`` or ``val`` beside it; columns ``image``
and ``label`` | | CIFAR-10, python version | ``data_batch_1`` ... ``test_batch``, also in a subfolder |
| image folder | ``train/<class>/*.png|jpg`` with ``val``, ``validation`` or ``test`` beside it |

Needs Pillow, and pyarrow for parquet (extras of this client).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ghn_client.errors import InvalidOptionError, MissingExtraError

TRAINING, VALIDATION = ("train",), ("validation", "val", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
#: Mean and standard deviation of ImageNet, per channel, on which published networks are trained.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images of one split.

    Attributes:
        images: (N, 3, H, W) uint8.
        labels: (N,) int64.
    """

    images: torch.Tensor
    labels: torch.Tensor

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1


class ImageBatches:
    """Normalised batches of an image set; iterable again and again.

    Args:
        data: The images.
        batch_size: Images per batch.
        augment: Shuffle, flip and shift by up to an eighth of the size.
        seed: Of shuffling and augmentation; every pass draws anew.
    """

    def __init__(self, data: ImageSet, *, batch_size: int, augment: bool, seed: int = 0) -> None:
        self.data, self.batch_size, self.augment = data, batch_size, augment
        self.generator = torch.Generator().manual_seed(seed)
        self.mean = torch.tensor(MEAN).view(3, 1, 1) * 255
        self.deviation = torch.tensor(DEVIATION).view(3, 1, 1) * 255

    def __len__(self) -> int:
        return -(-len(self.data.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        count = len(self.data.labels)
        order = torch.randperm(count, generator=self.generator) if self.augment else torch.arange(count)
        for start in range(0, count, self.batch_size):
            chosen = order[start : start + self.batch_size]
            images = (self.data.images[chosen].float() - self.mean) / self.deviation
            yield (self._augmented(images) if self.augment else images), self.data.labels[chosen]

    def _augmented(self, images: torch.Tensor) -> torch.Tensor:
        flip = torch.rand(len(images), generator=self.generator) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
        shift = images.shape[-1] // 8
        if not shift:
            return images
        padded = torch.nn.functional.pad(images, (shift,) * 4)
        top, left = (int(torch.randint(0, 2 * shift + 1, (), generator=self.generator)) for _ in range(2))
        return padded[:, :, top : top + images.shape[2], left : left + images.shape[3]]


def load_images(folder: str | Path, *, image_size: int, limit: int | None = None) -> tuple[ImageSet, ImageSet]:
    """The training and the validation images of a folder.

    Args:
        folder: In one of the layouts above.
        image_size: Images of another size are resized to so many pixels square.
        limit: Use at most so many of each.

    Raises:
        InvalidOptionError: The folder is absent, or of no known layout.
        MissingExtraError: A library that the layout needs is not installed.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InvalidOptionError(f"expected a folder of images, {root.name!r} is none")
    for reader in (_parquet, _cifar, _image_folder):
        training, validation = reader(root, TRAINING), reader(root, VALIDATION)
        if training is not None and validation is not None:
            return _decode(training, image_size, limit), _decode(validation, image_size, limit)
    raise InvalidOptionError(
        f"{root.name!r} has no known layout; expected train.parquet and test.parquet, cifar-10-batches-py, or folders"
        " train/<class> and val/<class>"
    )


Samples = list[tuple[Callable[[], Any], int]]


def _parquet(root: Path, names: tuple[str, ...]) -> Samples | None:
    files = [path for name in names for path in sorted(root.rglob(f"{name}*.parquet"))][:1]
    if not files:
        return None
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("parquet files need the package pyarrow: pip install pyarrow") from error
    table = parquet.read_table(files[0])
    column = "image" if "image" in table.column_names else "img"
    blobs = table[column].combine_chunks().field("bytes")
    return [(partial(_from_bytes, blob), int(label.as_py())) for blob, label in zip(blobs, table["label"], strict=True)]


def _cifar(root: Path, names: tuple[str, ...]) -> Samples | None:
    pattern = "data_batch_*" if names is TRAINING else "test_batch"
    files = sorted(root.rglob(pattern))
    samples: Samples = []
    for path in files:
        document = _NumpyOnly(path.open("rb"), encoding="bytes").load()
        pixels = document[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        samples += [
            (partial(_from_array, array), int(label)) for array, label in zip(pixels, document[b"labels"], strict=True)
        ]
    return samples or None


class _NumpyOnly(pickle.Unpickler):
    """Reads the arrays of CIFAR-10 batches and refuses everything else that a pickle could run."""

    def find_class(self, module: str, name: str) -> Any:
        """Numpy's own reconstruction functions, or an error."""
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "_frombuffer"):
            return super().find_class(module, name)
        raise InvalidOptionError(f"the data batch asks for {module}.{name}, which is no array; it is not read")


def _image_folder(root: Path, names: tuple[str, ...]) -> Samples | None:
    splits = [root / name for name in names if (root / name).is_dir()]
    if not splits:
        return None
    classes = sorted(path.name for path in splits[0].iterdir() if path.is_dir())
    return [
        (partial(_open, path), index)
        for index, name in enumerate(classes)
        for path in sorted((splits[0] / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ] or None


def _open(source: Any) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("images need the package Pillow: pip install pillow") from error
    return Image.open(source).convert("RGB")


def _from_bytes(blob: Any) -> Any:
    return _open(io.BytesIO(blob.as_py()))


def _from_array(array: Any) -> Any:
    from PIL import Image

    return Image.fromarray(array)


def _decode(samples: Samples, image_size: int, limit: int | None) -> ImageSet:
    if limit is not None and limit < len(samples):
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:limit]
        samples = [samples[index] for index in order.tolist()]
    images = np.empty((len(samples), image_size, image_size, 3), dtype=np.uint8)
    for index, (read, _) in enumerate(samples):
        image = read()
        if image.size != (image_size, image_size):
            image = image.resize((image_size, image_size))
        images[index] = np.asarray(image)
    labels = torch.tensor([label for _, label in samples])
    return ImageSet(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels)
