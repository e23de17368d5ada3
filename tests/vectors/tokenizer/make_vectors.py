#!/usr/bin/env python3
"""Writes <family>.gguf and expected.json: byte-level BPE vocabularies inside GGUF files, and what Hugging Face makes of text.

Run:  python make_vectors.py      (tokenizers 0.23.3, transformers 5.23.0, gguf 0.19.0, jinja2)

For each pre-tokenizer family a small vocabulary is trained on the sentences below with Hugging Face's own pre-tokenizer of that
family (gpt2, SmolLM2, Qwen2.5, Llama 3), then written as GGUF the way llama.cpp's converter does. expected.json holds ids and
decoded texts of difficult strings by `tokenizers`, and chat templates rendered by transformers (jinja2).
"""
import json
import pathlib

import gguf
import jinja2
import tokenizers
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.utils.chat_template_utils import _compile_jinja_template

HERE = pathlib.Path(__file__).parent
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CORPUS = [
    "The river rises in the hills and runs down to the sea, and the people of the valley drink from it.",
    "In 1984 there were 12345 houses; by 2024 there were 67890, and 100 more were planned for 2025.",
    "It's what we've said: they'll go, I'm sure, you're right, he'd know, and we can't say that they don't.",
    "IT'S LOUD HERE! WE'VE GOT 3.14159 REASONS, AND THEY'RE ALL GOOD ONES.",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n\tprint(i, add(i, 1))\n",
    "Über die Brücke gehen schöne Mädchen; café, naïve, façade, señor.",
    "Вот дом, который построил Джек. Это пшеница, которая в тёмном чулане хранится.",
    "東京は日本の首都です。天気がいいから、散歩しましょう。",
    "a  b   c    d     e\t\tf\r\n\r\ng",
    "😀 🎉 👍🏽 are pictures; → and ≤ are signs; 50 % of 1,000 € is 500 €.",
]

TEXTS = [
    "", " ", "  ", "\n", "\n\n", "\t", " \n", "\n ", "a", " a", "a ", "Hello world", "Hello, world!  How are you?",
    "It's we've they'll I'm you're he'd can't", "IT'S WE'VE THEY'LL I'M", "1", "12", "123", "1234", "12345 67 8",
    "year 2024,100.50", "x²+½", "a1b2", "١٢٣ digits", "  leading", "trailing   ", "a   b", "tabs\t\tand\r\nlines\r\n\r\nend",
    "\r\n \r\n  x", "caf\u00e9 cafe\u0301 \u212b", "Übermäßig", "Вот дом", "東京は日本", "😀👍🏽 ok", "\u00a0nbsp\u2003em",
    "…—“quoted”", "!!!??? ...", "$100%^&*()_+", "foo_bar.baz(qux)", "<|end|>", "a<|end|>b", " <|end|> ", "<|end|><|start|>",
    "<tool> x </tool>", "\u0000\u0001\u007f", "'s", "'S 'LL", "don't_stop", "a'b", "\u0300combining", "ﬁ ligature", "한국어",
]

TEMPLATES = {
    "chatml": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|start|>system\nBe kind<|end|>\n' }}"
              "{% endif %}{{'<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n'}}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}",
    "blocks": "{{- bos_token }}\n{%- if tools is not none %}\n  tools\n{%- endif %}\n{% for m in messages %}\n    {% if m.role == 'user' %}\n"
              "U: {{ m.content | trim }}\n    {% elif m['role'] == \"assistant\" %}\nA: {% generation %}{{ m.content }}{% endgeneration %}\n"
              "    {% else %}\n{#- nothing #}\nS: {{ m.content.upper() }}\n    {% endif %}\n{% endfor %}\nend\n",
    "json": "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}|{{ {'b': 1, 'a': [true, none, 1.5]} | tojson(sort_keys=true) }}"
            "|{{ messages[0].content | tojson(ensure_ascii=true) }}",
    "python": "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m.content.split(' ')[0].strip() }};"
              "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ messages[1:] | length }}{{ messages[-1].content.startswith('a') }}"
              "{{ 'x' if undefined_thing is not defined else 'y' }}{{ ' pad '.lstrip() ~ 'z'.rstrip('z') }}{{ messages | map(attribute='role') | join(',') }}"
              "{{ messages[0]['content'].replace('o', '0') }}{% for k, v in messages[0].items() %}{{ k }}={{ v }},{% endfor %}",
    "macro": "{% macro show(m, mark='-') -%}\n  {{ mark }}{{ m.role | capitalize }}\n{%- endmacro %}{% for m in messages %}{{ show(m, mark='*') }}\n{% endfor %}",
    "clock": "{% set d = strftime_now('%d %b %Y') %}Today: {{ d }}",
    "raise": "{% if messages[0].role != 'tool' %}{{ raise_exception('the first message must come from a tool') }}{% endif %}",
}

