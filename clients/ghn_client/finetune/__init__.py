"""What a training script does with predicted weights: tune a few of them, with guarantees.

Works on any torch module and depends on torch alone. ``STRATEGIES`` lists what can be tuned; every entry returns a
:class:`FineTuneHandle`. ``express`` and ``patch`` are exact solvers, ``plan`` says what each strategy could reach.
"""

from __future__ import annotations

from ghn_client.finetune.handle import FineTuneHandle, combine
from ghn_client.finetune.norm_only import norm_only

__all__ = ["FineTuneHandle", "combine", "norm_only"]
