"""The vocabulary of graph nodes: the 15 primitives of GHN-2 and GHN-3, and what each stands for.

A checkpoint stores its own vocabulary by name, so new rows go at the end and old checkpoints keep working:
nodes outside a checkpoint's vocabulary are contracted before prediction (``graph/passes.py``).

Reference: Knyazev et al. 2021, "Parameter Prediction for Unseen Deep Architectures" (arXiv:2110.13100), table 1.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OpType:
    """One row of the vocabulary.

    Attributes:
        name: Name stored in checkpoints.
        holds_parameter: Whether a node of this type stands for a trainable tensor.
        description: What in a network becomes such a node.
    """

    name: str
    holds_parameter: bool
    description: str


OP_TYPES: tuple[OpType, ...] = (
    OpType("max_pool", False, "max pooling over a window"),
    OpType("avg_pool", False, "average pooling over a window"),
    OpType("sep_conv", True, "weight of a depthwise or grouped convolution"),
    OpType("dil_conv", True, "weight of a grouped convolution with dilation"),
    OpType("conv", True, "weight of a convolution, linear layer or attention projection"),
    OpType("msa", False, "softmax of self-attention"),
    OpType("cse", False, "multiplication by a squeeze-and-excitation gate"),
    OpType("sum", False, "addition of two or more branches"),
    OpType("concat", False, "concatenation of two or more branches"),
    OpType("input", False, "the input of the network"),
    OpType("bias", True, "bias of a convolution, linear layer or attention projection"),
    OpType("bn", True, "weight (and bias) of a batch normalization"),
    OpType("ln", True, "weight (and bias) of a layer normalization"),
    OpType("pos_enc", True, "position embedding or lookup table"),
    OpType("glob_avg", False, "global or adaptive average pooling"),
)

OP_TYPE_NAMES: tuple[str, ...] = tuple(op_type.name for op_type in OP_TYPES)
OP_TYPE_BY_NAME: dict[str, OpType] = {op_type.name: op_type for op_type in OP_TYPES}
