"""Goal: a gate of the recipe judges the model that is delivered, and settings that are not the defaults reach it.  Method: the small recipe
on the asymmetric grid in classic order, calibrated half with a text file, whose artifact quantize writes and recovery, evaluation and
export read: once with gates that it passes, then, its other tasks from the cache, with one that no quantized model passes, and with one that
2 bits do not (4 may, on so few words).

  python3 quality_gate_test.py FOLDER_OF_BINARIES
"""

import glob
import json
import os
import sys
import tempfile

import programs


def run(binaries, folder, gates):
    settings = f"grid: asymmetric, order: classic, calibration: {{general: general.md, general_share: 0.5}}, {gates},"
    return programs.run_recipe(binaries, folder, programs.small_recipe(folder, settings))


def check_provenance(folder):
    path, = glob.glob(os.path.join(folder, "state", "result", "*", "artifact", "gptq", "config.json"))
    with open(path) as file:
        meta = json.load(file)["quantization_config"]["meta"]
    # 1,024 tokens in windows of 128, half of them of text, of which there is enough.
    general = meta["calibration"]["general"]
    assert general["windows"] == 4 and general["passes"] == 1 and general["documents"] > 4, general
    assert (meta["settings"]["grid"], meta["settings"]["order"]) == ("asymmetric", "classic"), meta
    print(f"{general['documents']} documents of general text", flush=True)


def main():
    programs.need_model()
    binaries = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "general.md"), "w") as file:
            for i in range(60):
                file.write(f"Note {i}: the river passes {7 * i} mills and {3 * i} old trees,\nwhere the children count {i} boats.\n\n")
        passed = run(binaries, folder, "max_kl: 20, max_ppl_ratio: 100")
        assert passed.returncode == 0, passed.stderr
        job = json.loads(passed.stdout)
        assert job.get("job", job)["artifact"]["digest"], job
        print("asymmetric grid, classic order: delivered", flush=True)
        check_provenance(folder)
        for gate, words in (("max_kl: 1e-9", "quantize.gptq.max_kl 1e-09"), ("bits: 2, max_ppl_ratio: 1.01", "quantize.gptq.max_ppl_ratio 1.01")):
            failed = run(binaries, folder, gate)
            said = failed.stdout + failed.stderr
            assert failed.returncode == 2, (failed.returncode, said)
            assert "the recovered model's" in said and words in said, said
            print(f"{gate}: the job failed", flush=True)
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
