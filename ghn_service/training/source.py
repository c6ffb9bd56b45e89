"""``ghn-train source``: trains one small network on labelled images, to be a source of weights for others.

One recipe for all: SGD with Nesterov momentum, a rate that rises and falls linearly, label smoothing, random crops and
mirrored images; the first epochs see smaller crops, which cost less (Touvron et al. 2019, arXiv:1906.06423, on why the
last ones need the final size). Transformers want ``optimizer=adamw``.
"""

from __future__ import annotations

import logging
import signal
import time
import tomllib
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from ghn_architectures.architecture import Architecture, Interface
from ghn_architectures.registry import ARCHITECTURES, SOURCES
from ghn_client.atomic_file import replaced_file
from ghn_client.finetune.images import ImageSet, Normalization, measure_normalization
from ghn_client.onnx.export import export_architecture
from ghn_service.errors import InvalidOptionError, TrainingError
from ghn_service.training.evaluation.zero_shot import accuracy
from ghn_service.training.images import Augmentation, digest_images, interface_of, load_training_data, require_split
from ghn_service.training.networks import to_channels_last
from ghn_service.training.precision import avoid_slow_layers, choose_precision, keep_freed_memory, target_passes
from ghn_service.training.processes import on_stop_signals
from ghn_service.training.settings import DataSettings, SourceRecipe
from ghn_service.training.step import slot_generator
from ghn_service.transfer.library import SourceSummary, save_source
from ghn_service.transfer.source import SourceCard

logger = logging.getLogger(__name__)
STATE_FILE = "source.pt"


def find_source_network(name: str, interface: Interface) -> Architecture:
    """A network of ``SOURCES`` or of the registry, or of a TOML file: ``family``, then fields of its configuration.

    Raises:
        InvalidOptionError: There is no such network or file, or its values make no network.
    """
    known = {**ARCHITECTURES, **SOURCES}
    if name in known:
        return Architecture(known[name].family, known[name], interface, name)
    path = Path(name)
    if path.suffix != ".toml":
        raise InvalidOptionError(f"no network is called {name!r}; known are {', '.join(known)}", field="network")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        kinds = {configuration.family: type(configuration) for configuration in known.values()}
        kind = kinds[values.pop("family")]
        lists = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        architecture = Architecture(kind.family, kind(**lists), interface, path.stem)
        architecture.build(initialize=False)
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InvalidOptionError(f"{path.name} describes no network: {error!r}", field="network") from error
    return architecture


def train_source(
    network: str,
    data_folder: Path,
    out: Path,
    recipe: SourceRecipe,
    *,
    licence: str = "",
    cache: Path | None = None,
    save_minutes: float = 2.0,
) -> SourceSummary | None:
    """Trains a network, or goes on where a run in the folder ``out`` stopped, and writes ``out/NAME.safetensors``.

    Images held out for validation are those that hypernetworks do not see either. ``licence`` are the terms of the
    weights, for the card. Gives ``None`` where a signal asked to stop before the end.

    Raises:
        TrainingError: The folder holds another run, or the loss is not finite.
        DataError: The data cannot be read.
    """
    keep_freed_memory()
    cache = cache or out.parent / "cache"
    training, validation = load_training_data(data_folder, DataSettings(), cache)
    normalization = measure_normalization(training)
    interface = interface_of(training)
    architecture = find_source_network(network, interface)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        module = to_channels_last(architecture.build())
    run = _Run(avoid_slow_layers(module), training, normalization, recipe, repr(architecture))
    run.resume(out / STATE_FILE)
    if not run.finish(out / STATE_FILE, save_minutes):
        return None
    size, channels = interface.image_size, interface.in_channels
    test = require_split(data_folder, "test", image_size=size, channels=channels, cache=cache)
    module.eval().half().float()  # what is measured is what the file keeps
    changes = " ".join(f"--set {name}={value}" for name, value in recipe.model_dump(exclude_defaults=True).items())
    card = SourceCard(
        dataset=data_folder.name,
        class_names=training.class_names,
        accuracy=accuracy(module, test, normalization, batch_size=250),
        recipe=f"{recipe.optimizer}, {recipe.epochs} epochs of {len(training)} images, the first {recipe.small_epochs} "
        f"on crops of {recipe.small_size} pixels; shifted and mirrored; details.recipe",
        seed=recipe.seed,
        command=f"ghn-train source {network} --data {data_folder.name} --out {out.name} {changes}".rstrip(),
        licence=licence,
        normalization={"mean": normalization.mean, "std": normalization.std},
        image_size=size,
        details={
            "recipe": recipe.model_dump(),
            "validation_accuracy": accuracy(module, validation, normalization, batch_size=250),
            "test_images": len(test),
            "training_minutes": round(run.elapsed_s / 60, 1),
            "multiply_adds": architecture.multiply_adds,
        },
    )
    structure = export_architecture(module, torch.zeros(1, *interface.input_shape))
    return save_source(
        out / f"{architecture.name}.safetensors", structure, module.state_dict(), card=card, dtype=torch.float16
    )


