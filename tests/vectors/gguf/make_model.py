#!/usr/bin/env python3
"""Writes tiny.gguf, a random one-layer Llama of mixed tensor types, and tiny.json: what transformers loads from it.

Run:  python make_model.py   after ../tokenizer/make_vectors.py   (gguf 0.19.0, transformers 5.23.0, torch 2.11.0)

The weights are stored as llama.cpp's converter stores them (rows of Q and K interleaved). tiny.json holds, for each tensor of
transformers' own GGUF loader, the shape and the SHA-256 of its bytes after rounding from float32 to bf16, and its config.
"""
import hashlib
import json
import pathlib

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as T

HERE = pathlib.Path(__file__).parent
HIDDEN, HEADS, KV_HEADS, FFN = 64, 4, 2, 96


def interleave(weight, heads):
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def main():
    rng = np.random.default_rng(7)
    vocabulary = gguf.GGUFReader(HERE / "../tokenizer/smollm.gguf")
    field = lambda key: vocabulary.fields[key].contents()
    vocab = len(field("tokenizer.ggml.tokens"))
    head = HIDDEN // HEADS
    shapes = {
        "token_embd.weight": (vocab, HIDDEN, T.Q4_0), "output_norm.weight": (HIDDEN, 0, T.F32),
        "blk.0.attn_norm.weight": (HIDDEN, 0, T.F32), "blk.0.ffn_norm.weight": (HIDDEN, 0, T.F32),
        "blk.0.attn_q.weight": (HEADS * head, HIDDEN, T.Q4_1), "blk.0.attn_k.weight": (KV_HEADS * head, HIDDEN, T.Q8_0),
        "blk.0.attn_v.weight": (KV_HEADS * head, HIDDEN, T.F16), "blk.0.attn_output.weight": (HIDDEN, HEADS * head, T.Q5_0),
        "blk.0.ffn_gate.weight": (FFN, HIDDEN, T.Q5_1), "blk.0.ffn_up.weight": (FFN, HIDDEN, T.BF16),
        "blk.0.ffn_down.weight": (HIDDEN, FFN, T.Q4_0),
    }
    writer = gguf.GGUFWriter(HERE / "tiny.gguf", "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(field("tokenizer.ggml.tokens"))
    writer.add_token_types(field("tokenizer.ggml.token_type"))
    writer.add_token_merges(field("tokenizer.ggml.merges"))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(field("tokenizer.chat_template"))
    for name, (rows, columns, kind) in shapes.items():
        weight = rng.normal(0, 0.1, size=(rows, columns) if columns else (rows,)).astype(np.float32)
        if "norm" in name:
            weight += 1
        if "attn_q" in name or "attn_k" in name:
            weight = interleave(weight, HEADS if "attn_q" in name else KV_HEADS)
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = transformers.AutoModelForCausalLM.from_pretrained(HERE, gguf_file="tiny.gguf", dtype=torch.float32)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        bits = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        tensors[name] = {"shape": list(tensor.shape), "sha256": hashlib.sha256(bits).hexdigest()}
    config = {key: getattr(model.config, key) for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "model_type")}
    config["rope_theta"] = model.config.rope_parameters["rope_theta"]
    made_with = f"gguf 0.19.0, transformers {transformers.__version__}, torch {torch.__version__}"
    (HERE / "tiny.json").write_text(json.dumps({"made_with": made_with, "config": config, "tensors": tensors}, indent=1) + "\n")
    assert (HERE / "tiny.gguf").stat().st_size < 64 * 1024


if __name__ == "__main__":
    main()
