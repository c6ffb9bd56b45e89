"""Labelled images on disk, as one array of bytes per split; for ``ghn-client finetune`` and for training.

| layout | files of a split |
|---|---|
| parquet (Hugging Face) | ``train.parquet`` or ``train-00000-of-00002.parquet``, ...; columns ``image`` and ``label`` |
| CIFAR, python version | ``data_batch_1``, ... and ``test_batch``, or ``cifar-100-python/train`` and ``test`` |
| IDX (MNIST and its relatives) | ``train-images-idx3-ubyte``, ``t10k-labels-idx1-ubyte``, ..., gzipped or not |
| image folder | ``train/<class>/*.png``, classes in alphabetical order; those of ``train`` for the other splits, too |

All but the last may lie in a subfolder; ``val`` and ``valid`` mean ``validation``. Names in image folders that start
with a dot are left out. Needs Pillow, for parquet pyarrow. No code of a data file runs.

Shapes: I images, B images of a batch, C channels (1 or 3), H = W rows and columns.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ghn_client.errors import FileError, InvalidOptionError, MissingExtraError, listed, require_known

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".gif")
EXTRA = "pip install pillow pyarrow"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one split."""

    images: torch.Tensor  # (I, C, H, W) uint8
    labels: torch.Tensor  # (I,) int64
    class_names: tuple[str, ...]  # one name per class

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes, with or without images."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return int(self.images.shape[1])

    @property
    def image_size(self) -> int:
        """Rows (and columns) of an image."""
        return int(self.images.shape[2])

    def subset(self, indices: torch.Tensor) -> ImageSet:
        """The images of the given indices, in that order."""
        return ImageSet(self.images[indices], self.labels[indices], self.class_names)

    def first(self, count: int) -> ImageSet:
        """The first ``count`` images, as far as there are so many."""
        return ImageSet(self.images[:count], self.labels[:count], self.class_names)

    def to(self, device: torch.device) -> ImageSet:
        """The same images on another device."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.class_names)


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per channel, on the scale 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, C, H, W) as normalised floats."""
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape) * 255.0
        scale = torch.tensor([1.0 / (255.0 * std) for std in self.std], device=images.device).view(shape)
        return (images.float() - mean) * scale


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Statistics of ImageNet, on which published networks are trained."""
IMAGENET_GRAY = Normalization((0.449,), (0.226,))
"""Their means over the three colours, for gray images."""


def measure_normalization(images: ImageSet, limit: int = 5000) -> Normalization:
    """Channel statistics of the first ``limit`` images."""
    pixels = images.images[:limit].float().div_(255.0)
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
    return Normalization(tuple(mean.tolist()), tuple(std.clamp_min(1e-3).tolist()))


class ImageBatches:
    """Batches of an image set, normalised as for ImageNet; iterable again and again.

    With ``augment`` they are shuffled, flipped, and shifted by up to an eighth of the size; every pass draws anew. A
    single image that is left over for the last batch joins the one before, since BatchNorm cannot be trained on it.
    """

    def __init__(self, data: ImageSet, *, batch_size: int, augment: bool, seed: int = 0) -> None:
        self.data, self.batch_size, self.augment = data, batch_size, augment
        self.normalization = IMAGENET if data.channels == 3 else IMAGENET_GRAY
        self.generator = torch.Generator().manual_seed(seed)
        self.sizes = [min(batch_size, len(data) - start) for start in range(0, len(data), batch_size)]  # of each batch
        if augment and 1 < batch_size < len(data) and self.sizes[-1] == 1:
            self.sizes[-2:] = [batch_size + 1]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        count = len(self.data)
        order = torch.randperm(count, generator=self.generator) if self.augment else torch.arange(count)
        for chosen in torch.split(order, self.sizes):
            images = self.normalization.apply(self.data.images[chosen])
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


def load_images(
    folder: str | Path, *, image_size: int, channels: int = 3, limit: int | None = None
) -> tuple[ImageSet, ImageSet]:
    """The training and the validation images of a folder; test images where there are none for validation.

    Args:
        folder: In one of the layouts above.
        image_size: Rows and columns; the centre square of images of another size is resized.
        channels: 1 (gray) or 3 (colour); images of the other kind are converted.
        limit: Use at most so many of each, a random choice.

    Raises:
        InvalidOptionError: The folder is absent, or of no known layout.
        FileError: A file is broken, or held-out images have other classes than the training images.
        MissingExtraError: A library that the layout needs is not installed.
    """
    found = (read_images(folder, split, image_size=image_size, channels=channels, limit=limit) for split in SPLITS)
    training = next(found)
    held_out = next((images for images in found if images is not None), None)
    if training is None or held_out is None:
        raise InvalidOptionError(
            f"{Path(folder).name!r} has no known layout; expected train.parquet and test.parquet, cifar-10-batches-py,"
            " IDX files, or folders train/<class> and val/<class>"
        )
    count = held_out.num_classes
    same = held_out.class_names in (training.class_names[:count], tuple(map(str, range(count))))  # some have no names
    if count > training.num_classes or not same:
        raise FileError(
            f"{Path(folder).name}: expected held-out images of the classes of the training images, "
            f"{listed(training.class_names)}, got {listed(held_out.class_names)}"
        )
    return training, held_out


def read_images(
    folder: str | Path,
    split: str,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
) -> ImageSet | None:
    """One split of a folder; ``None`` where the folder has no such split.

    Images that are stored class by class come in one random order, always the same: parts are taken from the beginning.

    Args:
        folder: In one of the layouts above.
        split: ``train``, ``validation`` or ``test``.
        image_size: Rows and columns; that of the first image where omitted.
        channels: 1 (gray) or 3 (colour); what the first image has where omitted.
        limit: Read at most so many, a random choice.

    Raises:
        InvalidOptionError: The folder is absent, or the split unknown.
        FileError: A file is broken, or an image folder has a class that the training images lack.
        MissingExtraError: A library that the layout needs is not installed.
    """
    root = Path(folder)
    require_known(split, SPLITS, field="split")
    if not root.is_dir():
        raise InvalidOptionError(f"expected a folder of images, {root.name!r} is none")
    stored = next((found for reader in READERS if (found := reader(root, split)) is not None), None)
    if stored is None:
        return None
    images, numbers, names = stored
    where = f"{root.name}, split {split}"
    labels = np.asarray(numbers, np.int64)
    if len(images) != len(labels) or not len(labels) or labels.min() < 0:
        raise FileError(f"{where}: expected a label of 0 or more for every image, got {len(images)} images, {labels}")
    num_classes = max(len(names), int(labels.max()) + 1)
    names = names or tuple(map(str, range(num_classes)))
    if len(names) < num_classes:
        raise FileError(f"{where}: label {num_classes - 1} has no class name; names are {names}")
    is_by_class = bool((np.diff(labels) >= 0).all())  # whoever takes the first so many would get the first classes
    if is_by_class or (limit is not None and limit < len(labels)):
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:limit].numpy()
        images = images[chosen] if isinstance(images, np.ndarray) else [images[index] for index in chosen]
        labels = labels[chosen]
    pixels = _in_format(images, where, image_size, channels)
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels), names)


Stored = tuple[NDArray[np.uint8] | Sequence[Any], Sequence[int], tuple[str, ...]]
"""Images, decoded (I, C, H, W) or as paths and encoded bytes; labels; names of the classes, if the layout has them."""


def _parquet(root: Path, split: str) -> Stored | None:
    pattern = re.compile(rf"({'|'.join(SPLITS[split])})(-\d+-of-\d+)?\.parquet")
    files = sorted(path for path in root.rglob("*.parquet") if pattern.fullmatch(path.name))
    if not files:
        return None
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(f"parquet files need the package pyarrow: {EXTRA}") from error
    blobs: list[Any] = []
    labels: list[int] = []
    names: tuple[str, ...] = ()
    for path in (path for path in files if path.parent == files[0].parent):
        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise FileError(f"{path.name}: expected a parquet file: {error}") from error
        image, label = (
            next((name for name in known if name in table.column_names), None)
            for known in (("image", "img"), ("label", "labels", "fine_label"))
        )
        if image is None or label is None:
            raise FileError(f"{path.name}: expected columns image and label, found {table.column_names}")
        column = table[image].combine_chunks()
        blobs += (column.field("bytes") if pyarrow.types.is_struct(column.type) else column).to_pylist()
        labels += table[label].to_pylist()
        with contextlib.suppress(KeyError, ValueError, TypeError):  # where the file does not name its classes
            names = tuple(json.loads(table.schema.metadata[b"huggingface"])["info"]["features"][label]["names"])
    return blobs, labels, names


def _cifar(root: Path, split: str) -> Stored | None:
    for home, pattern, meta, label_key, names_key in (
        (None, {"train": "data_batch_*", "test": "test_batch"}, "batches.meta", b"labels", b"label_names"),
        ("cifar-100-python", {"train": "train", "test": "test"}, "meta", b"fine_labels", b"fine_label_names"),
    ):
        found = sorted(path for path in root.resolve().rglob(pattern.get(split, "-")) if path.is_file())
        paths = [path for path in found if home in (None, path.parent.name)]
        if not paths:
            continue
        batches = [_read_pickle(path) for path in paths]
        try:
            pixels = np.concatenate([np.asarray(batch[b"data"], np.uint8) for batch in batches])
            labels = [int(label) for batch in batches for label in batch[label_key]]
            images = pixels.reshape(-1, 3, 32, 32)
        except (KeyError, ValueError, TypeError) as error:
            raise FileError(f"{paths[0].name}: expected batches with data (I, 3072) and labels: {error}") from error
        described = paths[0].with_name(meta)
        names = _read_pickle(described).get(names_key, []) if described.is_file() else []
        return images, labels, tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    return None


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles containers and numpy arrays only, so that a data file cannot run code."""

    allowed = (
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",
    )

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise pickle.UnpicklingError(f"a data file must not contain {module}.{name}")
        return super().find_class(module, name)


