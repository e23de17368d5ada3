"""Float32 logits and greedy texts of every model family and rotary scaling, beside transformers on the same folders.

  python families.py REFINERY_TASK [--only NAME] [--keep FOLDER]

Tiny models are drawn here with fixed seeds and saved as transformers saves them. Real models (GGUF files that Refinery imports;
transformers then reads the imported folder) are looked for in ~/.cache/refinery/models, or REFINERY_MODELS; rows of those
that are absent are skipped with a message. Prints a row per point: what, figure, bound; the last line is "N passed, N
failed", and the exit code is 1 when one failed.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import torch
import transformers
from safetensors.torch import load_file

BOUND = 1e-4      # greatest difference of logits, relative to the range of the peer's
POSITIONS = 64
NEW_TOKENS = 64
VOCAB = 512
SIZES = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=144, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
REAL = {"SmolLM2-135M": "SmolLM2-135M-Instruct.Q4_1.gguf", "Qwen2.5-Coder-0.5B": "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"}


def rope(kind, theta=10000.0, **fields):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **fields))


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
# name: class prefix, changes to SIZES; options: "shards", "spelling" of the config (see respell), "logits_only" and why.
TINY = {
    "Llama 2": ("Llama", dict(num_key_value_heads=4)),
    "Llama 3, in shards": ("Llama", rope("default", 500000.0), dict(shards="64KB")),
    "Llama 3.1, head_dim 24": ("Llama", dict(head_dim=24, **rope("llama3", 500000.0, **LLAMA3))),
    "Llama 3.2, tied": ("Llama", dict(tie_word_embeddings=True, **rope("llama3", 500000.0, **{**LLAMA3, "factor": 32.0}))),
    "Llama with biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "SmolLM2": ("Llama", dict(num_attention_heads=9, num_key_value_heads=3, hidden_size=72, tie_word_embeddings=True,
                              **rope("default", 100000.0))),
    "linear": ("Llama", rope("linear", factor=2.5), dict(spelling="rope_type")),
    "linear, spelled 'type'": ("Llama", rope("linear", factor=4.0), dict(spelling="type")),
    "dynamic": ("Llama", rope("dynamic", factor=2.0)),
    "dynamic beyond max_position": ("Llama", dict(max_position_embeddings=24, **rope("dynamic", factor=4.0)),
                                    dict(logits_only="the engine ends texts at max_position_embeddings")),
    "yarn": ("Qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "yarn, attention_factor": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.3)),
    "yarn, mscale": ("Llama", rope("yarn", factor=8.0, original_max_position_embeddings=32, mscale=0.707, mscale_all_dim=0.5)),
    "yarn, betas, not truncated": ("Qwen3", dict(head_dim=16, **rope("yarn", factor=16.0, original_max_position_embeddings=16,
                                                                     beta_fast=8.0, beta_slow=0.5, truncate=False))),
    "yarn, factor null": ("Llama", rope("yarn", factor=None, original_max_position_embeddings=64)),
    "Mistral, window": ("Mistral", dict(sliding_window=24, num_key_value_heads=1)),
    "Mistral, window null": ("Mistral", dict(sliding_window=None, head_dim=32)),
    "Qwen2": ("Qwen2", rope("default", 1000000.0)),
    "Qwen2.5, tied": ("Qwen2", dict(tie_word_embeddings=True, **rope("default", 1000000.0)), dict(shards="40KB")),
    "Qwen2, window on every layer": ("Qwen2", dict(use_sliding_window=True, sliding_window=20, max_window_layers=0)),
    "Qwen2, window from layer 1": ("Qwen2", dict(use_sliding_window=True, sliding_window=20, max_window_layers=1)),
    "Qwen3": ("Qwen3", dict(head_dim=32, tie_word_embeddings=True, **rope("default", 1000000.0))),
    "Qwen3, biases, untied": ("Qwen3", dict(head_dim=16, attention_bias=True)),
}
TEXTS = ["The history of the lighthouse begins with a fire on a hill. Sailors needed a sign that could be seen from far away, and "
         "towns along the coast paid for wood, oil and the people who kept watch through the night. Later came mirrors and lenses, "
         "which threw a narrow beam much farther than any open flame could ever reach.",
         "def quicksort(items):\n    if len(items) < 2:\n        return items\n    pivot = items[len(items) // 2]\n    smaller = [x for x "
         "in items if x < pivot]\n    equal = [x for x in items if x == pivot]\n    larger = [x for x in items if x > pivot]\n    return "
         "quicksort(smaller) + equal + quicksort(larger)\n",
         "Zwei Dinge erfüllen das Gemüt mit Bewunderung: der bestirnte Himmel über mir und das moralische Gesetz in mir. 数学是科学的皇后。 "
         "1 + 2 + 3 + 4 = 10, and 3.14159 is close to pi; prices rose by 12.5 % in 2019 (see table 4)."]
STARTS = ["The capital of France is", "Water freezes when", "def fibonacci(n):", "Once upon a time there was a", "The three laws of robotics",
          "Question: What do plants need to grow?\nAnswer:", "import numpy as np\n", "Dear Sir or Madam,", "A recipe for pancakes:\n1.",
          "SELECT name FROM users WHERE", "In 1969, humans first", "The opposite of hot is", "#include <vector>\n", "La tour Eiffel",
          "My favourite book is", "Roses are red,", "The quick brown fox", "for i in range(10):", "Photosynthesis is the process",
          "To be, or not to be"]

results = []


def row(name, what, figure, bound, passed):
    results.append(passed)
    print(f"{'PASS' if passed else 'FAIL'}  {name + ': ' + what:<82} {figure:<8} bound {bound}", flush=True)


def respell(folder, spelling):
    """config.json as transformers 4 wrote it, with the older or the newer name of the type."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    scaling[spelling] = scaling.pop("rope_type")
    config["rope_scaling"] = scaling
    path.write_text(json.dumps(config))


