#!/usr/bin/env python3
"""Writes constraints.json: the tokens that the Python package llguidance allows, step by step.

Run:  python make_constraint_vectors.py      (llguidance 1.9.1, tokenizers 0.23.3)

The vocabulary is smollm.gguf's. Forcing is switched off (no_forcing): every way to cut a text into tokens is allowed, as in
Refinery. A mask is 450 bits as hexadecimal digits, bit t of the number for token t; "start" is the first, then one a token.
"""
import json
import pathlib

import llguidance
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

import make_vectors

HERE = pathlib.Path(__file__).parent
VOCABULARY = 450
BLANKS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}

SCHEMAS = [
    ({"type": "object", "properties": {"question": {"type": "string"}, "n": {"type": "integer"}}, "required": ["question"],
      "additionalProperties": False}, '{"question": "Why 😀?", "n": 12}'),
    ({"type": "array", "items": {"enum": ["the", "river", 3]}, "minItems": 2, "maxItems": 3}, '["the", 3]'),
    ({"type": "string", "pattern": "^[A-Z][a-z]{2,5}( [0-9]+)?$"}, '"River 10"'),
    ({"anyOf": [{"type": "number", "minimum": -2.5}, {"type": "null"}]}, "-2.25"),
]
REGEXES = [("(yes|no|maybe)[.!]", "maybe."), (r"[\u4e00-\u9fff]{1,3}。?", "東京。"), (r"[0-9]{4}-[0-9]{2}", "2024-11")]
LARKS = [('start: "call " <|start|> /[a-z]+/ ("," /[a-z]+/)*\n', "call <|start|>the,and")]


def lark(grammar):
    return '%llguidance {"no_forcing": true}\n' + grammar


class Peer:
    """What llguidance wants to know about a tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        alphabet = [c for c in range(256) if chr(c).isprintable() and c not in (32, 0xAD) and not 0x7F <= c <= 0xA0]
        letters = {chr(c): c for c in alphabet}
        letters.update({chr(256 + i): c for i, c in enumerate(c for c in range(256) if c not in alphabet)})
        self.tokens = [added[i].content.encode() if i in added else bytes(letters[c] for c in tokenizer.id_to_token(i))
                       for i in range(size)]
        self.special_token_ids = [i for i, t in added.items() if t.special]
        self.eos_token_id, self.bos_token_id = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|start|>")

    def __call__(self, text):
        return self.tokenizer.encode(text if isinstance(text, str) else text.decode(), add_special_tokens=False).ids


def masks(tokenizer, peer, grammar, text):
    matcher = LLMatcher(tokenizer, grammar)
    assert not matcher.get_error(), matcher.get_error()
    rows = []
    for token in peer(text) + [None]:
        bits = int.from_bytes(matcher.compute_bitmask()[:(VOCABULARY + 7) // 8], "little") & ((1 << VOCABULARY) - 1)
        rows.append(f"{bits:x}")
        if token is not None:
            assert matcher.consume_token(token), (grammar, text, token)
    return rows


def main():
    peer = Peer(make_vectors.build("smollm"))
    tokenizer = LLTokenizer(TokenizerWrapper(peer), n_vocab=VOCABULARY)
    cases = []
    for kind, list_of in (("json", SCHEMAS), ("regex", REGEXES), ("lark", LARKS)):
        for source, text in list_of:
            if kind == "json":
                grammar = lark("start: %json " + json.dumps({**source, "x-guidance": BLANKS}) + "\n")
                source = json.dumps(source)
            else:
                grammar = lark(f"start: /{source}/\n" if kind == "regex" else source)
            cases.append({"kind": kind, "source": source, "text": text, "masks": masks(tokenizer, peer, grammar, text)})
    out = {"made_with": f"llguidance {llguidance.__version__}", "cases": cases}
    (HERE / "constraints.json").write_text(json.dumps(out, ensure_ascii=False, indent=0) + "\n")


if __name__ == "__main__":
    main()
