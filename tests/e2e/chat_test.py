"""`refinery chat` as people use it: in a pipe, and in a terminal (a pseudo-terminal here) with commands and Ctrl-C."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time

from programs import MODEL, need_model

# In float32: the first token's lead over the next is 0.1 of a range of 40, which 16-bit rounding may turn.
GREEDY = ["--temperature", "0", "--max-new-tokens", "24", "--dtype", "float32"]
QUESTION = "What is the capital of France?"


def run(refinery, *arguments, stdin=None):
    return subprocess.run([refinery, "chat"] + list(arguments), input=stdin, stdin=subprocess.DEVNULL if stdin is None else None,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=280)


def check_pipe(refinery):
    piped = run(refinery, MODEL, *GREEDY, stdin=QUESTION + "\n")
    assert piped.returncode == 0, piped.stderr
    assert "Paris" in piped.stdout and piped.stdout.endswith("\n"), piped.stdout
    given = run(refinery, MODEL, *GREEDY, "--verbose", "--prompt", QUESTION)
    assert given.stdout == piped.stdout, (given.stdout, piped.stdout)
    assert re.search(r"answer \d+ tokens, [\d.]+ tokens/s", given.stderr), given.stderr
    assert "tokens/s" not in given.stdout and "tokens/s" not in piped.stderr
    drawn = [run(refinery, MODEL, "--temperature", "1.5", "--seed", seed, "--max-new-tokens", "16", "--prompt", "Tell me a story.")
             for seed in ("3", "3", "4")]
    assert drawn[0].stdout == drawn[1].stdout != drawn[2].stdout, [d.stdout for d in drawn]
    assert "[cut after 16 tokens" in drawn[0].stderr, drawn[0].stderr


def check_schema(refinery, folder):
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
              "required": ["city", "people"], "additionalProperties": False}
    path = os.path.join(folder, "schema.json")
    with open(path, "w") as f:
        json.dump(schema, f)
    result = run(refinery, MODEL, "--temperature", "0.8", "--seed", "1", "--max-new-tokens", "200", "--json-schema", path,
                 "--prompt", "Describe Paris as JSON.")
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout)
    assert set(value) == {"city", "people"} and isinstance(value["people"], int), value


def check_errors(refinery, folder):
    for arguments, words in [(["/nowhere/model.gguf", "--prompt", "x"], "/nowhere/model.gguf"),
                             ([MODEL, "--prompt", "x", "--temperature", "-1"], "temperature is -1"),
                             ([MODEL, "--prompt", "x", "--json-schema", os.path.join(folder, "none.json")], "none.json"),
                             ([MODEL, "--prompt", "x " * 200, "--context", "64"], "the context holds 64"),
                             ([MODEL, "--prompt", "x", "--memory", "1"], "memory_budget")]:
        result = run(refinery, *arguments)
        assert result.returncode == 2, (arguments, result)
        assert words in result.stderr and result.stdout == "", (arguments, result)
    assert run(refinery, MODEL, stdin="").returncode == 2


class Conversation:
    """A chat on a terminal of its own."""

    def __init__(self, refinery, *arguments):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.execv(refinery, [refinery, "chat", MODEL] + list(arguments))
        self.seen = ""

    def wait_for(self, words, seconds=120):
        """Reads until `words` appear after what earlier calls waited for; returns the text up to them."""
        deadline = time.monotonic() + seconds
        while words not in self.seen:
            if time.monotonic() > deadline:
                raise AssertionError(f"no {words!r} in {self.seen!r}")
            if select.select([self.terminal], [], [], 1)[0]:
                self.seen += os.read(self.terminal, 65536).decode()
        before, self.seen = self.seen.split(words, 1)
        return before

    def say(self, line):
        os.write(self.terminal, (line + "\n").encode())
        self.wait_for(line)  # the terminal's echo

    def exit_code(self):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if select.select([self.terminal], [], [], 0.1)[0]:
                try:
                    os.read(self.terminal, 65536)
                except OSError:
                    pass
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("it did not end")


def check_terminal(refinery, folder):
    os.environ["NO_COLOR"] = "1"
    saved = os.path.join(folder, "saved.json")
    chat = Conversation(refinery, *GREEDY)
    chat.wait_for("> ")
    chat.say("/system You are a helpful AI assistant named SmolLM, trained by Hugging Face")
    chat.wait_for("> ")
    chat.say(QUESTION)
    assert "Paris" in chat.wait_for("> ")
    chat.say("Name one river there.")
    chat.wait_for("> ")
    chat.say("/save " + saved)
    chat.wait_for("> ")
    with open(saved) as f:
        roles = [m["role"] for m in json.load(f)]
    assert roles == ["system", "user", "assistant", "user", "assistant"], roles
    chat.say("/nonsense")
    chat.wait_for("is no command")
    chat.say("/exit")
    assert chat.exit_code() == 0

    chat = Conversation(refinery, "--temperature", "1", "--seed", "1", "--max-new-tokens", "4000")
    chat.wait_for("> ")
    chat.say("Write a very long story about a dragon.")
    time.sleep(4)
    os.write(chat.terminal, b"\x03")
    chat.wait_for("[stopped]", seconds=10)
    chat.wait_for("> ")
    os.write(chat.terminal, b"\x03")
    assert chat.exit_code() == 130


def main():
    need_model()
    refinery = os.path.join(sys.argv[1], "refinery")
    with tempfile.TemporaryDirectory() as folder:
        check_pipe(refinery)
        check_schema(refinery, folder)
        check_errors(refinery, folder)
        check_terminal(refinery, folder)


if __name__ == "__main__":
    main()
