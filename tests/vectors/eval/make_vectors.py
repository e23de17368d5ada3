"""Vectors for tests/worker/task/eval: what lm-evaluation-harness 0.4.13 makes of the benchmarks' rows.

    tests/bench/run.sh tests/vectors/eval/make_vectors.py DATA MODEL_FOLDER

DATA is laid out as `refinery data pull` leaves it (<benchmark>/<split>.jsonl); MODEL_FOLDER is an imported SmolLM2-135M-Instruct
(its tokenizer and chat template are used, never its weights). Writes beside this file:

prompts.json   digests of the context and continuation strings of 1,000 random items of each benchmark, 0-shot, 5-shot and through
               chat templates. Rows are drawn by random.Random(1000); a digest covers 100 items.
encodings.json token ids of some pairs by the rules of 0.4.13 and of 0.4.9.1, with a tokenizer that adds a BOS and one that does not.
figures.json   accuracies and standard errors of MMLU's subjects and groups, and bootstrapped ones, by the harness' own functions.
"""

import hashlib
import json
import pathlib
import random
import sys

import datasets
import lm_eval
from lm_eval.api import metrics
from lm_eval.api import task as task_module
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).parent
ITEMS = 1000
PER_DIGEST = 100
SEED = 1000
# A template that refuses a system message, and shows roles and white space plainly.
REFUSING = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
            "<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")

# Harness' task, our folder, dataset path and the splits that the task reads.
TASKS = [
    ("arc_easy", "arc_easy", "allenai/ai2_arc", {"train": "train", "validation": "validation", "test": "test"}),
    ("commonsense_qa", "commonsense_qa", "tau/commonsense_qa", {"train": "train", "validation": "validation"}),
    ("hellaswag", "hellaswag", "Rowan/hellaswag", {"train": "train", "validation": "validation"}),
    ("openbookqa", "openbookqa", "allenai/openbookqa", {"train": "train", "validation": "validation", "test": "test"}),
    ("piqa", "piqa", "baber/piqa", {"train": "train", "validation": "validation"}),
    ("social_iqa", "social_i_qa", "lighteval/siqa", {"train": "train", "validation": "validation"}),
    ("winogrande", "winogrande", "allenai/winogrande", {"train": "train", "validation": "validation"}),
]


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


class Rows(list):
    """A list of rows that answers what the harness asks a datasets.Dataset for; every row keeps its own types."""

    @property
    def features(self):
        return {key: None for key in self[0]}

    def map(self, function):
        return Rows({**row, **function(row)} for row in self)


class Local:
    """Stands for the hub: load_dataset returns the pulled rows."""

    def __init__(self, data):
        self.data = pathlib.Path(data)
        self.cache = {}

    def rows(self, folder, split):
        key = (folder, split)
        if key not in self.cache:
            self.cache[key] = read(self.data / folder / f"{split}.jsonl")
        return self.cache[key]

    def load(self, path, name=None, **_):
        if path == "cais/mmlu":
            return {split: Rows(row for row in self.rows("mmlu", split) if row["subject"] == name) for split in ("dev", "test")}
        folder, splits = next((folder, splits) for _, folder, where, splits in TASKS if where == path)
        return {split: Rows(self.rows(folder, file)) for split, file in splits.items()
                if (self.data / folder / f"{file}.jsonl").exists()}


def set_shots(task, shots):
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)
    return task


def requests_of(task, indices, shots, chat=None, multi_turn=True):
    """Per doc the (context, continuation) pairs; `indices` in rising order."""
    set_shots(task, shots)
    task.build_all_requests(samples=indices, apply_chat_template=chat is not None, fewshot_as_multiturn=multi_turn,
                            chat_template=chat)
    docs, last = [], None
    for instance in task.instances:
        if instance.doc_id != last:
            docs.append([])
            last = instance.doc_id
        docs[-1].append(instance.args)
    assert len(docs) == len(indices)
    return docs


def digests_of(docs):
    digests = []
    for begin in range(0, len(docs), PER_DIGEST):
        text = "".join(f"{context}\x1f{continuation}\x1e" for doc in docs[begin:begin + PER_DIGEST]
                       for context, continuation in doc)
        digests.append("sha256:" + hashlib.sha256(text.encode()).hexdigest())
    return digests


