"""Oracles for tests/worker/task/generate/sampler_test: what transformers' logits processors make of rows of logits.

Writes sampling.json: rows of logits (float32 values), and for each case the settings, prompt, answer so far, and the
distribution that is left: token -> probability. Processors stand in the order of transformers' generate: repetition penalty,
temperature, top-k, top-p, min-p. Presence and frequency penalty, which transformers lacks, come after the repetition penalty as
vLLM defines them: logits -= frequency * counts; logits -= presence * (counts > 0), counts over the answer alone.
Also log-softmax and the likeliest tokens of every row (torch.log_softmax, as compute_transition_scores takes it).

Made with torch 2.11.0 and the transformers named in the file:  python make_vectors.py
"""

import itertools
import json
import pathlib

import torch
import transformers
from transformers.generation.logits_process import (LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor,
                                                    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

HERE = pathlib.Path(__file__).parent
VOCAB = 40


def rows():
    torch.manual_seed(11)
    flat = torch.randn(VOCAB)
    steep = torch.randn(VOCAB) * 4
    ties = (torch.randn(VOCAB) * 2).round() / 2          # equal logits, also at the border of top-k
    one = torch.full((VOCAB,), float("-inf"))
    one[17] = -3.0                                       # all tokens but one impossible
    few = torch.randn(VOCAB)
    few[::3] = float("-inf")
    return {"flat": flat, "steep": steep, "ties": ties, "one": one, "few": few}


PROMPT = [3, 3, 17, 21, 39, 8]
ANSWER = [5, 17, 5, 5, 30, 8, 2]


def settings():
    yield {}
    for temperature in (0.01, 0.3, 1.7, 50.0):
        yield {"temperature": temperature}
    for top_k in (2, 5, VOCAB - 1, VOCAB, 1000):
        yield {"top_k": top_k}
    for top_p in (0.0, 0.3, 0.9, 0.999, 1.0):
        yield {"top_p": top_p}
    for min_p in (0.02, 0.4, 1.0):
        yield {"min_p": min_p}
    for repetition in (0.6, 1.3):
        yield {"repetition_penalty": repetition}
    for presence, frequency in ((0.7, 0.0), (0.0, 0.4), (-1.5, 0.25), (2.0, 2.0)):
        yield {"presence_penalty": presence, "frequency_penalty": frequency}
    for temperature, top_k, top_p, min_p in itertools.product((0.6, 1.4), (0, 7), (0.8,), (0.0, 0.15)):
        yield {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    yield {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.2, "presence_penalty": 0.5,
           "frequency_penalty": 0.3}


def distribution(row, s):
    scores = row.clone().unsqueeze(0)
    ids = torch.tensor([PROMPT + ANSWER])
    if s.get("repetition_penalty", 1.0) != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(s["repetition_penalty"])(ids, scores)
    counts = torch.bincount(torch.tensor(ANSWER), minlength=VOCAB).unsqueeze(0)
    scores = scores - s.get("frequency_penalty", 0.0) * counts
    scores = scores - s.get("presence_penalty", 0.0) * (counts > 0)
    processors = LogitsProcessorList()
    if s.get("temperature", 1.0) != 1.0:
        processors.append(TemperatureLogitsWarper(s["temperature"]))
    if s.get("top_k", 0) != 0:
        processors.append(TopKLogitsWarper(s["top_k"]))
    if s.get("top_p", 1.0) < 1.0:
        processors.append(TopPLogitsWarper(s["top_p"]))
    if s.get("min_p", 0.0) > 0:
        processors.append(MinPLogitsWarper(s["min_p"]))
    probabilities = processors(ids, scores).softmax(dim=-1)[0]
    return {int(t): float(f"{probabilities[t]:.7g}") for t in probabilities.nonzero()[:, 0]}


def main():
    number = lambda x: "-inf" if x == float("-inf") else x
    out = {"made_by": f"transformers {transformers.__version__}, torch {torch.__version__}", "prompt": PROMPT,
           "answer": ANSWER, "rows": {}, "log_probs": {}, "cases": []}
    for name, row in rows().items():
        out["rows"][name] = [number(x) for x in row.tolist()]
        log_probs = torch.log_softmax(row, dim=-1)
        out["log_probs"][name] = [number(x) for x in log_probs.tolist()]
        for s in settings():
            if name == "ties" and s.get("top_p", 1.0) < 1.0:
                continue  # which of equal tokens top-p keeps depends on an unstable sort
            out["cases"].append({"row": name, "settings": s, "distribution": distribution(row, s)})
    (HERE / "sampling.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
