"""Refinery's own run of a model beside transformers', peft's and gptqmodel's run of the same files.

  python compare.py REFINERY_TASK WORK

WORK/state holds a finished job (`refinery run --state WORK/state`). Prints a row per comparison: what, figure, bound; the
last line is "N passed, N failed", and the exit code is 1 when one failed.
"""

import glob
import json
import os
import subprocess
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

PROMPTS = [
    "Question: What do plants need to grow?\nAnswer:",
    "The capital of France is",
    "Once upon a time there was a",
    "Water freezes when",
    "def fibonacci(n):",
]
NEW_TOKENS = 64
rows = []


def check(what, figure, bound, passed):
    rows.append(passed)
    print(f"{'pass' if passed else 'FAIL'}  {what:<60} {figure:<24} bound {bound}", flush=True)


def inspect(task, work, name, model, dtype, adapter=None):
    """Greedy tokens and prompt logits as refinery-task gives them."""
    out = os.path.join(work, "inspect-" + name)
    prompts = os.path.join(work, "prompts.json")
    with open(prompts, "w") as f:
        json.dump(PROMPTS, f)
    command = [task, "inspect", "--model", model, "--dtype", dtype, "--prompts", prompts, "--output", out,
               "--max-new-tokens", str(NEW_TOKENS)]
    if adapter:
        command += ["--adapter", adapter]
    subprocess.run(command, check=True)
    with open(os.path.join(out, "tokens.json")) as f:
        tokens = json.load(f)
    return tokens["prompts"], tokens["greedy"], load_file(os.path.join(out, "logits.safetensors"))


def exact_weights(model, folder):
    """Puts plain linear layers with the artifact's own weights, (code - zero) x scale in float32, in the place of gptqmodel's."""
    tensors = {}
    for file in glob.glob(os.path.join(folder, "*.safetensors")):
        tensors.update(load_file(file))
    shifts = torch.arange(0, 32, 4)  # 4 bits, eight in a word
    for name, module in list(model.named_modules()):
        if name + ".qweight" not in tensors:
            continue
        qweight, qzeros = tensors[name + ".qweight"], tensors[name + ".qzeros"]
        codes = (qweight.unsqueeze(1) >> shifts.view(1, -1, 1) & 15).flatten(0, 1)            # [in, out]
        zeros = (qzeros.unsqueeze(2) >> shifts & 15).flatten(1, 2) + 1                        # [groups, out]; v1 stores one less
        group = tensors[name + ".g_idx"].long()
        weight = (codes - zeros[group]).float() * tensors[name + ".scales"].float()[group]
        linear = torch.nn.Linear(*weight.shape, bias=name + ".bias" in tensors, dtype=torch.float32)
        linear.weight.data = weight.t().contiguous()
        if linear.bias is not None:
            linear.bias.data = tensors[name + ".bias"].float()
        model.set_submodule(name, linear)
    return model


def tie(model, prompt, ours, theirs, bound):
    """Whether the first difference of two greedy texts is a near-tie: the peer's own margin is within the logits' bound."""
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
    logits = model(torch.tensor([prompt + theirs[:at]])).logits[0, -1].float()
    return ((logits[theirs[at]] - logits[ours[at]]) / (logits.max() - logits.min())).item() < bound


@torch.inference_mode()
def compare(name, model, prompts, greedy, logits, bound, exact=None):
    """bound: on the greatest difference of logits, relative to the range of the peer's logits. exact: for peers that
    round to 16 bits, the logits of the same weights without. Two such runs each lie some way off those, how far depends on the
    model and the prompt; so ours may be at most twice as far off as the peer's, and greedy texts may part at a near-tie, where
    the peer's margin is within bound. Returns the peer's logits."""
    worst = 0.0
    square = 0.0
    same = 0
    off = {"ours": 0.0, "peer": 0.0}
    found = []
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        theirs = model(ids).logits[0].float()
        found.append(theirs)
        ours = logits[f"logits.{i}"]
        difference = (ours - theirs) / (theirs.max() - theirs.min())
        if exact is not None:
            size = exact[i].max() - exact[i].min()
            for who, some in (("ours", ours), ("peer", theirs)):
                off[who] = max(off[who], ((some - exact[i]) / size).abs().max().item())
        worst = max(worst, difference.abs().max().item())
        square = max(square, difference.square().mean().sqrt().item())
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True,
                             eos_token_id=None, pad_token_id=0, repetition_penalty=1.0)
        text = out[0, len(prompt):].tolist()
        same += text == greedy[i] or (exact is not None and tie(model, prompt, greedy[i], text, bound))
    if exact is None:
        check(f"{name}: logits, greatest difference / range", f"{worst:.2e} (rms {square:.1e})", f"{bound:.0e}", worst < bound)
    else:
        print(f"----  {name}: greatest difference to the peer's / range {worst:.2e} (rms {square:.1e})")
        check(f"{name}: logits, greatest distance from the exact ones / range", f"{off['ours']:.2e}",
              f"2 x the peer's {off['peer']:.2e}", off["ours"] < 2 * off["peer"])
    check(f"{name}: greedy {NEW_TOKENS} tokens {'equal' if exact is None else 'equal up to near-ties'}", f"{same} of {len(prompts)}",
          f"{len(prompts)}", same == len(prompts))
    return found


def main():
    task, work = sys.argv[1:]
    torch.set_num_threads(2)
    result = glob.glob(os.path.join(work, "state", "result", "*"))[0]
    artifact = os.path.join(result, "artifact")
    gguf = os.path.expanduser("~/.cache/refinery/models/SmolLM2-135M-Instruct.Q4_1.gguf")
    for dtype, bound in (("float32", 1e-4),):
        prompts, greedy, logits = inspect(task, work, "base-" + dtype, gguf, dtype)
        with open(os.path.join(work, "inspect-base-" + dtype, "tokens.json")) as f:
            base = json.load(f)["model"]
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).eval()
        compare(f"imported GGUF, {dtype}, transformers", model, prompts, greedy, logits, bound)

    from peft import PeftModel
    adapter = os.path.join(artifact, "adapter")
    prompts, greedy, logits = inspect(task, work, "adapter", gguf, "float32", adapter)
    compare("adapter, float32, peft", PeftModel.from_pretrained(model, adapter).eval(), prompts, greedy, logits, 1e-3)

    gptq = os.path.join(artifact, "gptq")
    # gptqmodel's kernels dequantize in 16 bits, whatever the model's dtype: 4e-4 of the range is their rounding. So the exact
    # weights come first, where every token must agree; beside the kernels, texts may part where that rounding decides.
    exact = None
    for dtype, bound in (("float32", 1e-3), ("bfloat16", 2e-2)):
        prompts, greedy, logits = inspect(task, work, "gptq-" + dtype, gptq, dtype)
        model = AutoModelForCausalLM.from_pretrained(gptq, dtype=getattr(torch, dtype), device_map="cpu").eval()
        if exact is None:
            plain = exact_weights(AutoModelForCausalLM.from_pretrained(gptq, dtype=torch.float32, device_map="cpu"), gptq).eval()
            exact = compare("GPTQ artifact, float32, transformers with its exact weights", plain, prompts, greedy, logits, 1e-4)
        compare(f"GPTQ artifact, {dtype}, transformers + gptqmodel", model, prompts, greedy, logits, bound, exact)

    print(f"{sum(rows)} passed, {len(rows) - sum(rows)} failed")
    sys.exit(0 if all(rows) else 1)


if __name__ == "__main__":
    main()
