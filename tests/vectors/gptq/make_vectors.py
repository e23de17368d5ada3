#!/usr/bin/env python3
"""Writes dequantized.json: small GPTQ checkpoints packed by gptqmodel, and the weights that gptqmodel makes of them.

Run:  python make_vectors.py     (gptqmodel 7.7.0, torch 2.15.0: the environment of tests/parity; CPU)
Each entry: the tensors of one linear layer as base64 of little-endian int32 or float16 with their shapes, the format, and
"weight", float16 [out, in]: gptqmodel dequantizes in 16 bits, which rounds scale * (code - zero) once. Asymmetric zero points;
with desc_act the inputs are spread over the groups in random order.
"""
import base64
import json
import pathlib

import numpy as np
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

IN, OUT, GROUP = 64, 32, 32


def entry(tensor, kind):
    data = tensor.detach().contiguous().numpy().astype(kind)
    return {"shape": list(data.shape), "data": base64.b64encode(data.tobytes()).decode()}


def make(bits, version, desc_act, generator):
    groups = IN // GROUP
    g_idx = torch.arange(IN) // GROUP
    if desc_act:
        g_idx = g_idx[torch.randperm(IN, generator=generator)]
    g_idx = g_idx.to(torch.int32)
    scales = ((torch.rand(OUT, groups, generator=generator) + 0.1) * 0.05).half().float()
    zeros = torch.randint(1, 2**bits, (OUT, groups), generator=generator).float()
    codes = torch.randint(0, 2**bits, (OUT, IN), generator=generator).float()
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = scales[:, g_idx.long()] * (codes - zeros[:, g_idx.long()])
    layer = TorchLinear(bits=bits, group_size=GROUP, sym=False, desc_act=desc_act, in_features=IN, out_features=OUT, bias=False)
    layer.pack_block(linear, scales, zeros, g_idx)
    layer.post_init()
    layer.eval()
    weight = layer.dequantize_weight().T
    qzeros = layer.qzeros.clone()
    if version == 1:
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=GROUP, desc_act=desc_act, sym=False))
        qzeros = layer.qzeros
    return {"bits": bits, "group_size": GROUP, "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "desc_act": desc_act,
            "qweight": entry(layer.qweight, "<i4"), "qzeros": entry(qzeros, "<i4"), "scales": entry(layer.scales, "<f2"),
            "g_idx": entry(g_idx, "<i4"), "weight": entry(weight.half(), "<f2")}


def main():
    generator = torch.Generator().manual_seed(5)
    layers = [make(bits, version, desc_act, generator)
              for bits in (2, 3, 4, 8) for version, desc_act in ((1, True), (2, False))]
    path = pathlib.Path(__file__).with_name("dequantized.json")
    path.write_text(json.dumps({"made_with": "gptqmodel 7.7.0, torch " + torch.__version__, "layers": layers}, indent=0) + "\n")
    print(path, path.stat().st_size)
    assert path.stat().st_size < 64 * 1024


if __name__ == "__main__":
    main()
