# SPDX-License-Identifier: Apache-2.0
"""Exported weights in int8: what `export_hf.py --dtype int8` does to an ONNX file."""

import os

import numpy as np

BLOCK = 64  # int8 weights that share a scale


def quantize_onnx(path: str | os.PathLike, target: str | os.PathLike) -> None:
    """
    Store the weights of an exported float32 model in about a quarter of the space.

    - Matrices that sequences are multiplied by (encoders, cross-modal attention, pooling): int8 with a scale for every
      `BLOCK` weights of an output, and computed in integers (`MatMulNBits` of onnxruntime). The states they meet are
      quantised in the same blocks, position by position. (The standard operators of `quantize_dynamic` take one scale
      for the states of the whole batch: a clip's result would depend on its batch, and is twice as far off.)
    - The table of tokens: int8 with a scale for each token.
    - Everything else (convolutions, norms, and the head from the fusion on, where every rounding would go straight
      into the answer): stored in float16, computed in float32.

    Args:
        path: of `export_onnx`.
        target: file to write.
    """
    import onnx

    model = onnx.load(os.fspath(path))
    notes = {entry.key: entry.value for entry in model.metadata_props}
    _quantize_token_table(model.graph)
    _quantize_matrices(model.graph)
    _store_as_float16(model.graph)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.helper.set_model_props(model, {**notes, "dtype": "int8"})
    onnx.save(model, os.fspath(target))


def _quantize_matrices(graph) -> None:
    """Replace each product with a constant matrix by one with blocks of int8 weights."""
    from onnx import helper, numpy_helper

    matrices = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    done: set[str] = set()
    for position, node in enumerate(graph.node):
        if node.op_type != "MatMul" or node.input[1] not in matrices or matrices[node.input[1]].dims[1] == 1:
            continue
        name = node.input[1]
        inputs, outputs = matrices[name].dims
        if name not in done:  # some encoders use a matrix in every layer
            weight = numpy_helper.to_array(matrices[name]).T
            blocks = np.pad(weight, ((0, 0), (0, -inputs % BLOCK))).reshape(outputs, -1, BLOCK)
            quantized, scale = _to_int8(blocks)
            quantized = (quantized + 128).astype(np.uint8)  # the operator takes 128 for zero
            graph.initializer.append(numpy_helper.from_array(quantized, f"{name}.int8"))
            graph.initializer.append(numpy_helper.from_array(scale.reshape(-1), f"{name}.scale"))
            done.add(name)
        graph.node[position].CopyFrom(
            helper.make_node(
                "MatMulNBits",
                [node.input[0], f"{name}.int8", f"{name}.scale"],
                list(node.output),
                node.name,
                domain="com.microsoft",
                K=inputs,
                N=outputs,
                bits=8,
                block_size=BLOCK,
                accuracy_level=4,  # states in int8, too
            )
        )
    used = {name for node in graph.node for name in node.input}
    for name in done - used:
        graph.initializer.remove(matrices[name])


def _to_int8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., N] -> whole numbers from -127 to 127 [..., N] and scales [..., 1] that float16 can hold."""
    exact = np.maximum(np.abs(values).max(axis=-1, keepdims=True) / 127, np.finfo(np.float16).smallest_subnormal)
    scale = exact.astype(np.float16)
    scale = np.where(scale < exact, np.nextafter(scale, np.float16(np.inf)), scale).astype(np.float32)
    return np.rint(values / scale), scale


def _quantize_token_table(graph) -> None:
    """Replace the rows that `input_ids` pick by int8 ones times a scale per row."""
    from onnx import TensorProto, helper, numpy_helper

    tables = {tensor.name: tensor for tensor in graph.initializer}
    position, gather = next(
        (position, node)
        for position, node in enumerate(graph.node)
        if node.op_type == "Gather" and node.input[0] in tables and node.input[1] == "input_ids"
    )
    name, ids = gather.input
    result = gather.output[0]
    quantized, scale = _to_int8(numpy_helper.to_array(tables[name]))
    graph.initializer.remove(tables[name])
    graph.initializer.append(numpy_helper.from_array(quantized.astype(np.int8), f"{name}.int8"))
    graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
    graph.node.remove(gather)
    nodes = [
        helper.make_node("Gather", [f"{name}.int8", ids], [f"{name}.rows"], f"{name}.rows"),
        helper.make_node("Cast", [f"{name}.rows"], [f"{name}.floats"], f"{name}.floats", to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{name}.scale", ids], [f"{name}.scales"], f"{name}.scales"),
        helper.make_node("Mul", [f"{name}.floats", f"{name}.scales"], [result], f"{name}.product"),
    ]
    for offset, node in enumerate(nodes):
        graph.node.insert(position + offset, node)


def _store_as_float16(graph, min_size: int = 512) -> None:
    """Keep float32 weights of some size in float16; onnxruntime turns them back once, when it opens the file."""
    from onnx import TensorProto, helper, numpy_helper

    for tensor in [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT]:
        values = numpy_helper.to_array(tensor)
        if values.size < min_size or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        half = f"{tensor.name}.float16"
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), half))
        graph.node.insert(0, helper.make_node("Cast", [half], [tensor.name], half, to=TensorProto.FLOAT))
