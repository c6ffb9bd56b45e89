"""Does repairing diversity help? ``make reproduce-diversity``, or ``python -m benchmarks.reproduce_diversity``.

Fine-tunes each architecture on 1,000 CIFAR-10 images from He initialisation and from predictions with no step, noise,
QR, polar and auto: same number of steps, same batches per seed, learning rate of each start from the same grid on
validation images. Writes a table in Markdown, the numbers as JSON, and a plot as SVG. The published recipes
(arXiv:2207.10049) train far longer and act from a late layer on; the options let one ask for that.
"""

from __future__ import annotations

import argparse
import html
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghn_service.postprocess.base import decode_step
from ghn_service.predictor import PredictionOptions, Predictor
from ghn_service.training.data import measure_normalization, require_images, split_validation
from ghn_service.training.data_layouts import ImageFormat
from ghn_service.training.fine_tune import FineTuneData, FineTunePlan, fine_tune, mean_and_error, small_training_set
from ghn_service.training.networks import REFERENCE, Task, find_network
from ghn_service.training.sampling import TargetArchitecture
from ghn_service.training.zero_shot import he_module, initial_module, load_tensors

STARTS: Mapping[str, tuple[str, ...] | None] = {
    "He": None,
    "GHN": (),
    "GHN + noise": ("noise:beta=3e-5",),
    "GHN + QR": ("noise:beta=3e-5", "orthogonal:method=qr"),
    "GHN + polar": ("noise:beta=3e-5", "orthogonal:method=polar"),
    "GHN + auto": ("auto",),
}
COLOURS = ("#8a8f98", "#1f6fd1", "#5aa9e6", "#c2630c", "#1a7f37", "#8250df")


def start_module(name: str, architecture: TargetArchitecture, predictor: Predictor, seed: int, layer: int) -> nn.Module:
    """The network with the start of this name; ``layer`` is the first that the steps change."""
    texts = STARTS[name]
    if texts is None:
        return he_module(architecture, seed=seed)
    module = initial_module(architecture, seed=seed)
    with_layer = [f"{text}{',' if ':' in text else ':'}layer={layer}" if layer else text for text in texts]
    options = PredictionOptions(seed=seed, steps=tuple(decode_step(text) for text in with_layer))
    load_tensors(module, predictor.predict(architecture.graph(), options=options))
    return module


