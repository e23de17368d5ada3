"""Writes tests/fuzz/corpus/<format>/: malformed files made by hand, which random edits of valid ones would not reach.

  python3 tests/fuzz/make_corpus.py
"""
import os
import struct

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "corpus")
MOST_BYTES = 48 * 1024


def put(folder, files):
    os.makedirs(os.path.join(ROOT, folder), exist_ok=True)
    for name, data in files.items():
        data = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
        assert len(data) <= MOST_BYTES, (folder, name, len(data))
        with open(os.path.join(ROOT, folder, name), "wb") as file:
            file.write(data)


def grow(start, step, times=40, show="ns.s | length"):
    return f"{{% set ns = namespace(s={start}) %}}{{% for i in range({times}) %}}{{% set ns.s = {step} %}}{{% endfor %}}{{{{ {show} }}}}"


def templates():
    files = {
        # texts and lists that grow with every turn
        "add": grow("'aaaaaaaaaaaaaaaa'", "ns.s + ns.s", 64), "tilde": grow("'ab'", "ns.s ~ ns.s", 60, "ns.s"),
        "join": grow("'ab'", "[ns.s, ns.s, ns.s, ns.s] | join('')"), "join_method": grow("'ab'", "ns.s.join([ns.s, ns.s, ns.s])"),
        "replace_method": grow("'a'", "ns.s.replace('a', 'aaaaaaaa')"), "replace_filter": grow("'a'", "ns.s | replace('a', 'aaaaaaaa')"),
        "replace_empty": grow("'aaaa'", "ns.s.replace('', ns.s)"), "tojson": grow("'\\\\\"'", "ns.s | tojson", 60),
        "list_add": grow("[1, 2]", "ns.s + ns.s", 64), "format": grow("'%s%s'", "ns.s | format(ns.s, ns.s)"),
        "format_method": grow("'a'", "'{0}{0}{0}{0}'.format(ns.s)"), "escape": grow("'&<>'", "ns.s | escape | string | forceescape"),
        "urlencode": grow("'%% '", "ns.s | urlencode"), "indent": grow("'a\\nb\\n'", "ns.s | indent(50, true)", 200),
        "list_string": grow("[]", "[ns.s, ns.s]", 40, "ns.s"), "dict_json": grow("{}", "{'a': ns.s, 'b': ns.s}", 40, "ns.s | tojson | length"),
        "dict_equal": "{% set ns = namespace(d={}, e={}) %}{% for i in range(40) %}{% set ns.d = {'a': ns.d, 'b': ns.d} %}"
                      "{% set ns.e = {'a': ns.e, 'b': ns.e} %}{% endfor %}{{ ns.d == ns.e }}",
        "nest_list": grow("[]", "[ns.s]", 100000, "ns.s | tojson"), "nest_compare": grow("[]", "[ns.s]", 100000, "ns.s == ns.s"),
        "repeat": "{{ 'a' * 4000000000 }}", "repeat_nested": "{{ (('a' * 100000) * 100000) | length }}", "repeat_list": "{{ ([1] * 1000000000) | length }}",
        # numbers that decide about sizes
        "center": "{{ 'a'.center(4000000000) }}{{ 'a' | center(4000000000) }}", "ljust": "{{ 'a'.ljust(4000000000) }}{{ 'a'.zfill(4000000000) }}",
        "indent_json": "{{ [[[[[[1]]]]]] | tojson(indent=1000000000) }}", "indent_width": "{{ 'a\nb' | indent(4000000000) }}",
        "format_width": "{{ '%4000000000d' | format(1) }}{{ '%.4000000000f' | format(1.0) }}", "format_width_2": "{{ '{:4000000000}'.format(1) }}",
        "strftime_width": "{{ strftime_now('%4000000000d') }}{{ strftime_now('%9999999Y') }}", "strftime_many": "{{ strftime_now('%c' * 100000) }}",
        "range": "{{ range(1000000000000) | list | length }}", "range_back": "{{ range(0, -9223372036854775808, -1) | length }}{{ range(1, 2, 0) }}",
        "slice": "{{ 'abc'[-9223372036854775808:9223372036854775807:-1] }}{{ [1,2][::0] }}{{ 'abc'[::-9223372036854775808] }}",
        "batch": "{{ range(10) | batch(9000000000000000000, 'x') | list }}", "slices": "{{ range(10) | slice(9000000000000000000) | list }}",
        "power": "{{ 10 ** 1000000000 }}{{ 2 ** -1 }}", "overflow": "{{ 9223372036854775807 + 1 }}{{ -9223372036854775808 // -1 }}",
        "remainder": "{{ -9223372036854775808 % -1 }}", "divide": "{{ 1 / 0 }}", "floor_divide": "{{ 1 // 0 }}", "modulo": "{{ 1 % 0 }}",
        "split": "{{ ('a ' * 1000000).split(' ') | length }}", "sort": "{{ range(90000) | list | sort | reverse | list | unique | list | length }}",
        # work without end
        "loops": "{% for a in range(10000) %}{% for b in range(10000) %}{% for c in range(10000) %}{% endfor %}{% endfor %}{% endfor %}",
        "loops_out": "{% for a in range(10000) %}{% for b in range(10000) %}" + "x" * 60 + "{% endfor %}{% endfor %}",
        "set_block": "{% set a %}{% for i in range(100000) %}" + "x" * 40 + "{% endfor %}{% endset %}{{ [a, a, a, a] | join | length }}",
        "macro_self": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "macro_pair": "{% macro f(n) %}{{ g(n) }}{{ g(n) }}{% endmacro %}{% macro g(n) %}{% if n < 60 %}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}",
        "loop_self": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
        "call": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call f() %}" * 24 + "x" + "{% endcall %}" * 24,
        "include_self": "{% include 'chat_template' %}", "import_self": "{% import 'chat_template' as t %}{{ t }}",
        "extends_self": "{% extends 'chat_template' %}{% block a %}{{ super() }}{% endblock %}",
        "holds_itself": "{% set ns = namespace() %}{% set ns.me = ns %}{{ ns }}{{ ns.me.me.me }}{{ ns | tojson }}",
        # text that nests
        "parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "brackets": "{{ " + "[" * 20000 + "]" * 20000 + " }}",
        "braces": "{{ " + "{1:" * 9000 + "1" + "}" * 9000 + " }}", "nots": "{{ " + "not " * 10000 + "true }}", "minuses": "{{ " + "-" * 30000 + "1 }}",
        "ifs": "{% if true %}" * 1500 + "{% endif %}" * 1500, "fors": "{% for x in [1] %}" * 1500 + "{% endfor %}" * 1500,
        "elifs": "{% if false %}" + "{% elif false %}" * 2500 + "{% endif %}", "inline_ifs": "{{ " + "1 if true else " * 3000 + "2 }}",
        "filters": "{{ 'a'" + "|upper" * 6000 + " }}", "attributes": "{{ messages" + ".a" * 20000 + " }}", "sums": "{{ 1" + "+1" * 20000 + " }}",
        "ands": "{{ 1" + " and 1" * 6000 + " }}", "calls": "{{ messages" + "()" * 20000 + " }}", "subscripts": "{{ messages" + "[0]" * 10000 + " }}",
        "generations": "{% generation %}" * 2500, "generation_words": "{%" + " generation" * 3000 + "%}{% endgeneration %}",
        # bytes
        "not_utf8": b"{{ '\xff\xfe\x80' }}{% if \xc0 %}", "nul": b"{{ 'a\x00b' }}\x00{% raw %}\x00{% endraw %}", "unclosed": "{% for m in messages %}{{ m.content",
        "comments": "{#" * 20000, "tags": "{%" * 20000, "raws": "{% raw %}" * 4000, "direction": "{{ '\u202e' }}{# \u202e #}", "backslash": "{{ '\\", "escapes": "{{ '\\ud800\\x\\u{' }}",
        "names": "{{ debug() }}{{ self }}{{ loop }}{{ namespace }}{{ range }}{{ dict }}{{ cycler(1) }}{{ joiner() }}{{ lipsum(1000000000) }}",
    }
    put("template", {name + ".jinja": data for name, data in files.items()})


