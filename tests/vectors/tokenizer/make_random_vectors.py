#!/usr/bin/env python3
"""Writes sentencepiece.gguf and random_digests.json: what the peers make of the 10,000 texts of random_texts.py.

Run:  python make_random_vectors.py SMOLLM2.gguf FOLDER STORIES      (tokenizers 0.23.3, sentencepiece 0.2.3, gguf 0.19.0)

FOLDER holds llama3_1/, qwen3/ and gpt2/ (deploy/install_dependencies.sh model), STORIES is stories260K's tok512.bin. A digest
is the SHA-256 of a line for each text, first of the ids with commas between, then of the decoded texts as JSON.

sentencepiece.gguf is a vocabulary trained here by sentencepiece itself (BPE, byte fallback). Two peers tokenize SentencePiece
vocabularies: Hugging Face's conversion (the digest) and sentencepiece, which must agree on every text without special tokens.
"""
import hashlib
import io
import json
import pathlib
import struct
import sys

import gguf
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import generate_merges

import make_vectors
from random_texts import random_texts

HERE = pathlib.Path(__file__).parent
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def digests(tokenizer, texts):
    ids, decoded = hashlib.sha256(), hashlib.sha256()
    for text in texts:
        row = tokenizer.encode(text).ids
        ids.update((",".join(map(str, row)) + "\n").encode())
        decoded.update(tokenizer.decode(row).encode() + b"\n")
    return {"ids": ids.hexdigest(), "texts": decoded.hexdigest()}


def train():
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_vectors.CORPUS * 3), model_writer=out, vocab_size=500, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.9995,
        user_defined_symbols=["<tool>"], split_digits=True, allow_whitespace_only_pieces=True, minloglevel=2)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(out.getvalue())
    return proto


def stories(path):
    """llama2.c's format: the longest token's size, then score, size and text of each token, with blanks for U+2581."""
    data = pathlib.Path(path).read_bytes()
    proto, at = sentencepiece_model_pb2.ModelProto(), 4
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    proto.normalizer_spec.name, proto.normalizer_spec.add_dummy_prefix = "identity", True
    proto.normalizer_spec.remove_extra_whitespaces, proto.normalizer_spec.escape_whitespaces = False, True
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        text, at = data[at + 8:at + 8 + size].decode(), at + 8 + size
        index = len(proto.pieces)
        special = index < 3
        piece = proto.pieces.add()
        piece.piece = ["<unk>", "<s>", "</s>"][index] if special else text.replace(" ", "\u2581")
        piece.score = score
        byte = len(text) == 6 and text.startswith("<0x")
        piece.type = (UNKNOWN, CONTROL, CONTROL)[index] if special else BYTE if byte else NORMAL
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto


def write_gguf(proto, path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([p.piece for p in proto.pieces])
    writer.add_token_scores([p.score for p in proto.pieces])
    writer.add_token_types([p.type for p in proto.pieces])
    for name, piece in (("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>")):
        getattr(writer, f"add_{name}_token_id")([p.piece for p in proto.pieces].index(piece))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def converted(proto):
    """Hugging Face's conversion of a SentencePiece BPE model (LlamaConverter), with the tokenizer.json of released Llamas."""
    vocab = {p.piece: i for i, p in enumerate(proto.pieces)}
    scores = {p.piece: p.score for p in proto.pieces}
    special = {p.piece for p in proto.pieces if p.type in (UNKNOWN, CONTROL, BYTE)}
    merges = generate_merges(vocab, scores, skip_tokens=special)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B",
                                                             special_tokens=[("<s>", vocab["<s>"])])
    for p in proto.pieces:
        if p.type in (UNKNOWN, CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(p.piece, special=p.type != USER_DEFINED, normalized=False)])
    return tokenizer


def disagreements(proto, tokenizer, texts):
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    special = [p.piece for p in proto.pieces if p.type in (UNKNOWN, CONTROL, USER_DEFINED)]
    plain = [t for t in texts if not any(s in t for s in special) and "\0" not in t]
    return len(plain), [t for t in plain if [processor.bos_id()] + processor.encode(t) != tokenizer.encode(t).ids]


def gpt2(folder):
    merges = [tuple(line.split(" ")) for line in (folder / "vocab.bpe").read_text().split("\n")[1:] if line]
    tokenizer = Tokenizer(models.BPE(json.loads((folder / "encoder.json").read_text()), merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def smollm2(path):
    """From the GGUF file by hand: the pieces of HuggingFaceTB's own tokenizer.json (digits alone, then GPT-2's letters)."""
    fields = gguf.GGUFReader(path).fields
    strings = lambda key: [bytes(fields[key].parts[i]).decode() for i in fields[key].data]
    tokens = strings("tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ")) for m in strings("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([t for t, i in zip(tokens, types.data) if types.parts[i][0] == CONTROL])
    return tokenizer


def main():
    smollm2_path, folder, stories_path = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
    texts = random_texts()
    peers = {name: make_vectors.build(name) for name in make_vectors.FAMILIES}
    for name, proto in (("sentencepiece", train()), ("stories260K", stories(stories_path))):
        if name == "sentencepiece":
            write_gguf(proto, HERE / "sentencepiece.gguf")
        peers[name] = converted(proto)
        plain, different = disagreements(proto, peers[name], texts)
        print(f"{name}: sentencepiece and Hugging Face differ in {len(different)} of {plain} plain texts", different[:2])
    peers["smollm2"] = smollm2(smollm2_path)
    peers["gpt2"] = gpt2(folder / "gpt2")
    for name in ("llama3_1", "qwen3"):
        peers[name] = Tokenizer.from_file(str(folder / name / "tokenizer.json"))
    out = {"made_with": f"tokenizers {tokenizers.__version__}, sentencepiece {sentencepiece.__version__}",
           "first": texts[:3], "digests": {name: digests(peer, texts) for name, peer in peers.items()}}
    (HERE / "random_digests.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
