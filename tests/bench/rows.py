"""The table that every benchmark prints: what we reach, what the peer reaches in the same run, and the bound.

    rows = Rows()
    rows.add("decode, batch 1", ours=85.0, peer=60.1, ratio=85.0 / 60.1, bound=">= 1.25", ok=85.0 / 60.1 >= 1.25, unit="tok/s")
    sys.exit(rows.finish())

A row is printed as soon as it is added, so that a long run shows how far it is; finish() prints all of them aligned and returns
the exit status, 1 when a bound is missed.
"""

import sys


def text_of(value):
    """Numbers with four significant digits; None as a dash; everything else as it is."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return str(int(value))
    return f"{value:.4g}"


class Rows:
    HEAD = ("what", "ours", "peer", "unit", "ratio", "bound", "")

    def __init__(self, stream=None):
        self.rows = []
        self.missed = 0
        self.stream = stream or sys.stdout

    def add(self, name, ours, peer, ratio, bound, ok, unit=""):
        """`ratio` may be None where there is nothing to divide; `bound` is the text of the bound; `ok` whether it holds (None: no
        bound, for information)."""
        verdict = "" if ok is None else "PASS" if ok else "FAIL"
        self.missed += ok is not None and not ok
        row = (name, text_of(ours), text_of(peer), unit, text_of(ratio), text_of(bound), verdict)
        self.rows.append(row)
        print("..", "  ".join(cell for cell in row if cell), file=sys.stderr, flush=True)

    def finish(self):
        table = [self.HEAD] + self.rows
        widths = [max(len(row[i]) for row in table) for i in range(len(self.HEAD))]
        for row in table:
            cells = [cell.ljust(width) if i in (0, 3, 5, 6) else cell.rjust(width)
                     for i, (cell, width) in enumerate(zip(row, widths))]
            print("  ".join(cells).rstrip(), file=self.stream, flush=True)
        print(f"{len(self.rows)} rows, {self.missed} missed", file=self.stream, flush=True)
        return 1 if self.missed else 0
