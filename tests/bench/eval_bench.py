"""Evaluation against lm-evaluation-harness 0.4.13:  tests/bench/run.sh eval_bench.py [--build DIR] [--items N]

Weights are SmolLM2-135M-Instruct as Refinery imports it from the GGUF file; both sides read the same folder. The tokenizer is the
one that the gold was made with: transformers' GGUF loader knows no Digits step, so the step is taken out of a copy of the folder's
tokenizer.json (people get the tokenizer with it). The items are the gold dev set, ../shared/data.

Time: bfloat16, two threads, the harness with the batch size that is best on a part of the items, both sides twice in turns, the
better run of each. Two figures, each with the same start and end on both sides: the whole command (`refinery eval` and the harness'
simple_evaluate in a process of its own, its data sets read from the same files), which is what a user waits for and has the bound,
and scoring alone (the harness' loglikelihood(); of Refinery also reading rows and building prompts).
Scores: float32, against what the harness itself found (../shared/data/gold).
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from rows import Rows

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SHARED = ROOT.parent / "shared" / "data"
TASKS = ["arc_easy", "commonsense_qa", "hellaswag", "mmlu", "openbookqa", "piqa", "social_i_qa", "winogrande"]
FIVE_SHOT = ["arc_easy", "hellaswag", "mmlu", "winogrande"]
BATCH_SIZES = [1, 8, 16, 32]
TIMED_RUNS = 2
THREADS = os.environ.get("OMP_NUM_THREADS", "2")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", default=str(ROOT / "build" / "dev"))
    parser.add_argument("--model", default=os.environ.get(
        "REFINERY_TEST_MODEL", str(pathlib.Path.home() / ".cache/refinery/models/SmolLM2-135M-Instruct.Q4_1.gguf")))
    parser.add_argument("--items", type=int, default=0, help="only the first N items of each task (0 = all)")
    parser.add_argument("--only", choices=["time", "scores"], help="one half")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return done.stdout


class Refinery:
    def __init__(self, options, work):
        self.program = pathlib.Path(options.build) / "bin" / "refinery"
        self.task_program = pathlib.Path(options.build) / "bin" / "refinery-task"
        self.work = work
        prompts = work / "prompts.json"
        prompts.write_text("[[1]]")
        run([self.task_program, "inspect", "--model", options.model, "--prompts", prompts, "--max-new-tokens", 0,
             "--output", work / "inspect"])
        self.folder = self.peer_folder(pathlib.Path(json.loads((work / "inspect" / "tokens.json").read_text())["model"]))

    def peer_folder(self, imported):
        """The imported folder with the tokenizer that the gold was made with."""
        folder = self.work / "model"
        folder.mkdir()
        for file in imported.iterdir():
            if file.name not in ("tokenizer.json", "import.json"):
                (folder / file.name).symlink_to(file)
        tokenizer = json.loads((imported / "tokenizer.json").read_text())
        steps = tokenizer["pre_tokenizer"]["pretokenizers"]
        assert [step["type"] for step in steps] == ["Digits", "ByteLevel"], steps
        del steps[0]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        return folder

    def eval(self, tasks, split, dtype, shots=0, limit=0, max_length=0, data=SHARED / "tasks"):
        """The JSON that `refinery eval` prints, the items of every task, and its wall time."""
        items = pathlib.Path(tempfile.mkdtemp(dir=self.work))
        command = [self.program, "eval", self.folder, "--tasks", ",".join(tasks), "--split", split, "--pool", "fewshot",
                   "--data", data, "--dtype", dtype, "--threads", THREADS, "--shots", shots, "--limit", limit,
                   "--max-length", max_length, "--items", items, "--output", "json"]
        start = time.perf_counter()
        result = json.loads(run(command))
        seconds = time.perf_counter() - start
        scored = {task: [json.loads(line) for line in open(items / f"{task}.jsonl")] for task in tasks}
        return result, scored, seconds


def gold_rows(task, subset, shots):
    return [json.loads(line) for line in open(SHARED / "gold" / f"{task}.{subset}.{shots}shot.jsonl")]


def limited(task, rows, limit):
    """The harness (and we) count --limit per subject of mmlu."""
    if task != "mmlu" or limit == 0:
        return rows if limit == 0 else rows[:limit]
    taken, kept = {}, []
    for row in rows:
        taken[row["harness_task"]] = taken.get(row["harness_task"], 0) + 1
        if taken[row["harness_task"]] <= limit:
            kept.append(row)
    return kept


def digest(row):
    text = "".join(f"{request['context']}\x1f{request['continuation']}\x1e" for request in row["requests"])
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def scores(rows, refinery, options):
    for subset, tasks, shots in (("dev", TASKS, 0), ("dev30", FIVE_SHOT, 5)):
        _, scored, _ = refinery.eval(tasks, subset, "float32", shots, options.items)
        for task in tasks:
            gold = limited(task, gold_rows(task, subset, shots), options.items)
            ours = scored[task]
            assert len(gold) == len(ours), (task, len(gold), len(ours))
            name = f"{task} {shots}-shot, {len(gold)} items"
            same = sum(digest(a) == b["context"] for a, b in zip(gold, ours))
            rows.add(f"{name}: prompts and continuations equal", same, len(gold), same / len(gold), "all", same == len(gold))
            worst = max(abs(request["ll"] - found) for a, b in zip(gold, ours)
                        for request, found in zip(a["requests"], b["log_likelihoods"]))
            rows.add(f"{name}: largest difference of a choice", worst, 0, None, "<= 1e-3", worst <= 1e-3, "nats")
            chosen = sum(a["pred"] == b["prediction"] and (a.get("acc_norm") is None or a["pred_norm"] == b["prediction_norm"])
                         for a, b in zip(gold, ours))
            rows.add(f"{name}: items with the same choices", chosen, len(gold), chosen / len(gold), "all", chosen == len(gold))
    wikitext(rows, refinery, options)


def programs(rows, options):
    """What the test programs compare with committed vectors of the harness: sampled indices, strings of 1,000 items a benchmark."""
    for program, case, name in (("data_test", "PythonRandomTest.SamplesAsCPythonDoes", "few-shot selections, seven golden vectors"),
                                ("eval_test", "HarnessPromptsTest.*", "prompts of 1,000 random items of each benchmark")):
        done = subprocess.run([pathlib.Path(options.build) / "bin" / program, f"--gtest_filter={case}"], capture_output=True, text=True)
        skipped = "[  SKIPPED ]" in done.stdout
        compared = next((line.split()[0] for line in done.stdout.splitlines() if line.endswith("items compared")), "-")
        lacking = sum(line.startswith("not compared: ") for line in done.stdout.splitlines())
        rows.add(name + (f" ({lacking} sets of prompts lack their data)" if lacking else ""), compared, compared, None, "equal",
                 None if skipped else done.returncode == 0 and "[  PASSED  ] 1 test" in done.stdout)


def wikitext(rows, refinery, options):
    data = refinery.work / "data" / "wikitext"
    data.mkdir(parents=True)
    (data / "test_100k.jsonl").symlink_to(SHARED / "tasks" / "wikitext" / "test_100k.jsonl")
    for window in (1024, 8192):
        pages = [json.loads(line) for line in open(SHARED / "gold" / f"wikitext.test_100k.max{window}.jsonl")]
        pages = pages[:options.items] if options.items else pages
        result, _, _ = refinery.eval(["wikitext"], "test_100k", "float32", limit=options.items, max_length=window,
                                     data=data.parent)
        ll, words, octets = (sum(page[key] for page in pages) for key in ("ll", "words", "bytes"))
        expected = {"word_perplexity": math.exp(-ll / words), "byte_perplexity": math.exp(-ll / octets),
                    "bits_per_byte": -ll / octets / math.log(2)}
        for found in result["results"]:
            peer = expected[found["metric"]]
            rows.add(f"wikitext, windows of {window}, {len(pages)} pages: {found['metric']}", found["value"], peer,
                     found["value"] / peer, "1 +- 1e-4", abs(found["value"] / peer - 1) <= 1e-4)


def peer(folder, size, limit):
    """The harness' own evaluation in this process; prints its seconds and scores. See timing()."""
    import lm_eval
    import torch
    from lm_eval.api import task as task_module
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(int(THREADS))
    names = {"allenai/ai2_arc": "arc_easy", "tau/commonsense_qa": "commonsense_qa", "Rowan/hellaswag": "hellaswag",
             "allenai/openbookqa": "openbookqa", "baber/piqa": "piqa", "lighteval/siqa": "social_i_qa",
             "allenai/winogrande": "winogrande", "cais/mmlu": "mmlu"}

    class Rows(list):
        features = property(lambda self: dict.fromkeys(self[0]))

        def map(self, function):
            return Rows({**row, **function(row)} for row in self)

    def load(path, name=None, **_):
        found = {}
        for split, file in (("train", "fewshot"), ("dev", "fewshot"), ("validation", "dev"), ("test", "dev")):
            rows = [json.loads(line) for line in open(SHARED / "tasks" / names[path] / f"{file}.jsonl")]
            found[split] = Rows(row for row in rows if path != "cais/mmlu" or row["subject"] == name)
        return found

    task_module.datasets.load_dataset = load
    model = HFLM(pretrained=folder, dtype="bfloat16", batch_size=size, device="cpu")
    scoring = {"seconds": 0.0}
    inner = model.loglikelihood

    def timed(requests, **options):
        start = time.perf_counter()
        found = inner(requests, **options)
        scoring.update(seconds=time.perf_counter() - start, requests=len(requests))
        return found

    model.loglikelihood = timed
    tasks = ["social_iqa" if task == "social_i_qa" else task for task in TASKS]
    result = lm_eval.simple_evaluate(model=model, tasks=tasks, num_fewshot=0, limit=limit or None, bootstrap_iters=0)
    scores = {task: result["results"][task]["acc,none"] for task in tasks if task != "mmlu"}
    scores["mmlu"] = result["groups"]["mmlu"]["acc,none"]
    print(json.dumps({**scoring, "acc": scores}))


