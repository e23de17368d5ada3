"""Goal: a gate of the recipe judges the model that is delivered, and settings that are not the defaults reach it.  Method: the small recipe
on the asymmetric grid in classic order, whose artifact quantize writes and recovery, evaluation and export read: once with a gate that it
passes, then, its other tasks from the cache, with gates that no quantized model passes.

  python3 quality_gate_test.py FOLDER_OF_BINARIES
"""

import json
import os
import subprocess
import sys
import tempfile

import programs


def recipe(folder, gates):
    """small.yaml with other settings of GPTQ, beside the files that it names."""
    with open(os.path.join(programs.HERE, "small.yaml")) as file:
        text = file.read()
    for name in ("seeds.jsonl", "items.jsonl"):
        text = text.replace(f"file: {name}", f"file: {os.path.join(programs.HERE, name)}")
    changed = text.replace("gptq: {bits: 4,", f"gptq: {{grid: asymmetric, order: classic, {gates}, bits: 4,")
    assert changed != text
    path = os.path.join(folder, "recipe.yaml")
    with open(path, "w") as file:
        file.write(changed)
    return path


def run(binaries, folder, gates):
    return subprocess.run([os.path.join(binaries, "refinery"), "run", recipe(folder, gates), "--state", os.path.join(folder, "state"), "-o", "json"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def main():
    programs.need_model()
    binaries = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        passed = run(binaries, folder, "max_kl: 20, max_ppl_ratio: 100")
        assert passed.returncode == 0, passed.stderr
        job = json.loads(passed.stdout)
        assert job.get("job", job)["artifact"]["digest"], job
        print("asymmetric grid, classic order: delivered", flush=True)
        for gate, words in (("max_kl: 1e-9", "quantize.gptq.max_kl 1e-09"), ("max_ppl_ratio: 1.000000001", "quantize.gptq.max_ppl_ratio")):
            failed = run(binaries, folder, gate)
            said = failed.stdout + failed.stderr
            assert failed.returncode == 2, (failed.returncode, said)
            assert "the recovered model's" in said and words in said, said
            print(f"{gate}: the job failed", flush=True)
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
