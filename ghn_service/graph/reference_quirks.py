"""Where the reference implementation has a habit that its trained checkpoints depend on, and what is done about it.

The reference reads autograd graphs of torch modules (Knyazev et al. 2021, arXiv:2110.13100; 2023, arXiv:2303.04143).
Everything here is a rule on the graph's own structure; no network is recognised by its name.

Reproduced:

* Position embeddings have no predecessors; a ``sum`` follows them (``onnx.elementwise``).
* A squeeze-and-excitation gate has no pooling node: its mean vanishes, and the gate's first layer hangs directly on
  the feature (``passes.mark_squeezes``).
* An adaptive average pool is ``glob_avg`` even where it keeps several positions or changes nothing
  (``passes.classify_average_pools``).
* A global pool that ends the network moves in front of the 1x1 convolution that is its classifier, so that classifier
  weight and bias are the last two nodes (``passes.move_final_pool``).
* The values of an attention reach the next layer through the softmax node only (``onnx.attention.attended``).
* Normalisation biases, class tokens, layer scales and relative position tables are no nodes.
* Distances are cut off at 50 (``MAX_DISTANCE``).

Not reproduced, because the reference is ill-formed there (appendix B of the specification): bias-free linear layers cut
out of the data path, gated networks losing their last pooling because of the head's name, cycles in Swin V2, the
orphaned head of MaxViT.
"""

from __future__ import annotations

import math

MAX_DISTANCE = 50


def has_position_grid(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape, added to the tokens or the image, is decoded as a position embedding.

    (1, tokens, channels) needs a square grid of positions, with or without one token more; (1, channels, height,
    width) and (tokens, channels) always do.
    """
    if len(shape) == 3 and shape[0] == 1 and min(shape[1:]) > 1:
        return shape[1] - math.isqrt(shape[1]) ** 2 in (0, 1)
    if len(shape) == 4 and shape[0] == 1:
        return min(shape[1:]) > 1
    return len(shape) == 2 and min(shape) > 1