def run_peer(folder, size, limit):
    """Seconds of scoring, of the whole process, and what it found."""
    start = time.perf_counter()
    found = run([sys.executable, __file__, "--peer", folder, "--batch-size", size, "--items", limit])
    whole = time.perf_counter() - start
    return json.loads(found.splitlines()[-1]), whole


def timing(rows, refinery, options):
    part = min(5, options.items) if options.items else 5
    tried = {size: run_peer(refinery.folder, size, part)[0]["seconds"] for size in BATCH_SIZES}
    best = min(tried, key=tried.get)
    print(f"harness, {part} items a task, seconds by batch size:", {size: round(seconds, 2) for size, seconds in tried.items()},
          file=sys.stderr)
    refinery.eval(["piqa"], "dev", "bfloat16", limit=2)  # the file cache is warm for both
    peers, ours = [], []
    for _ in range(TIMED_RUNS):  # in turns: what else the machine does meets both
        peers.append(run_peer(refinery.folder, best, options.items))
        result, _, whole = refinery.eval(TASKS, "dev", "bfloat16", limit=options.items)
        ours.append((result["seconds"]["tasks"], whole))
        print(f"harness {peers[-1][1]:.1f} s (scoring {peers[-1][0]['seconds']:.1f}), refinery {whole:.1f} s (scoring {ours[-1][0]:.1f})",
              file=sys.stderr)
    found, peer_whole = peers[0][0], min(seconds for _, seconds in peers)
    peer_scoring = min(run["seconds"] for run, _ in peers)
    seconds, whole = (min(run[i] for run in ours) for i in (0, 1))
    name = f"gold dev set, bf16, {THREADS} threads, {found['requests']} requests, harness at batch size {best}"
    rows.add(f"{name}: whole command", whole, peer_whole, whole / peer_whole, "<= 0.25", whole <= 0.25 * peer_whole, "s")
    rows.add(f"{name}: scoring alone", seconds, peer_scoring, seconds / peer_scoring, "-", None, "s")
    tokens = result["tokens"]
    rows.add("tokens through the model, shared prefixes once and not", tokens["computed"], tokens["requested"],
             tokens["computed"] / tokens["requested"], "-", None)
    for figure in result["results"]:
        task = "social_iqa" if figure["task"] == "social_i_qa" else figure["task"]
        if figure["metric"] == "acc" and task in found["acc"]:
            rows.add(f"{task} acc in bf16, which differs between implementations", figure["value"], found["acc"][task], None, "-", None)


def main():
    options = parse()
    if options.peer:
        peer(options.peer, options.batch_size, options.items)
        return
    rows = Rows()
    with tempfile.TemporaryDirectory(prefix="refinery-bench-") as work:
        refinery = Refinery(options, pathlib.Path(work))
        if options.only != "scores":
            timing(rows, refinery, options)
        if options.only != "time":
            scores(rows, refinery, options)
            programs(rows, options)
    sys.exit(rows.finish())


main()
