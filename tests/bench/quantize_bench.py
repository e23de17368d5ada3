"""Quantization beside GPTQModel: the same weights, the same calibration tokens, the same machine, in the same run.

    tests/bench/quantize_bench.py --programs build/dev/bin [--only time|quality|recover|qwen] [--sequences 64] [--fresh]
                                  (by the python of tests/parity/environment.sh; `make bench-quantize` does so)

Rows: seconds and peak memory (128 x 512 tokens), perplexity of WikiText-2's raw test at four settings, recovery, and
Qwen2.5-Coder-0.5B where its GGUF is in the model cache. The weights are SmolLM2-135M's after a short LoRA run merged into them:
as released they lie on a 4-bit grid already; recovery is shown on both. The peer's folders and
our quantized models are measured by the same program of ours, whose exactness against lm-evaluation-harness is tested elsewhere.

GPTQModel is run with its defaults and with what its documentation recommends for accuracy (`mse=2.4`, and act order besides); what it
reaches is deterministic and kept in ~/.cache/refinery/bench-peers by a digest of everything it depends on; --fresh measures it anew.
Times are never kept.
"""

import argparse
import hashlib
import itertools
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time

from rows import Rows

HERE = pathlib.Path(__file__).resolve().parent
SHARED = HERE.parents[2] / "shared" / "data" / "text"
TRAIN, TEST, OTHER = (SHARED / name for name in ("wikitext2_raw_train_5k_rows.txt", "wiki.test.raw.first500k.txt", "c4_330k.txt"))
CACHE = pathlib.Path.home() / ".cache" / "refinery"
LENGTH = 512
VARIANTS = {"default": {}, "mse": {"mse": 2.4}, "mse with act order": {"mse": 2.4, "desc_act": True, "act_group_aware": False}}
THREADS = os.environ.get("REFINERY_BENCH_THREADS", "2")
# gptqmodel 7.7.0 does not start on two cores with its own default of one worker.
PEER_ENVIRONMENT = {"OMP_NUM_THREADS": THREADS, "GPTQMODEL_CPU_WORKERS": "2"}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=pathlib.Path, default="build/dev/bin")
    parser.add_argument("--model", type=pathlib.Path, default=CACHE / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--qwen", type=pathlib.Path, help="a GGUF of Qwen2.5-Coder-0.5B; default: the one in the model cache")
    parser.add_argument("--only", choices=["time", "quality", "recover", "qwen"])
    parser.add_argument("--sequences", type=int, default=64, help="calibration sequences of the perplexity rows")
    parser.add_argument("--timed-sequences", type=int, default=128)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--settings", default="4:64,4:128,3:64,2:32", help="bits:group of the perplexity rows")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of the peer")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--peer", help="JSON of one run of the peer; internal")
    parser.add_argument("--move", nargs=2, help="SOURCE TARGET: trains and merges; internal")
    return parser.parse_args()