def _read_pickle(path: Path) -> dict[bytes, Any]:
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file, encoding="bytes").load()
    except Exception as error:  # an unpickler may raise anything on broken bytes
        raise FileError(f"{path.name}: expected a pickled batch: {error}") from error
    if not isinstance(content, dict):
        raise FileError(f"{path.name}: expected a pickled dictionary, got {type(content).__name__}")
    return content


def _idx(root: Path, split: str) -> Stored | None:
    prefix = {"train": "train", "test": "t10k"}.get(split, "-")
    found = [sorted(root.rglob(f"{prefix}-{kind}*ubyte*")) for kind in ("images", "labels")]
    if not all(found):
        return None
    return _read_idx(found[0][0], 3)[:, None], _read_idx(found[1][0], 1).tolist(), ()


def _read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    """An array of bytes with ``rank`` axes after a header of big-endian sizes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise FileError(f"{path.name}: expected a gzipped IDX file: {error}") from error
    if len(data) < 4 + 4 * rank or data[:4] != bytes((0, 0, 8, rank)):
        raise FileError(f"{path.name}: expected an IDX header of {rank} axes of bytes, got {data[:4]!r}")
    shape = np.frombuffer(data, ">u4", count=rank, offset=4).tolist()
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if body.size != int(np.prod(shape)):
        raise FileError(f"{path.name}: header promises shape {shape}, but {body.size} bytes follow")
    return body.reshape(shape)


def _image_folder(root: Path, split: str) -> Stored | None:
    homes = {key: next((root / name for name in SPLITS[key] if (root / name).is_dir()), None) for key in SPLITS}
    home = homes[split]
    if home is None:
        return None
    names, own = (
        tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
        for folder in (homes["train"] or home, home)
    )
    if unknown := sorted(set(own) - set(names)):
        raise FileError(
            f"{home.name}: expected the classes of the training images, {listed(names)}, got {unknown[0]!r}"
        )
    found = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((home / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and not any(x.startswith(".") for x in path.relative_to(home).parts)
    ]
    if not found:
        raise FileError(f"{home.name}: expected a folder of images per class, found {len(own)} folders, no image")
    return [path for path, _ in found], [label for _, label in found], names


READERS: tuple[Callable[[Path, str], Stored | None], ...] = (_parquet, _cifar, _idx, _image_folder)


def _in_format(
    images: NDArray[np.uint8] | Sequence[Any], where: str, size: int | None, channels: int | None
) -> NDArray[np.uint8]:
    """Decoded images (I, C, H, W), cut to a square and resized; missing sizes are those of the first image."""
    if isinstance(images, np.ndarray) and images.shape[1:] == (
        channels or images.shape[1],
        size or images.shape[2],
        size or images.shape[3],
    ):
        return images.copy()
    rows: list[NDArray[np.uint8]] = []
    for image in _decoded(images, where):
        size = size or min(image.size)
        channels = channels or (1 if image.mode in ("L", "1", "I;16") else 3)
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (size, size):
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.resize((size, size), resample=2, box=(left, top, left + side, top + side))  # bilinear
        rows.append(np.asarray(image, np.uint8).reshape(size, size, channels))
    return np.ascontiguousarray(np.stack(rows).transpose(0, 3, 1, 2))


def _decoded(images: NDArray[np.uint8] | Sequence[Any], where: str) -> Iterable[Any]:
    """Pillow images, from arrays (C, H, W), paths or encoded bytes."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError(f"images need the package Pillow: {EXTRA}") from error
    for number, item in enumerate(images):
        if isinstance(item, np.ndarray):
            yield Image.fromarray(item[0] if len(item) == 1 else item.transpose(1, 2, 0))
            continue
        try:
            image = Image.open(item if isinstance(item, Path) else io.BytesIO(item))
            image.load()
        except Exception as error:  # Pillow's decoders raise many types on broken bytes
            name = f"{item.parent.name}/{item.name}" if isinstance(item, Path) else f"{where}, row {number}"
            raise FileError(f"{name}: expected an encoded image: {error}") from error
        yield image
