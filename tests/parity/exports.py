"""Every export format, loaded by the programs that it is for: the same weights bit by bit, the same greedy text.

  python exports.py REFINERY_TASK EXPORT_PROBE [--only TEXT] [--all] [--keep FOLDER]

export_probe rounds a model to a grid (plain rounding: here the files matter, not the quality) and writes the folders; transformers
with gptqmodel, gptqmodel alone, transformers with compressed-tensors, gguf-py and llama-cpp-python read them. SmolLM2-135M is looked
for in ~/.cache/refinery/models (REFINERY_MODELS_DIR); its rows are skipped with a message where it is absent. The other models are
drawn here with fixed seeds. Prints a row per point; the last line is "N passed, N failed", and the exit code is 1 when one failed.

Bounds. Weights: equal as float32, or, where a peer computes them in 16 bits, equal to ours rounded once to its dtype; Q4_1's within
half a unit in the last place of its float16 minimum. Greedy text: equal up to near-ties, where the peer's own margin is within its
rounding (relative to the range of its logits): 1e-3 for transformers with gptqmodel, which dequantizes in 16 bits, 1e-4
for compressed-tensors in float32, 2e-2 for llama.cpp, which rounds activations to 8 bits.
"""

import argparse
import glob
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import gguf
import numpy
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

PROMPTS = ["Question: What do plants need to grow?\nAnswer:", "The capital of France is", "Once upon a time there was a",
           "def fibonacci(n):"]
NEW_TOKENS = 32
SMALL = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
TINY = {
    "Qwen2": ("Qwen2", dict(tie_word_embeddings=True), "qwen2"),
    "Qwen3": ("Qwen3", dict(head_dim=32, tie_word_embeddings=False), "qwen2"),
    "Llama": ("Llama", dict(attention_bias=True, tie_word_embeddings=False, rope_parameters=LLAMA3), "llama-bpe"),
}
PEERS = {"gptq": ("transformers", "gptqmodel"), "gptq_v2": ("transformers", "gptqmodel"), "compressed_tensors": ("transformers",),
         "gguf": ("llama.cpp",)}
# (model, flags of export_probe, formats); "gptqmodel" alone reads layers of several widths.
ALL = ("gptq", "gptq_v2", "compressed_tensors", "gguf")
CASES = [
    ("SmolLM2-135M", ["--bits", "4", "--group-size", "64"], ALL),
    *((name, ["--bits", "4", "--group-size", "32"], ALL) for name in TINY),
    ("Qwen2", ["--bits", "4", "--group-size", "16"], ("gguf",)),  # no block type: F16 weights
    ("Llama", ["--bits", "3", "--group-size", "32"], ("gguf",)),  # as 4 bits
]
# With --all: minutes each, for the peers expand every layer on the CPU.
MORE_CASES = [
    ("SmolLM2-135M", ["--bits", "4", "--group-size", "32", "--grid", "asymmetric"], ALL),
    ("SmolLM2-135M", ["--bits", "8", "--group-size", "64"], ALL),
    ("SmolLM2-135M", ["--bits", "4", "--group-size", "-1", "--grid", "symmetric", "--q8-embeddings"], ("compressed_tensors", "gguf")),
    ("SmolLM2-135M", ["--bits", "4", "--group-size", "64", "--mixed", "8"], ALL),
    ("SmolLM2-135M", ["--bits", "4", "--group-size", "64", "--mixed", "3"], ALL),
    ("SmolLM2-135M", ["--bits", "3", "--group-size", "64"], ("gptq", "gguf")),
    ("SmolLM2-135M", ["--bits", "2", "--group-size", "32"], ("gptq", "gguf")),
]
rows = []


def check(what, figure, bound, passed):
    rows.append(passed)
    print(f"{'pass' if passed else 'FAIL'}  {what:<92} {figure:<22} bound {bound}", flush=True)


