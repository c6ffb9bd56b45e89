"""Torch's own parameter names, recovered from what its exporters leave on the nodes.

The newer exporter writes on every node the line of the traced program that it came from, whose arguments name the
parameters with dots turned into underscores (``%p_layer1_0_conv1_weight``), and the path of the module. That tells the
uses of a merged initializer apart, names folded and transposed weights, and shows biases that an optimisation dropped
because they were zero. The older exporter keeps names, aliases merged tensors with Identity nodes, and puts the module
path into the node's name (``/layer1/layer1.0/conv1/Conv``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from ghn_service.graph.onnx.file import OnnxFile, OnnxNode
from ghn_service.graph.onnx.folded import string_list
from ghn_service.graph.raw_graph import Source

_FX_KEY = "pkg.torch.onnx.fx_node"
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_CLASSES_KEY = "pkg.torch.onnx.class_hierarchy"
_TOKEN = re.compile(r"%([pb]_\w+)")
_TARGET = re.compile(r"target=torch\.ops\.aten\.(\w+)")
_ANONYMOUS = re.compile(r"(?:val_\d+|_val_\d+|onnx::\w+_\d+|.*/Constant(?:_\d+)?_output_\d+)$")
_ALIAS_NODE = re.compile(r"Identity_\d+$")
_NUMBER = re.compile(r"\d+")
_NOT_IDENTIFIER = re.compile(r"\W")

_MAX_TOKENS = 256
_WEIGHT_BIAS = ("weight", "bias")
_CONV_OPS = frozenset(
    {"conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)
_LINEAR_OPS = frozenset({"linear", "addmm", "mm", "matmul"})
_NORM_OPS = frozenset(
    {"layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "instance_norm", "batch_norm",
     "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional",
     "_native_batch_norm_legit_no_training"}
)  # fmt: skip
# Traced operators whose weight and bias an ONNX operator may hold; another one's metadata came with a fusion.
_TRACED_OPS: dict[str, frozenset[str]] = {
    "Conv": _CONV_OPS, "ConvTranspose": _CONV_OPS, "Gemm": _LINEAR_OPS, "MatMul": _LINEAR_OPS, "Add": _LINEAR_OPS,
    "BatchNormalization": _NORM_OPS, "LayerNormalization": _NORM_OPS, "GroupNormalization": _NORM_OPS,
    "InstanceNormalization": _NORM_OPS,
}  # fmt: skip
# Parameters of torch modules whose own name ends like a submodule's weight or bias.
_PLAIN_ATTRIBUTES = frozenset({"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"})


def is_anonymous(name: str) -> bool:
    """Whether one of torch's exporters made up this value name."""
    return _ANONYMOUS.match(name) is not None


@dataclass(frozen=True)
class _Origin:
    """What the exporter wrote on a node about the program that it traced.

    Attributes:
        line: The line that the node came from; "" where the file does not say.
        operator: The operator of that line.
        tokens: Its arguments that are parameters (``p_...``) or buffers (``b_...``).
        parameters: Those that are parameters, where the operator is known.
        scopes_text: Paths of the modules around the node, outermost first, and the node itself.
        classes_text: Their classes.
    """

    line: str = ""
    operator: str = ""
    tokens: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    scopes_text: str = ""
    classes_text: str = ""

    @cached_property
    def scopes(self) -> list[str]:
        """Paths of the modules around the node, outermost first."""
        return string_list(self.scopes_text)[:-1]

    @cached_property
    def classes(self) -> list[str]:
        """Their classes, and that of the node."""
        return string_list(self.classes_text)


