"""What an evaluation measures, and under which protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FineTuneSettings:
    """How networks are fine-tuned.

    Attributes:
        learning_rates: The grid; SGD with momentum 0.9, constant.
        choose_at: Steps after which a side keeps only its best learning rate.
        budgets: Steps at which the two sides are compared.
        longest: Steps of the He side, so that its way to the predicted side's accuracy can be counted.
        every: Steps between two points of a curve.
        batch_size: Images per step.
        weight_decay: Weight decay.
        clip: Largest gradient norm.
    """

    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    choose_at: int = 100
    budgets: tuple[int, ...] = (100, 500)
    longest: int = 800
    every: int = 50
    batch_size: int = 64
    weight_decay: float = 5e-4
    clip: float = 5.0


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured.

    Attributes:
        splits: Networks per split of the generator, and of ``reference`` for the registry's networks.
        test_images: Test images for zero-shot accuracy.
        calibration_images: Training images for recalibrated BatchNorm.
        fine_tune_networks: Networks of split ``test`` in the fine-tuning comparison; 0 leaves it out.
        fine_tune_images: Sizes of the training sets; 0 stands for all images.
        fine_tune_test_images: Test images per point of a curve.
        validation_images: Held-out training images that choose learning rates.
        seeds: Seeds of the comparison; the first one chooses the learning rates.
        fine_tune: Budgets and grid.
        novelty_networks: Training networks in the honesty check; 0 leaves it out.
        precision: Number format of fine-tuning passes.
        zero_shot_precision: Number format of zero-shot passes.
        largest_macs: Networks with more multiply-adds are left out, and counted as such.
        is_baseline_only: Whether only the He side of the comparison is measured, which serves every checkpoint.
    """

    splits: Mapping[str, int]
    test_images: int = 2000
    calibration_images: int = 1280
    fine_tune_networks: int = 20
    fine_tune_images: tuple[int, ...] = (0, 1000)
    fine_tune_test_images: int = 1000
    validation_images: int = 1000
    seeds: tuple[int, ...] = (0,)
    fine_tune: FineTuneSettings = field(default_factory=FineTuneSettings)
    novelty_networks: int = 32
    precision: str = "auto"
    zero_shot_precision: str = "float32"
    largest_macs: float = 1.5e9
    is_baseline_only: bool = False
