#!/usr/bin/env python3
"""Writes the vectors of the export tests with the peers' own writers.

Run:  python make_vectors.py        (gguf 0.19.0, compressed-tensors 0.20.0, numpy, torch)
peer.gguf    a file of gguf-py's GGUFWriter with one metadata entry of every type that Refinery writes and one tensor of every
             tensor type, whose bytes are 0, 1, 2, .. modulo 251.
blocks.json  codes, scales and zero points, and the blocks that gguf-py's quantizers make of the weights they stand for. Every block
             holds the codes at the ends of its grid, so that the quantizers find the same scale again. Also random weights and their Q8_0.
packed.json  codes and zero points, and the words that compressed-tensors' pack_to_int32 makes of them.
"""
import base64
import json
import pathlib

import gguf
import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from gguf import GGMLQuantizationType as T
from gguf import quants

HERE = pathlib.Path(__file__).parent
rng = np.random.default_rng(20261122)


def text(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def write_peer():
    writer = gguf.GGUFWriter(HERE / "peer.gguf", "llama")
    writer.add_uint32("a.u32", 4000000000)
    writer.add_int32("a.i32", -7)
    writer.add_uint64("a.u64", 1 << 40)
    writer.add_float32("a.f32", 1e-5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "naïve \n")
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1e9])
    writer.add_array("a.texts", ["", "Ġthe", "x y"])
    shapes = {"norm": (T.F32, (5,)), "half": (T.F16, (3, 4)), "brain": (T.BF16, (2, 8)), "q4_0": (T.Q4_0, (3, 64)), "q4_1": (T.Q4_1, (1, 32)),
              "q8_0": (T.Q8_0, (2, 32))}
    for name, (kind, shape) in shapes.items():
        block, size = gguf.GGML_QUANT_SIZES[kind]
        row = shape[-1] // block * size
        data = (np.arange(int(np.prod(shape[:-1])) * row) % 251).astype(np.uint8).reshape(*shape[:-1], row)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks(kind, bits, group):
    out, width = 6, 128
    top = (1 << bits) - 1
    codes = rng.integers(0 if bits == 4 else 1, top + 1, (out, width))
    scales = (rng.uniform(0.001, 0.1, (out, width // group)) * rng.choice([-1, 1], (out, width // group))).astype(np.float16)
    zeros = np.full(scales.shape, 1 << (bits - 1))
    for block in range(0, width, 32):
        if kind == T.Q4_1:
            codes[:, block + 3], codes[:, block + 20] = 0, top
        else:
            codes[:, block + 3] = 0 if bits == 4 else top
    if kind != T.Q4_0:  # their quantizers give positive scales only
        scales = np.abs(scales)
    if kind == T.Q4_1:
        zeros = rng.integers(0, top + 1, scales.shape)
    spread = lambda a: np.repeat(a, group, axis=1)
    scale = spread(scales).astype(np.float32)
    if kind == T.Q4_1:
        minimum = spread((-zeros.astype(np.float32) * scales.astype(np.float32)).astype(np.float16)).astype(np.float32)
        weights = scale * codes.astype(np.float32) + minimum
    else:
        weights = scale * (codes - (1 << (bits - 1))).astype(np.float32)
    made = quants.quantize(weights, kind)
    return {"bits": bits, "group_size": group, "out": out, "in": width, "codes": text(codes.astype(np.uint8)), "scales": text(scales),
            "zeros": text(zeros.astype(np.uint8)) if kind == T.Q4_1 else "", "blocks": text(made)}


def write_blocks():
    weights = (rng.standard_normal((4, 96)) * 0.1).astype(np.float32)
    weights[1, 32:64] = 0
    vectors = {"Q4_0": blocks(T.Q4_0, 4, 64), "Q4_1": blocks(T.Q4_1, 4, 32), "Q8_0": blocks(T.Q8_0, 8, 128),
               "rounded": {"weights": text(weights), "blocks": text(quants.quantize(weights, T.Q8_0))}}
    (HERE / "blocks.json").write_text(json.dumps(vectors, indent=1) + "\n")


def write_packed():
    """A layer of 32 outputs and 64 inputs in groups of 32."""
    vectors = {}
    for bits in (4, 8):
        codes, zeros = rng.integers(0, 1 << bits, (32, 64)), rng.integers(1, 1 << bits, (32, 2))
        scales = rng.uniform(-0.1, 0.1, (32, 2)).astype(np.float16)
        signed = lambda a: torch.from_numpy((a - (1 << (bits - 1))).astype(np.int8))
        vectors[str(bits)] = {"codes": text(codes.astype(np.uint8)), "zeros": text(zeros.astype(np.uint8)), "scales": text(scales),
                              "weight_packed": text(pack_to_int32(signed(codes), bits, packed_dim=1).numpy()),
                              "weight_zero_point": text(pack_to_int32(signed(zeros), bits, packed_dim=0).numpy())}
    (HERE / "packed.json").write_text(json.dumps(vectors, indent=1) + "\n")


if __name__ == "__main__":
    write_peer()
    write_blocks()
    write_packed()
