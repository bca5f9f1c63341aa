"""What stands for operators of PyTorch: how a call in the exported graph is written into a plan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from tacit.ir.types import Dim, Type

if TYPE_CHECKING:
    from tacit.capture import Capture
    from tacit.ir.build import FixedBuilder

# What is said of a result for the batch as a whole.
WHOLE = (
    "it takes in the batch with all other dimensions; name those that it shall take in, and choose between two values "
    "by torch.where"
)
# What is said of elements that are chosen by a value.
SECRET_INDEX = (
    "an index that depends on the input, which nobody may see: choose among n rows by a product, as in "
    "F.one_hot(index, n).float() @ rows"
)


class Layer:
    """Base of the ops of the model level, and of ATen operators that are written in terms of other layers.

    aten: the overloads, as "aten.relu.default"; a later class takes them over from an earlier one.
    axes: names of arguments that are dimensions. They arrive as those of the line: positive, never the batch.
    batch_anywhere: whether it also works where the batch is not the first dimension of the tensor in PyTorch: element
        by element, along the last dimension, or along `axes`. Lines always have it first, the other dimensions in
        order behind it.
    numbers: names of arguments that are tensors or numbers; in the place of any other tensor a number arrives as a
        constant.
    own_shapes: names of arguments with a shape of their own, not to be broadcast: constants, or lines as they stand.
    unresolved: names of arguments that arrive as nodes of the exported graph where they are constants.
    increasing: whether it is an increasing function of each element; such a one commutes with maxima.
    choosers: names of arguments that choose, truth values and indices: they stay whole numbers beside floats.
    """

    aten: ClassVar[tuple[str, ...]] = ()
    axes: ClassVar[tuple[str, ...]] = ()
    batch_anywhere: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = ()
    own_shapes: ClassVar[tuple[str, ...]] = ()
    unresolved: ClassVar[tuple[str, ...]] = ()
    increasing: ClassVar[bool] = False
    choosers: ClassVar[tuple[str, ...]] = ()
    known: ClassVar[list[type[Layer]]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Layer.known.append(cls)

    @classmethod
    def capture(cls, graph: Capture, **kwargs: Any) -> str | list[str]:
        """Write this op into the model plan; arguments are those of the ATen schema. Several results as a list."""
        raise NotImplementedError

    def expand(self, b: FixedBuilder, *args: str) -> str:
        """Write the fixed-point form; operands that are weights come as their labels."""
        raise NotImplementedError

    def wants(self, frac: int) -> int:
        """The fractional bits that operands should have for a result with so many, where a few are more than usual;
        0 where the usual ones do."""
        return 0

    def is_whole(self, *operands: bool) -> bool:
        """Whether the result has no fractional bits and is exact, given which operands are such whole numbers."""
        return False


def layers() -> dict[str, type[Layer]]:
    """The layer that stands for each ATen overload."""
    return {target: layer for layer in Layer.known for target in layer.__dict__.get("aten", ())}


def real(*shape: Dim) -> Type:
    """A type of the model level."""
    return Type("real", shape)


def spread(value: Any, count: int) -> tuple[int, ...]:
    """An argument that may be given once for all of `count` dimensions."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


def inverse(value: float) -> float:
    """1 / value, and infinity for 0: the scalar is refused by name later."""
    return 1 / value if value else math.inf
