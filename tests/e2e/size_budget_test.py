"""Goal: a budget of bits per weight holds in every exported format, and bounds that nothing can keep to are refused before anything is
trained.  Method: refinery-task quantizes SmolLM2-135M at 5 bits a weight, killed when the widths are measured and resumed, as on another
worker; the bytes are counted in the header of its file, which holds what GPTQ folders hold. The small recipe is run with that budget and three
formats, whose manifests say what was written, and with budgets and a memory bound that are too low.

  python3 size_budget_test.py FOLDER_OF_BINARIES
"""

import glob
import json
import os
import signal
import struct
import sys
import tempfile

import killed_quantize_test
import programs

BITS = 5
WEIGHTS = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)  # of SmolLM2-135M's linear layers


def check_size(binaries, folder):
    task = killed_quantize_test.Task(binaries, folder)
    task.spec["quantize"] = {"gptq": dict(killed_quantize_test.GPTQ, bitsBudget=BITS, widths=[4, 8])}
    first, second = os.path.join(folder, "checkpoints-0"), os.path.join(folder, "checkpoints-1")
    killed = task.quantize("killed", first)
    programs.Programs.wait_for(lambda: os.path.isdir(os.path.join(first, "modules-0")), 120, "measured widths")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert task.quantize("quantized", second, os.path.join(first, "modules-0")).wait() == 0, task.text()
    assert "mixed_bits" not in task.text(), "the widths were measured again"
    with open(os.path.join(task.outputs, "quantized.safetensors"), "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    size = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items() if not name.endswith(".g_idx"))
    # qweight is [in * bits / 32, out] and g_idx [in].
    found = {name[:-8]: 32 * entry["shape"][0] // header[name[:-8] + ".g_idx"]["shape"][0]
             for name, entry in header.items() if name.endswith(".qweight")}
    bits = 8 * size / WEIGHTS
    print(f"{bits:.3f} bits a weight of {BITS}; {sum(width == 8 for width in found.values())} of {len(found)} layers have 8", flush=True)
    assert 0.95 * BITS < bits <= BITS, bits
    assert set(found.values()) == {4, 8}, found
    for layer in range(30):
        of = {name.split(".")[-1]: width for name, width in found.items() if name.startswith(f"model.layers.{layer}.")}
        assert of["q_proj"] == of["k_proj"] == of["v_proj"] and of["gate_proj"] == of["up_proj"], of


def check_job(binaries, folder):
    more = "export: {formats: [gptq, gguf, compressed_tensors], gguf: {head: q8_0}}\n"
    run = programs.run_recipe(binaries, folder, programs.small_recipe(folder, f"bits_budget: {BITS},", more))
    assert run.returncode == 0, run.stderr
    # 4.5 bits a weight on average take the rate of 4 bits; SmolLM2's head is its embeddings.
    for note in ("recover_learning_rate: the peak is 0.0025", "gguf_head_tied: export.gguf.head has no effect"):
        assert note in run.stderr, run.stderr
    artifact, = glob.glob(os.path.join(folder, "state", "result", "*", "artifact"))
    bits = {}
    for name in ("gptq", "gguf", "compressed_tensors"):
        with open(os.path.join(artifact, name, "manifest.json")) as file:
            stored = json.load(file)["bytes"]
        bits[name] = 16 * stored["linear"] / stored["linear_bf16"]
    print(", ".join(f"{name} {value:.3f}" for name, value in bits.items()), f"bits a weight of {BITS}", flush=True)
    assert 0.95 * BITS < max(bits.values()) <= BITS, bits
    with open(os.path.join(artifact, "gptq", "config.json")) as file:
        config = json.load(file)["quantization_config"]
    widths = config["meta"]["bits_by_module"].values()
    assert config["bits"] == 4 and set(widths) == {4, 8} and len(widths) == 210, config
    assert config["meta"]["budget"] == {"bits_per_weight": BITS, "formats": ["gptq", "gguf", "compressed_tensors"], "widths": [4, 8]}, config


def check_refused(binaries, folder, gptq, more, words):
    refused = programs.run_recipe(binaries, folder, programs.small_recipe(folder, gptq, more))
    said = refused.stdout + refused.stderr
    assert refused.returncode == 2, (refused.returncode, said)
    assert words in said and "train/" not in said, said
    print(f"{gptq} refused", flush=True)


def main():
    programs.need_model()
    with tempfile.TemporaryDirectory() as folder:
        # 4 bits, and of every group of 64 a scale of 16 bits and a zero point of 4: 4.3125.
        check_refused(sys.argv[1], folder, "bits_budget: 4.3,", "export: {formats: [gptq, compressed_tensors]}\n", "4.313 bits a weight")
        # A block of GGUF has its own scale for 32 weights: 4.5.
        check_refused(sys.argv[1], folder, "bits_budget: 4.4,", "export: {formats: [gptq, gguf]}\n", "4.5 bits a weight")
        check_refused(sys.argv[1], folder, "bits_budget: 5, order: classic,", "export: {formats: [gptq, gguf]}\n", "a permuted g_idx every layer")
        check_refused(sys.argv[1], folder, "memory_mib: 100,", "", "memory_mib")
    for check in (check_size, check_job):
        with tempfile.TemporaryDirectory() as folder:
            check(sys.argv[1], folder)
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