def chat_of(folder, template=None):
    model = HFLM.__new__(HFLM)
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    model.tokenizer.chat_template = template or json.load(open(folder / "tokenizer_config.json"))["chat_template"]
    model.chat_template_args = {}
    return model.apply_chat_template


def modes(folder):
    smol, refusing = chat_of(folder), chat_of(folder, REFUSING)
    return [("plain", 0, None, True), ("plain", 5, None, True), ("chat", 0, smol, True), ("chat", 2, smol, True),
            ("chat_single_turn", 2, smol, False), ("chat_refusing", 2, refusing, True)]


def mmlu_requests(manager, rows, indices, shots, chat, multi_turn):
    """Each subject is a task of its own; its docs are the rows of the subject, in order."""
    wanted, position, seen = {}, {}, {}
    for index, row in enumerate(rows):
        subject = row["subject"]
        position[index] = seen.get(subject, 0)
        seen[subject] = position[index] + 1
    chosen = set(indices)
    for index in indices:
        wanted.setdefault(rows[index]["subject"], []).append(index)
    docs = {}
    for subject, own in wanted.items():
        task = load_task(manager, f"mmlu_{subject}")
        found = requests_of(task, [position[index] for index in own], shots, chat, multi_turn)
        docs.update(zip(own, found))
    assert chosen == set(docs)
    return [docs[index] for index in indices]


def load_task(manager, name):
    loaded = manager.load([name]) if hasattr(manager, "load") else manager.load_task_or_group(name)
    tasks = loaded["tasks"] if "tasks" in loaded else loaded
    return tasks[name]


def prompts(data, folder):
    local = Local(data)
    task_module.datasets.load_dataset = local.load
    manager = TaskManager()
    out = []
    for name, where, _, splits in TASKS + [("mmlu", "mmlu", "cais/mmlu", {"test": "test"})]:
        scored = "test" if "test" in splits else "validation"
        rows = local.rows(where, scored)
        indices = sorted(random.Random(SEED).sample(range(len(rows)), min(ITEMS, len(rows))))
        for mode, shots, chat, multi_turn in modes(folder):
            if name == "mmlu":
                docs = mmlu_requests(manager, rows, indices, shots, chat, multi_turn)
            else:
                docs = requests_of(load_task(manager, name), indices, shots, chat, multi_turn)
            out.append({"benchmark": where, "split": scored, "rows": len(rows), "items": len(indices), "mode": mode,
                        "shots": shots, "digests": digests_of(docs)})
            print(where, mode, shots, len(docs), file=sys.stderr)
    return {"lm_eval": lm_eval.__version__, "seed": SEED, "per_digest": PER_DIGEST, "refusing_template": REFUSING, "prompts": out}


def encoder(folder, adds_bos, add_bos_token):
    spec = json.load(open(folder / "tokenizer.json"))
    bos = "<|im_start|>"
    if adds_bos:
        number = next(token["id"] for token in spec["added_tokens"] if token["content"] == bos)
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}}}
    path = pathlib.Path("/tmp/refinery-encoder.json")
    path.write_text(json.dumps(spec))
    model = HFLM.__new__(HFLM)
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=bos, eos_token="<|im_end|>")
    model.add_bos_token = add_bos_token
    model.backend = "causal"
    model.custom_prefix_token_id = None
    model.enable_thinking = None
    model._loglikelihood_tokens = lambda requests, **_: requests
    return model


class Request:
    def __init__(self, context, continuation):
        self.args = (context, continuation)


PAIRS = [("Question: What is ice?\nAnswer:", " frozen water"), ("The cat ", "sat"), ("tab\t\n ", " x"), ("", " nothing before"),
         ("<|im_start|>user\nHi<|im_end|>\n", "Hello"), ("", "<|im_start|>x y"), ("caf\u00e9 na\u00efve", " \u00fcber \u65e5\u672c"),
         ("trailing\u00a0", "no-break"), ("In 1987 there were 1,024", " of 3.14159"), ("a", "b")]


