"""What ONNX has for JAX's operations, and for functions of the models."""

import math
from collections.abc import Callable

import numpy as np
from jax.extend import core

Tensor = str | np.ndarray  # a name in the graph, or a constant
CHANNELS_FIRST = (0, 3, 1, 2)  # the axes of an image [b, h, w, c] in ONNX's order


def _gelu(graph, x):
    """Uses the order of operations that ONNX Runtime fuses."""
    root, one, half = (np.array(n, np.float32) for n in (math.sqrt(2), 1, 0.5))
    twice_cdf = graph.node("Add", graph.node("Erf", graph.node("Div", x, root)), one)
    return graph.node("Mul", graph.node("Mul", x, twice_cdf), half)


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
ELEMENTWISE: dict[str, Callable] = {
    name: lambda graph, *xs, operation=operation, **_: graph.node(operation, *xs)
    for name, operation in _SAME_IN_ONNX.items()
} | {
    "ne": lambda graph, x, y, **_: graph.node("Not", graph.node("Equal", x, y)),
    "square": lambda graph, x, **_: graph.node("Mul", x, x),
    "rsqrt": lambda graph, x, **_: graph.node("Reciprocal", graph.node("Sqrt", x)),
    "select_n": lambda graph, which, no, yes, **_: graph.node("Where", which, yes, no),
    "convert_element_type": lambda graph, x, *, new_dtype, **_: graph.cast(x, new_dtype),
    "sam.gelu": lambda graph, x, **_: _gelu(graph, x),
}


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
    shapes = [atom.aval.shape for atom in equation.invars]
    free = [
        [axis for axis in range(len(shapes[i])) if axis not in (*summed[i], *batch[i])]
        for i in range(2)
    ]
    sizes = [shapes[0][axis] for axis in batch[0]]
    rows, columns = (math.prod(shapes[i][axis] for axis in free[i]) for i in range(2))
    depth = math.prod(shapes[0][axis] for axis in summed[0])
    orders = (*batch[0], *free[0], *summed[0]), (*batch[1], *summed[1], *free[1])
    x, y = (
        _reshaped(graph, graph.transpose(z, order, shape), [shape[axis] for axis in order], new)
        for z, order, shape, new in zip(
            (x, y), orders, shapes, ((*sizes, rows, depth), (*sizes, depth, columns)), strict=True
        )
    )
    product, out = graph.node("MatMul", x, y), equation.outvars[0].aval.shape
    return _reshaped(graph, product, (*sizes, rows, columns), out)


def _convolution(graph, equation, x, kernel):
    """A convolution of a tensor with channels first."""
    parameters = equation.params
    if set(parameters["lhs_dilation"]) != {1} or parameters["batch_group_count"] != 1:
        raise ValueError("transposed convolutions cannot be exported to ONNX")
    numbers, padding = parameters["dimension_numbers"], parameters["padding"]
    assert numbers.lhs_spec == numbers.out_spec == CHANNELS_FIRST
    return graph.node(
        "Conv",
        x,
        graph.transpose(kernel, numbers.rhs_spec, kernel.shape),
        strides=parameters["window_strides"],
        pads=[before for before, _ in padding] + [after for _, after in padding],
        dilations=parameters["rhs_dilation"],
        group=parameters["feature_group_count"],
    )


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


def _softmax(graph, equation, logits):
    (axis,) = equation.params["call_jaxpr"].jaxpr.eqns[0].params["axes"]
    return graph.node("Softmax", logits, axis=axis)


def _average(graph, equation, logits, v):
    return graph.node("MatMul", graph.node("Softmax", logits, axis=-1), v)


def _conv(graph, equation, x, kernel, *bias):
    """A convolution of a tensor with channels first."""
    given, shape, *_ = (atom.aval.shape for atom in equation.invars)
    out = equation.outvars[0].aval.shape
    return graph.node(
        "Conv",
        x,
        graph.transpose(kernel, (3, 2, 0, 1), shape),
        *bias,
        strides=[-(-given[1] // out[1])] * 2,
        pads=[shape[0] // 2] * 4,
        group=given[3] // shape[2],
    )


def _layer_norm(graph, equation, x, scale, bias):
    eps = _literal_added(equation.params["jaxpr"].jaxpr)
    shape = equation.invars[0].aval.shape
    rows = _reshaped(graph, x, shape, (1, -1, shape[-1]))
    rows = graph.node("LayerNormalization", rows, scale, bias, axis=-1, epsilon=eps)
    return _reshaped(graph, rows, (), shape)


def _literal_added(jaxpr) -> float:
    """The only number that is added in a layer norm."""
    for equation in jaxpr.eqns:
        for part in ("jaxpr", "call_jaxpr"):
            if part in equation.params:
                return _literal_added(equation.params[part].jaxpr)
        if equation.primitive.name == "add" and isinstance(equation.invars[1], core.Literal):
            return float(equation.invars[1].val)
    raise ValueError("a layer norm without epsilon cannot be exported to ONNX")


# Operations that need arrays at full size; `sam.` are functions (`sam_jax.ops.operation`).
OPERATIONS: dict[str, Callable] = {
    "reshape": _reshape,
    "squeeze": _reshape,
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
    "sam.softmax": _softmax,
    "sam.average": _average,
    "sam.conv": _conv,
    "sam.layer_norm": _layer_norm,
}
# Functions for which ONNX or its runtimes have operators, with which encoders take half the time.
FUNCTIONS = {name for name in OPERATIONS | ELEMENTWISE if name.startswith("sam.")}
# They take an image with channels first as the first argument, and return one.
CONVOLUTIONS = {"conv_general_dilated", "sam.conv"}
