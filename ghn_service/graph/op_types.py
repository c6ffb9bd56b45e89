"""The vocabulary of graph nodes: the 15 primitives of GHN-2 and GHN-3, and what each stands for.

A checkpoint stores its own vocabulary by name, so new rows go at the end and old checkpoints keep working:
nodes outside a checkpoint's vocabulary are contracted before prediction (``graph/passes.py``).

Reference: Knyazev et al. 2021, "Parameter Prediction for Unseen Deep Architectures" (arXiv:2110.13100), table 1.
"""

from __future__ import annotations

# Whether a node of each type stands for a trainable tensor, by the name that checkpoints store.
OP_TYPES: dict[str, bool] = {
    "max_pool": False,  # max pooling over a window
    "avg_pool": False,  # average pooling over a window
    "sep_conv": True,  # weight of a depthwise or grouped convolution
    "dil_conv": True,  # weight of a grouped convolution with dilation
    "conv": True,  # weight of a convolution, linear layer or attention projection
    "msa": False,  # softmax of self-attention
    "cse": False,  # multiplication by a squeeze-and-excitation gate
    "sum": False,  # addition of two or more branches
    "concat": False,  # concatenation of two or more branches
    "input": False,  # the input of the network
    "bias": True,  # bias of a convolution, linear layer or attention projection
    "bn": True,  # weight (and bias) of a batch normalization
    "ln": True,  # weight (and bias) of a layer normalization
    "pos_enc": True,  # position embedding or lookup table
    "glob_avg": False,  # global or adaptive average pooling
}
OP_TYPE_NAMES: tuple[str, ...] = tuple(OP_TYPES)
