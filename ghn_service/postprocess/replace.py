"""A ``ParameterSet`` with some of its tensors replaced."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ghn_service.parameters import ParameterSet


def replace_tensors(parameters: ParameterSet, changed: Mapping[str, torch.Tensor]) -> ParameterSet:
    """The same parameters with the tensors of ``changed`` in the place of their namesakes; shapes must agree."""
    tensors = {name: changed.get(name, tensor) for name, tensor in parameters.items()}
    return ParameterSet(parameters.specs, tensors, parameters.origins, parameters.warnings)
