# SPDX-License-Identifier: Apache-2.0
"""Exported weights in int8: what `export_hf.py --dtype int8` does to ONNX files. In PyTorch: `quantization_mmser`."""

import logging
import os

import numpy as np

BLOCK = 64  # int8 weights that share a scale
SCALES = ("_scales", ".scale")  # how the names of scales end, those of onnxruntime and ours


def quantize_onnx(path: str | os.PathLike, target: str | os.PathLike) -> None:
    """
    Store the weights of an exported float32 model in about a quarter of the space.

    - Matrices that multiply sequences (encoders, cross-modal attention, pooling): onnxruntime's own quantiser turns
      them into int8 with a scale for every `BLOCK` weights of an output, and onnxruntime multiplies in integers. It
      quantises the states in the same blocks, position by position. (`quantize_dynamic` takes one scale for the
      states of the whole batch: each clip's result would depend on its batch. Here padding can still change a state
      by 1e-7 and thereby its rounding, which moved the probabilities of a few of 60 clips by up to 0.007.)
    - The table of tokens: int8 with a scale for each token. onnxruntime's quantiser has 4 bits only for tables.
    - Everything else: stored in float16, computed in float32. This holds the convolutions, the norms, and the head
      from the fusion on, where every rounding error would reach the answer.

    Args:
        path: file that `export_onnx` wrote.
        target: file to write.
    """
    import onnx

    model = onnx.load(os.fspath(path))
    notes = {entry.key: entry.value for entry in model.metadata_props}
    _quantize_token_table(model.graph)
    _quantize_matrices(model)
    _store_as_float16(model.graph)
    onnx.helper.set_model_props(model, {**notes, "dtype": "int8"})
    onnx.save(model, os.fspath(target))


def _quantize_matrices(model) -> None:
    """Replace each product with a constant matrix by one with int8 weights. A matrix of one column is left alone."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)  # the import calls `basicConfig`, which does nothing if there is a handler
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    root.removeHandler(handler)
    graph = model.graph
    narrow = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 and tensor.dims[1] == 1}
    excluded = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in narrow]
    # At accuracy level 4 the states are int8, too
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=4, bits=8)
    MatMulNBitsQuantizer(model, nodes_to_exclude=excluded, algo_config=config).process()


def _quantize_token_table(graph) -> None:
    """Replace the rows that `input_ids` pick by int8 ones times a scale per row."""
    from onnx import TensorProto, helper, numpy_helper

    if "input_ids" not in [value.name for value in graph.input]:  # a model of audio alone
        return
    tables = {tensor.name: tensor for tensor in graph.initializer}
    position, gather = next(
        (position, node)
        for position, node in enumerate(graph.node)
        if node.op_type == "Gather" and node.input[0] in tables and node.input[1] == "input_ids"
    )
    name, ids = gather.input
    values = numpy_helper.to_array(tables[name])
    scale = np.maximum(np.abs(values).max(axis=-1, keepdims=True) / 127, np.finfo(np.float32).tiny)
    graph.initializer.remove(tables[name])
    graph.initializer.append(numpy_helper.from_array(np.rint(values / scale).astype(np.int8), f"{name}.int8"))
    graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
    graph.node.remove(gather)
    nodes = [
        helper.make_node("Gather", [f"{name}.int8", ids], [f"{name}.rows"], f"{name}.rows"),
        helper.make_node("Cast", [f"{name}.rows"], [f"{name}.floats"], f"{name}.floats", to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{name}.scale", ids], [f"{name}.scales"], f"{name}.scales"),
        helper.make_node("Mul", [f"{name}.floats", f"{name}.scales"], [gather.output[0]], f"{name}.product"),
    ]
    for offset, node in enumerate(nodes):
        graph.node.insert(position + offset, node)


def _relative_error(values: np.ndarray) -> float:
    """How far float16 is off, at most, relative to each value; zeros and the scales of zeros do not count."""
    values = values[np.abs(values) > 1e-30].astype(np.float64)
    return float(np.abs(values.astype(np.float16) / values - 1).max(initial=0.0))


def _store_as_float16(graph, min_size: int = 512) -> None:
    """Keep float32 weights of some size in float16; onnxruntime turns them back once, when it opens the file."""
    from onnx import TensorProto, helper, numpy_helper

    for tensor in [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT]:
        values = numpy_helper.to_array(tensor)
        if values.size < min_size or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        if tensor.name.endswith(SCALES) and _relative_error(values) > 0.005:  # as much as int8 itself is off
            continue
        half = f"{tensor.name}.float16"
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), half))
        graph.node.insert(0, helper.make_node("Cast", [half], [tensor.name], half, to=TensorProto.FLOAT))