class _Run:
    """One network in training; every draw depends on the seed and the step alone, so a resumed run ends the same."""

    def __init__(
        self,
        module: nn.Module,
        images: ImageSet,
        normalization: Normalization,
        recipe: SourceRecipe,
        network: str,
    ) -> None:
        self.module, self.images, self.normalization, self.recipe = module, images, normalization, recipe
        self.identity = {"network": network, "data": digest_images(images), **recipe.model_dump()}
        self.steps_per_epoch = max(1, len(images) // recipe.batch_size)
        self.step, self.elapsed_s = 0, 0.0
        self.precision = choose_precision("auto", torch.device("cpu"))
        self.augmentation = Augmentation()
        parameters = list(module.parameters())
        groups = [
            {"params": [item for item in parameters if item.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [item for item in parameters if item.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, lr=recipe.learning_rate)
            if recipe.optimizer == "adamw"
            else torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)
        )

    def resume(self, path: Path) -> None:
        """Goes on from a state file, if there is one."""
        if not path.exists():
            return
        body = torch.load(path, weights_only=True)
        saved = {"data": self.identity["data"], **body["identity"]}  # older states do not know their data
        if saved != self.identity:
            raise TrainingError(f"{path.parent} holds a run of another network, recipe or data; choose another folder")
        self.module.load_state_dict(body["module"])
        self.optimizer.load_state_dict(body["optimizer"])
        self.step, self.elapsed_s = body["step"], body["elapsed_s"]
        logger.info("resumed at step %d after %.0f s", self.step, self.elapsed_s)

    def save(self, path: Path) -> None:
        """Writes the state, whole or not at all."""
        body = {
            "identity": self.identity,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as part:
            torch.save(body, part)

    def finish(self, path: Path, save_minutes: float) -> bool:
        """Trains to the end of the schedule; False where a signal asked to stop before. The state is saved."""
        asked: list[int] = []
        total = self.recipe.epochs * self.steps_per_epoch
        saved_at = time.monotonic()
        losses: list[float] = []
        self.module.train()
        with on_stop_signals(lambda number, _frame: asked.append(number)):
            while self.step < total and not asked:
                started = time.monotonic()
                losses.append(self.advance(total))
                self.elapsed_s += time.monotonic() - started
                if self.step % 50 == 0 or self.step == total:
                    mean, losses = sum(losses) / len(losses), []
                    logger.info("step %d of %d: loss %.3f, %.0f s", self.step, total, mean, self.elapsed_s)
                    if mean != mean:
                        raise TrainingError(f"the loss is not finite at step {self.step}; lower the learning rate")
                if time.monotonic() - saved_at >= 60 * save_minutes:
                    self.save(path)
                    saved_at = time.monotonic()
        self.save(path)
        if asked:
            logger.info("%s: stopped at step %d", signal.Signals(asked[0]).name, self.step)
        return self.step >= total

    def advance(self, total: int) -> float:
        """One step; gives its loss."""
        recipe = self.recipe
        epoch, place = divmod(self.step, self.steps_per_epoch)
        order = torch.randperm(len(self.images), generator=slot_generator(recipe.seed, epoch))
        chosen = order[place * recipe.batch_size : (place + 1) * recipe.batch_size]
        pixels = self.augmentation.apply(
            self.images.images[chosen], generator=slot_generator(recipe.seed, epoch, place)
        )
        margin = (self.images.image_size - recipe.small_size) // 2
        if epoch < recipe.small_epochs and recipe.small_size and margin > 0:
            pixels = pixels[:, :, margin:-margin, margin:-margin]  # after the shift: a random crop
        batch = self.normalization.apply(pixels).contiguous(memory_format=torch.channels_last)
        done = (self.step + 0.5) / total
        factor = min(done / recipe.warmup, (1.0 - done) / (1.0 - recipe.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * factor
        with target_passes(batch.device, self.precision):
            logits = self.module(batch)
        loss = functional.cross_entropy(
            logits.float(), self.images.labels[chosen], label_smoothing=recipe.label_smoothing
        )
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        return loss.item()
