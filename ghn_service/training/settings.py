"""What a training run is made of, as frozen values that a TOML file or ``--set`` can change.

The defaults are what won in the comparisons of ``docs/training.md``. A checkpoint's metadata has the values that it was
trained with.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field

from ghn_service.errors import CheckpointError, InvalidOptionError
from ghn_service.hypernetwork.config import decode_config

SMALL_HYPERNETWORK: dict[str, Any] = {
    "hidden_channels": 32,
    "max_shape": [64, 64, 7, 7],
    "num_classes": 10,
    "decoder_activation": "leaky_relu",
}


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class DataSettings(_Section):
    """Images and batches.

    Attributes:
        batch_size: Images per target network and gradient.
        batches_per_network: Batches of images whose gradients are averaged for one predicted network.
        image_size: Rows and columns; as stored where omitted.
        channels: 1 or 3; as stored where omitted.
        pad: Largest random shift, pixels.
        flip: Whether half of the images are mirrored.
        validation_images: Training images held out for validation, where the data has no such split.
    """

    batch_size: int = Field(default=64, ge=2)
    batches_per_network: int = Field(default=4, ge=1)
    image_size: int | None = Field(default=None, ge=4)
    channels: Literal[1, 3] | None = None
    pad: int = Field(default=4, ge=0)
    flip: bool = True
    validation_images: int = Field(default=5000, ge=1)


class SamplingSettings(_Section):
    """Which target networks are trained on.

    Attributes:
        meta_batch: Networks per step, over all processes.
        budget_macs: Networks with more multiply-adds per image than this are kept with probability
            ``budget_macs / multiply_adds``, so that every cost class gets about the same compute.
        largest_macs: Networks with more multiply-adds than this are left out.
        start_macs: ``largest_macs`` at the start; it grows to ``largest_macs`` over ``growth`` of the run.
        growth: Fraction of the run over which the largest network grows.
        largest_nodes: Networks with more graph nodes than this are left out.
        split: Where they are drawn: ``train``, or ``broad``, which has deeper and wider ones too.
        pool: Different networks; after that many they come again.
        keep: Share of the networks of a family that is trained on in one round of the pool, by the family's name; all
            of them for families that are not named. So rare or hard families get more of the compute.
    """

    meta_batch: int = Field(default=1, ge=1)
    budget_macs: float = Field(default=5e6, gt=0)
    largest_macs: float = Field(default=30e6, gt=0)
    start_macs: float = Field(default=3e6, gt=0)
    growth: float = Field(default=0.6, ge=0, le=1)
    largest_nodes: int = Field(default=250, ge=4)
    split: Literal["train", "broad"] = "train"
    pool: int = Field(default=2500, ge=1)
    keep: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)


class ObjectiveSettings(_Section):
    """The loss of a predicted network.

    Attributes:
        label_smoothing: Smoothing of the one-hot labels.
        penalty: Weight of the sum of Frobenius norms of the predicted tensors (GHN-3: 3e-5).
    """

    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    penalty: float = Field(default=3e-5, ge=0)


class OptimizerSettings(_Section):
    """Update rule, schedule and averaging.

    Attributes:
        name: ``adamw``, or ``muon`` (Muon for the matrices of encoder and decoder, AdamW for the rest).
        learning_rate: Largest rate of AdamW.
        decoder_scale: Factor on the rate of the decoders' parameters.
        muon_learning_rate: Largest rate of Muon.
        muon_largest_side: Matrices whose shorter side is longer than this stay with AdamW: orthogonalising costs its
            cube.
        betas: Averaging of AdamW.
        weight_decay: Decoupled decay of matrices; vectors and embeddings have none.
        clip: Largest norm of the whole gradient. Muon makes steps of equal size whatever the gradient's, so one
            network with a huge gradient would steer many steps; 1 is about the usual norm.
        schedule: ``cosine``, or ``trapezoid``: constant, then linear to 0 over ``cooldown`` of the run.
        warmup: Fraction of the run with growing rate.
        cooldown: Fraction of the run with falling rate (``trapezoid``).
        ema_decay: Decay per step of the averaged weights, which are the ones that ship.
        ema_every: Steps between two updates of the average.
    """

    name: Literal["adamw", "muon"] = "muon"
    learning_rate: float = Field(default=1e-3, gt=0)
    decoder_scale: float = Field(default=1.0, gt=0)
    muon_learning_rate: float = Field(default=0.01, gt=0)
    muon_largest_side: int = Field(default=1024, ge=1)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=1e-2, ge=0)
    clip: float = Field(default=1.0, gt=0)
    schedule: Literal["cosine", "trapezoid"] = "trapezoid"
    warmup: float = Field(default=0.01, ge=0, lt=1)
    cooldown: float = Field(default=0.4, gt=0, le=1)
    ema_decay: float = Field(default=0.998, ge=0, lt=1)
    ema_every: int = Field(default=4, ge=1)


class LimitSettings(_Section):
    """How long a run lasts, what it writes, and when it gives up.

    Attributes:
        steps: Steps of the run, whose schedule follows them; they do not count where ``minutes`` is given.
        minutes: Length of the run in minutes of training, over all resumes; the schedule then follows the clock, and
            a resumed run is no longer equal bit for bit to an uninterrupted one.
        save_minutes: Minutes between two saved states.
        log_every: Steps between two lines of the log.
        validate_minutes: Minutes between two validations; 0 for one at the end only.
        validation_networks: Networks of split ``val`` per validation.
        validation_images: Images per validation network.
        rollback_after: Consecutive bad steps after which the last good state is loaded.
        divergence: A loss above this multiple of the log of the class count is a bad step.
        give_up_after: Rollbacks after which the run stops with an error.
        draw_first: Draw the whole pool with all processors before training, into a file of the cache folder.
        state_part_bytes: Saved states are split into files of at most so many bytes; None for one file.
        cuda_graphs: On a GPU, record the passes of each network once and replay them, where that works.
    """

    steps: int = Field(default=100_000, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    save_minutes: float = Field(default=3.0, ge=0)
    log_every: int = Field(default=50, ge=1)
    validate_minutes: float = Field(default=10.0, ge=0)
    validation_networks: int = Field(default=24, ge=1)
    validation_images: int = Field(default=512, ge=16)
    rollback_after: int = Field(default=10, ge=1)
    divergence: float = Field(default=20.0, gt=1)
    give_up_after: int = Field(default=5, ge=1)
    draw_first: bool = False
    state_part_bytes: int | None = Field(default=None, ge=1024)
    cuda_graphs: bool = False


class TrainingSettings(_Section):
    """Everything that decides the result of a run, apart from the data.

    Attributes:
        seed: Seed of initial weights, networks and batches.
        precision: Number format of the target networks' passes; ``auto`` takes bfloat16 where the processor has it.
        threads: Threads of torch on a CPU; ``None`` leaves torch's default.
        hypernetwork: Fields of ``GHNConfig``; class count is taken from the data where it is not given.
    """

    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    hypernetwork: dict[str, Any] = Field(default_factory=lambda: dict(SMALL_HYPERNETWORK))
    data: DataSettings = DataSettings()
    sampling: SamplingSettings = SamplingSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    limits: LimitSettings = LimitSettings()

    @pydantic.field_validator("hypernetwork")
    @classmethod
    def _known_hypernetwork(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = {**SMALL_HYPERNETWORK, **values}
        try:
            decode_config(values)
        except CheckpointError as error:
            raise ValueError(str(error)) from error
        return values

    def digest(self) -> str:
        """A short hash of everything but the limits: a state fits a run exactly if these agree."""
        body = self.model_dump(exclude={"limits"}, mode="json")
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


class SourceRecipe(_Section):
    """How ``ghn-train source`` trains a network; with the network and the data it decides every weight.

    Attributes:
        epochs: Passes over the training images.
        small_epochs: Passes over crops of ``small_size`` pixels, the first of them.
        small_size: Side of these crops.
        optimizer: ``sgd``, with Nesterov momentum of 0.9, or ``adamw``.
        learning_rate: The largest; it rises over ``warmup`` of the steps and falls to 0, both linearly.
        warmup: Share of the steps with growing rate.
        weight_decay: Of weights with two axes or more.
        label_smoothing: Smoothing of the one-hot labels.
        batch_size: Images per step.
        seed: Seed of initial weights, order and augmentation.
    """

    epochs: int = Field(default=14, ge=1)
    small_epochs: int = Field(default=9, ge=0)
    small_size: int = Field(default=24, ge=4)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(default=0.2, gt=0)
    warmup: float = Field(default=0.15, gt=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    label_smoothing: float = Field(default=0.05, ge=0, lt=1)
    batch_size: int = Field(default=128, ge=2)
    seed: int = 0


PRESETS: dict[str, dict[str, Any]] = {
    # what keeps a large GPU busy: target networks are launch-bound there, so larger batches and networks cost little
    "gpu": {
        "data": {"batch_size": 256, "batches_per_network": 1},
        "sampling": {
            "meta_batch": 8,
            "split": "broad",
            "pool": 12_000,
            "largest_nodes": 400,
            "budget_macs": 60e6,
            "largest_macs": 400e6,
            "start_macs": 30e6,
        },
        "limits": {"draw_first": True, "save_minutes": 2.0, "validate_minutes": 4.0, "cuda_graphs": True},
    }
}

AnySettings = TypeVar("AnySettings", bound=pydantic.BaseModel)


def load_settings(
    path: Path | None,
    changes: Sequence[str] = (),
    kind: type[AnySettings] = TrainingSettings,  # type: ignore[assignment]
    *,
    preset: str | None = None,
) -> AnySettings:
    """Settings of a preset, a TOML file and ``section.name=value`` changes; later ones win.

    Values of changes are TOML or bare words.

    Raises:
        InvalidOptionError: The file or a change cannot be read, or a value is impossible; ``field`` names it.
    """
    if preset is not None and preset not in PRESETS:
        raise InvalidOptionError(f"expected a preset of {', '.join(PRESETS)}, got {preset!r}", field="preset")
    values: dict[str, Any] = copy.deepcopy(PRESETS[preset]) if preset else {}
    if path:
        try:
            _merge(values, tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InvalidOptionError(f"cannot read the configuration {path.name}: {error}", field="config") from error
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or not name.strip():
            raise InvalidOptionError(f"expected section.name=value, got {change!r}", field="set")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        for part in reversed(name.strip().split(".")):
            value = {part: value}
        _merge(values, value)
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _names(kind)
            near = difflib.get_close_matches(name, known, n=3) or known
            raise InvalidOptionError(
                f"there is no setting {name!r}; known are {', '.join(near)}", field=name
            ) from error
        raise InvalidOptionError(f"{name}: {first['msg']}; got {first['input']!r}", field=name) from error


def _names(kind: type[pydantic.BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    names: list[str] = []
    for name, field in kind.model_fields.items():
        inner = field.annotation
        is_section = isinstance(inner, type) and issubclass(inner, pydantic.BaseModel)
        names += _names(inner, f"{prefix}{name}.") if is_section else [prefix + name]  # type: ignore[arg-type]
    return names


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
