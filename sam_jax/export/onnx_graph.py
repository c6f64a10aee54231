"""Converts traced JAX functions to ONNX graphs; supports only the operations of SAM.

`Graph.call` traces a function, walks its jaxpr, and adds a node for each equation. Values that
depend only on constants (folded weights, position tables, indices) are computed on the way. Each
constant is stored once, and only one slice of a constant that repeats along an axis. One size of
the inputs may be symbolic, such as the number of points. Unknown operations are errors.

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

OPSET = 17  # as in Meta's export, and supported by browsers
# Protobuf's limit is 2 GB: the weights of larger models are stored in a separate file.
_LARGEST_FILE = 1 << 30
# In bytes. Below this, a repeating array is stored whole: a node that expands it is larger.
_SMALL = 1024
Tensor = str | np.ndarray  # a name in the graph, or a constant


class _Value(NamedTuple):
    """A traced array. Axes along which it repeats have length 1, since ONNX broadcasts."""

    tensor: Tensor
    shape: tuple


class Graph:
    """An ONNX graph under construction."""

    def __init__(self):
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[tuple, tuple[str, np.ndarray]] = {}
        self._open_sizes: dict[Any, tuple[Tensor, int]] = {}  # a tensor and an axis of that size
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

    def _value(self, tensor: Tensor, shape: tuple) -> _Value:
        for axis, size in enumerate(shape):
            if not isinstance(size, int):
                self._open_sizes.setdefault(size, (tensor, axis))
        return _Value(tensor, tuple(shape))

    def _full(self, value: _Value, shape: tuple) -> Tensor:
        """The tensor, broadcast to its full shape."""
        if value.shape == tuple(shape):
            return value.tensor
        own = (1,) * (len(shape) - len(value.shape)) + value.shape
        sizes = [self._size(1 if n == m else n) for n, m in zip(shape, own, strict=True)]
        return self.node("Expand", value.tensor, self.node("Concat", *sizes, axis=0))

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
        translate = _OPERATIONS.get(name)
        if inner is not None and name in ("jit", "custom_jvp_call"):
            translate = _FUNCTIONS.get(inner.jaxpr.debug_info.func_name)
            if translate is None or all_known:
                return self._run(inner, values)
        elif name == "platform_index":  # of `jax.lax.platform_dependent`: take the CPU's branch
            platforms = parameters["platforms"]  # of each branch; None for the default
            index = next(i for i, names in enumerate(platforms) if not names or "cpu" in names)
            return [_known_value(np.int32(index))]
        elif name == "cond" and isinstance(values[0].tensor, np.ndarray):
            return self._run(parameters["branches"][int(values[0].tensor)], values[1:])
        elif name == "broadcast_in_dim":
            return [_broadcast_in_dim(self, values[0], **parameters)]
        elif name in _ELEMENTWISE:
            shape = _broadcast_shapes([value.shape for value in values])
            if not all_known:
                tensor = _ELEMENTWISE[name](self, *(v.tensor for v in values), **parameters)
                return [self._value(tensor, shape)]
            return _compute(equation, [np.broadcast_to(v.tensor, shape) for v in values])
        if all_known:
            arrays = [np.broadcast_to(v.tensor, n) for v, n in zip(values, shapes, strict=True)]
            return _compute(equation, arrays)
        if translate is None:
            raise ValueError(f"JAX's operation {name!r} cannot be exported to ONNX")
        tensors = [self._full(v, shape) for v, shape in zip(values, shapes, strict=True)]
        results = translate(self, equation, *tensors)
        results = results if isinstance(results, list) else [results]
        return [
            self._value(tensor, _aval(var).shape)
            for tensor, var in zip(results, equation.outvars, strict=True)
        ]


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


def _broadcast_in_dim(graph, value, *, shape, broadcast_dimensions, **_):
    sizes, new = [1] * len(shape), sorted(set(range(len(shape))) - set(broadcast_dimensions))
    for axis, size in zip(broadcast_dimensions, value.shape, strict=True):
        sizes[axis] = size
    if isinstance(value.tensor, np.ndarray):
        return _known_value(np.expand_dims(value.tensor, new))
    tensor = graph.node("Unsqueeze", value.tensor, np.array(new)) if new else value.tensor
    return graph._value(tensor, tuple(sizes))


_SAME_IN_ONNX = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "max": "Max",
    "eq": "Equal",
    "exp": "Exp",
    "sin": "Sin",
    "cos": "Cos",
    "stop_gradient": "Identity",
}
# Elementwise operations, broadcast by ONNX's rules.
_ELEMENTWISE: dict[str, Callable] = {
    name: lambda graph, *xs, operation=operation, **_: graph.node(operation, *xs)
    for name, operation in _SAME_IN_ONNX.items()
} | {
    "ne": lambda graph, x, y, **_: graph.node("Not", graph.node("Equal", x, y)),
    "square": lambda graph, x, **_: graph.node("Mul", x, x),
    "rsqrt": lambda graph, x, **_: graph.node("Reciprocal", graph.node("Sqrt", x)),
    "select_n": lambda graph, which, no, yes, **_: graph.node("Where", which, yes, no),
    "convert_element_type": lambda graph, x, *, new_dtype, **_: graph.cast(x, new_dtype),
}


def _permuted(graph, x, order):
    if isinstance(x, np.ndarray):
        return x.transpose(order)
    return x if list(order) == sorted(order) else graph.node("Transpose", x, perm=list(order))


def _reshaped(graph, x, old, new):
    if tuple(old) == tuple(new):
        return x
    if isinstance(x, np.ndarray):
        return x.reshape(new)
    sizes = [n if isinstance(n, int) else -1 for n in new]
    return graph.node("Reshape", x, np.array(sizes, np.int64))


def _reshape(graph, equation, x):
    return _reshaped(graph, x, equation.invars[0].aval.shape, equation.outvars[0].aval.shape)


def _dot_general(graph, equation, x, y):
    """Computes it as a product of [batch, rows, depth] and [batch, depth, columns]."""
    summed, batch = equation.params["dimension_numbers"]
    shapes = [_aval(atom).shape for atom in equation.invars]
    free = [
        [axis for axis in range(len(shapes[i])) if axis not in (*summed[i], *batch[i])]
        for i in range(2)
    ]
    sizes = [shapes[0][axis] for axis in batch[0]]
    rows, columns = (math.prod(shapes[i][axis] for axis in free[i]) for i in range(2))
    depth = math.prod(shapes[0][axis] for axis in summed[0])
    orders = (*batch[0], *free[0], *summed[0]), (*batch[1], *summed[1], *free[1])
    x, y = (
        _reshaped(graph, _permuted(graph, z, order), [shape[axis] for axis in order], new)
        for z, order, shape, new in zip(
            (x, y), orders, shapes, ((*sizes, rows, depth), (*sizes, depth, columns)), strict=True
        )
    )
    product, out = graph.node("MatMul", x, y), equation.outvars[0].aval.shape
    return _reshaped(graph, product, (*sizes, rows, columns), out)


def _convolution(graph, equation, x, kernel):
    parameters = equation.params
    if set(parameters["lhs_dilation"]) != {1} or parameters["batch_group_count"] != 1:
        raise ValueError("transposed convolutions cannot be exported to ONNX")
    numbers, padding = parameters["dimension_numbers"], parameters["padding"]
    result = graph.node(
        "Conv",
        _permuted(graph, x, numbers.lhs_spec),  # channels first
        _permuted(graph, kernel, numbers.rhs_spec),
        strides=parameters["window_strides"],
        pads=[before for before, _ in padding] + [after for _, after in padding],
        dilations=parameters["rhs_dilation"],
        group=parameters["feature_group_count"],
    )
    return _permuted(graph, result, np.argsort(numbers.out_spec).tolist())


def _stack(graph, equation, *tensors):
    axis = equation.params["axis"]
    tensors = [graph.node("Unsqueeze", x, np.array([axis])) for x in tensors]
    return graph.node("Concat", *tensors, axis=axis)


def _slice(graph, equation, x):
    old, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    axes = np.array([axis for axis in range(len(old)) if old[axis] != new[axis]], np.int64)
    start, limit = equation.params["start_indices"], equation.params["limit_indices"]
    steps = equation.params["strides"] or [1] * len(old)
    start, limit, steps = (np.array(values)[axes] for values in (start, limit, steps))
    return graph.node("Slice", x, start, limit, axes, steps)


def _split(graph, equation, x):
    ends = np.cumsum(equation.params["sizes"])
    bounds = zip(ends - equation.params["sizes"], ends, strict=True)
    axis = np.array([equation.params["axis"]])
    return [graph.node("Slice", x, np.array([a]), np.array([b]), axis) for a, b in bounds]


def _gather(graph, equation, x, start):
    """Supports only slices such as `x[..., 1:2]` of an array with a symbolic size."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if isinstance(start, str) or start.ndim != 1 or numbers.collapsed_slice_dims:
        raise ValueError("indexing by arrays cannot be exported to ONNX")
    axes, start = np.array(numbers.start_index_map), start.astype(np.int64)
    return graph.node("Slice", x, start, start + [sizes[axis] for axis in axes], axes)