MESSAGES = [
    [{"role": "user", "content": " Hello <b>\"world\"</b> & ünïcode 😀\n"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one two"}, {"role": "assistant", "content": "a 'reply'"}],
]


def split(pattern):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


FAMILIES = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True), None),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]), None),
    "qwen2": (split(LETTERS + r"\p{N}" + TAIL), normalizers.NFC()),
    "llama-bpe": (split(LETTERS + r"\p{N}{1,3}" + TAIL), None),
}


def build(family):
    pre, normalizer = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE(ignore_merges=family == "llama-bpe"))
    tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(t, special=True, normalized=False) for t in ("<|start|>", "<|end|>")]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if family == "llama-bpe":
        bos = tokenizer.token_to_id("<|start|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", pair="<|start|> $A <|start|> $B", special_tokens=[("<|start|>", bos)])
    return tokenizer


def write_gguf(family, tokenizer):
    spec = json.loads(tokenizer.to_str())
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = [t for t, _ in sorted(vocab.items(), key=lambda item: item[1])]
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    for added in spec["added_tokens"]:
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if family == "qwen2":  # the embedding has more rows than the vocabulary
        for i in range(3):
            tokens.append(f"[PAD{len(tokens)}]")
            kinds.append(gguf.TokenType.UNUSED)
    writer = gguf.GGUFWriter(HERE / f"{family}.gguf", "llama")
    writer.add_context_length(128)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(family)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(m) for m in spec["model"]["merges"]])
    writer.add_bos_token_id(vocab["<|start|>"])
    writer.add_eos_token_id(vocab["<|end|>"])
    writer.add_chat_template(TEMPLATES["chatml"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def render(template, messages):
    try:
        # Rendered without the clock: strftime_now is replaced by the date that Refinery tells templates.
        compiled = _compile_jinja_template(template)
        compiled.globals["strftime_now"] = lambda pattern: "26 Jul 2024" if pattern == "%d %b %Y" else None
        return {"text": compiled.render(messages=messages, tools=None, documents=None, add_generation_prompt=True,
                                        bos_token="<|start|>", eos_token="<|end|>")}
    except jinja2.exceptions.TemplateError as error:
        return {"error": str(error)}


def main():
    out = {"made_with": f"tokenizers {tokenizers.__version__}, transformers {transformers.__version__}, "
                        f"jinja2 {jinja2.__version__}", "texts": TEXTS, "families": {}, "templates": []}
    for family in FAMILIES:
        tokenizer = build(family)
        write_gguf(family, tokenizer)
        rows = []
        for text in TEXTS:
            ids = tokenizer.encode(text).ids
            plain = tokenizer.encode(text, add_special_tokens=False).ids
            rows.append([ids, plain, tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=False)])
        out["families"][family] = rows
    for name, template in TEMPLATES.items():
        for messages in MESSAGES:
            out["templates"].append({"name": name, "template": template, "messages": messages, **render(template, messages)})
    path = HERE / "expected.json"
    path.write_text(json.dumps(out, separators=(",", ":")) + "\n")
    for file in HERE.glob("*"):
        assert file.is_dir() or file.stat().st_size < 64 * 1024, file


if __name__ == "__main__":
    main()
