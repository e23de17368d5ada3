"""Goal: each wrong input gives one clear sentence on standard error and exit code 2.  Method: make the mistake, read both.

  python3 wrong_inputs_test.py FOLDER_OF_BINARIES
"""

import os
import socket
import subprocess
import sys
import tempfile

import programs

failures = 0


def expect(what, command, *words, environment=None):
    """Runs `command`; the one line that begins with the program's name must hold all words."""
    global failures
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120,
                            env={**os.environ, **(environment or {})})
    lines = [line for line in result.stderr.strip().splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(os.path.basename(command[0]) + ": ")]
    last = " | ".join(errors)
    good = result.returncode == 2 and len(errors) == 1 and all(word in last for word in words)
    failures += not good
    print(f"{'pass' if good else 'FAIL'}  {what}: exit {result.returncode}: {last}", flush=True)
    if not good:
        print("      wanted exit 2 and " + ", ".join(repr(w) for w in words) + "\n      " + "\n      ".join(lines[-8:]), flush=True)


def recipe(folder, **changes):
    """The small recipe with some lines replaced; returns its path."""
    with open(os.path.join(programs.HERE, "small.yaml")) as f:
        text = f.read()
    for old, new in changes.values():
        assert old in text, old
        text = text.replace(old, new)
    for name in ("seeds.jsonl", "items.jsonl"):
        text = text.replace("file: " + name, "file: " + os.path.join(programs.HERE, name))
    path = os.path.join(folder, "recipe.yaml")
    with open(path, "w") as f:
        f.write(text)
    return path


def corrupt_gguf(folder):
    path = os.path.join(folder, "corrupt.gguf")
    with open(programs.MODEL, "rb") as f:
        data = bytearray(f.read(4 << 20))   # the tensors' data is missing
    with open(path, "wb") as f:
        f.write(data)
    return path


def corrupt_safetensors(folder):
    model = os.path.join(folder, "corrupt")
    os.makedirs(model)
    with open(os.path.join(model, "config.json"), "w") as f:
        f.write('{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,'
                ' "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64, "max_position_embeddings": 64,'
                ' "rms_norm_eps": 1e-5, "model_type": "llama"}')
    with open(os.path.join(model, "tokenizer.json"), "w") as f:
        f.write('{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}')
    with open(os.path.join(model, "model.safetensors"), "wb") as f:
        f.write((1 << 40).to_bytes(8, "little") + b"{}")
    return model


def other_tokenizer(binaries, folder):
    """The student's own folder form with one token renamed: a teacher whose tokenizer differs."""
    import json
    import shutil
    prompts = os.path.join(folder, "prompts.json")
    with open(prompts, "w") as f:
        json.dump([[1, 2]], f)
    out = os.path.join(folder, "inspect")
    subprocess.run([os.path.join(binaries, "refinery-task"), "inspect", "--model", programs.MODEL, "--prompts", prompts, "--output",
                    out, "--max-new-tokens", "0"], check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(out, "tokens.json")) as f:
        source = json.load(f)["model"]
    model = os.path.join(folder, "teacher")
    shutil.copytree(source, model)
    path = os.path.join(model, "tokenizer.json")
    with open(path) as f:
        tokenizer = json.load(f)
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [t for t, i in sorted(vocabulary.items(), key=lambda p: p[1])][1000:1002]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    os.chmod(path, 0o644)
    with open(path, "w") as f:
        json.dump(tokenizer, f)
    return model


def main():
    programs.need_model()
    binaries = sys.argv[1]
    refinery = os.path.join(binaries, "refinery")
    student = "~/.cache/refinery/models/SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory() as folder:
        def run(path):
            return [refinery, "run", path, "--state", os.path.join(folder, "state")]

        expect("missing recipe", run("nowhere.yaml"), "nowhere.yaml")
        expect("unknown key", run(recipe(folder, a=("tokens_per_step", "tokens_per_stepp"))), "recipe.yaml:", "tokens_per_stepp",
               "tokens_per_step")
        expect("missing data file", run(recipe(folder, a=("file: seeds.jsonl", "file: /nowhere/seeds.jsonl"))), "/nowhere/seeds.jsonl")
        expect("missing model", run(recipe(folder, a=(student, "/nowhere/model.gguf"))), "/nowhere/model.gguf")
        expect("group size that the format cannot hold",
               run(recipe(folder, a=("group_size: 64", "group_size: 128"),
                          b=("quantize:", "export: {formats: [compressed_tensors]}\nquantize:"))), "128", "576")
        expect("corrupt GGUF", run(recipe(folder, a=(student, corrupt_gguf(folder)))), "corrupt.gguf")
        expect("corrupt safetensors", run(recipe(folder, a=(student, corrupt_safetensors(folder)))), "model.safetensors")
        expect("tokenizers that differ", run(recipe(folder, a=("teacher: {", "teacher: {model: " + other_tokenizer(binaries, folder) + ", "))),
               "tokenizer")
        expect("unreachable coordinator", [refinery, "--coordinator", "127.0.0.1:1", "list"], "127.0.0.1:1")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            expect("port in use", [os.path.join(binaries, "refineryd"), "--state", os.path.join(folder, "other"), "--listen",
                                   f"127.0.0.1:{port}", "--metrics-address", "none"], str(port))
    print(f"{10 - failures} passed, {failures} failed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