def _pad(graph, equation, x, value):
    before, after, between = zip(*equation.params["padding_config"], strict=True)
    if min(before + after) < 0 or any(between):
        raise ValueError("negative and interior padding cannot be exported to ONNX")
    return graph.node("Pad", x, np.array(before + after), value)


# Operations that need arrays at full size.
_OPERATIONS: dict[str, Callable] = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "transpose": lambda graph, eqn, x: _permuted(graph, x, eqn.params["permutation"]),
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "concatenate": lambda graph, eqn, *xs: graph.node("Concat", *xs, axis=eqn.params["dimension"]),
    "stack": _stack,
    "slice": _slice,
    "split": _split,
    "gather": _gather,
    "pad": _pad,
    "reduce_sum": lambda graph, eqn, x: graph.node(
        "ReduceSum", x, np.array(eqn.params["axes"]), keepdims=0
    ),
    "reduce_max": lambda graph, eqn, x: graph.node(
        "ReduceMax", x, axes=eqn.params["axes"], keepdims=0
    ),
}


def _softmax(graph, equation, logits):
    (axis,) = equation.params["call_jaxpr"].jaxpr.eqns[0].params["axes"]
    return graph.node("Softmax", logits, axis=axis)


def _average(graph, equation, logits, v):
    return graph.node("MatMul", graph.node("Softmax", logits, axis=-1), v)


def _gelu(graph, equation, x):
    """Uses the order of operations that ONNX Runtime fuses."""
    root, one, half = (np.array(n, np.float32) for n in (math.sqrt(2), 1, 0.5))
    twice_cdf = graph.node("Add", graph.node("Erf", graph.node("Div", x, root)), one)
    return graph.node("Mul", graph.node("Mul", x, twice_cdf), half)


def _conv(graph, equation, x, kernel):
    given, shape = (atom.aval.shape for atom in equation.invars)
    out = equation.outvars[0].aval.shape
    result = graph.node(
        "Conv",
        _permuted(graph, x, (0, 3, 1, 2)),
        _permuted(graph, kernel, (3, 2, 0, 1)),
        strides=[-(-given[1] // out[1])] * 2,
        pads=[shape[0] // 2] * 4,
        group=given[3] // shape[2],
    )
    return _permuted(graph, result, (0, 2, 3, 1))


# Functions of the models (`sam_jax.ops.operation`) for which ONNX or ONNX Runtime has operators,
# with which MobileSAM's encoder takes half the time.
_FUNCTIONS: dict[str, Callable] = {
    "sam.softmax": _softmax,
    "sam.average": _average,
    "sam.gelu": _gelu,
    "sam.conv": _conv,
}
