"""make bench-model: the generation engine beside transformers and llama.cpp on the same weights, a row per point.

    tests/bench/run.sh model_bench.py --programs build/dev/bin --model FILE.gguf [--rounds 3]

Ours and the peer take turns, each in a process of its own; a ratio is the median over the rounds of the pairs' ratios, so that a
machine that changes its speed changes both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

import gguf_forms
import gptq_form
from rows import Rows

HERE = os.path.dirname(os.path.abspath(__file__))


def last_json(command, environment=None):
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


class Bench:
    def __init__(self, arguments):
        self.program = os.path.join(arguments.programs, "refinery_model_benchmark")
        self.rounds = arguments.rounds
        self.work = arguments.work
        os.makedirs(self.work, exist_ok=True)
        self.folder = self.ours(arguments.model, "import")["folder"]
        self.bf16 = os.path.join(self.work, "bf16.gguf")
        self.q4_0 = os.path.join(self.work, "q4_0.gguf")
        self.gptq = os.path.join(self.work, "gptq-4bit-g64")
        if not os.path.exists(self.bf16):
            gguf_forms.write_bf16(arguments.model, self.bf16)
        if not os.path.exists(self.q4_0):
            gguf_forms.write_q4_0(self.bf16, self.q4_0)
        if not os.path.exists(self.gptq):
            gptq_form.write_gptq(self.folder, self.gptq + ".part")
            os.rename(self.gptq + ".part", self.gptq)
        self.rows = Rows()

    def ours(self, model, case, *options):
        # As the worker starts refinery-task: OpenMP's threads sleep while they wait.
        return last_json([self.program, model, case, *map(str, options)], {"OMP_WAIT_POLICY": "PASSIVE"})

    def peer(self, name, model, case, *options):
        return last_json([sys.executable, os.path.join(HERE, "model_peers.py"), name, model, case, *map(str, options)])

    def compare(self, what, ours, peer, bound, tokens):
        """ours and peer give {"seconds": ...} per step; the row shows tokens per second."""
        pairs = [(ours()["seconds"], peer()["seconds"]) for _ in range(self.rounds)]
        ratio = statistics.median(b / a for a, b in pairs)
        mine, theirs = (tokens / statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        self.rows.add(what, mine, theirs, ratio, f">= {bound}", ratio >= bound, "tokens/s")

    def run(self):
        decode = lambda batch, new: (lambda: self.ours(self.folder, "decode", "--batch", batch, "--new", new, "--repeat", 3))
        slow = lambda batch, new: (
            lambda: self.peer("transformers", self.folder, "decode", "--batch", batch, "--new", new, "--repeat", 2))
        self.compare("decode, batch 1, bf16, against transformers", decode(1, 96), slow(1, 48), 1.25, 1)
        shares = [self.ours(self.folder, "decode", "--share", 1, "--repeat", 5)["share_of_read_bandwidth"] for _ in range(self.rounds)]
        share = statistics.median(shares)
        self.rows.add("decode, batch 1, bf16, of the memory's read bandwidth", 100 * share, 100, share, ">= 0.75", share >= 0.75, "%")
        self.compare("decode, batch 16, bf16, against transformers", decode(16, 48), slow(16, 24), 2.2, 16)
        self.compare("decode, batch 1, 4 bit, against llama.cpp Q4_0",
                     lambda: self.ours(self.gptq, "decode", "--new", 128, "--repeat", 5),
                     lambda: self.peer("llama.cpp", self.q4_0, "decode", "--new", 128, "--repeat", 5), 1.0, 1)
        prefill = lambda: self.ours(self.folder, "prefill", "--repeat", 2)
        self.compare("prefill of 2,048 tokens, bf16, against transformers", prefill,
                     lambda: self.peer("transformers", self.folder, "prefill", "--repeat", 2), 1.3, 2048)
        self.compare("prefill of 2,048 tokens, bf16, against llama.cpp", prefill,
                     lambda: self.peer("llama.cpp", self.bf16, "prefill", "--repeat", 1), 1.0, 2048)
        shared = self.ours(self.folder, "prefix", "--repeat", 1)
        ratio = shared["seconds_without_sharing"] / shared["seconds"]
        self.rows.add("64 requests with a common prefix of 500 tokens, shared against not", shared["seconds"],
                      shared["seconds_without_sharing"], ratio, ">= 4", ratio >= 4, "s")
        peak = self.ours(self.folder, "decode", "--batch", 16, "--prompt", 384, "--new", 127, "--repeat", 1)["peak_bytes"] / 2**20
        self.rows.add("peak memory, bf16, 16 x 512 tokens", peak, None, None, "< 700", peak < 700, "MiB")
        kernels = self.ours("-", "int4")
        ratio = kernels["seconds_libtorch"] / kernels["seconds"]
        self.rows.add("4-bit product of one row, ours against LibTorch's int4 kernel", 1e6 * kernels["seconds"],
                      1e6 * kernels["seconds_libtorch"], ratio, "> 1, else take LibTorch's", ratio > 1, "us")
        return self.rows.finish()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--programs", required=True)
    parser.add_argument("--model", default=os.path.expanduser("~/.cache/refinery/models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--work", default=os.path.expanduser("~/.cache/refinery/bench-models"))
    parser.add_argument("--rounds", type=int, default=3)
    sys.exit(Bench(parser.parse_args()).run())


if __name__ == "__main__":
    main()
