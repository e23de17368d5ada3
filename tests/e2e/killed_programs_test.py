"""Goal: killing programs loses no work and changes no bit.  Method: the small recipe once undisturbed through `refinery run`, and
once through separately started programs of which the worker is killed (SIGKILL) during training, after a checkpoint, and the
coordinator during quantization; both jobs must succeed with the same artifact digest.

  python3 killed_programs_test.py FOLDER_OF_BINARIES
"""

import json
import os
import subprocess
import sys
import tempfile

import programs

RECIPE = os.path.join(programs.HERE, "small.yaml")


def tasks_of(description, kind, *states):
    return [t for t in description["tasks"] if t["kind"] == kind and t["state"] in states]


def undisturbed(binaries, folder):
    state = os.path.join(folder, "state")
    run = subprocess.run([os.path.join(binaries, "refinery"), "run", RECIPE, "--state", state, "-o", "json"],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 0, run.stderr
    job = json.loads(run.stdout)
    job = job.get("job", job)
    return job["artifact"]["digest"]


def disturbed(binaries, folder):
    p = programs.Programs(binaries, folder)
    try:
        p.start_coordinator()
        p.start_worker()
        submitted = json.loads(p.client("submit", RECIPE).stdout)
        job = submitted.get("job", submitted)["id"]

        # A training task that has progressed past its first checkpoint (the recipe makes one every 2 of 6 steps).
        def training():
            for task in tasks_of(p.describe(job), "TRAIN", "LEASED"):
                if task.get("progress", {}).get("done", 0) >= 3:
                    return task
        task = p.wait_for(training, 300, "training past its first checkpoint")
        p.kill("refinery-worker")
        print(f"killed the worker in {task['path']} at step {task['progress']['done']}", flush=True)
        p.start_worker()

        p.wait_for(lambda: tasks_of(p.describe(job), "QUANTIZE", "LEASED"), 300, "quantization")
        p.kill("refineryd")
        print("killed the coordinator during quantization", flush=True)
        p.start_coordinator(listen=p.address)

        watched = p.client("watch", job, check=False)
        description = p.describe(job)
        assert watched.returncode == 0, (watched.stderr, description.get("reason"))
        again = next(t for t in description["tasks"] if t["path"] == task["path"])
        assert again["attempt"] >= 2, again
        return description["artifact"]["digest"]
    finally:
        p.stop()


def main():
    programs.need_model()
    binaries = sys.argv[1]
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        wanted = undisturbed(binaries, first)
        print(f"undisturbed  {wanted}", flush=True)
        found = disturbed(binaries, second)
        print(f"disturbed    {found}", flush=True)
        assert found == wanted, "the artifact differs"
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