class TorchNames:
    """Names of the parameters behind the operands of nodes."""

    def __init__(self, file: OnnxFile) -> None:
        self._file = file
        self._origins: dict[int, _Origin] = {}  # by the node of the file, which calls of a function share

    def _origin(self, node: OnnxNode) -> _Origin:
        origin = self._origins.get(id(node.proto))
        if origin is None:
            origin = _Origin()
            if node.proto.metadata_props:
                entries = {entry.key: entry.value for entry in node.proto.metadata_props}
                texts = [entries.get(key, "") for key in (_FX_KEY, _SCOPES_KEY, _CLASSES_KEY)]
                line, scopes, classes = (text if isinstance(text, str) else "" for text in texts)
                target, tokens = _TARGET.search(line), tuple(_TOKEN.findall(line)[:_MAX_TOKENS])
                parameters = tuple(token for token in tokens if token.startswith("p_") and target)
                origin = _Origin(line, target.group(1) if target else "", tokens, parameters, scopes, classes)
            self._origins[id(node.proto)] = origin
        return origin

    def identify(self, source: Source, node: OnnxNode, slot: str, *, is_direct: bool = True) -> tuple[str, str]:
        """The torch name of ``source`` as ``node`` uses it in ``slot``, and a token that tells uses apart; "" for none.

        ``slot`` is ``weight``, ``bias``, ``running_mean``, ``running_var`` or ``operand``; with ``is_direct`` the
        operand is the tensor itself or a view of it: else it was computed from it, and only its own name is evidence.
        """
        if not self._file.is_torch:
            return "", ""
        origin = self._origin(node)
        if source.folded and slot == "operand":
            name = _folded_name(source, origin.scopes)
            return name, name
        token = _token(source, node, origin, slot, is_direct=is_direct) if origin.tokens else ""
        if token:
            return self._demangled(token, origin), token
        if source.folded:
            return _folded_name(source, origin.scopes), ""
        if source.kind == "CONSTANT" or is_anonymous(source.name):
            is_foreign = origin.line and origin.operator not in _TRACED_OPS.get(node.op_type, ())
            return ("" if is_foreign or slot not in _WEIGHT_BIAS else self.name_in_module(node, slot)), ""
        # With a norm folded in, a convolution's weight keeps its name, but not the declaration that it is a parameter.
        is_fused = slot == "weight" and "." in source.name and origin.operator in _NORM_OPS
        return (source.name if source.kind or not self._file.kinds or is_fused else ""), ""

    def name_in_module(self, node: OnnxNode, leaf: str) -> str:
        """``leaf`` after the path of the module that ``node`` is in; "" if the file does not say which that is."""
        scopes = self._origin(node).scopes
        path = scopes[-1] if scopes else _path_of(node.name)
        return f"{path}.{leaf}" if path else ""

    def dropped_bias(self, node: OnnxNode) -> tuple[str, str]:
        """Torch name and token of a bias that the exporter left out of ``node`` because it was zero."""
        origin = self._origin(node)
        if origin.operator not in _TRACED_OPS.get(node.op_type, ()) or len(origin.parameters) != 2:
            return "", ""
        token = origin.parameters[0 if origin.operator == "addmm" else 1]
        return self._demangled(token, origin), token

    def has_folded_norm(self, node: OnnxNode, bias: Source | None) -> bool:
        """Whether a batch normalization was folded into a convolution; ``bias`` is what it has for a bias now."""
        if not self._file.is_torch:
            return False
        origin = self._origin(node)
        if origin.operator:
            is_own = bias is None or bias.kind == "PARAMETER" or f"p_{_mangled(bias.name)}" in origin.parameters
            is_foreign = not is_own and len(origin.parameters) == 1
            return origin.operator in _NORM_OPS or (is_foreign and origin.operator in _CONV_OPS)
        return bias is not None and is_anonymous(bias.name) and not bias.is_literal

    def module_class(self, node: OnnxNode) -> str:
        """Class of the innermost module around ``node``, without its package; "" if it is not known."""
        classes = self._origin(node).classes
        return classes[-2].rpartition(".")[2] if len(classes) > 1 else ""

    def is_alias(self, node: OnnxNode) -> bool:
        """Whether ``node`` is an Identity with which the older exporter gives a merged tensor its own name back."""
        return self._file.is_torch and node.op_type == "Identity" and _ALIAS_NODE.match(node.name) is not None

    def _demangled(self, token: str, origin: _Origin) -> str:
        """The name of the parameter that the traced program calls ``token``."""
        known = self._file.traced_names.get(token) or self._known.get(token[2:])
        if known is not None:
            return known
        text = token[2:]
        for scope in reversed(origin.scopes):
            prefix = _mangled(scope) + "_" if scope else ""
            if not text.startswith(prefix):
                continue
            rest = text[len(prefix) :]
            stem, _, leaf = rest.rpartition("_")
            if stem and leaf in _WEIGHT_BIAS and rest not in _PLAIN_ATTRIBUTES:
                rest = f"{stem}.{leaf}"
            return f"{scope}.{rest}" if scope else rest
        return ""

    @cached_property
    def _known(self) -> dict[str, str]:
        names = [*self._file.initializers, *(header.name for header in self._file.inputs)]
        return {_mangled(name): name for name in names if not is_anonymous(name)}


def _token(source: Source, node: OnnxNode, origin: _Origin, slot: str, *, is_direct: bool) -> str:
    """Which argument of the traced operator ``source`` is; "" if that cannot be told."""
    if slot in ("running_mean", "running_var"):
        return next((token for token in origin.tokens if token.startswith("b_") and token.endswith(slot)), "")
    own = _mangled(source.name)
    exact = next((token for token in origin.tokens if token[2:] == own), "")
    if not is_direct:
        return exact
    count = len(origin.parameters)
    if slot in _WEIGHT_BIAS and origin.operator in _TRACED_OPS.get(node.op_type, ()) and count <= 2:
        place = _WEIGHT_BIAS.index(slot)
        place = count - 1 - place if origin.operator == "addmm" else place
        if 0 <= place < count:
            return origin.parameters[place]
    if exact:
        return exact
    return origin.tokens[0] if slot == "operand" and len(origin.tokens) == 1 else ""


def _folded_name(source: Source, scopes: list[str]) -> str:
    """The parameter that the exporter computed ``source`` from, if it was only one.

    The exporter merges equal results and keeps the origins of one. A use in a module whose path differs from that
    origin's in numbers alone (``blocks.1.attn`` for ``blocks.0.attn``) reads the other module's parameter.
    """
    if source.folded is None or len(source.folded) != 1:
        return ""
    name = source.folded[0]
    owner, _, leaf = name.rpartition(".")
    if owner in scopes:
        return name
    pattern = _NUMBER.sub("#", owner)
    sibling = next((scope for scope in reversed(scopes) if _NUMBER.sub("#", scope) == pattern), "")
    return f"{sibling}.{leaf}" if sibling else name


def _mangled(name: str) -> str:
    """A parameter's name as torch.export writes it into the traced program."""
    return _NOT_IDENTIFIER.sub("_", name).lower()


def _path_of(node_name: str) -> str:
    """The module path in a node name such as ``/layer1/layer1.0/conv1/Conv``."""
    if not node_name.startswith("/"):
        return ""
    path: list[str] = []
    for part in node_name.split("/")[1:-1]:
        if path and part.startswith(path[-1] + "."):
            path[-1] = part
        else:
            path.append(part)
    return ".".join(path)
