"""Times one case of a peer in a process of its own and prints one line of JSON, as refinery_model_benchmark does for us.

    model_peers.py transformers MODEL_FOLDER decode|prefill [--batch N] [--prompt N] [--new N]
    model_peers.py llama.cpp    MODEL.gguf   decode|prefill ...

Prompts are the same token ids as ours; decoding is greedy and is the difference of two lengths of text.
"""

import argparse
import json
import os
import statistics
import time


def prompt(which, length):
    return [10 + (which * 7919 + index * 104729) % 990 for index in range(length)]


def transformers_runs(arguments):
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    model.eval()
    ids = torch.tensor([prompt(i, arguments.prompt) for i in range(arguments.batch)])

    def generate(new_tokens):
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new_tokens,
                           max_new_tokens=new_tokens, pad_token_id=0)
        return time.perf_counter() - start

    return generate


def llama_runs(arguments):
    import llama_cpp
    import numpy as np

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    model = llama_cpp.Llama(arguments.model, n_ctx=arguments.batch * (arguments.prompt + arguments.new + 1), n_batch=2048, n_ubatch=512,
                            n_threads=arguments.threads, n_threads_batch=arguments.threads, verbose=False, logits_all=False)
    ids = prompt(0, arguments.prompt)

    def generate(new_tokens):
        model.reset()
        start = time.perf_counter()
        model.eval(ids)
        for _ in range(new_tokens):
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),))
            token = int(logits.argmax())
            if new_tokens > 1:
                model.eval([token])
        return time.perf_counter() - start

    return generate


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["transformers", "llama.cpp"])
    parser.add_argument("model")
    parser.add_argument("case", choices=["decode", "prefill"])
    for name, default in (("batch", 1), ("prompt", 0), ("new", 128), ("threads", 2), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    arguments.prompt = arguments.prompt or (32 if arguments.case == "decode" else 2048)
    generate = {"transformers": transformers_runs, "llama.cpp": llama_runs}[arguments.peer](arguments)
    generate(2)
    if arguments.case == "prefill":
        times = [generate(1) for _ in range(arguments.repeat)]
    else:
        times = [(generate(1 + arguments.new) - generate(1)) / arguments.new for _ in range(arguments.repeat)]
    print(json.dumps({"seconds": statistics.median(times)}))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