def own_peak_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def calibration_ids(folder, sequences):
    """The same tokens as refinery_quantize_benchmark takes: the text end to end, cut into sequences."""
    from tokenizers import Tokenizer
    ids = Tokenizer.from_file(str(pathlib.Path(folder) / "tokenizer.json")).encode(TRAIN.read_text(), add_special_tokens=False).ids
    return [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(min(sequences, len(ids) // LENGTH))]


def run_peer(job):
    """Quantizes with GPTQModel; prints seconds and peak memory."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    torch.set_num_threads(int(THREADS))
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration_ids(job["folder"], job["sequences"])]
    config = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], device="cpu", **job["options"])
    model = GPTQModel.load(job["folder"], config)
    start = time.perf_counter()
    model.quantize(calibration, batch_size=1)
    seconds = time.perf_counter() - start
    model.save(job["target"])
    print("RESULT " + json.dumps({"seconds": seconds, "peak": own_peak_bytes()}), flush=True)


def move(source, target):
    """A short LoRA run on WikiText merged into the weights; deterministic."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    torch.set_num_threads(int(THREADS))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=names, lora_dropout=0.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    sequences = calibration_ids(source, 400)[200:]
    for step in range(30):
        ids = torch.tensor(sequences[2 * step : 2 * step + 2])[:, :256]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"moving the weights, step {step + 1} of 30: loss {loss.item():.3f}", file=sys.stderr)
    merged = model.merge_and_unload().to(torch.bfloat16)
    part = pathlib.Path(str(target) + ".part")
    shutil.rmtree(part, ignore_errors=True)
    merged.save_pretrained(part)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pathlib.Path(source) / name, part / name)
    part.rename(target)


class Bench:
    def __init__(self, options):
        self.options = options
        self.program = options.programs / "refinery_quantize_benchmark"
        self.rows = Rows()
        self.moved = CACHE / "bench-models" / "smollm2-135m-moved"
        if not self.moved.exists():
            self.moved.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, __file__, "--move", self.imported(options.model), self.moved], check=True)

    def ours(self, program, *arguments):
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": THREADS}  # as the worker starts refinery-task
        done = subprocess.run([str(program), *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode not in (0, 1) or not done.stdout:
            sys.exit(f"{program} failed:\n{done.stderr[-2000:]}")
        return done.stdout

    def imported(self, gguf):
        """The folder that a GGUF file becomes."""
        with tempfile.TemporaryDirectory() as work:
            prompts = pathlib.Path(work) / "prompts.json"
            prompts.write_text("[[1]]")
            subprocess.run([str(self.options.programs / "refinery-task"), "inspect", "--model", str(gguf), "--prompts", str(prompts),
                            "--max-new-tokens", "0", "--output", str(pathlib.Path(work) / "out")], check=True, stdout=subprocess.DEVNULL)
            return json.loads((pathlib.Path(work) / "out" / "tokens.json").read_text())["model"]

    def quantize(self, folder, bits, group_size, sequences, windows):
        text = self.ours(self.program, folder, TRAIN, TEST, "--bits", bits, "--group-size", group_size, "--sequences", sequences,
                         "--length", LENGTH, "--windows", windows, "--threads", THREADS, "--skip-rounding")
        figures = {key: float(value) for key, value in re.findall(r"perplexity (\w+)\s+([\d.]+)", text)}
        times = re.search(r"group size -?\d+: ([\d.]+) s \((.*?)\).*peak memory ([\d.]+) GiB", text)
        figures.update(seconds=float(times[1]), parts=times[2], peak=float(times[3]) * 2**30)
        return figures

    def perplexity(self, folder):
        text = self.ours(self.program, folder, "-", TEST, "--measure", "--windows", self.options.windows, "--threads", THREADS)
        return float(re.search(r"perplexity as it is\s+([\d.]+)", text)[1])

    def run_peer(self, folder, bits, group_size, sequences, variant, measure):
        job = {"folder": str(folder), "bits": bits, "group_size": group_size, "sequences": sequences, "options": VARIANTS[variant]}
        digest = hashlib.sha256()
        for file in (pathlib.Path(folder) / "model.safetensors", TRAIN, TEST):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        digest.update(json.dumps([job["bits"], group_size, sequences, job["options"], self.options.windows, "gptqmodel 7.7.0"]).encode())
        kept = CACHE / "bench-peers" / f"{digest.hexdigest()[:24]}.json"
        if measure == "perplexity" and kept.exists() and not self.options.fresh:
            return json.loads(kept.read_text())
        with tempfile.TemporaryDirectory() as work:
            job["target"] = str(pathlib.Path(work) / "quantized")
            done = subprocess.run([sys.executable, __file__, "--peer", json.dumps(job)], cwd=work, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True, env={**PEER_ENVIRONMENT, **os.environ})
            line = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not line:
                sys.exit(f"gptqmodel failed at {bits} bit, group {group_size}, {variant}:\n{done.stdout[-3000:]}")
            found = json.loads(line[-1][len("RESULT "):])
            found["perplexity"] = self.perplexity(job["target"])
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
        return found

    def time_rows(self, name, folder, sequences, bound, peak_bound):
        mine = self.quantize(folder, 4, 64, sequences, 1)
        print(f"{name}: {mine['parts']}", file=sys.stderr)
        peer = self.run_peer(folder, 4, 64, sequences, "default", "time")
        what = f"{name}, 4 bit g64, {sequences} x {LENGTH} tokens, {THREADS} threads"
        ratio = mine["seconds"] / peer["seconds"]
        self.rows.add(f"{what}: wall time", mine["seconds"], peer["seconds"], ratio, f"<= {bound:.3g}", ratio <= bound, "s")
        if peak_bound:
            ok = mine["peak"] < peer["peak"] and mine["peak"] < peak_bound
            self.rows.add(f"{what}: peak memory", mine["peak"] / 2**20, peer["peak"] / 2**20, mine["peak"] / peer["peak"],
                          f"< 1, < {peak_bound / 2**20:.0f} MiB", ok, "MiB")

    def quality_rows(self):
        for setting in self.options.settings.split(","):
            bits, group_size = map(int, setting.split(":"))
            mine = self.quantize(self.moved, bits, group_size, self.options.sequences, self.options.windows)
            found = {variant: self.run_peer(self.moved, bits, group_size, self.options.sequences, variant, "perplexity")["perplexity"]
                     for variant in VARIANTS if variant in self.options.variants.split(",")}
            best = min(found, key=found.get)
            what = f"WikiText-2 perplexity, {bits} bit g{group_size} (bf16 {mine['bf16']:.3f})"
            ours = mine["quantized"]
            if "default" in found:
                self.rows.add(f"{what}: against the default", ours, found["default"], ours / found["default"], "< 1", ours < found["default"])
            self.rows.add(f"{what}: against its best ({best})", ours, found[best], ours / found[best], "<= 1", ours <= found[best])

    def recover_rows(self):
        program = self.options.programs / "refinery_recover_benchmark"
        released = self.imported(self.options.model)
        for (weights, folder), bits in itertools.product((("moved", self.moved), ("released", released)), (4, 3)):
            what = f"recover, {weights} weights, {bits} bit g64"
            text = self.ours(program, folder, TRAIN, TEST, OTHER, "--bits", bits, "--group-size", 64, "--sequences",
                             self.options.sequences, "--windows", self.options.windows, "--threads", THREADS)
            seconds = float(re.search(r"tokens in ([\d.]+) s", text)[1])
            self.rows.add(f"{what}: time", seconds, None, None, "<= 300", seconds <= 300, "s")
            for name, bound in (("test", 60), ("other", 40)):
                line = re.search(rf"{name}\s+perplexity bf16 ([\d.]+), quantized ([\d.]+), recovered ([\d.]+): ([-\d.]+) %.*?"
                                 r"KL quantized ([\d.]+), recovered ([\d.]+)", text)
                bf16, before, after, closed, kl_before, kl_after = map(float, line.groups())
                domain = "WikiText-2" if name == "test" else "C4"
                self.rows.add(f"{what}, {domain} perplexity, gap to {bf16:.3f} closed (%)", after, before, closed,
                              f">= {bound} %", closed >= bound)
                self.rows.add(f"{what}, {domain} KL to the source", kl_after, kl_before, kl_after / kl_before, "< 1",
                              kl_after < kl_before, "nats")


def main():
    options = parse()
    if options.peer:
        return run_peer(json.loads(options.peer))
    if options.move:
        return move(*options.move)
    if not TRAIN.exists():
        sys.exit(f"quantize_bench.py: {TRAIN} is absent: the benchmark needs ../shared/data beside the repository")
    bench = Bench(options)
    if options.only in (None, "time"):
        bench.time_rows("SmolLM2-135M", bench.moved, options.timed_sequences, 1 / 5, 1.2 * 2**30)
    if options.only in (None, "qwen"):
        qwen = options.qwen or next(iter(sorted((CACHE / "models").glob("qwen2.5-coder-0.5b*.gguf"))), None)
        if qwen is None:
            print("no GGUF of Qwen2.5-Coder-0.5B in the model cache: its rows are left out (--qwen FILE)", file=sys.stderr)
        else:
            bench.time_rows("Qwen2.5-Coder-0.5B", bench.imported(qwen), 64, 1 / 3, None)
    if options.only in (None, "quality"):
        bench.quality_rows()
    if options.only in (None, "recover"):
        bench.recover_rows()
    sys.exit(bench.rows.finish())


if __name__ == "__main__":
    main()
