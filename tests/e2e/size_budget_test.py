"""Goal: a budget of bits per weight holds in the files that are delivered, and bounds that nothing can keep to are refused before anything is
trained.  Method: the small recipe at 5 bits a weight, in three formats; the bytes are counted in the headers of the files.

  python3 size_budget_test.py FOLDER_OF_BINARIES
"""

import glob
import json
import math
import os
import struct
import sys
import tempfile

import programs

BITS = 5


def tensors(folder):
    """Name to (shape, bytes) of a safetensors folder."""
    found = {}
    for path in glob.glob(os.path.join(folder, "*.safetensors")):
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = (entry["shape"], entry["data_offsets"][1] - entry["data_offsets"][0])
    return found


def linear_weights(config):
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // heads
    return config["num_hidden_layers"] * (2 * hidden * heads * head + 2 * hidden * keys * head + 3 * hidden * wide)


def check_sizes(artifact):
    for name, parts in (("gptq", (".qweight", ".qzeros", ".scales")), ("compressed_tensors", (".weight_packed", ".weight_scale"))):
        folder = os.path.join(artifact, name)
        with open(os.path.join(folder, "config.json")) as file:
            config = json.load(file)
        size = sum(size for tensor, (_, size) in tensors(folder).items() if tensor.endswith(parts))
        bits = 8 * size / linear_weights(config)
        print(f"{name}: {bits:.3f} bits a weight of {BITS}", flush=True)
        assert 0.9 * BITS < bits <= BITS, bits
        assert '"bits": 8' in json.dumps(config["quantization_config"]) or '"num_bits": 8' in json.dumps(config["quantization_config"]), config


def check_refused(binaries, folder, gptq, more, words):
    refused = programs.run_recipe(binaries, folder, programs.small_recipe(folder, gptq, more))
    said = refused.stdout + refused.stderr
    assert refused.returncode == 2, (refused.returncode, said)
    assert words in said and "train/" not in said, said
    print(f"{gptq} refused", flush=True)


def main():
    programs.need_model()
    binaries = sys.argv[1]
    formats = "export: {formats: [gptq, compressed_tensors, gguf]}\n"
    with tempfile.TemporaryDirectory() as folder:
        least = 4 + (16 + 4) / 64  # codes, and of every group of 64 a scale and a zero point
        assert math.isclose(least, 4.3125)
        check_refused(binaries, folder, "bits_budget: 4.3,", formats, "4.313 bits a weight")
        check_refused(binaries, folder, "memory_mib: 100,", "", "memory_mib")
        done = programs.run_recipe(binaries, folder, programs.small_recipe(folder, f"bits_budget: {BITS},", formats))
        assert done.returncode == 0, done.stderr
        check_sizes(glob.glob(os.path.join(folder, "state", "result", "*", "artifact"))[0])
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
