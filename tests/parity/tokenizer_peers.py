"""Tokenizers and chat templates beside their peers, live: 10,000 random texts and the conversations of chat_requests.json.

  python tokenizer_peers.py PROBE [SMOLLM2.gguf] [FOLDER] [STORIES]

PROBE is tests/parity/tokenizer_probe as built; FOLDER holds llama3_1/, qwen3/ and gpt2/ (deploy/install_dependencies.sh
model), STORIES is stories260K's tok512.bin. What is missing is left out with a line that says so. Prints a row per comparison:
what, equal of all, bound; the last line is "N passed, N failed", and the exit code is 1 when one failed.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
VECTORS = HERE.parent / "vectors" / "tokenizer"
sys.path.append(str(VECTORS))

import make_chat_vectors  # noqa: E402
import make_random_vectors  # noqa: E402
import make_vectors  # noqa: E402
from random_texts import random_texts  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

rows = []


def check(what, equal, total):
    rows.append(equal == total)
    print(f"{'pass' if rows[-1] else 'FAIL'}  {what:<66} {equal:>6} of {total:<6} bound: all", flush=True)


def probe(program, mode, folder, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    done = subprocess.run([program, mode, str(folder)], input=text, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.split("\n") if line]


def compare_texts(program, what, folder, peer, texts):
    ours = probe(program, "encode", folder, texts)
    check(f"{what}: ids of random texts", sum(peer.encode(t).ids == o[0] for t, o in zip(texts, ours)), len(texts))
    check(f"{what}: texts of those ids", sum(peer.decode(o[0]) == o[1] for o in ours), len(texts))


def compare_sentencepiece(program, what, folder, proto, texts):
    import sentencepiece
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    special = [p.piece for p in proto.pieces if p.type in (2, 3, 4)]
    plain = [t for t in texts if not any(s in t for s in special) and "\0" not in t]
    ours = probe(program, "encode", folder, plain)
    check(f"{what}: ids by sentencepiece, texts without special tokens",
          sum([processor.bos_id()] + processor.encode(t) == o[0] for t, o in zip(plain, ours)), len(plain))


def from_gguf(program, path, folder):
    subprocess.run([program, "gguf", str(path), str(folder)], check=True)
    return folder


def compare_vocabularies(program, work, smollm2, released, stories):
    texts = random_texts()
    for name in make_vectors.FAMILIES:
        folder = from_gguf(program, VECTORS / f"{name}.gguf", work / name)
        compare_texts(program, f"small vocabulary, {name}, from GGUF", folder, make_vectors.build(name), texts)
    protos = {"sentencepiece": make_random_vectors.train()}
    if stories:
        protos["stories260K"] = make_random_vectors.stories(stories)
    for name, proto in protos.items():
        make_random_vectors.write_gguf(proto, work / f"{name}.gguf")
        folder = from_gguf(program, work / f"{name}.gguf", work / name)
        compare_texts(program, f"{name} from GGUF", folder, make_random_vectors.converted(proto), texts)
        compare_sentencepiece(program, name, folder, proto, texts)
    if smollm2:
        folder = from_gguf(program, smollm2, work / "smollm2")
        compare_texts(program, "SmolLM2 from GGUF, peer reads our tokenizer.json", folder,
                      Tokenizer.from_file(str(folder / "tokenizer.json")), texts)
        compare_texts(program, "SmolLM2 from GGUF, peer built by hand", folder, make_random_vectors.smollm2(smollm2), texts)
        compare_with_loader(program, smollm2, folder, texts)
    if released and (released / "gpt2").is_dir():
        peer = make_random_vectors.gpt2(released / "gpt2")
        (work / "gpt2").mkdir()
        (work / "gpt2" / "tokenizer.json").write_text(peer.to_str())
        compare_texts(program, "gpt2", work / "gpt2", peer, texts)
    for name in ("llama3_1", "qwen3"):
        if released and (released / name).is_dir():
            peer = Tokenizer.from_file(str(released / name / "tokenizer.json"))
            compare_texts(program, name, released / name, peer, texts)


def compare_with_loader(program, smollm2, folder, texts):
    """transformers' GGUF loader leaves out that SmolLM2 takes digits one by one; with that step added it must agree."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer
    peer = AutoTokenizer.from_pretrained(os.path.dirname(smollm2), gguf_file=os.path.basename(smollm2))._tokenizer
    peer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ours = probe(program, "encode", folder, texts)
    check("SmolLM2 from GGUF, transformers' GGUF loader and digits alone",
          sum(peer.encode(t, add_special_tokens=False).ids == o[0] for t, o in zip(texts, ours)), len(texts))


def compare_chats(program, work, smollm2, released):
    make_chat_vectors.chat_template_utils.datetime = make_chat_vectors.FixedClock
    requests = json.loads((VECTORS / "chat_requests.json").read_text())
    for name, peer, template in make_chat_vectors.all_templates(smollm2, released or pathlib.Path("/nowhere")):
        folder = work / f"chat-{name}"
        folder.mkdir()
        (folder / "tokenizer.json").write_text(peer._tokenizer.to_str())
        (folder / "tokenizer_config.json").write_text(json.dumps({**peer.special_tokens_map, "chat_template": template}))
        ours = probe(program, "render", folder, requests)
        theirs = [make_chat_vectors.render(peer, template, request) for request in requests]
        equal = sum(o.get("text") == t if isinstance(t, str) else "error" in o for o, t in zip(ours, theirs))
        check(f"chat template {name}: conversations as by apply_chat_template", equal, len(requests))


def main():
    program, smollm2, released, stories = (sys.argv[1:] + ["", "", ""])[:4]
    for what, path in (("SmolLM2", smollm2), ("released tokenizers", released), ("stories260K", stories)):
        if not os.path.exists(path):
            print(f"skip  {what}: nothing at '{path}'")
    smollm2, stories = [p if os.path.exists(p) else "" for p in (smollm2, stories)]
    released = pathlib.Path(released) if os.path.exists(released) else None
    with tempfile.TemporaryDirectory() as work:
        compare_vocabularies(program, pathlib.Path(work), smollm2, released, stories)
        compare_chats(program, pathlib.Path(work), smollm2, released)
    print(f"{sum(rows)} passed, {len(rows) - sum(rows)} failed")
    sys.exit(not all(rows))


if __name__ == "__main__":
    main()