def make(name, folder):
    kind, changes, options = (*TINY[name], {})[:3]
    config = getattr(transformers, kind + "Config")(**{**SIZES, **changes})
    torch.manual_seed(sum(name.encode()))
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = {"norm": 0.2, "bias": 0.3, "embed": 1.0}.get(next((p for p in ("norm", "bias", "embed") if p in key), ""),
                                                                  1.2 / parameter.shape[-1] ** 0.5)
            parameter.copy_(torch.randn_like(parameter) * spread + (1 if "norm" in key else 0))
    model.save_pretrained(folder, **({"max_shard_size": options["shards"]} if "shards" in options else {}))
    if "spelling" in options:
        respell(folder, options["spelling"])
    assert ("shards" in options) == (folder / "model.safetensors.index.json").exists()
    words = tokenizers_file()
    (folder / "tokenizer.json").write_text(words)
    return options


def tokenizers_file():
    from tokenizers import Tokenizer, models
    return Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")).to_str()


def inspect(task, model, prompts, new_tokens, work, adapters=()):
    """Refinery's prompts as ids, greedy texts, logits per prompt, and the folder that it read."""
    (work / "prompts.json").write_text(json.dumps(prompts))
    out = work / "out"
    command = [task, "inspect", "--model", str(model), "--dtype", "float32", "--prompts", str(work / "prompts.json"), "--output",
               str(out), "--max-new-tokens", str(new_tokens)]
    if pathlib.Path(model).is_dir():
        command += ["--cache", str(work / "cache")]
    for adapter in adapters:
        command += ["--adapter", str(adapter)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    tokens = json.loads((out / "tokens.json").read_text())
    return tokens["prompts"], tokens["greedy"], load_file(out / "logits.safetensors"), tokens["model"]


@torch.inference_mode()
def compare_logits(name, model, prompts, logits):
    worst = 0.0
    for i, prompt in enumerate(prompts):
        assert len(prompt) >= POSITIONS, (name, len(prompt))
        theirs = model(torch.tensor([prompt])).logits[0, :POSITIONS]
        ours = logits[f"logits.{i}"][:POSITIONS]
        worst = max(worst, ((ours - theirs).abs().max() / (theirs.max() - theirs.min())).item())
    row(name, f"logits, {len(prompts)} x {POSITIONS}, difference / range", f"{worst:.1e}", f"{BOUND:.0e}", worst < BOUND)


@torch.inference_mode()
def greedy_text(model, prompt):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True,
                         eos_token_id=None, pad_token_id=0, repetition_penalty=1.0)
    return out[0, len(prompt):].tolist()