def make_tokenizer(kind):
    """256 bytes, some merges, two special tokens; split as Qwen2 or Llama 3 do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    byte = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("t", "h"), ("i", "n"), ("e", "r"), ("a", "n"), ("Ġ", "t"), ("Ġ", "a"), ("th", "e"), ("Ġ", "the"), ("o", "n")]
    tokens = ["<|bos|>", "<|eos|>"] + byte + [a + b for a, b in pairs]
    model = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs, ignore_merges=kind == "llama-bpe")
    tokenizer = Tokenizer(model)
    digits = r"\p{N}{1,3}" if kind == "llama-bpe" else r"\p{N}"
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits +
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    from tokenizers import Regex
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>"])
    return tokenizer, len(tokens)


def make_model(name, folder):
    kind, changes, pre = TINY[name]
    tokenizer, size = make_tokenizer(pre)
    vocab = (size + 31) // 32 * 32
    config = getattr(transformers, kind + "Config")(**{**SMALL, **changes, "vocab_size": vocab})
    torch.manual_seed(sum(name.encode()))
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = next((s for part, s in (("norm", 0.2), ("bias", 0.3), ("embed", 1.0), ("lm_head", 0.5)) if part in key), 0.15)
            parameter.copy_(torch.randn_like(parameter) * spread + (1 if "norm" in key else 0))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}))
    return folder


def inspect(task, folder, work):
    out, prompts = work / "inspect", work / "prompts.json"
    prompts.write_text(json.dumps(PROMPTS))
    subprocess.run([task, "inspect", "--model", str(folder), "--dtype", "float32", "--prompts", str(prompts), "--output", str(out),
                    "--max-new-tokens", str(NEW_TOKENS)], check=True)
    tokens = json.loads((out / "tokens.json").read_text())
    return tokens["prompts"], tokens["greedy"], load_file(out / "logits.safetensors")


def compare_text(name, prompts, greedy, logits, generate, logits_after, bound):
    """generate(ids) -> the peer's greedy tokens; logits_after(ids) -> its logits of the last position. Counts texts equal up to
    near-ties."""
    same, ties, worst = 0, 0, 0.0
    for i, prompt in enumerate(prompts):
        first = logits_after(prompt)
        worst = max(worst, float((logits[f"logits.{i}"][-1] - first).abs().max() / (first.max() - first.min())))
        theirs = generate(prompt)
        if theirs == greedy[i]:
            same += 1
            continue
        at = next(n for n, (a, b) in enumerate(zip(greedy[i], theirs)) if a != b)
        parted = logits_after(prompt + theirs[:at])
        ties += float((parted[theirs[at]] - parted[greedy[i][at]]) / (parted.max() - parted.min())) < bound
    check(f"{name}: greedy {NEW_TOKENS} tokens equal up to near-ties", f"{same} + {ties} ties", f"{len(prompts)}", same + ties == len(prompts))
    print(f"----  {name}: first logits, greatest difference / range {worst:.1e}")


def same_weights(name, ours, theirs):
    """theirs: {module: weight}. In 16 bits, ours is rounded once to the same."""
    wrong = [m for m, w in theirs.items() if not torch.equal(w, ours[m].to(w.dtype))]
    dtypes = {str(w.dtype).removeprefix("torch.") for w in theirs.values()}
    check(f"{name}: weights bit by bit ({', '.join(sorted(dtypes))})", f"{len(theirs) - len(wrong)} of {len(theirs)}", f"{len(theirs)}",
          not wrong and len(theirs) > 0)


@torch.inference_mode()
def hf_logits(model, ids):
    return model(torch.tensor([ids])).logits[0, -1].float()


@torch.inference_mode()
def hf_generate(model, ids):
    prompt = torch.tensor([ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True,
                         eos_token_id=None, pad_token_id=0, repetition_penalty=1.0)
    return out[0, len(ids):].tolist()


def load_hf(peer, folder):
    if peer == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel
        return GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()


def linear_weights(model, names):
    found = {}
    for key, module in model.named_modules():
        if key not in names:
            continue
        if hasattr(module, "qweight"):  # gptqmodel's; it dequantizes to [in, out]
            found[key] = module.dequantize_weight().t().contiguous()
        else:
            found[key] = module.weight.data
    return found


def read_gguf(path, config, names):
    """Dequantized by gguf-py, rows of Q and K put back: {module: weight}, and the half ulp of what was rounded: minimums of Q4_1, F16 weights."""
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    reader = gguf.GGUFReader(path)
    llama = bytes(reader.fields["general.architecture"].parts[-1]) == b"llama"
    weights, slack = {}, {}
    for tensor in reader.tensors:
        pieces = tensor.name.split(".")
        if pieces[0] != "blk" or pieces[2] not in parts or pieces[3] != "weight":
            continue
        module = f"model.layers.{pieces[1]}.{parts[pieces[2]]}"
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        half = torch.zeros(1)
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            blocks = tensor.data.reshape(value.shape[0], -1, 20)
            minimum = torch.from_numpy(blocks[:, :, 2:4].copy().view(numpy.float16).astype(numpy.float32)).abs()
            half = (minimum.squeeze(-1) * 2.0**-11 + 2.0**-25).repeat_interleave(32, dim=1)
        if tensor.tensor_type == gguf.GGMLQuantizationType.F16:
            half = value.abs() * 2.0**-11 + 2.0**-25
        if llama and pieces[2] in ("attn_q", "attn_k"):
            heads = config["num_attention_heads"] if pieces[2] == "attn_q" else config["num_key_value_heads"]
            restore = lambda t: t.view(heads, -1, 2, t.shape[1]).transpose(1, 2).reshape(t.shape)
            value, half = restore(value), restore(half) if half.numel() > 1 else half
        if module in names:
            weights[module], slack[module] = value, half
    return weights, slack


def check_gguf(name, folder, config, ours):
    import llama_cpp
    path = str(folder / "model.gguf")
    theirs, slack = read_gguf(path, config, ours)
    exact = [m for m in theirs if torch.equal(theirs[m], ours[m])]
    within = [m for m in theirs if bool(((theirs[m] - ours[m]).abs() <= slack[m]).all())]
    rounded = any(half.numel() > 1 for half in slack.values())
    good = within if rounded else exact
    check(f"{name}, gguf-py: weights {'within half an ulp' if rounded else 'bit by bit'}", f"{len(good)} of {len(ours)}", f"{len(ours)}",
          len(good) == len(ours))
    return llama_cpp.Llama(path, n_ctx=256, n_threads=2, logits_all=True, verbose=False)


def check_llama(name, llama, prompts, greedy, logits):
    ids = [llama.tokenize(p.encode(), add_bos=True, special=True) for p in PROMPTS]
    # add_bos: llama.cpp adds it only where the file says so.
    check(f"{name}, llama.cpp: token ids of the prompts", f"{sum(a == b for a, b in zip(ids, prompts))} of {len(prompts)}", f"{len(prompts)}",
          ids == prompts)

    def last(tokens):
        llama.reset()
        llama.eval(tokens)
        return torch.from_numpy(llama.scores[len(tokens) - 1].copy())

    def generate(tokens):
        text = [int(last(tokens).argmax())]
        while len(text) < NEW_TOKENS:
            llama.eval([text[-1]])
            text.append(int(llama.scores[len(tokens) + len(text) - 2].argmax()))
        return text
    compare_text(f"{name}, llama.cpp", prompts, greedy, logits, generate, last, 2e-2)


def run_case(task, probe, model, name, flags, formats, work):
    out = work / "out"
    written = list(dict.fromkeys(("gptq",) + formats))  # ours are read from the gptq folder
    lines = subprocess.run([probe, str(model), str(out), *flags, "--formats", ",".join(written), "--weights"], check=True, capture_output=True,
                           text=True).stdout
    for line in lines.splitlines():
        form, ratio = line.split()[0], float(line.split()[-1])
        if form in formats and flags[:4] == ["--bits", "4", "--group-size", "64"] and len(flags) == 4:
            # Q4_0 repeats a scale every 32 weights: 4.5 bits, whatever the group size.
            bound = 0.28125 if form == "gguf" else 0.28
            check(f"{name}, {form}: bytes of linear layers / bfloat16", f"{ratio:.4f}", f"{bound}", ratio <= bound + 1e-4)
    ours = load_file(out / "weights.safetensors")
    config = json.loads((pathlib.Path(model) / "config.json").read_text())
    prompts, greedy, logits = inspect(task, out / "gptq", work)
    mixed = "--mixed" in flags
    for form in formats:
        if form == "gguf":
            llama = check_gguf(f"{name}, {form}", out / form, config, ours)
            check_llama(f"{name}, {form}", llama, prompts, greedy, logits)
            continue
        for peer in PEERS[form]:
            # Layers of several widths: optimum reads no "dynamic", gptqmodel itself does; it knows 16 bits only.
            if form.startswith("gptq") and mixed != (peer == "gptqmodel"):
                continue
            label = f"{name}, {form}, {peer}" + (" + compressed-tensors" if form == "compressed_tensors" else " + gptqmodel" if peer == "transformers" else "")
            loaded = load_hf(peer, out / form)
            hf_logits(loaded, prompts[0])  # some peers unpack at the first use
            same_weights(label, ours, linear_weights(loaded, ours))
            if peer == "gptqmodel":
                continue  # alone it computes in 16 bits, which takes a CPU minutes a text
            bound = 1e-4 if form == "compressed_tensors" else 1e-3
            compare_text(label, prompts, greedy, logits, lambda ids: hf_generate(loaded, ids), lambda ids: hf_logits(loaded, ids), bound)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("probe")
    parser.add_argument("--only", default="")
    parser.add_argument("--all", action="store_true", help="every setting, not only 4 bits with groups of 64")
    parser.add_argument("--keep")
    args = parser.parse_args()
    torch.set_num_threads(2)
    store = pathlib.Path(os.environ.get("REFINERY_MODELS_DIR", os.path.expanduser("~/.cache/refinery/models")))
    smollm = next((p for p in sorted(store.glob("*-v1")) if json.loads((p / "config.json").read_text())["hidden_size"] == 576), None)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(args.keep or folder)
        work.mkdir(parents=True, exist_ok=True)
        models = {}
        for number, (name, flags, formats) in enumerate(CASES + (MORE_CASES if args.all else [])):
            label = name + " " + " ".join(f.removeprefix("--") for f in flags)
            if args.only not in label:
                continue
            if name == "SmolLM2-135M":
                if smollm is None:
                    print(f"skip  {label}: the model is not in {store}")
                    continue
                models[name] = smollm
            elif name not in models:
                models[name] = make_model(name, work / f"model-{name}")
            case = work / f"case-{number}"
            case.mkdir(exist_ok=True)
            run_case(args.task, args.probe, models[name], label, flags, formats, case)
            if not args.keep:
                subprocess.run(["rm", "-r", str(case)], check=True)
    print(f"{sum(rows)} passed, {len(rows) - sum(rows)} failed")
    sys.exit(0 if all(rows) else 1)


if __name__ == "__main__":
    main()
