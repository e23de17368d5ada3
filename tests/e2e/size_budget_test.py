"""Goal: a budget of bits per weight holds in every exported format, and bounds that nothing can keep to are refused before anything is
trained.  Method: refinery-task quantizes SmolLM2-135M at 5 bits a weight, for GPTQ alone and for GPTQ and GGUF; the bytes are counted in
the header of its file, which holds what GPTQ folders hold, and for GGUF by the sizes of its blocks; the small recipe is run with budgets and
a memory bound that are too low.

  python3 size_budget_test.py FOLDER_OF_BINARIES
"""

import json
import os
import struct
import sys
import tempfile

import killed_quantize_test
import programs

BITS = 5
WEIGHTS = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)  # of SmolLM2-135M's linear layers


def check_size(binaries, folder, formats):
    task = killed_quantize_test.Task(binaries, folder)
    task.spec["quantize"] = {"gptq": dict(killed_quantize_test.GPTQ, bitsBudget=BITS, widths=[4, 8]), "formats": formats}
    assert task.quantize("quantized", "").wait() == 0, task.text()
    with open(os.path.join(task.outputs, "quantized.safetensors"), "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    size = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items() if not name.endswith(".g_idx"))
    # qweight is [in * bits / 32, out] and g_idx [in].
    found = {name[:-8]: 32 * entry["shape"][0] // header[name[:-8] + ".g_idx"]["shape"][0]
             for name, entry in header.items() if name.endswith(".qweight")}
    bits = {"gptq": 8 * size / WEIGHTS}
    weights = {name[:-7]: header[name[:-7] + ".g_idx"]["shape"][0] * entry["shape"][1]
               for name, entry in header.items() if name.endswith(".scales")}
    # Q4_0: 32 codes of 4 bits and a scale of 16; Q8_0 the same with 8.
    bits["gguf"] = sum(weights[name] * (width + 0.5) for name, width in found.items()) / WEIGHTS
    largest = max(bits[name] for name in formats)
    print(f"{formats}: {largest:.3f} bits a weight of {BITS}; {sum(width == 8 for width in found.values())} of {len(found)} layers have 8", flush=True)
    assert 0.95 * BITS < largest <= BITS, bits
    assert set(found.values()) == {4, 8}, found
    for layer in range(30):
        of = {name.split(".")[-1]: width for name, width in found.items() if name.startswith(f"model.layers.{layer}.")}
        assert of["q_proj"] == of["k_proj"] == of["v_proj"] and of["gate_proj"] == of["up_proj"], of


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
        check_refused(sys.argv[1], folder, "memory_mib: 100,", "", "memory_mib")
    for formats in (["gptq"], ["gptq", "gguf"]):
        with tempfile.TemporaryDirectory() as folder:
            check_size(sys.argv[1], folder, formats)
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