def tokenizers():
    def model(parts="", vocab='"a":0,"b":1', merges=""):
        return f'{{"version":"1.0","added_tokens":[],{parts}"model":{{"type":"BPE","vocab":{{{vocab}}},"merges":[{merges}]}}}}'

    def split(pattern):
        return model('"pre_tokenizer":{"type":"Split","pattern":{"Regex":"%s"},"behavior":"Isolated","invert":false},' % pattern)

    patterns = {
        "exponential": "(a+)+$", "exponential_2": "(a|a)*$", "stars": "((a*)*)*c", "cubic": "a*a*a*a*a*b", "references": "(a*)(a*)(a*)\\\\1\\\\2\\\\3c",
        "lookbehind": "(?<=a+)b", "lookahead": "(?=(a+))a*b\\\\1", "calls_itself": "(?<x>a\\\\g<x>?b?)+$", "left_recursion": "(?<x>\\\\g<x>a|a)",
        "counts": "(a{1000}){1000}{1000}", "count": "a{0,100000}b", "open": "(((((", "deep": "(" * 5000 + "a" + ")" * 5000, "class": "[" + "a-z" * 5000 + "]",
        "empty": "", "classes": "[" * 3000 + "a" + "]" * 3000, "property": "\\\\p{NoSuch}", "quantifiers": "a" + "*" * 5000, "alternatives": "|".join(["a"] * 5000),
        "absent": "(?~a+)+$", "conditional": "(a)?(?(1)b|c)+$", "possessive": "(a++)+a$", "unicode": "(\\\\X)+$",
    }
    chain = '"normalizer":{"type":"Sequence","normalizers":[%s]},'
    files = {"regex_" + name: split(pattern) for name, pattern in patterns.items()} | {
        "replace_growth": model(chain % ",".join(['{"type":"Replace","pattern":{"String":"a"},"content":"%s"}' % ("a" * 16)] * 8)),
        "replace_regex": model(chain % '{"type":"Replace","pattern":{"Regex":"(a+)+$"},"content":""}'),
        "prepend_growth": model(chain % ",".join(['{"type":"Prepend","prepend":"%s"}' % ("a" * 100)] * 300)),
        "deep_sequence": model('"pre_tokenizer":' + '{"type":"Sequence","pretokenizers":[' * 120 + '{"type":"Whitespace"}' + "]}" * 120 + ","),
        "very_deep_sequence": model('"pre_tokenizer":' + '{"type":"Sequence","pretokenizers":[' * 900 + '{"type":"Whitespace"}' + "]}" * 900 + ","),
        "merge_unknown": model(merges='"a c","x y"'), "merge_self": model(vocab='"a":0,"aa":1', merges='"a a","aa aa"'), "merge_no_space": model(merges='"aa"'),
        "merge_three": model(merges='["a","b","c"]'), "same_id": model(vocab='"a":0,"b":0,"c":4294967295'), "no_vocab": model(vocab=""),
        "huge_id": '{"added_tokens":[{"id":4294967295,"content":"<x>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],'
                   '"model":{"type":"BPE","vocab":{"a":4294967294},"merges":[]}}',
        "unigram_empty": '{"model":{"type":"Unigram","unk_id":7,"vocab":[]}}', "unigram_huge": '{"model":{"type":"Unigram","unk_id":0,"vocab":[["a",1e308],["b",-1e308]]}}',
        "unigram_no_unk": '{"model":{"type":"Unigram","unk_id":null,"vocab":[["b",-1.0]]}}', "unigram_empty_piece": '{"model":{"type":"Unigram","unk_id":0,"vocab":[["",0.0],["a",0]]}}',
        "wordpiece_no_unk": '{"model":{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"##","max_input_chars_per_word":0,"vocab":{}}}',
        "wordlevel": '{"model":{"type":"WordLevel","vocab":{},"unk_token":"x"}}', "no_model": "{}", "model_null": '{"model":null}', "list": "[]", "empty": "", "deep": "[" * 30000,
        "template_missing": model('"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}}],"pair":[],"special_tokens":{}},'),
        "template_ids": model('"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"s","type_id":0}}],"pair":[],"special_tokens":'
                              '{"s":{"id":"s","ids":[],"tokens":["x","y"]}}},'),
        "padding": '{"truncation":{"max_length":0,"stride":9,"strategy":"OnlyFirst","direction":"Left"},"padding":{"strategy":{"Fixed":18446744073709551615},"direction":"Left",'
                   '"pad_to_multiple_of":0,"pad_id":0,"pad_type_id":0,"pad_token":"x"},"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}',
        "charsmap": model('"normalizer":{"type":"Precompiled","precompiled_charsmap":"////////"},'), "charsmap_empty": model('"normalizer":{"type":"Precompiled","precompiled_charsmap":""},'),
        "charsmap_long": model('"normalizer":{"type":"Precompiled","precompiled_charsmap":"/////38AAAAAAAAAAAAAAAAAAAAAAAAA"},'),
        "charsmap_noise": model('"normalizer":{"type":"Precompiled","precompiled_charsmap":"CAAAAAECAwQFBgcICQoLDA0ODxAREhMU"},'),
        "strip_decoder": model('"decoder":{"type":"Strip","content":"a","start":18446744073709551615,"stop":18446744073709551615},'), "dropout": '{"model":{"type":"BPE","dropout":2.0,"vocab":{"a":0},"merges":[]}}',
        "fixed_length": model('"pre_tokenizer":{"type":"FixedLength","length":0},'), "punctuation": model('"pre_tokenizer":{"type":"Punctuation","behavior":"None"},'),
        "added_many": '{"added_tokens":[%s],"model":{"type":"BPE","vocab":{},"merges":[]}}' % ",".join(
            '{"id":%d,"content":"%s","single_word":true,"lstrip":true,"rstrip":true,"normalized":true,"special":false}' % (i, "a" * (i % 9)) for i in range(300)),
    }
    put("tokenizer", {name + ".json": data for name, data in files.items()})


