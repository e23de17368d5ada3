"""Goal: a gate of the recipe judges the model that is delivered, and settings that are not the defaults reach it.  Method: the small recipe
on the asymmetric grid in classic order, whose artifact quantize writes and recovery, evaluation and export read: once with a gate that it
passes, then, its other tasks from the cache, with gates that no quantized model passes.

  python3 quality_gate_test.py FOLDER_OF_BINARIES
"""

import json
import sys
import tempfile

import programs


def run(binaries, folder, gates):
    return programs.run_recipe(binaries, folder, programs.small_recipe(folder, f"grid: asymmetric, order: classic, {gates},"))


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
