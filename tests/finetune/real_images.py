"""Real images for tests: CIFAR-10 as float tensors, and principal components of them."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from tests.shared_data import shared_path


@cache
def cifar10(count: int, split: str = "test") -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 3, 32, 32) in [-1, 1] and labels (count,)."""
    parquet = pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    table = parquet.read_table(shared_path(f"data/cifar10/{split}.parquet")).slice(0, count)
    blobs = table["image"].combine_chunks().field("bytes")
    pixels = np.stack([np.asarray(image.open(io.BytesIO(blob.as_py())).convert("RGB")) for blob in blobs])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return images, torch.from_numpy(table["label"].to_numpy().copy())


@cache
def principal_components(count: int, dimension: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``dimension`` whitened principal components of half-size images, and labels."""
    images, labels = cifar10(count)
    flat = nn.functional.avg_pool2d(images, 2).flatten(1).double()
    centred = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / count)
    top = vectors[:, -dimension:] / values[-dimension:].sqrt()
    return (centred @ top).float(), labels


def train(network: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, *, epochs: int, seed: int = 0) -> None:
    """Plain Adam on cross-entropy; leaves the network in eval mode."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    network.eval()