def safetensors():
    def file(header, data=b"", size=None):
        header = header if isinstance(header, bytes) else header.encode()
        return struct.pack("<Q", len(header) if size is None else size) + header + data

    def one(shape, begin, end, dtype="U8"):
        return '{"a":{"dtype":"%s","shape":%s,"data_offsets":[%s,%s]}}' % (dtype, shape, begin, end)

    put("safetensors", {name + ".safetensors": data for name, data in {
        "beyond_limit": file("{}", size=100000001), "minus_one": file("{}", size=2**64 - 1), "wraps": file("{}", size=2**64 - 8), "deep": file('{"a":' * 6000 + "1" + "}" * 6000),
        "deep_list": file("[" * 40000), "product": file(one("[4294967296,4294967296]", 0, 0, "F32")), "zero_and_huge": file(one("[0,9223372036854775807,9223372036854775807]", 0, 0)),
        "dimensions": file(one("[%s]" % ",".join(["1"] * 5000), 0, 1), b"x"), "reversed": file(one("[1]", 4, 2), b"x" * 6), "negative": file(one("[-1]", -4, -2), b"x" * 6),
        "fractions": file(one("[1.0]", "0.0", "1.0"), b"x"), "odd_bools": file(one("[4]", 0, 4, "BOOL"), b"\x02\xff\x00\x01"), "nan_numbers": file(one("[2]", 0, 4, "BF16"), b"\xff" * 4),
        "twice": file('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}', b"x" * 9),
        "overlap": file('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}', b"x" * 6),
        "name_nul": file('{"a\\u0000b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "name_surrogate": file('{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "name_bytes": file(b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "name_long": file('{"%s":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}' % ("n" * 40000), b"x"),
        "many": file("{%s}" % ",".join('"t%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % (i, i, i + 1) for i in range(700)), b"x" * 700),
    }.items()})


def text(value):
    return struct.pack("<Q", len(value)) + value


def ggufs():
    def file(metadata=b"", metadata_count=0, tensors=b"", tensor_count=0, data=b"", version=3):
        return b"GGUF" + struct.pack("<IQQ", version, tensor_count, metadata_count) + metadata + tensors + data

    def array(key, kind, count, body=b""):
        return text(key) + struct.pack("<IIQ", 9, kind, count) + body

    def tensor(name, sizes, kind, offset):
        return text(name) + struct.pack("<I", len(sizes)) + b"".join(struct.pack("<Q", s) for s in sizes) + struct.pack("<IQ", kind, offset)

    def number(key, value):
        return text(key) + struct.pack("<II", 4, value)

    def one(*arguments, data=b"\0" * 96):
        return file(tensors=tensor(b"t", *arguments), tensor_count=1, data=data)

    files = {
        "arrays_in_arrays": file(text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 2000, 1), "array_count": file(array(b"a", 0, 2**64 - 1), 1), "array_16m": file(array(b"a", 0, 2**24, b"\0" * 100), 1),
        "text_length": file(struct.pack("<Q", 2**64 - 1), 1), "tensor_count": file(tensor_count=2**64 - 1), "metadata_count": file(metadata_count=2**64 - 1),
        "metadata_many": file(b"".join(number(b"k%d" % i, i) for i in range(1500)), 1500), "alignment_0": file(number(b"general.alignment", 0), 1),
        "alignment_3": file(number(b"general.alignment", 3), 1, tensor(b"t", [4], 0, 0), 1, b"\0" * 64), "alignment_vast": file(text(b"general.alignment") + struct.pack("<IQ", 10, 2**63), 1),
        "alignment_text": file(text(b"general.alignment") + struct.pack("<I", 8) + text(b"32"), 1), "sizes_0": one([], 0, 0), "sizes_5": one([1] * 5, 0, 0), "sizes_product": one([2**32, 2**32], 0, 0),
        "size_vast": one([2**64 - 1], 0, 0), "offset_vast": one([4], 0, 2**64 - 16), "offset_wraps": one([4], 0, 2**64 - 32), "type_removed": one([32], 4, 0), "type_vast": one([32], 2**32 - 1, 0), "uneven": one([33], 2, 0),
        "overlap": file(tensors=tensor(b"a", [8], 0, 0) + tensor(b"b", [8], 0, 0), tensor_count=2, data=b"\0" * 96), "twice": file(tensors=tensor(b"a", [8], 0, 0) + tensor(b"a", [8], 0, 32), tensor_count=2, data=b"\0" * 96),
        "name_bytes": file(tensors=tensor(b"\xff\xfe", [8], 0, 0), tensor_count=1, data=b"\0" * 96), "big_endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version_1": file(version=1), "version_vast": file(version=2**32 - 1),
        "architecture_long": file(text(b"general.architecture") + struct.pack("<I", 8) + text(b"a" * 40000), 1),
    }
    shapes = [(0, 0, 0, 0, 0), (1, 0, 1, 1, 1), (2**31, 1, 1, 1, 1), (3, 2, 1, 8, 8), (4, 4, 2**31 - 1, 8, 8), (8, 8, 1, 2**32 - 1, 8), (2, 8, 1, 8, 8), (64, 1, 1, 64, 2**32 - 1)]
    keys = (b"attention.head_count", b"attention.head_count_kv", b"block_count", b"feed_forward_length", b"context_length")
    for index, shape in enumerate(shapes):
        parts = [text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama"), number(b"llama.embedding_length", 64)]
        parts += [number(b"llama." + key, value) for key, value in zip(keys, shape)]
        parts += [text(b"llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, float("nan")), number(b"tokenizer.ggml.bos_token_id", 2**32 - 1)]
        parts += [text(b"tokenizer.ggml." + key) + struct.pack("<I", 8) + text(value) for key, value in ((b"model", b"gpt2"), (b"pre", b"smollm"))]
        parts += [array(b"tokenizer.ggml.tokens", 8, 3, text(b"a") + text(b"a") + text(b"")), array(b"tokenizer.ggml.merges", 8, 2, text(b"a") + text(b" "))]
        parts += [array(b"tokenizer.ggml.token_type", 5, 2, struct.pack("<ii", -1, 99))]
        whole = file(b"".join(parts), len(parts), tensor(b"token_embd.weight", [64, 3], 0, 0), 1)
        files[f"model_{index}"] = whole + b"\0" * (-len(whole) % 32 + 768)
    put("gguf", {name + ".gguf": data for name, data in files.items()})


def tables():
    put("table", {
        "quote_open.csv": 'a,b\n"' + "x" * 40000, "quotes.csv": '"' * 40001, "columns.csv": ",".join("c%d" % i for i in range(6000)) + "\n", "short_row.csv": "a,b\n" * 9000 + "x\n",
        "returns.csv": "a\r\r\n\r\nb\r", "only_mark.csv": b"\xef\xbb\xbf", "nul.csv": "a,b\n\0,\0\n", "deep.json": '[{"a":' + "[" * 20000 + "]" * 20000 + "}]", "open_text.json": '[{"a":"' + '\\"' * 20000,
        "numbers.json": '[{"a":1e99999},{"a":-0},{"a":123456789012345678901234567890}]', "deep_objects.json": "[" + '{"a":' * 9000, "lists.json": "[[[[1]]]]", "commas.json": "[,,,,]",
        "deep.jsonl": '{"a":' * 6000 + "1" + "}" * 6000 + "\n", "mark.parquet": "PAR1", "no_footer.parquet": b"PAR1\xff\xff\xff\x7fPAR1", "negative.parquet": b"PAR1" + b"\0" * 32 + b"\xff\xff\xff\xffPAR1",
        "mark.arrow": "ARROW1\0\0", "footer.arrow": b"ARROW1\0\0" + b"\0" * 64 + b"\xff\xff\xff\x7fARROW1", "stream_length.arrow": b"\xff\xff\xff\xff\xff\xff\xff\x7f",
        "stream_negative.arrow": b"\xff\xff\xff\xff\x00\x00\x00\x80" + b"\0" * 64, "stream_end.arrow": b"\xff\xff\xff\xff\0\0\0\0", "stream_noise.arrow": b"\xff\xff\xff\xff\x40\0\0\0" + bytes(range(64)),
        # Footers of Parquet: a list that claims 2^32 items, structs in structs, lists in lists, zeros.
        "list_count.parquet": b"PAR1" + b"\x15\x02\x19\xfc\xff\xff\xff\xff\x0f" + struct.pack("<I", 9) + b"PAR1", "structs.parquet": b"PAR1" + b"\x1c" * 40000 + struct.pack("<I", 40000) + b"PAR1",
        "lists.parquet": b"PAR1" + b"\x19" * 40000 + struct.pack("<I", 40000) + b"PAR1", "zeros.parquet": b"PAR1" + b"\0" * 40000 + struct.pack("<I", 40000) + b"PAR1",
    })


templates()
tokenizers()
safetensors()
ggufs()
tables()
for folder in sorted(os.listdir(ROOT)):
    print(folder, len(os.listdir(os.path.join(ROOT, folder))))
