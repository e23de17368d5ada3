"""Makes gptq_v1_<bits>bit.json: codes and what a GPTQ v1 checkpoint stores for them.

Written from the layout's description alone (docs/formats.md; the same as GPTQModel's and AutoGPTQ's checkpoints), one value
and one bit at a time, so that it shares nothing with the packer it checks:
  2, 4, 8 bit: int32 word r of an output column holds inputs r*pf .. r*pf+pf-1 (pf = 32/bits), the first in the lowest bits.
  3 bit: three words for 32 values. Word 0: v0..v9 at bits 0, 3 .. 27, low two bits of v10 at 30-31. Word 1: bit 0 = v10 >> 2,
         v11..v20 at bits 1, 4 .. 28, bit 31 = v21 & 1. Word 2: bits 0-1 = v21 >> 1, v22..v31 at bits 2, 5 .. 29.
  qzeros: the zero point minus one, packed the same way along the output columns of each group.
Run: python3 make_vectors.py (numpy only; the seed is fixed, the same files come out).
"""
import json
import pathlib

import numpy as np


def pack32(values, bits):
    """32 values -> `bits` words as Python ints."""
    v = [int(x) for x in values]
    if bits == 3:
        w0 = sum(v[i] << (3 * i) for i in range(10)) | (v[10] & 3) << 30
        w1 = (v[10] >> 2) | sum(v[11 + i] << (1 + 3 * i) for i in range(10)) | (v[21] & 1) << 31
        w2 = (v[21] >> 1) | sum(v[22 + i] << (2 + 3 * i) for i in range(10))
        return [w0, w1, w2]
    per_word = 32 // bits
    return [sum(v[r * per_word + j] << (bits * j) for j in range(per_word)) for r in range(bits)]


def signed(words):
    return np.array(words, dtype=np.uint32).view(np.int32).tolist()


def main():
    rng = np.random.default_rng(20240917)
    for bits in (2, 3, 4, 8):
        columns, outputs, group = 64, 32, 32
        codes = rng.integers(0, 2**bits, (outputs, columns))
        scales = (rng.standard_normal((outputs, columns // group)) * 0.02).astype(np.float16)
        qweight = [[0] * outputs for _ in range(columns * bits // 32)]
        for o in range(outputs):
            for run in range(columns // 32):
                for k, word in enumerate(pack32(codes[o, run * 32:run * 32 + 32], bits)):
                    qweight[run * bits + k][o] = word
        zeros = []
        for _ in range(columns // group):
            row = []
            for run in range(outputs // 32):
                row += pack32([2 ** (bits - 1) - 1] * 32, bits)
            zeros.append(row)
        document = {
            "bits": bits, "group_size": group, "codes": codes.tolist(),
            "scales_bits": scales.view(np.uint16).tolist(),
            "qweight": [signed(row) for row in qweight],
            "qzeros": [signed(row) for row in zeros],
            "scales_packed_bits": np.ascontiguousarray(scales.T).view(np.uint16).tolist(),
            "g_idx": [i // group for i in range(columns)],
        }
        path = pathlib.Path(__file__).with_name(f"gptq_v1_{bits}bit.json")
        path.write_text(json.dumps(document, separators=(",", ":")) + "\n")
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
