"""What ONNX operators do with axes: one function per kind of operator.

A handler gets the network as far as it is read, the node and its operands, and returns its outputs. It makes axes that
are the same channels one ``Dim`` (``unify``), notes layers, and raises ``NotUnderstoodError`` where it cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy

from ghn_service.graph.onnx.file import OnnxNode
from ghn_service.transfer.axes import Dim, concatenation, reshaped, split_sum, unify
from ghn_service.transfer.convolutions import convolve, convolve_transposed, pad, pool
from ghn_service.transfer.folding import MAX_RANK, constant
from ghn_service.transfer.network import Network, NotUnderstoodError, Tensor, Value, listed_axes, weight_operand
from ghn_service.transfer.work import spend

SHAPE_ONLY = frozenset(
    {"Shape", "Size", "ConstantOfShape", "Range", "Constant", "RandomNormalLike", "RandomUniformLike"}
)
"""Operators whose results hold no data, whatever they are computed from."""

_MAX_PIECES = 4096
_COST_OF_PIECE = 16
_Handler = Callable[[Network, OnnxNode, list[Value]], list[Value]]


def _same(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    """Element by element on one operand."""
    return [Value(operands[0].dims)]


def _view(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    """The same elements under another name or type."""
    return [operands[0].view(operands[0].dims, operands[0].axis_of)]


def _elementwise(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    """Element by element on several operands, with broadcasting; a bias joins the product before it."""
    tensors = [value.tensor for value in operands if value.tensor is not None and value.tensor.kind == "parameter"]
    names = network.data_inputs(node)
    if len(tensors) == 1 and len(names) == 1:
        (tensor,), (name,) = tensors, names
        before = network.makers.get(name)
        is_bias = node.op_type == "Add" and tensor.layer is None and math.prod(tensor.shape) == tensor.shape[-1]
        is_alone = before is not None and "bias" not in before.tensors and len(network.consumers[name]) == 1
        if before is not None and before.kind == "linear" and is_bias and is_alone:
            before.tensors["bias"], before.output = tensor, node.outputs[0]
            tensor.layer = network.makers[node.outputs[0]] = before
        else:
            kind = {"Add": "shift", "Sub": "shift", "Mul": "scale"}.get(node.op_type, "other")
            network.add_layer(node, kind, {"weight": tensor})
    return [Value(_broadcast(operands))]


def _broadcast(operands: Sequence[Value]) -> list[Dim]:
    rank = max((len(value.dims) for value in operands), default=0)
    axes = []
    for position in range(-rank, 0):
        wide = []
        for value in operands:
            if len(value.dims) >= -position and (dim := value.dims[position]).size != 1:
                wide.append(dim)
                if value.tensor is not None and value.tensor.kind == "constant":
                    dim.mark("pinned")
        for dim in wide[1:]:
            if dim.size != wide[0].size:
                raise NotUnderstoodError
            unify(wide[0], dim)
        axes.append(wide[0] if wide else Dim(1))
    return axes


# ---- products -------------------------------------------------------------------------------------------------------


def _contract(
    network: Network, node: OnnxNode, operands: list[Value], pairs: list[tuple[int, int]], bias: Tensor | None = None
) -> None:
    """Unifies axes that two operands are summed over together, ``(axis of 0, axis of 1)``; notes the linear layer."""
    for first, second in pairs:
        dim = operands[0].dims[first]
        unify(dim, operands[1].dims[second])
        for operand, axis, other in ((operands[0], first, node.inputs[1]), (operands[1], second, node.inputs[0])):
            if operand.is_data:
                continue
            tensor = weight_operand([operand], 0)
            if tensor is not None and (origin := operand.axis_of[axis]) is not None:
                tensor.contracted.add(origin)
                tensor.fed_by.append(other)
            elif operand.origins:
                dim.mark("pinned")
        if operands[0].is_data and operands[1].is_data:
            dim.mark("dotted")
    tensors = [value.tensor for value in operands[:2] if not value.is_data and value.tensor is not None]
    if len(tensors) == 1 and any(value.is_data for value in operands[:2]):
        network.add_layer(node, "linear", {"weight": tensors[0], "bias": bias})


def _matmul(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    a, b = operands[0].dims, operands[1].dims
    _contract(network, node, operands, [(len(a) - 1, max(len(b) - 2, 0))])
    return [Value([*_broadcast([Value(a[:-2]), Value(b[:-2])]), *a[-2:-1], *(b[-1:] if len(b) > 1 else [])])]


def _gemm(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    first, second = (0 if node.integer("transA", 0) else 1), (1 if node.integer("transB", 0) else 0)
    _contract(network, node, operands, [(first, second)], bias=weight_operand(operands, 2))
    out = [operands[0].dims[1 - first], operands[1].dims[1 - second]]
    if len(operands) > 2 and operands[2].axes is not None:
        _broadcast([Value(out), operands[2]])
    return [Value(out)]


def _einsum(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    left, arrow, right = node.text("equation").replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or len(operands) != 2 or "." in left:
        raise NotUnderstoodError
    found: dict[str, Dim] = {}
    for term, value in zip(terms, operands, strict=True):
        for letter, dim in zip(term, value.dims, strict=True):
            unify(found.setdefault(letter, dim), dim)
    shared = [letter for letter in terms[0] if letter in terms[1] and letter not in right]
    _contract(network, node, operands, [(terms[0].index(letter), terms[1].index(letter)) for letter in shared])
    return [Value([found[letter] for letter in right])]


# ---- norms and reductions -------------------------------------------------------------------------------------------


def _batch_norm(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    for value in operands[1:5]:
        unify(operands[0].dims[1], value.dims[0])
    return _norm(network, node, operands, "norm", [])


def _layer_norm(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    axes = operands[0].dims
    _broadcast(operands)
    return _norm(network, node, operands, "layer_norm", axes[node.integer("axis", -1) % len(axes) :])


def _instance_norm(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    for value in operands[1:]:
        unify(operands[0].dims[1], value.dims[0])
    return _norm(network, node, operands, "layer_norm", operands[0].dims[2:])


def _group_norm(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    axis, count = operands[0].dims[1], node.integer("num_groups", 1)
    groups = reshaped([axis], [count, axis.size // count])
    for value in operands[1:3]:
        unify(value.dims[0], axis if value.dims[0].size == axis.size else groups[0])
    return _norm(network, node, operands, "layer_norm", groups[1:])


def _norm(network: Network, node: OnnxNode, operands: list[Value], kind: str, means: list[Dim]) -> list[Value]:
    """A norm that takes means over some axes."""
    for axis in means:
        axis.mark("even")
    network.even_axes.extend(means)
    roles = ("weight", "bias", "mean", "var") if kind == "norm" else ("weight", "bias")
    tensors = {role: weight_operand(operands, i) for i, role in enumerate(roles, start=1)}
    if kind == "layer_norm":  # constant ones and zeros where it has none
        tensors = {role: tensor for role, tensor in tensors.items() if tensor and tensor.kind == "parameter"}
    epsilon = node.attributes["epsilon"].f if "epsilon" in node.attributes else 1e-5
    network.add_layer(node, kind, tensors, epsilon=epsilon)
    return [Value(operands[0].dims)]


def _reduce(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    dims = operands[0].dims
    axes, keep = listed_axes(node, operands, len(dims)), node.integer("keepdims", 1)
    for axis in axes:
        dims[axis].mark("even" if node.op_type in ("ReduceMean", "ReduceMax", "ReduceMin") else "pinned")
        network.even_axes.append(dims[axis])
    if node.op_type == "ReduceMean" and keep and sorted(axes) == list(range(2, len(dims))):
        network.global_means.add(node.outputs[0])
    return [Value([Dim(1) if i in axes else dim for i, dim in enumerate(dims) if keep or i not in axes])]


def _along_axes(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    """Sums up to each element, or a triangle: what comes first on an axis matters."""
    dims = operands[0].dims
    for axis in (-2, -1) if node.op_type == "Trilu" else operands[1].integers:
        dims[axis].mark("pinned")
    return [Value(dims)]


def _softmax(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    operands[0].dims[node.integer("axis", -1)].mark("pinned")
    return [Value(operands[0].dims)]


# ---- shapes ---------------------------------------------------------------------------------------------------------


def _reshape(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    value = operands[0]
    old = [dim.size for dim in value.dims]
    sizes = _new_sizes(network, node, operands, old)
    if math.prod(sizes) != math.prod(old) or len(sizes) > MAX_RANK or min(sizes, default=1) < 1:
        raise NotUnderstoodError
    axes = reshaped(value.dims, sizes)
    origins: list[int | None] = [None] * len(sizes)
    wide = [axis for axis, size in zip(value.axis_of, old, strict=False) if size != 1]
    if len(wide) == 1:
        wide *= len(sizes)
    elif [size for size in sizes if size != 1] != [size for size in old if size != 1]:
        wide = []
    if wide:  # one axis, or only ones came and went
        waiting = iter(wide)
        origins = [next(waiting) if size != 1 else None for size in sizes]
    return [value.view(axes, origins)]


def _new_sizes(network: Network, node: OnnxNode, operands: list[Value], old: list[int]) -> list[int]:
    """The shape that a Reshape, Flatten, Squeeze or Unsqueeze makes."""
    if node.op_type == "Flatten":
        axis = node.integer("axis", 1)
        return [math.prod(old[:axis]), math.prod(old[axis:])]
    if node.op_type == "Squeeze":
        is_named = "axes" in node.attributes or len(operands) > 1
        axes = listed_axes(node, operands, len(old)) if is_named else [i for i, size in enumerate(old) if size == 1]
        return [size for i, size in enumerate(old) if i not in axes]
    if node.op_type == "Unsqueeze":
        given = node.integers("axes") or operands[1].integers
        rank, waiting = len(old) + len(given), iter(old)
        if rank > MAX_RANK:
            raise NotUnderstoodError
        return [1 if i in {axis % rank for axis in given} else next(waiting) for i in range(rank)]
    if len(operands) < 2 or operands[1].known is None:
        return list(network.file.value_shape(node.outputs[0]) or [])
    sizes = operands[1].integers
    if not node.integer("allowzero", 0):
        sizes = [old[i] if size == 0 and i < len(old) else size for i, size in enumerate(sizes)]
    if -1 in sizes:
        sizes[sizes.index(-1)] = math.prod(old) // -math.prod(sizes)
    return sizes


def _transpose(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    value = operands[0]
    order = node.integers("perm") or tuple(reversed(range(len(value.dims))))
    if sorted(order) != list(range(len(value.dims))):
        raise NotUnderstoodError
    return [value.view([value.dims[i] for i in order], [value.axis_of[i] for i in order if value.tensor is not None])]


def _expand(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    value, sizes = operands[0], operands[1].integers
    more = len(sizes) - len(value.dims)
    if len(sizes) > MAX_RANK:
        raise NotUnderstoodError
    dims = [*[Dim(1)] * more, *value.dims]
    sizes = [*[1] * -more, *sizes]
    axes = [dim if size in (1, -1) or dim.size == size else Dim(size) for dim, size in zip(dims, sizes, strict=True)]
    return [value.view(axes, [*[None] * more, *value.axis_of])]


def _concat(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    rank = len(operands[0].dims)
    axis = node.integer("axis", 0) % rank
    axes = []
    for i in range(rank):
        dims = [value.dims[i] for value in operands]
        if i == axis:
            axes.append(concatenation(dims))
            continue
        wide = [dim for dim in dims if dim.size != 1] or dims[:1]
        for dim in wide[1:]:
            unify(wide[0], dim)
        axes.append(wide[0])
    return [Value(axes)]


def _split(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    """Also into a sequence."""
    value = operands[0]
    axis = node.integer("axis", 0) % len(value.dims)
    size = value.dims[axis].size
    given = operands[1] if len(operands) > 1 else Value(None)
    sizes = list(node.integers("split")) or (given.integers if given.known is not None else [])
    if node.op_type == "SplitToSequence":
        each = given.integers[0] if not given.dims else 0
    else:
        each = 0 if sizes else -(-size // len(node.outputs))
    if each:
        whole, rest = divmod(size, each)
        sizes = [each] * min(whole, _MAX_PIECES) + ([rest] if rest else [])
    spend(_COST_OF_PIECE * len(sizes))
    dims = value.dims
    pieces = [value.view([*dims[:axis], piece, *dims[axis + 1 :]], value.axis_of) for piece in _cut(dims[axis], sizes)]
    return [Value(None, pieces=tuple(pieces))] if node.op_type == "SplitToSequence" else pieces


def _cut(axis: Dim, sizes: Sequence[int]) -> list[Dim]:
    """An axis in consecutive pieces; pixels and tokens have no identity that is worth keeping."""
    if axis.leaves() and axis.is_positions:
        return [Dim(size, "position") for size in sizes]
    pieces = split_sum(axis, [size for size in sizes if size]) if sum(sizes) == axis.size else None
    if pieces is None:
        axis.mark("pinned")
        return [Dim(size, "pinned") for size in sizes]
    waiting = iter(pieces)
    return [next(waiting) if size else Dim(0, "pinned") for size in sizes]


def _sequence_at(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    return [operands[0].pieces[operands[1].integers[0]]]


def _slice(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    value, dims = operands[0], list(operands[0].dims)
    named: dict[str, Sequence[int]] = {name: node.integers(name) for name in node.attributes}
    for name, operand, title in zip(node.inputs[1:], operands[1:], ("starts", "ends", "axes", "steps"), strict=False):
        if name:
            named[title] = operand.integers
    axes = named.get("axes", range(len(named["starts"])))
    steps = named.get("steps", [1] * len(axes))
    for axis, start, end, step in zip(axes, named["starts"], named["ends"], steps, strict=True):
        dim, before = dims[axis], Dim(0)
        chosen = range(*slice(start, end, step).indices(dim.size))
        bounds: tuple[int, ...] = () if step == 1 else (chosen.start, step)
        if dim.is_positions:  # which are cut alike by equal numbers, whatever the size of the image
            bounds = (start, *([end] if end < dim.size else []), step)
        if step == 1 and len(chosen) != dim.size:
            before, dims[axis], _ = _cut(dim, (chosen.start, len(chosen), dim.size - chosen.start - len(chosen)))
        if step != 1 or len(chosen) != dim.size:
            network.cuts.setdefault(node.outputs[0], []).append((axis % len(dims), before, bounds))
        if step != 1:
            dims[axis] = Dim(len(chosen), "pinned")
            if dim.is_positions:
                dims[axis].flags.add("position")
            else:
                dim.mark("pinned")
    return [value.view(dims, value.axis_of)]


def _gather(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    value, index = operands[0], operands[1]
    dims, places = value.dims, index.dims
    axis = node.integer("axis", 0) % len(dims)
    is_whole = index.known is not None and index.known.size == dims[axis].size
    if len(places) > 1 and is_whole and index.integers == list(range(dims[axis].size)):
        network.reshaped.add(node.outputs[0])  # as torch exports what AdaptiveAvgPool2d(1) makes
        sizes = [dim.size for dim in (*dims[:axis], *places, *dims[axis + 1 :])]
        return [Value(reshaped(dims, sizes))]
    if value.tensor is None or not places:
        dims[axis].mark("pinned")
    else:
        dims[axis].mark("rows")
        value.tensor.is_grid |= not index.is_data and math.prod(dim.size for dim in places) > dims[axis].size
        if index.is_data:
            value.tensor.is_looked_up = True
            network.add_layer(node, "table", {"weight": value.tensor})
    return [Value([*dims[:axis], *(Dim(dim.size, "position") for dim in places), *dims[axis + 1 :]])]


def _gather_nd(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    value, places = operands[0], operands[1].dims
    if node.integer("batch_dims", 0) or not places or value.is_data:
        raise NotUnderstoodError
    count = places[-1].size
    for dim in value.dims[:count]:
        dim.mark("rows")
    if value.tensor is not None and count == 1:
        value.tensor.is_grid |= math.prod(dim.size for dim in places) > value.dims[0].size
    return [Value([*(Dim(dim.size, "position") for dim in places[:-1]), *value.dims[count:]])]


def _resize(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    shape, dims = network.file.value_shape(node.outputs[0]), operands[0].dims
    if shape is None or tuple(dim.size for dim in dims[:2]) != shape[:2]:
        raise NotUnderstoodError
    return [Value([*dims[:2], *(Dim(size, "position") for size in shape[2:])])]


# ---- what holds no data ---------------------------------------------------------------------------------------------


def _constant(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    shape: tuple[int, ...] = ()
    for name, attribute in node.attributes.items():
        if name == "value":
            shape = tuple(attribute.t.dims)
        elif name in ("value_ints", "value_floats"):
            shape = (len(attribute.ints) or len(attribute.floats),)
    held = (shape, *map(id, node.attributes.values()))  # the same where calls of a function are given one constant
    if held not in network.constants:
        network.constants[held] = constant(network.file, node.outputs[0], shape)
    return [Value([Dim(size, "pinned") for size in shape], network.constants[held])]


def _shape(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    sizes = [dim.size for dim in operands[0].dims]
    sizes = sizes[node.integer("start", 0) : node.integer("end", len(sizes))]
    return [Value([Dim(len(sizes), "pinned")], numpy.array(sizes, dtype=numpy.int64))]


def _filled(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    sizes = operands[0].integers
    if len(sizes) > MAX_RANK:
        raise NotUnderstoodError
    return [Value([Dim(max(size, 0), "pinned") for size in sizes])]


def _range(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    start, limit, delta = (value.integers[0] for value in operands)
    return [Value([Dim(len(range(start, limit, delta)), "position", "pinned")])]


HANDLERS: dict[str, _Handler] = {
    operator: handler
    for handler, operators in {
        _view: "Identity Cast CastLike Dropout",
        _same: "Relu Sigmoid Tanh Erf Gelu FastGelu QuickGelu Elu Selu Celu LeakyRelu ThresholdedRelu HardSigmoid Mish"
        " HardSwish Softplus Softsign Swish Silu Sqrt Reciprocal Exp Log Neg Abs Sin Cos Sign Floor Ceil Round Not"
        " IsNaN IsInf Clip",
        _along_axes: "Trilu CumSum",
        _elementwise: "Add Sub Mul Div Pow Sum Mean Max Min Mod Where Equal Less LessOrEqual Greater GreaterOrEqual And"
        " Or Xor PRelu BiasGelu",
        convolve: "Conv",
        convolve_transposed: "ConvTranspose",
        _matmul: "MatMul",
        _gemm: "Gemm",
        _einsum: "Einsum",
        _batch_norm: "BatchNormalization",
        _layer_norm: "LayerNormalization RMSNormalization SimplifiedLayerNormalization",
        _instance_norm: "InstanceNormalization",
        _group_norm: "GroupNormalization",
        pool: "MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool",
        _reduce: "ReduceMean ReduceMax ReduceMin ReduceSum ReduceProd ReduceL1 ReduceL2 ReduceSumSquare"
        " ReduceLogSumExp",
        _softmax: "Softmax LogSoftmax",
        _reshape: "Reshape Flatten Squeeze Unsqueeze",
        _transpose: "Transpose",
        _expand: "Expand",
        _concat: "Concat",
        _split: "Split SplitToSequence",
        _sequence_at: "SequenceAt",
        _slice: "Slice",
        _gather: "Gather",
        _gather_nd: "GatherND",
        pad: "Pad",
        _resize: "Resize Upsample",
        _constant: "Constant",
        _shape: "Shape",
        _filled: "ConstantOfShape",
        _range: "Range",
    }.items()
    for operator in operators.split()
}
