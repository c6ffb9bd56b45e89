"""The file layouts of labelled images on disk, each read into one uint8 array.

Four layouts that the public uses: Hugging Face parquet, torchvision's ``cifar-10-batches-py``, IDX files (MNIST and
Fashion-MNIST, gzipped or not) and an image folder with one folder per class. Every reader looks for one split in one
folder and returns ``None`` where its layout is not there, so that ``data.load_images`` can ask them in turn.

Shapes: I images, H rows, W columns, C channels (1 or 3).
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
from PIL import Image

from ghn_service.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".gif")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class RawImages:
    """What a layout holds for one split: images (I, C, H, W) uint8, labels (I,) int64, and the class names."""

    images: numpy.ndarray[Any, numpy.dtype[numpy.uint8]]
    labels: numpy.ndarray[Any, numpy.dtype[numpy.int64]]
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class ImageFormat:
    """What decoded images shall look like.

    Attributes:
        size: Rows and columns; ``None`` takes the size of the first image.
        channels: 1 (gray), 3 (colour) or ``None`` for what the first image has.
    """

    size: int | None = None
    channels: int | None = None


def read_parquet(folder: Path, split: str, image_format: ImageFormat) -> RawImages | None:
    """Parquet files as the Hugging Face ``datasets`` library writes them: ``{image: {bytes}, label: int}``.

    Raises:
        DataError: A file is no parquet, lacks a column, or holds an image that cannot be decoded.
    """
    paths = _split_files(folder, split, ".parquet")
    if not paths:
        return None
    blobs: list[bytes] = []
    labels: list[int] = []
    names: tuple[str, ...] = ()
    for path in paths:
        table = _read_table(path)
        image_column = _column(table, ("image", "img"), path)
        label_column = _column(table, ("label", "labels", "fine_label"), path)
        images = table[image_column].combine_chunks()
        encoded = images.field("bytes") if pyarrow.types.is_struct(images.type) else images
        blobs.extend(item for item in encoded.to_pylist())
        labels.extend(table[label_column].to_pylist())
        names = names or _class_names(table, label_column)
    decoded = _decode_all((f"{folder.name} row {row}", blob) for row, blob in enumerate(blobs))
    return _raw_images(_to_array(decoded, image_format), labels, names, folder)


def read_cifar_batches(folder: Path, split: str, image_format: ImageFormat) -> RawImages | None:
    """The pickled batches of ``cifar-10-batches-py`` or ``cifar-100-python``, in the folder or one below it.

    Raises:
        DataError: A batch is no such pickle.
    """
    for name, files, meta, label_key, names_key in (
        (
            "cifar-10-batches-py",
            {"train": "data_batch_*", "test": "test_batch"},
            "batches.meta",
            b"labels",
            "label_names",
        ),
        ("cifar-100-python", {"train": "train", "test": "test"}, "meta", b"fine_labels", "fine_label_names"),
    ):
        home = folder if folder.name == name else folder / name
        paths = sorted(home.glob(files[split])) if split in files and home.is_dir() else []
        if not paths:
            continue
        batches = [_read_pickle(path) for path in paths]
        try:
            pixels = numpy.concatenate([numpy.asarray(batch[b"data"], numpy.uint8) for batch in batches])
            labels = [int(label) for batch in batches for label in batch[label_key]]
            images = pixels.reshape(-1, 3, 32, 32)
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{home.name}: expected batches with data (I, 3072) and labels: {error}") from error
        names = _read_pickle(home / meta).get(names_key.encode(), []) if (home / meta).is_file() else []
        readable = tuple(item.decode() if isinstance(item, bytes) else str(item) for item in names)
        return _raw_images(_convert(images, image_format), labels, readable, home)
    return None


def read_idx(folder: Path, split: str, image_format: ImageFormat) -> RawImages | None:
    """The IDX files of MNIST and Fashion-MNIST (``train-images-idx3-ubyte[.gz]``, ``t10k-...``).

    Raises:
        DataError: A header does not fit the file.
    """
    prefix = {"train": "train", "test": "t10k"}.get(split)
    images_path, labels_path = (
        next(iter(sorted(folder.glob(f"{prefix}-{kind}*ubyte*"))), None) for kind in ("images", "labels")
    )
    if prefix is None or images_path is None or labels_path is None:
        return None
    images = _read_idx_array(images_path, 3)[:, None]
    labels = _read_idx_array(labels_path, 1)
    return _raw_images(_convert(images, image_format), labels.tolist(), (), folder)


def read_image_folder(folder: Path, split: str, image_format: ImageFormat) -> RawImages | None:
    """Image files in ``<split>/<class>/``; the classes are the folders in alphabetical order.

    Raises:
        DataError: A file cannot be decoded, or a split has no class folder with images.
    """
    home = next((folder / name for name in SPLIT_NAMES[split] if (folder / name).is_dir()), None)
    if home is None:
        return None
    names = tuple(sorted(item.name for item in home.iterdir() if item.is_dir()))
    found = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((home / name).iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not found:
        raise DataError(f"{home.name}: expected one folder of images per class, found {len(names)} folders, no image")
    decoded = _decode_all((f"{path.parent.name}/{path.name}", path.read_bytes()) for path, _ in found)
    return _raw_images(_to_array(decoded, image_format), [label for _, label in found], names, home)


READERS: dict[str, Callable[[Path, str, ImageFormat], RawImages | None]] = {
    "parquet": read_parquet,
    "cifar batches": read_cifar_batches,
    "idx": read_idx,
    "image folder": read_image_folder,
}


def _split_files(folder: Path, split: str, suffix: str) -> list[Path]:
    """Files ``<split>.parquet`` or ``<split>-00000-of-00002.parquet``, in the folder or in its ``data`` folder."""
    for home in (folder, folder / "data", folder / "plain_text"):
        for name in SPLIT_NAMES[split]:
            paths = sorted({*home.glob(f"{name}{suffix}"), *home.glob(f"{name}-*-of-*{suffix}")})
            if paths:
                return paths
    return []


def _read_table(path: Path) -> Any:
    try:
        return pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path.name}: expected a parquet file: {error}") from error


def _column(table: Any, names: tuple[str, ...], path: Path) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise DataError(f"{path.name}: expected a column named {' or '.join(names)}, found {table.column_names}")


def _class_names(table: Any, label_column: str) -> tuple[str, ...]:
    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label_column]["names"])
    except (KeyError, ValueError, TypeError):
        return ()


def _read_idx_array(path: Path, rank: int) -> numpy.ndarray[Any, numpy.dtype[numpy.uint8]]:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path.name}: expected a gzipped IDX file: {error}") from error
    if len(data) < 4 + 4 * rank or data[:4] != bytes((0, 0, 8, rank)):
        raise DataError(f"{path.name}: expected an IDX header of {rank} axes of bytes, got {data[:4]!r}")
    shape = numpy.frombuffer(data, ">u4", count=rank, offset=4).tolist()
    body = numpy.frombuffer(data, numpy.uint8, offset=4 + 4 * rank)
    if body.size != int(numpy.prod(shape)):
        raise DataError(f"{path.name}: header promises shape {shape}, but {body.size} bytes follow")
    return body.reshape(shape)


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles containers and numpy arrays only, so that a data file cannot run code."""

    allowed = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"a data file must not contain {module}.{name}")
        return super().find_class(module, name)


