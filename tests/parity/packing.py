#!/usr/bin/env python3
"""Unpacks what refinery_packing_probe packs with GPTQModel's and compressed-tensors' own unpackers, code by code.

Run:  python packing.py PACKING_PROBE      (gptqmodel 7.7.0, compressed-tensors 0.20.0: the environment of this folder; CPU)
For 2, 3, 4 and 8 bits, several shapes, group sizes -1, 16, 32, 64 and 128 with ragged last groups, symmetric and asymmetric,
natural groups and act-order, GPTQ v1 and v2: the probe draws codes, zero points, scales and a group index and writes them beside
their packed form. Every field that the peers read must be the one that was drawn.
"""
import pathlib
import subprocess
import sys
import tempfile

import torch
from compressed_tensors.compressors import unpack_from_int32
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors.torch import load_file


def gptqmodel_weight(case, t):
    """GPTQModel's layer over our tensors, as its loader makes it; v1 is turned to v2 by its own conversion."""
    bits, group, sym = case["bits"], case["group_size"], case["symmetric"]
    out, inputs = t["codes"].shape
    layer = TorchLinear(bits=bits, group_size=group, sym=sym, desc_act=case["act_order"], in_features=inputs, out_features=out, bias=False)
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        stored = getattr(layer, name)
        assert stored.shape == t[name].shape, (name, stored.shape, t[name].shape)
        setattr(layer, name, t[name].clone())
    layer.optimize = lambda *a, **k: None
    if case["version"] == 1:
        convert_gptq_v1_to_v2_format_module(layer, bits=bits, pack_dtype=torch.int32)
    layer.post_init()
    layer.eval()
    return layer.dequantize_weight().T


def check_gptqmodel(case, t):
    ones = dict(t, scales=torch.ones_like(t["scales"]))  # codes minus zero points, exact in 16 bits
    groups = t["g_idx"].long()
    wanted = t["codes"].int() - t["zeros"].int()[:, groups]
    got = gptqmodel_weight(case, ones)
    assert torch.equal(got.int(), wanted), "GPTQModel reads other codes or zero points"
    real = gptqmodel_weight(case, t)
    exact = t["scales"].T[:, groups].float() * wanted
    assert torch.allclose(real.float(), exact, rtol=2**-10, atol=1e-7), "GPTQModel reads other scales"


def check_compressed_tensors(case, t):
    """pack-quantized holds the same words, transposed (3 bits: as one dense stream, like GPTQ)."""
    packed = t["qweight"].T.contiguous()
    out, inputs = t["codes"].shape
    half = 2 ** (case["bits"] - 1)
    got = unpack_from_int32(packed, case["bits"], torch.Size([out, inputs]))
    assert torch.equal(got.int() + half, t["codes"].int()), "compressed-tensors reads other codes"


def main():
    probe = sys.argv[1]
    failed = done = 0
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([probe, folder], check=True)
        for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
            name = path.stem  # b4_g64_64x192_sym_natural_v1
            b, g, shape, sym, order, version = name.split("_")
            case = {"bits": int(b[1:]), "group_size": int(g[1:]), "symmetric": sym == "sym", "act_order": order == "actorder",
                    "version": int(version[1:])}
            tensors = load_file(path)
            try:
                check_gptqmodel(case, tensors)
                check_compressed_tensors(case, tensors)
            except AssertionError as error:
                failed += 1
                print(f"FAILED {name}: {error}")
            done += 1
    print(f"packing: {done} layouts read by GPTQModel and compressed-tensors, {failed} differ")
    return 1 if failed or done == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
