"""What a training script does with predicted weights: tune a few of them, with guarantees.

Works on any torch module. ``STRATEGIES`` lists what can be tuned; every entry returns a
:class:`FineTuneHandle`. ``express`` and ``patch`` are exact solvers, ``plan`` says what each strategy could reach.
"""

from __future__ import annotations

from ghn_client.finetune.additive import AdditiveModule, additive
from ghn_client.finetune.delta import load_complete_model, load_delta, save_delta
from ghn_client.finetune.express.pairing import random_norm_network
from ghn_client.finetune.express.solver import express, feasibility
from ghn_client.finetune.factored import defactorize_module, factorize_module, low_rank
from ghn_client.finetune.fit import FitSettings, evaluate, fit
from ghn_client.finetune.handle import FineTuneHandle, combine
from ghn_client.finetune.inserted_norms import insert_norms
from ghn_client.finetune.lora import low_rank_update
from ghn_client.finetune.norm_only import gamma_report, norm_only
from ghn_client.finetune.patch.solver import patch
from ghn_client.finetune.peft_format import export_peft, import_peft
from ghn_client.finetune.planner import plan
from ghn_client.finetune.strategies import STRATEGIES, all_parameters, bias_only, head_only, prepare

__all__ = [
    "STRATEGIES",
    "AdditiveModule",
    "FineTuneHandle",
    "FitSettings",
    "additive",
    "all_parameters",
    "bias_only",
    "combine",
    "defactorize_module",
    "evaluate",
    "export_peft",
    "express",
    "factorize_module",
    "feasibility",
    "fit",
    "gamma_report",
    "head_only",
    "import_peft",
    "insert_norms",
    "load_complete_model",
    "load_delta",
    "low_rank",
    "low_rank_update",
    "norm_only",
    "patch",
    "plan",
    "prepare",
    "random_norm_network",
    "save_delta",
]
