"""Starts and ends Refinery's programs for the end-to-end tests. Everything listens on loopback and lives in one folder."""

import json
import os
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
MODEL = os.path.expanduser("~/.cache/refinery/models/SmolLM2-135M-Instruct.Q4_1.gguf")
SKIPPED = 77


def need_model():
    if not os.path.exists(MODEL):
        print(f"skipped: {MODEL} is not there (deploy/install_dependencies.sh model brings it)")
        sys.exit(SKIPPED)


def small_recipe(folder, gptq, more=""):
    """small.yaml with other settings of GPTQ ("bits_budget: 5,"; without bits or a budget 4 bits) and further sections, beside the files that it names."""
    with open(os.path.join(HERE, "small.yaml")) as file:
        text = file.read()
    for name in ("seeds.jsonl", "items.jsonl"):
        text = text.replace(f"file: {name}", f"file: {os.path.join(HERE, name)}")
    changed = text.replace("gptq: {bits: 4,", f"gptq: {{{gptq}" + ("" if "bits: " in gptq or "_budget" in gptq else " bits: 4,"))
    assert changed != text
    path = os.path.join(folder, "recipe.yaml")
    with open(path, "w") as file:
        file.write(changed + more)
    return path


def run_recipe(binaries, folder, path):
    """`refinery run`: a coordinator and a worker of its own, state in `folder`."""
    return subprocess.run([os.path.join(binaries, "refinery"), "run", path, "--state", os.path.join(folder, "state"), "-o", "json"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Programs:
    """One coordinator and one worker on `folder`; both can be killed and started again."""

    def __init__(self, binaries, folder):
        self.binaries = binaries
        self.folder = folder
        self.state = os.path.join(folder, "state")
        self.processes = {}

    def start(self, name, arguments):
        log = open(os.path.join(self.folder, name + ".log"), "ab")
        self.processes[name] = subprocess.Popen([os.path.join(self.binaries, name)] + arguments, stdout=log, stderr=log)

    def start_coordinator(self, listen="127.0.0.1:0"):
        address = os.path.join(self.state, "address")
        if os.path.exists(address):
            os.remove(address)
        # How full this machine's disk is does not matter to a test.
        self.start("refineryd", ["--state", self.state, "--listen", listen, "--metrics-address", "none", "--disk-full-free-gib", "0",
                                 "--disk-read-only-free-gib", "0"])
        self.wait_for(lambda: os.path.exists(address), 30, "the coordinator's address")
        with open(address) as f:
            self.address = f.read().strip()

    def start_worker(self):
        self.start("refinery-worker", ["--coordinator", self.address, "--cache", os.path.join(self.folder, "cache"), "--slots", "1",
                                       "--metrics-address", "none"])

    def kill(self, name):
        """SIGKILL: the program gets no chance to say anything."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()
        del self.processes[name]

    def stop(self):
        for process in reversed(list(self.processes.values())):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def client(self, *arguments, check=True):
        command = [os.path.join(self.binaries, "refinery"), "--coordinator", self.address, "-o", "json"] + list(arguments)
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if check and result.returncode != 0:
            raise AssertionError(f"{command} ended with {result.returncode}: {result.stderr}")
        return result

    def describe(self, job):
        return json.loads(self.client("describe", job).stdout)

    @staticmethod
    def wait_for(condition, seconds, what):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(0.1)
        raise AssertionError(f"no {what} within {seconds} s")
