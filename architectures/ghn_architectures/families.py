"""The families of random networks and their shares in each split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ghn_architectures import plans, token_plans
from ghn_architectures.draw import Draw
from ghn_architectures.interface import Configuration
from ghn_architectures.plans import Plan


@dataclass(frozen=True, slots=True)
class Family:
    """A way to draw networks.

    Attributes:
        plan: Draws everything but the width, from a stream of random choices and a scale.
        share: Share among the families of a split, relative.
    """

    plan: Callable[[Draw, int], Plan]
    share: float


FAMILIES: dict[str, Family] = {
    "cells": Family(plans.plan_cells, 0.25),
    "resnet": Family(plans.plan_resnet, 0.24),
    "convnet": Family(plans.plan_convnet, 0.13),
    "mobilenet": Family(plans.plan_mobilenet, 0.10),
    "bottleneck": Family(plans.plan_bottleneck, 0.06),
    "convnext": Family(token_plans.plan_convnext, 0.06),
    "densenet": Family(plans.plan_densenet, 0.05),
    "vit": Family(token_plans.plan_vit, 0.035),
    "mlp": Family(token_plans.plan_mlp, 0.025),
    "attention_cells": Family(plans.plan_attention_cells, 0.02),
    "mixer": Family(token_plans.plan_mixer, 0.02),
    "swin": Family(token_plans.plan_swin, 0.01),
}


def without_norm(plan: Callable[[Draw, int], Plan]) -> Callable[[Draw, int], Plan]:
    """The same networks without normalisation."""

    def changed(draw: Draw, scale: int) -> Plan:
        drawn = plan(draw, scale)

        def configuration(base: int) -> Configuration:
            return dataclasses.replace(drawn(base), norm="none")  # type: ignore[type-var]

        return configuration

    return changed


NORM_FREE_FAMILIES: dict[str, Family] = {
    name: Family(without_norm(FAMILIES[name].plan), FAMILIES[name].share)
    for name in ("cells", "resnet", "convnet", "mobilenet", "bottleneck")
}
DEEP_FAMILIES: dict[str, Family] = {
    name: FAMILIES[name] for name in ("cells", "resnet", "mobilenet", "bottleneck", "densenet", "convnext", "vit")
}
DENSE_FAMILIES: dict[str, Family] = {
    "cells": Family(partial(plans.plan_cells, steps=(4, 8), norm="batch"), 1.0),
}
_DEEPER_SHARES = {"bottleneck": 0.14, "mobilenet": 0.12, "densenet": 0.08, "convnext": 0.06, "vit": 0.05}
DEEPER_FAMILIES: dict[str, Family] = {
    "resnet": Family(plans.plan_deep_resnet, 0.55),
    **{name: Family(FAMILIES[name].plan, share) for name, share in _DEEPER_SHARES.items()},
}
