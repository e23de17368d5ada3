"""Goal: a quantization killed at any module goes on and gives the same bits.  Method: refinery-task quantizes SmolLM2-135M once
undisturbed. Then it is killed (SIGKILL) ten times, each time when the journal has grown by a random number of modules; every other
time it goes on in the same folder, else from the checkpoint that it published last, as on another worker. One finished module is
damaged on the way. Both artifacts must have the same digests.

  python3 killed_quantize_test.py FOLDER_OF_BINARIES [SEED]
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import programs

KILLS = 10
MODULES = 210  # seven linear layers in each of 30
GPTQ = {"bits": 4, "groupSize": 64, "dampFraction": 0.01, "calibrationTokens": 1024, "sequenceLength": 128, "heldOutTokens": 256}


def write_examples(folder):
    os.makedirs(folder)
    rows = []
    for name in ("seeds.jsonl", "items.jsonl"):
        with open(os.path.join(programs.HERE, name)) as f:
            for row in map(json.loads, f):
                answer = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
                rows.append({"instruction": f"Question: {row['question']}\nAnswer:", "input": "", "output": answer, "origin": "seed"})
    for split, part in (("train", rows[4:]), ("validation", rows[:2]), ("held_out", rows[2:4])):
        with open(os.path.join(folder, split + ".jsonl"), "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in part)


class Task:
    """Runs of refinery-task on one set of inputs."""

    def __init__(self, binaries, folder):
        self.program = os.path.join(binaries, "refinery-task")
        self.folder = folder
        self.inputs = os.path.join(folder, "inputs")
        self.count = 0
        write_examples(os.path.join(self.inputs, "examples"))
        run = self.start({"job": "j", "path": "import/student", "importModel": {"uri": programs.MODEL}},
                         os.path.join(folder, "student"))
        assert run.wait() == 0, self.text()
        os.rename(os.path.join(folder, "student"), os.path.join(self.inputs, "student"))
        self.spec = {"job": "j", "path": "quantize/student", "threads": 2, "quantize": {"gptq": GPTQ}}

    def start(self, spec, outputs, checkpoints="", resume=""):
        self.count += 1
        path = os.path.join(self.folder, f"spec-{self.count}.json")
        with open(path, "w") as f:
            json.dump(spec, f)
        command = [self.program, "--spec", path, "--inputs", self.inputs, "--outputs", outputs]
        command += ["--checkpoints", checkpoints] if checkpoints else []
        command += ["--resume", resume] if resume else []
        self.log = os.path.join(self.folder, f"log-{self.count}")
        environment = dict(os.environ, OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="2")
        return subprocess.Popen(command, stdout=open(self.log, "wb"), stderr=subprocess.STDOUT, env=environment)

    def quantize(self, name, checkpoints, resume=""):
        self.outputs = os.path.join(self.folder, name)
        return self.start(self.spec, self.outputs, checkpoints, resume)

    def text(self):
        with open(self.log) as f:
            return f.read()

    def digests(self):
        found = {}
        for file in ("quantized.safetensors", "quantized.json"):
            with open(os.path.join(self.outputs, file), "rb") as f:
                found[file] = hashlib.sha256(f.read()).hexdigest()
        return found


def finished(checkpoints):
    folder = os.path.join(checkpoints, "journal")
    return sorted(f for f in os.listdir(folder) if f.endswith(".safetensors")) if os.path.isdir(folder) else []


def last_checkpoint(checkpoints):
    names = [n for n in os.listdir(checkpoints) if re.fullmatch(r"modules-\d+", n)]
    return os.path.join(checkpoints, max(names, key=lambda n: int(n[8:]))) if names else ""


def kill_at(process, checkpoints, modules, task):
    while len(finished(checkpoints)) < modules:
        assert process.poll() is None, f"it ended before it was killed:\n{task.text()[-2000:]}"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def disturbed(task, rng, folder):
    checkpoints = os.path.join(folder, "checkpoints-0")
    targets = sorted(rng.sample(range(1, MODULES - 1), KILLS))
    resume = ""
    for i, target in enumerate(targets):
        process = task.quantize(f"killed-{i}", checkpoints, resume)
        kill_at(process, checkpoints, target, task)
        resume = ""
        print(f"killed at {len(finished(checkpoints))} modules", flush=True)
        if i == KILLS // 2:
            damaged = os.path.join(checkpoints, "journal", rng.choice(finished(checkpoints)))
            with open(damaged, "r+b") as f:
                f.seek(-1, os.SEEK_END)
                last = f.read(1)
                f.seek(-1, os.SEEK_END)
                f.write(bytes([last[0] ^ 1]))
        elif i % 2 == 1 and last_checkpoint(checkpoints):
            # Another worker has the published checkpoint and nothing else.
            resume = os.path.join(folder, f"resume-{i}")
            shutil.copytree(last_checkpoint(checkpoints), resume)
            checkpoints = os.path.join(folder, f"checkpoints-{i + 1}")
            targets[i + 1:] = [max(t, len(os.listdir(resume)) + 1) for t in targets[i + 1:]]
    process = task.quantize("resumed", checkpoints, resume)
    assert process.wait() == 0, task.text()[-2000:]
    assert "modules were quantized before this attempt" in task.text()


def main():
    programs.need_model()
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory() as folder:
        task = Task(sys.argv[1], folder)
        begin = time.time()
        process = task.quantize("undisturbed", os.path.join(folder, "checkpoints"))
        assert process.wait() == 0, task.text()[-2000:]
        wanted = task.digests()
        print(f"undisturbed  {wanted} in {time.time() - begin:.1f} s", flush=True)
        assert len(finished(os.path.join(folder, "checkpoints"))) == MODULES
        disturbed(task, random.Random(seed), folder)
        found = task.digests()
        print(f"disturbed    {found}", flush=True)
        assert found == wanted, "the artifact differs"
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