@torch.inference_mode()
def chooses(model, prompt, text):
    """Whether the peer's most likely token after the prompt and each prefix of `text` is the next one of `text`: then, by
    induction, `text` is its greedy text. One forward pass instead of one per token."""
    logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1:-1]
    return logits.argmax(-1).tolist() == text


def compare_texts(name, model, prompts, greedy, generated):
    """The first `generated` texts against the peer's generate (with its KV cache), all against the choices of forward passes."""
    assert all(len(text) == NEW_TOKENS for text in greedy), name
    chosen = sum(chooses(model, prompt, text) for prompt, text in zip(prompts, greedy))
    same = sum(greedy_text(model, prompt) == text for prompt, text in list(zip(prompts, greedy))[:generated])
    row(name, f"greedy, {generated} x {NEW_TOKENS} tokens as generate() gives", f"{same}", f"{generated}", same == generated)
    row(name, f"greedy, {len(prompts)} x {NEW_TOKENS} tokens as forward passes choose", f"{chosen}", f"{len(prompts)}",
        chosen == len(prompts))


def compare(name, task, source, long_prompts, prompts, work, generated, logits_only=None, adapters=()):
    count = len(long_prompts)
    everything = long_prompts if logits_only else long_prompts + prompts
    ids, greedy, logits, folder = inspect(task, source, everything, 0 if logits_only else NEW_TOKENS, work, adapters)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapters:
        model = stacked(model, adapters)
    compare_logits(name, model, ids[:count], logits)
    if logits_only:
        print(f"----  {name}: no greedy texts: {logits_only}")
    else:
        compare_texts(name, model, ids[count:], greedy[count:], generated)


def make_adapters(base, work):
    """Two adapters as PEFT saves them: one with ranks and alphas by module, one rank-stabilized."""
    from peft import LoraConfig, get_peft_model
    configs = [LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], rank_pattern={"up_proj": 2},
                          alpha_pattern={"layers.1.self_attn.q_proj": 9, "v_proj": 3}),
               LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "k_proj", "o_proj", "gate_proj"])]
    folders = []
    for number, config in enumerate(configs):
        model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        torch.manual_seed(number)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn_like(parameter) * 0.15)
        folders.append(work / f"adapter-{number}")
        model.save_pretrained(folders[-1])
    return folders


def stacked(model, adapters):
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
    names = ["a0"]
    for number, folder in enumerate(adapters[1:], 1):
        model.load_adapter(folder, adapter_name=f"a{number}")
        names.append(f"a{number}")
    model.base_model.set_adapter(names)
    return model.eval()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--generate-all", action="store_true", help="generate() for every prompt of the real models (minutes)")
    parser.add_argument("--keep", help="folder for the tiny models instead of a temporary one")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started = time.monotonic()
    generator = torch.Generator().manual_seed(11)
    draw = lambda length: torch.randint(3, VOCAB, (length,), generator=generator).tolist()
    long_prompts = [draw(POSITIONS) for _ in range(3)]
    prompts = [draw(4 + i) for i in range(20)]
    with tempfile.TemporaryDirectory() as temporary:
        work = pathlib.Path(arguments.keep or temporary)
        for number, name in enumerate(TINY):
            if arguments.only and arguments.only not in name:
                continue
            folder = work / f"tiny-{number}"
            options = make(name, folder)
            compare(name, arguments.task, folder, long_prompts, prompts, work, 5, options.get("logits_only"))
        if not arguments.only or arguments.only in "peft, patterns, stacked":
            make("Llama 2", work / "base")
            adapters = make_adapters(work / "base", work)
            compare("peft, rank and alpha patterns", arguments.task, work / "base", long_prompts, prompts, work, 5, adapters=adapters[:1])
            compare("peft, two adapters stacked", arguments.task, work / "base", long_prompts, prompts, work, 5, adapters=adapters)
        models = pathlib.Path(os.environ.get("REFINERY_MODELS", pathlib.Path.home() / ".cache/refinery/models"))
        for name, file in REAL.items():
            if arguments.only and arguments.only not in name:
                continue
            if not (models / file).exists():
                print(f"----  {name}: skipped, {models / file} is absent")
                continue
            compare(name, arguments.task, models / file, TEXTS, STARTS, work, 20 if arguments.generate_all else 4)
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed ({time.monotonic() - started:.0f} s)")
    sys.exit(0 if results and all(results) else 1)


if __name__ == "__main__":
    main()
