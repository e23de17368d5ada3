#!/usr/bin/env python3
"""Writes blocks.json: random blocks of every ggml type that Refinery reads, and their float32 values by gguf-py.

Run:  python make_vectors.py        (gguf 0.19.0, numpy)
Each entry: "blocks", base64 of the raw bytes; "values", base64 of little-endian float32. Codes and sub-scales are uniform
random bytes; the float16 fields are random but finite (normal, subnormal, negative and zero), because infinities times zero
codes give NaNs whose bits no one defines.
"""
import base64
import json
import pathlib

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES

# Byte offsets of the float16 fields in a block.
HALF_FIELDS = {
    T.F32: [], T.F16: [0], T.BF16: [], T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0],
    T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208], T.IQ4_NL: [0],
}
SPECIAL_HALVES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0x3C00]  # zeros, subnormals, largest, one


def finite_half(rng):
    while True:
        bits = int(rng.integers(0, 1 << 16))
        if (bits >> 10) & 0x1F != 0x1F:
            return bits


def main():
    rng = np.random.default_rng(20260109)
    out = {"made_with": "gguf 0.19.0, numpy " + np.__version__, "types": {}}
    for kind, fields in HALF_FIELDS.items():
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        count = 64 if block_size == 1 else (9 if block_size == 32 else 3)
        blocks = rng.integers(0, 256, size=(count, block_bytes), dtype=np.uint8)
        for b in range(count):
            for field in fields:
                bits = SPECIAL_HALVES[b] if b < len(SPECIAL_HALVES) and block_size < 256 else finite_half(rng)
                blocks[b, field:field + 2] = np.frombuffer(np.uint16(bits).tobytes(), dtype=np.uint8)
        if kind in (T.F32, T.BF16):  # keep exponents finite
            blocks[:, -1] &= 0x3F
        values = quants.dequantize(blocks.reshape(-1), kind).astype("<f4").reshape(-1)
        assert np.isfinite(values).all(), kind
        out["types"][kind.name] = {
            "id": int(kind), "block_size": block_size, "block_bytes": block_bytes,
            "blocks": base64.b64encode(blocks.tobytes()).decode(),
            "values": base64.b64encode(values.tobytes()).decode(),
        }
    path = pathlib.Path(__file__).parent / "blocks.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    assert path.stat().st_size < 64 * 1024, path.stat().st_size


if __name__ == "__main__":
    main()
