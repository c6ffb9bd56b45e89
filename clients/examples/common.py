"""What the examples share: images, a small network, a plain training loop, and the last line that each prints.

``--data DIR`` takes a folder of images (CIFAR-10 in any public layout); without it, images of ten patterns are made.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ghn_client import GHNClient
from ghn_client.finetune.images import load_images

EXAMPLE = torch.zeros(1, 3, 32, 32)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every example."""
    options = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    options.add_argument("--data", type=Path, help="folder of images; made ones without it")
    options.add_argument("--images", type=int, default=2000, help="training images")
    options.add_argument("--steps", type=int, default=100, help="training steps of 64 images")
    options.add_argument("--address", help="of a server; without it one runs in this process")
    return options


def connect(address: str | None) -> GHNClient:
    """A client of the server at ``address``, or of one in this process."""
    return GHNClient(address) if address else GHNClient.embedded()


def image_loaders(options: argparse.Namespace, batch_size: int = 64) -> tuple[DataLoader, DataLoader]:
    """Training and test images (B, 3, 32, 32) with labels below 10."""
    if options.data:
        splits = load_images(options.data, image_size=32, limit=options.images)
        sets = [TensorDataset(part.images.float() / 128 - 1, part.labels) for part in splits]
    else:
        generator = torch.Generator().manual_seed(0)
        patterns = nn.functional.interpolate(torch.randn(10, 3, 4, 4, generator=generator), 32, mode="bilinear")
        sets = []
        for count in (options.images, 500):
            labels = torch.randint(0, 10, (count,), generator=generator)
            sets.append(
                TensorDataset(patterns[labels] + 2 * torch.randn(count, 3, 32, 32, generator=generator), labels)
            )
    return DataLoader(sets[0], batch_size, shuffle=True, drop_last=True), DataLoader(sets[1], 250)


def small_network(seed: int = 0) -> nn.Module:
    """A convolutional network of 75,000 parameters with torch's default initialisation."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(network: nn.Module, batches: Iterable, steps: int, learning_rate: float = 0.03) -> nn.Module:
    """Cross-entropy and SGD for ``steps`` batches."""
    optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=0.9)
    network.train()
    for images, labels in itertools.islice(itertools.chain.from_iterable(itertools.repeat(batches)), steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network


@torch.no_grad()
def accuracy(network: nn.Module, batches: Iterable) -> float:
    """The share of images that are classified as they should be."""
    network.eval()
    right = [(network(images).argmax(1) == labels).float() for images, labels in batches]
    return float(torch.cat(right).mean())


def compare(what: str, predicted: float, default: float) -> None:
    """The last line of an example: its figure beside that of the default initialisation."""
    print(f"{what}: {predicted:.1%} from predicted weights, {default:.1%} from the default initialisation")
