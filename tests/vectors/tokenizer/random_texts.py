"""10,000 texts that no one would write, the same in every language: tests/support/random_texts.h is this in C++.

pieces.json holds lists of pieces (scripts, combining marks, emoji sequences, controls, digits, blanks, look-alikes of special
tokens). A text is 1 to 24 pieces; a piece is a member of a list, one to four times, or any code point but the surrogates.
"""
import json
import pathlib

PIECES = json.loads((pathlib.Path(__file__).parent / "pieces.json").read_text())
MASK = (1 << 64) - 1


class Random:
    """splitmix64 (Steele, Lea, Flood 2014)."""

    def __init__(self, seed):
        self.state = seed

    def below(self, bound):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return (z ^ (z >> 31)) % bound


def random_texts(count=10_000, seed=20_240_726):
    random = Random(seed)
    texts = []
    for _ in range(count):
        text = ""
        for _ in range(1 + random.below(24)):
            if random.below(10) == 0:
                code = 1 + random.below(0x10FFFF - 0x800)
                text += chr(code if code < 0xD800 else code + 0x800)
            else:
                pieces = PIECES[random.below(len(PIECES))]
                text += pieces[random.below(len(pieces))] * (1 + (random.below(4) if random.below(6) == 0 else 0))
        texts.append(text)
    return texts
