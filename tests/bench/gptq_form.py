"""Writes a 16-bit Hugging Face folder as a GPTQ folder by plain rounding, for timing: which codes it holds does not matter there."""

import json
import os
import shutil

import torch
from safetensors import safe_open
from safetensors.torch import save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def round_to_codes(weight, bits, group_size):
    """weight [out, in] -> codes [out, in], scales [groups, out] float16; symmetric, zero point 2^(bits-1)."""
    out, inputs = weight.shape
    groups = weight.float().view(out, inputs // group_size, group_size)
    half = 1 << (bits - 1)
    scales = (groups.abs().amax(-1) / (half - 1)).clamp_min(1e-6).half()
    codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-half, half - 1) + half
    return codes.view(out, inputs).to(torch.int64), scales.t().contiguous()


def pack(fields, bits):
    """fields [n, m] -> int32 [n * bits / 32, m], least significant first."""
    per_word = 32 // bits
    fields = fields.view(-1, per_word, fields.shape[1])
    shifts = (torch.arange(per_word) * bits).view(1, -1, 1)
    words = (fields << shifts).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def write_gptq(source, target, bits=4, group_size=64):
    shutil.rmtree(target, ignore_errors=True)
    os.makedirs(target)
    tensors = {}
    with safe_open(os.path.join(source, "model.safetensors"), "pt") as file:
        for name in file.keys():
            weight = file.get_tensor(name)
            parts = name.split(".")
            if len(parts) < 2 or parts[-2] not in LINEARS or parts[-1] != "weight":
                tensors[name] = weight.half() if weight.dtype == torch.float32 else weight
                continue
            prefix = name[: -len(".weight")]
            codes, scales = round_to_codes(weight, bits, group_size)
            zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.int64)
            tensors[prefix + ".qweight"] = pack(codes.t().contiguous(), bits)
            tensors[prefix + ".qzeros"] = pack(zeros.t().contiguous(), bits).t().contiguous()
            tensors[prefix + ".scales"] = scales
            tensors[prefix + ".g_idx"] = (torch.arange(weight.shape[1]) // group_size).to(torch.int32)
    save_file(tensors, os.path.join(target, "model.safetensors"), {"format": "pt"})
    with open(os.path.join(source, "config.json")) as file:
        config = json.load(file)
    config["quantization_config"] = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": bits, "group_size": group_size,
                                     "sym": True, "desc_act": False}
    with open(os.path.join(target, "config.json"), "w") as file:
        json.dump(config, file, indent=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if os.path.exists(os.path.join(source, name)):
            shutil.copy(os.path.join(source, name), target)
