"""Converts traced JAX functions to ONNX graphs; supports only the operations of SAM.

`Graph.call` traces a function, walks its jaxpr, and adds a node for each equation. Values that
depend only on constants (folded weights, position tables, indices) are computed on the way. Each
constant is stored once, and only one slice of a constant that repeats along an axis. One size of
the inputs may be symbolic, such as the number of points. Unknown operations are errors.

Tensors of images have channels first, as ONNX's convolutions have them, or last, as everything else
here: they are transposed only where an operation needs the other order.

jax2onnx is not used: ONNX Runtime rejects the decoder that it produces (0.13.0, which works with
sam_jax's Orbax, and 0.17.1, which needs an older one), because of a linear layer on a vector and
because it takes n + 5 tokens for 5.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
from jax.core import ShapedArray
from jax.extend import core
from onnx import helper, numpy_helper

from sam_jax.export.onnx_operations import (
    CHANNELS_FIRST,
    CONVOLUTIONS,
    ELEMENTWISE,
    FUNCTIONS,
    OPERATIONS,
    Tensor,
)

OPSET = 17  # as in Meta's export, and supported by browsers
# Protobuf's limit is 2 GB: the weights of larger models are stored in a separate file.
_LARGEST_FILE = 1 << 30
# In bytes. Below this, a repeating array is stored whole: a node that expands it is larger.
_SMALL = 1024


class _Value(NamedTuple):
    """A traced array. Axes along which it repeats have length 1, since ONNX broadcasts."""

    tensor: Tensor
    shape: tuple  # in the array's own order of axes
    order: tuple[int, ...] | None = None  # of the tensor's axes, if it is not the array's own


class Graph:
    """An ONNX graph under construction."""

    def __init__(self):
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[tuple, tuple[str, np.ndarray]] = {}
        self._open_sizes: dict[Any, tuple[Tensor, int]] = {}  # a tensor and an axis of that size
        self._transposed: dict[tuple, str] = {}  # tensors by the tensor and the order of its axes
        self._numbers = itertools.count()

    def input(self, name: str, shape: Sequence[int | str]) -> str:
        """Declares a float32 input; a string in its shape names a symbolic size."""
        info = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        self._inputs.append(info)
        return name

    def node(self, operation: str, *inputs: Tensor, **attributes: Any) -> str:
        """Adds a node with one output and returns the output's name."""
        name = f"{operation.lower()}_{next(self._numbers)}"
        names = [x if isinstance(x, str) else self._constant(x) for x in inputs]
        self._nodes.append(helper.make_node(operation, names, [name], **attributes))
        return name

    def transpose(self, x: Tensor, order: Sequence[int], shape: tuple) -> Tensor:
        """A tensor of this shape with its axes in another order; the same nodes each time."""
        if isinstance(x, np.ndarray):
            return x.transpose(order)
        if list(order) == sorted(order):
            return x
        if (x, *order) not in self._transposed:
            self._transposed[x, *order] = self._transpose(x, list(order), shape)
        return self._transposed[x, *order]

    def _transpose(self, x: str, order: list[int], shape: tuple) -> str:
        if order not in ([0, 2, 3, 1], [0, 3, 1, 2]) or not all(isinstance(n, int) for n in shape):
            return self.node("Transpose", x, perm=order)
        # An image's pixels as one axis: OpenVINO copies images in and out of the memory layout that
        # its convolutions choose, and would choose it for what follows.
        split = 2 if order[1] == 2 else 3
        joined = (shape[0], math.prod(shape[1:split]), math.prod(shape[split:]))
        x = self.node("Transpose", self.node("Reshape", x, np.array(joined)), perm=[0, 2, 1])
        return self.node("Reshape", x, np.array([shape[axis] for axis in order]))

    def cast(self, x: Tensor, dtype: Any) -> str:
        """Adds a conversion to another dtype."""
        return self.node("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def call(self, function: Callable, *inputs: tuple[str, jax.ShapeDtypeStruct]) -> list[str]:
        """Adds the computation of a function and returns the names of its results.

        Args:
            function: takes arrays and returns a tuple of arrays. Values that it closes over are
                constants.
            *inputs: for each argument, a tensor of the graph, and its shape and dtype.

        Raises:
            ValueError: for an unknown operation, and a function that computes in another dtype.
        """
        closed = jax.make_jaxpr(function)(*(spec for _, spec in inputs))
        values = [self._value(name, spec.shape) for name, spec in inputs]
        with jax.default_matmul_precision("highest"):  # for values computed on the way
            results = self._run(closed, values)
        return [
            self.node("Identity", self._full(value, aval.shape))
            for value, aval in zip(results, closed.out_avals, strict=True)
        ]

    def save(self, path: Path, outputs: dict[str, tuple[str, Sequence[int | str]]]) -> None:
        """Writes the model.

        Args:
            path: the file to write. More than a gigabyte of weights is stored next to it, in
                `<file name>.data`.
            outputs: for each output's name, its tensor and shape; all are float32.
        """
        graph = helper.make_graph(
            self._nodes
            + [helper.make_node("Identity", [tensor], [n]) for n, (tensor, _) in outputs.items()],
            path.stem,
            self._inputs,
            [
                helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
                for name, (_, shape) in outputs.items()
            ],
        )
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(
            graph,
            opset_imports=[opset],
            ir_version=helper.find_min_ir_version_for([opset]),
            producer_name="sam_jax",
        )
        # Last and one by one, since every message copies its parts.
        for name, array in self._constants.values():
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        size = sum(array.nbytes for _, array in self._constants.values())
        data = {"save_as_external_data": True, "location": f"{path.name}.data"}
        onnx.save_model(model, path, **(data if size > _LARGEST_FILE else {}))
        onnx.checker.check_model(path, full_check=True)

    def _constant(self, array: np.ndarray) -> str:
        array = np.asarray(array, order="C")
        content = hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest()
        key = array.dtype, array.shape, content
        return self._constants.setdefault(key, (f"constant_{len(self._constants)}", array))[0]

    def _value(self, tensor: Tensor, shape: tuple, order: tuple | None = None) -> _Value:
        for axis, size in enumerate(shape):
            if not isinstance(size, int):
                place = axis if order is None else order.index(axis)
                self._open_sizes.setdefault(size, (tensor, place))
        return _Value(tensor, tuple(shape), order)

    def _ordered(self, value: _Value, order: tuple[int, ...] | None) -> Tensor:
        """The tensor with its axes in this order; None for the array's own."""
        if value.order == order:
            return value.tensor
        own = tuple(range(len(value.shape)))
        now = value.order or own
        shape = tuple(value.shape[axis] for axis in now)
        return self.transpose(value.tensor, [now.index(axis) for axis in order or own], shape)

    def _full(self, value: _Value, shape: tuple, order: tuple[int, ...] | None = None) -> Tensor:
        """The tensor, broadcast to its full shape, with its axes in this order."""
        tensor = self._ordered(value, order)
        if value.shape == tuple(shape):
            return tensor
        if order is not None:
            shape = tuple(shape[axis] for axis in order)
            value = _Value(tensor, tuple(value.shape[axis] for axis in order))
        own = (1,) * (len(shape) - len(value.shape)) + value.shape
        sizes = [self._size(1 if n == m else n) for n, m in zip(shape, own, strict=True)]
        return self.node("Expand", tensor, self.node("Concat", *sizes, axis=0))

    def _size(self, size) -> Tensor:
        if isinstance(size, int):
            return np.array([size])
        tensor, axis = self._open_sizes[size]
        return self.node("Shape", tensor, start=axis, end=axis + 1)

    def _run(self, closed: core.ClosedJaxpr, values: Sequence[_Value]) -> list[_Value]:
        jaxpr = closed.jaxpr
        known = dict(zip(jaxpr.invars, values, strict=True))
        known |= zip(jaxpr.constvars, map(_known_value, closed.consts), strict=True)

        def read(atom) -> _Value:
            if isinstance(atom, core.Literal):
                return _known_value(np.asarray(atom.val, _aval(atom).dtype))
            return known[atom]

        for equation in jaxpr.eqns:
            _check_float32(equation)
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            known |= zip(equation.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        name, parameters = equation.primitive.name, equation.params
        shapes = [_aval(atom).shape for atom in equation.invars]
        all_known = all(isinstance(value.tensor, np.ndarray) for value in values) and all(
            isinstance(size, int) for shape in shapes for size in shape
        )
        inner = parameters.get("jaxpr", parameters.get("call_jaxpr"))
        if inner is not None and name in ("jit", "custom_jvp_call"):
            name = inner.jaxpr.debug_info.func_name
            if name not in FUNCTIONS or all_known:
                return self._run(inner, values)
        elif name == "platform_index":  # of `jax.lax.platform_dependent`: the others are for XLA
            return [_known_value(np.int32(parameters["platforms"].index(None)))]
        elif name == "cond" and isinstance(values[0].tensor, np.ndarray):
            return self._run(parameters["branches"][int(values[0].tensor)], values[1:])
        elif name == "broadcast_in_dim":
            return [self._broadcast(values[0], **parameters)]
        if name in ELEMENTWISE:
            shape = _broadcast_shapes([value.shape for value in values])
            if not all_known:
                return [self._elementwise(ELEMENTWISE[name], values, shape, parameters)]
            return _compute(equation, [np.broadcast_to(v.tensor, shape) for v in values])
        if all_known:
            arrays = [np.broadcast_to(v.tensor, n) for v, n in zip(values, shapes, strict=True)]
            return _compute(equation, arrays)
        if name == "transpose":
            return [self._reordered(values[0], parameters["permutation"])]
        if name not in OPERATIONS:
            raise ValueError(f"JAX's operation {name!r} cannot be exported to ONNX")
        order = CHANNELS_FIRST if name in CONVOLUTIONS else None
        orders = [order, *[None] * (len(values) - 1)]
        tensors = map(self._full, values, shapes, orders)
        results = OPERATIONS[name](self, equation, *tensors)
        results = results if isinstance(results, list) else [results]
        return [
            self._value(tensor, _aval(var).shape, order)
            for tensor, var in zip(results, equation.outvars, strict=True)
        ]

    def _broadcast(self, value: _Value, *, shape, broadcast_dimensions, **_) -> _Value:
        sizes, new = [1] * len(shape), sorted(set(range(len(shape))) - set(broadcast_dimensions))
        for axis, size in zip(broadcast_dimensions, value.shape, strict=True):
            sizes[axis] = size
        if isinstance(value.tensor, np.ndarray):
            return _known_value(np.expand_dims(value.tensor, new))
        if not new:
            return self._value(value.tensor, tuple(sizes), value.order)
        tensor = self.node("Unsqueeze", self._ordered(value, None), np.array(new))
        return self._value(tensor, tuple(sizes))

    def _reordered(self, value: _Value, permutation: Sequence[int]) -> _Value:
        """The transposed array, for which the tensor is the same."""
        order = tuple(permutation.index(axis) for axis in value.order or sorted(permutation))
        shape = tuple(value.shape[axis] for axis in permutation)
        return self._value(value.tensor, shape, None if list(order) == sorted(order) else order)

    def _elementwise(
        self, operation: Callable, values: list[_Value], shape: tuple, parameters: dict
    ) -> _Value:
        """Computed in the tensors' order of axes if all have the same, else in the array's own."""
        orders = {v.order for v in values if isinstance(v.tensor, str) and v.shape}
        order = orders.pop() if len(orders) == 1 else None
        tensors = [self._ordered(v, order if v.shape else None) for v in values]
        return self._value(operation(self, *tensors, **parameters), shape, order)


def _aval(atom: core.Var | core.Literal) -> ShapedArray:
    """Shape and dtype of a variable of a jaxpr."""
    assert isinstance(atom.aval, ShapedArray)
    return atom.aval


def _check_float32(equation: core.JaxprEqn) -> None:
    for dtype in (_aval(var).dtype for var in equation.outvars):
        if jax.numpy.issubdtype(dtype, jax.numpy.floating) and dtype != np.float32:
            raise ValueError(
                f"the model computes in {dtype}, but ONNX is written in float32; load it with "
                "dtype=jnp.float32, and keep its parameters in float32"
            )


def _known_value(array) -> _Value:
    """A constant; only one slice is kept along axes whose slices are identical."""
    array = np.asarray(array)
    if array.nbytes > _SMALL:
        bits = array.view(f"u{array.itemsize}")
        for axis in range(array.ndim):
            first, second = (bits.take([i], axis, mode="clip") for i in (0, 1))
            if np.array_equal(first, second) and (bits == first).all():
                array, bits = array.take([0], axis), first
    return _Value(array, array.shape)


def _compute(equation: core.JaxprEqn, arrays: Sequence[np.ndarray]) -> list[_Value]:
    result = equation.primitive.bind(*map(jax.numpy.asarray, arrays), **equation.params)
    return [_known_value(x) for x in (result if equation.primitive.multiple_results else [result])]


def _broadcast_shapes(shapes: Sequence[tuple]) -> tuple:
    """`np.broadcast_shapes`, also for symbolic sizes."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*padded, strict=True))