def encodings(folder):
    out = []
    for adds_bos in (False, True):
        for version, add_bos_token in (("0.4.13", None), ("0.4.9.1", False)):
            model = encoder(folder, adds_bos, add_bos_token)
            found = model.loglikelihood([Request(*pair) for pair in PAIRS], disable_tqdm=True)
            out.append({"adds_bos": adds_bos, "version": version,
                        "pairs": [{"context": a, "continuation": b, "context_ids": list(x), "continuation_ids": list(y)}
                                  for (a, b), x, y in found]})
    return {"lm_eval": lm_eval.__version__, "bos": "<|im_start|>", "encodings": out}


def right(subject, index):
    """A rule that both sides can follow: whether item `index` of the subject with that number is answered rightly."""
    return (index * 37 + subject * 11) % 101 < 40 + subject % 7


def figures(data):
    local = Local(data)
    sizes = {}
    for row in local.rows("mmlu", "test"):
        sizes[row["subject"]] = sizes.get(row["subject"], 0) + 1
    subjects = sorted(sizes)
    correct = {s: [float(right(i, j)) for j in range(sizes[s])] for i, s in enumerate(subjects)}
    results = {s: {"acc,none": metrics.mean(correct[s]), "acc_stderr,none": metrics.mean_stderr(correct[s]), "sample_len": sizes[s]}
               for s in subjects}
    manager = TaskManager()
    groups = {}
    for name in ("mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"):
        part = name[5:]
        members = [s for s in subjects if not part or group_of(s) == part]
        own = [results[s] for s in members]
        groups[name] = {
            "acc": metrics.aggregate_subtask_metrics([r["acc,none"] for r in own], [r["sample_len"] for r in own]),
            "acc_stderr": float(metrics.pooled_sample_stderr([r["acc_stderr,none"] for r in own], [r["sample_len"] for r in own])),
            "count": sum(r["sample_len"] for r in own)}
    values = [-(i * 37 % 101) / 10 - 0.5 for i in range(60)]
    import os
    os.environ["DISABLE_MULTIPROC"] = "1"
    bootstrap = {"values": values, "iterations": 3000, "perplexity": metrics.perplexity(values),
                 "stderr": metrics.bootstrap_stderr(metrics.perplexity, values, 3000)}
    discordant = []
    from scipy.stats import binomtest
    for a, b in ((0, 0), (3, 3), (1, 9), (12, 30), (100, 140), (0, 20), (500, 420)):
        discordant.append([a, b, binomtest(a, a + b, 0.5).pvalue if a + b else 1.0])
    matches = []
    for answer, expected in (("Paris", "paris"), ("Paris.", "Paris"), ("\u00c9t\u00e9!", "\u00e9t\u00e9"), ("42 apples", "apples"),
                             ("a-b", "ab"), ("same", "same"), ("x ", "x"), ("No. 7", "no")):
        for flags in ((False, False, False), (True, False, False), (False, True, False), (False, False, True), (True, True, True)):
            value = metrics.exact_match_hf_evaluate([answer], [expected], ignore_case=flags[0], ignore_punctuation=flags[1],
                                                    ignore_numbers=flags[2])["exact_match"]
            matches.append([answer, expected, *flags, bool(value)])
    return {"lm_eval": lm_eval.__version__, "exact_match": matches,
            "subjects": [{"subject": s, "count": sizes[s], "acc": results[s]["acc,none"], "acc_stderr": results[s]["acc_stderr,none"]}
                         for s in subjects],
            "groups": groups, "bootstrap": bootstrap, "mcnemar": discordant}


def group_of(subject):
    """From the harness' own task files."""
    folder = pathlib.Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    text = (folder / f"mmlu_{subject}.yaml").read_text()
    return next(part for part in ("social_sciences", "humanities", "stem", "other") if f"mmlu_{part}_tasks" in text)


def main():
    data, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    wanted = sys.argv[3:] or ["prompts", "encodings", "figures"]
    makers = {"prompts": lambda: prompts(data, folder), "encodings": lambda: encodings(folder), "figures": lambda: figures(data)}
    for name in wanted:
        (HERE / f"{name}.json").write_text(json.dumps(makers[name](), indent=0, ensure_ascii=True) + "\n")


main()
