"""What is known about each value of an ONNX graph while it is read: where its data comes from, or which weight it is.

Legend: a *view* is a weight behind Transpose, Reshape, Cast and the like; ``order`` lists its stored axes longer than 1
in the order in which the view has them, or is None once they are mixed.
"""

from __future__ import annotations

from dataclasses import dataclass

from ghn_service.graph.raw_graph import NOTHING, Flow, Source

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class View:
    """A weight as one value shows it.

    Attributes:
        source: The weight.
        shape: Shape of the value; None where it is unknown.
        order: See the module docstring.
    """

    source: Source
    shape: Shape | None
    order: Shape | None

    @staticmethod
    def of(source: Source) -> View:
        """The weight itself."""
        return View(source, source.shape, tuple(axis for axis, size in enumerate(source.shape) if size > 1))

    def derived(self, *, keeps_shape: bool) -> View:
        """The weight after a computation that is no mere view."""
        return View(self.source, self.shape if keeps_shape else None, self.order if keeps_shape else None)

    def transposed(self, permutation: Shape) -> View:
        """The view with its axes permuted; without a permutation, reversed."""
        if self.shape is None:
            return View(self.source, None, None)
        rank = len(self.shape)
        axes = permutation or tuple(reversed(range(rank)))
        if sorted(axes) != list(range(rank)):
            return View(self.source, None, None)
        shape = tuple(self.shape[axis] for axis in axes)
        if self.order is None:
            return View(self.source, shape, None)
        stored = dict(zip((axis for axis, size in enumerate(self.shape) if size > 1), self.order, strict=True))
        return View(self.source, shape, tuple(stored[axis] for axis in axes if axis in stored))

    def reshaped(self, shape: Shape | None) -> View:
        """The view with another shape of as many elements."""
        if shape is None or self.shape is None:
            return View(self.source, shape, None)
        same = [size for size in shape if size > 1] == [size for size in self.shape if size > 1]
        return View(self.source, shape, self.order if same else None)

    def permutation(self, axes: Shape) -> Shape:
        """How torch's axes are stored, where this view's axes ``axes`` are torch's in order.

        Returns:
            ``ParameterSpec.permutation``; empty if the stored layout is torch's own, or if it cannot be told.
        """
        if self.shape is None or self.order is None or len(axes) != len(self.shape):
            return ()
        stored = dict(zip((axis for axis, size in enumerate(self.shape) if size > 1), self.order, strict=True))
        ones = iter([axis for axis, size in enumerate(self.source.shape) if size <= 1])
        result = [stored[axis] if axis in stored else next(ones, -1) for axis in axes]
        if len(self.source.shape) != len(axes):
            long_axes = [stored[axis] for axis in axes if axis in stored]
            result = long_axes + [axis for axis in range(len(self.source.shape)) if axis not in long_axes]
        if sorted(result) != list(range(len(self.source.shape))):
            return ()
        return () if result == sorted(result) else tuple(result)


@dataclass(frozen=True, slots=True)
class Value:
    """What is known about one value.

    Attributes:
        flow: Raw nodes that its data comes from; empty for weights, constants and shape arithmetic.
        views: Weights that it was computed from, where it carries no data.
        gate: Name of the value that went into the sigmoid, for the output of a gate; "" otherwise.
        attention: Softmax nodes whose probabilities this value is.
        layer: Raw node of the layer that this is the output of, while a bias may still follow; -1 otherwise.
        norm: Raw node of the layer normalisation that this is the scaled output of, while a bias may still follow.
        normalized: ``layer`` after a decomposed layer normalisation, ``other`` after another one, while scale and
            bias may still follow; "" otherwise.
        spatial: Sizes of the spatial axes of a channels-first image, where known.
        shifted: Whether a constant was just added, as in a hard sigmoid.
    """

    flow: Flow = NOTHING
    views: tuple[View, ...] = ()
    gate: str = ""
    attention: Flow = NOTHING
    layer: int = -1
    norm: int = -1
    normalized: str = ""
    spatial: Shape | None = None
    shifted: bool = False


CONSTANT = Value()
