"""Oracles for tests/worker/task/model and generate: tiny random models run by transformers in float32 on the CPU.

Writes one <name>.json per model: config.json as transformers saves it, the seed of the weights, the packed sequences, and
what transformers answered: logits at chosen positions, log-sum-exp everywhere, and greedy continuations.

The weights are not stored: both sides draw them from the same generator, a 64-bit linear congruential generator whose state
starts from FNV-1a of "<seed>/<tensor name>" (see Weights below and tests/support of the reader). A value is
(uniform in [-1, 1)) * amplitude, rounded to bfloat16 so that a bf16 model holds exactly the same numbers; the weights of norms
are 1 + value.

Made with torch 2.11.0 and the transformers named in each file:  python make_vectors.py
"""

import json
import pathlib

import torch
import transformers
from transformers import (LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM)

HERE = pathlib.Path(__file__).parent
SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2, bos_token_id=1, rms_norm_eps=1e-5)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
LINEAR = dict(rope_type="linear", rope_theta=5000.0, factor=2.0)
# Beyond 16 positions: the long sequence by its length, the greedy texts step by step.
DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=3.0)
YARN_MSCALE = dict(rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=32, mscale=0.8,
                   mscale_all_dim=0.5, truncate=False, beta_fast=16.0, beta_slow=2.0)
YARN_ATTENTION = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64,
                      attention_factor=1.25)


def sized(**changes):
    return {**SIZES, **changes}


# The order gives the seeds: add at the end. The names stand in tiny_models.h, too.
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama_llama3_bias": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True,
                                                        head_dim=16)),
    "llama_linear": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LINEAR)),
    "mistral_window": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=6)),
    "qwen2_yarn": (Qwen2ForCausalLM, Qwen2Config(**SIZES, rope_parameters=YARN, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "llama_dynamic": (LlamaForCausalLM, LlamaConfig(**sized(max_position_embeddings=16), rope_parameters=DYNAMIC)),
    "mistral_null_yarn": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None, rope_parameters=YARN_ATTENTION)),
    "qwen3_yarn_mscale": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16, rope_parameters=YARN_MSCALE,
                                                        tie_word_embeddings=True, attention_bias=True)),
    "qwen2_window": (Qwen2ForCausalLM, Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=0)),
    "qwen2_mixed_window": (Qwen2ForCausalLM, Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5,
                                                         max_window_layers=1)),
    "qwen3_mixed_window": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16, use_sliding_window=True, sliding_window=7,
                                                         layer_types=["sliding_attention", "full_attention"])),
}
SEQUENCES = [[1, 5, 9, 33, 60, 2, 17, 8, 8, 40, 3, 21], [1, 7], [4, 4, 50, 12, 30, 31, 32, 33, 34, 35, 36, 37]]
LONG = [(7 * i * i + 3 * i + 1) % 61 for i in range(48)]


def weights(seed: int, name: str, shape: torch.Size) -> torch.Tensor:
    state = 0xCBF29CE484222325
    for byte in f"{seed}/{name}".encode():
        state = ((state ^ byte) * 0x100000001B3) % 2**64
    values = []
    for _ in range(shape.numel()):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        values.append((state >> 40) / 2**23 - 1)
    norm = "norm" in name
    amplitude = 0.2 if norm or name.endswith("bias") else 1.0 if "embed" in name else 0.35
    value = torch.tensor(values, dtype=torch.float64).view(shape) * amplitude + (1 if norm else 0)
    return value.to(torch.bfloat16).float()


def main() -> None:
    torch.set_num_threads(1)
    for seed, (name, (cls, config)) in enumerate(MODELS.items()):
        config.architectures = [cls.__name__]
        model = cls(config).eval().float()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(weights(seed, key, parameter.shape))
            answers = []
            for sequence in SEQUENCES + [LONG]:
                logits = model(torch.tensor([sequence])).logits[0].double()
                answers.append({
                    "ids": sequence,
                    "last_logits": [round(x, 6) for x in logits[-1].tolist()],
                    "log_sum_exp": [round(x, 6) for x in logits.logsumexp(-1).tolist()],
                    "first_logit": [round(x, 6) for x in logits[:, 0].tolist()],
                })
            greedy = []
            for sequence in SEQUENCES:
                out = model.generate(torch.tensor([sequence]), max_new_tokens=24, do_sample=False, eos_token_id=[],
                                     pad_token_id=0)
                greedy.append(out[0, len(sequence):].tolist())
        record = {"made_by": f"make_vectors.py, transformers {transformers.__version__}, torch {torch.__version__}",
                  "seed": seed, "config": config.to_diff_dict(), "answers": answers, "greedy": greedy}
        (HERE / f"{name}.json").write_text(json.dumps(record, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