def load_data(arguments: argparse.Namespace, seed: int) -> FineTuneData:
    """The images of one seed: a class-balanced small training set, 1,000 for validation, the test images."""
    image_format = ImageFormat(size=arguments.image_size)
    everything = require_images(arguments.data, "train", image_format=image_format, cache=arguments.cache)
    rest, validation = split_validation(everything, 1000)
    test = require_images(arguments.data, "test", image_format=image_format, cache=arguments.cache)
    test = test.subset(torch.arange(min(arguments.test_images, len(test))))
    normalization = measure_normalization(rest)
    return FineTuneData(small_training_set(rest, arguments.images, seed=seed), validation, test, normalization)


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Test accuracy by architecture and start, one entry a seed."""
    predictor = Predictor.from_checkpoint(arguments.checkpoint, device="cpu")
    plan = FineTunePlan(
        learning_rates=tuple(arguments.rates),
        choose_at=arguments.steps,
        budgets=(arguments.steps,),
        longest=arguments.steps,
        every=arguments.steps,
    )
    results: dict[str, dict[str, list[float]]] = {}
    for network in arguments.architectures:
        architecture = find_network(REFERENCE, network, Task(10, 3, arguments.image_size))
        results[network] = {name: [] for name in STARTS}
        for seed in range(arguments.seeds):
            data = load_data(arguments, seed)
            for name in STARTS:
                module = start_module(name, architecture, predictor, seed, arguments.layer)
                curve = fine_tune(module, data, plan, steps=arguments.steps, seed=seed)
                results[network][name].append(curve.at(arguments.steps))
                print(
                    f"{network} seed {seed} {name}: {curve.at(arguments.steps):.4f} (lr {curve.learning_rate:g})",
                    flush=True,
                )
    return results


def markdown_table(results: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Mean and standard error in percent; bold is the best of a row, a star marks a gain over GHN of two errors."""
    lines = ["| architecture | " + " | ".join(STARTS) + " |", "|---" * (len(STARTS) + 1) + "|"]
    for network, scores in results.items():
        best = max(scores, key=lambda name: statistics.fmean(scores[name]))
        cells = []
        for name, values in scores.items():
            mean, error = mean_and_error(values)
            gain, gain_error = mean_and_error([a - b for a, b in zip(values, scores["GHN"], strict=True)])
            star = "*" if len(values) > 1 and name not in ("He", "GHN") and gain > 2 * gain_error > 0 else ""
            text = f"{100 * mean:.1f} ± {100 * error:.1f}{star}"
            cells.append(f"**{text}**" if name == best else text)
        lines.append(f"| {network} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bar_plot(results: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Grouped bars with standard errors, as an SVG image."""
    width, height, left, bottom, top = 760, 340, 44, 60, 16
    largest = max(max(values) for scores in results.values() for values in scores.values()) * 1.08 or 1.0
    group = (width - left - 10) / max(len(results), 1)
    bar = group * 0.8 / len(STARTS)
    up = height - top - bottom
    parts = []
    for row, (network, scores) in enumerate(results.items()):
        for column, (name, values) in enumerate(scores.items()):
            mean, error = mean_and_error(values)
            x, y = left + row * group + group * 0.1 + column * bar, top + up * (1 - mean / largest)
            low, high = (top + up * (1 - value / largest) for value in (mean - error, mean + error))
            middle = x + bar * 0.45
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar * 0.9:.1f}" height="{top + up - y:.1f}" '
                f'fill="{COLOURS[column]}"><title>{html.escape(name)}: {mean:.1%}</title></rect>'
                f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="#444"/>'
            )
        middle = left + (row + 0.5) * group
        parts.append(f'<text x="{middle:.1f}" y="{top + up + 18}" text-anchor="middle">{html.escape(network)}</text>')
    for column, name in enumerate(STARTS):
        x = left + column * (width - left) / len(STARTS)
        parts.append(f'<rect x="{x:.1f}" y="{height - 20}" width="11" height="11" fill="{COLOURS[column]}"/>')
        parts.append(f'<text x="{x + 16:.1f}" y="{height - 10}">{html.escape(name)}</text>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = top + up * (1 - share)
        parts.append(f'<line x1="{left}" x2="{width - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8883"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * share * largest:.0f}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" fill="#888">{"".join(parts)}</svg>\n'
    )


def main() -> None:
    """Measures, prints the table, and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the hypernetwork")
    parser.add_argument("--cache", type=Path, help="folder for decoded images")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of diversity_results.{md,json,svg}")
    parser.add_argument("--architectures", nargs="+", default=["resnet20", "convnext_atto", "vit_mini"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=160, help="steps of 64 images; 160 are ten epochs of 1,000")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    parser.add_argument("--layer", type=int, default=0, help="first layer that steps change")
    arguments = parser.parse_args()
    start = time.monotonic()
    results = measure(arguments)
    table = markdown_table(results)
    settings: dict[str, Any] = {name: str(v) if isinstance(v, Path) else v for name, v in vars(arguments).items()}
    del settings["data"], settings["cache"], settings["out"]
    settings["checkpoint"] = arguments.checkpoint.name
    body = json.dumps({"settings": settings, "accuracy": results}, indent=1)
    (arguments.out / "diversity_results.md").write_text(f"{table}\n")
    (arguments.out / "diversity_results.json").write_text(f"{body}\n")
    (arguments.out / "diversity_results.svg").write_text(bar_plot(results))
    print(f"\n{table}\n\n{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