def _read_pickle(path: Path) -> dict[bytes, Any]:
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file, encoding="bytes").load()
    except Exception as error:  # an unpickler may raise anything on broken bytes
        raise DataError(f"{path.name}: expected a pickled batch: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path.name}: expected a pickled dictionary, got {type(content).__name__}")
    return content


def _decode_all(blobs: Iterable[tuple[str, Any]]) -> Iterable[Image.Image]:
    for name, blob in blobs:
        if isinstance(blob, dict):
            blob = blob.get("bytes")
        try:
            image = Image.open(io.BytesIO(blob))
            image.load()
        except Exception as error:  # Pillow's decoders raise many types on broken bytes
            raise DataError(f"{name}: expected an encoded image: {error}") from error
        yield image


def _to_array(images: Iterable[Image.Image], image_format: ImageFormat) -> numpy.ndarray[Any, numpy.dtype[numpy.uint8]]:
    """Decoded images as (I, C, H, W); differing sizes are resized to the first one's."""
    size, channels = image_format.size, image_format.channels
    rows: list[Any] = []
    for image in images:
        if size is None:
            size = min(image.size)
        if channels is None:
            channels = 1 if image.mode in ("L", "1", "I;16") else 3
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (size, size):
            image = _resize(image, size)
        rows.append(numpy.asarray(image, numpy.uint8).reshape(size, size, channels))
    if not rows:
        raise DataError("expected at least one image, found none")
    return numpy.ascontiguousarray(numpy.stack(rows).transpose(0, 3, 1, 2))


def _resize(image: Image.Image, size: int) -> Image.Image:
    """The centre square of an image, resized to ``size`` rows and columns."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def _convert(images: numpy.ndarray[Any, Any], image_format: ImageFormat) -> numpy.ndarray[Any, Any]:
    """Raw arrays (I, C, H, W) in the wanted format; unchanged where they already have it."""
    _, channels, rows, columns = images.shape
    wanted = (image_format.channels or channels, image_format.size or rows, image_format.size or columns)
    if (channels, rows, columns) == wanted:
        return images
    mode = "L" if channels == 1 else "RGB"
    pictures = (Image.fromarray(item[0] if mode == "L" else item.transpose(1, 2, 0), mode) for item in images)
    return _to_array(pictures, ImageFormat(wanted[1], wanted[0]))


def _raw_images(images: numpy.ndarray[Any, Any], labels: list[int], names: tuple[str, ...], home: Path) -> RawImages:
    array = numpy.asarray(labels, numpy.int64)
    if len(images) != len(array):
        raise DataError(f"{home.name}: {len(images)} images but {len(array)} labels")
    if len(array) and array.min() < 0:
        raise DataError(f"{home.name}: labels must be 0 or more, found {array.min()}")
    num_classes = max(len(names), int(array.max()) + 1 if len(array) else 0)
    names = names or tuple(str(index) for index in range(num_classes))
    if len(names) < num_classes:
        raise DataError(f"{home.name}: label {num_classes - 1} has no class name; names are {names}")
    return RawImages(images, array, names)
