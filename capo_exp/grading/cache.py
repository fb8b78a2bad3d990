"""Verdicts remembered by the content of what was graded."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from threading import Lock

from capo_exp.grading.compare import Grade

Pair = tuple[str, tuple[str, ...]]
"""A completion and its gold answer, in each way to write it."""
LONGEST_ANSWER = 1_000  # characters of an extracted answer that is worth its memory
UNCERTAIN = ("timeout", "crash", "error")
"""These may be the machine's fault: such a completion is graded again."""


class VerdictCache:
    """Holds the verdicts used last, `size` of them; 65,536 take some 100 MB at most. Safe for threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: OrderedDict[bytes, Grade] = OrderedDict()
        self._lock = Lock()

    def find(self, pairs: Iterable[Pair]) -> dict[Pair, Grade]:
        """Returns the verdicts that are known."""
        found = {}
        with self._lock:
            for pair in pairs:
                if (key := digest_pair(pair)) in self._known:
                    self._known.move_to_end(key)
                    found[pair] = self._known[key]
        return found

    def add(self, grades: Mapping[Pair, Grade]) -> None:
        """Remembers what is certain and short, and forgets what was used least."""
        with self._lock:
            for pair, verdict in grades.items():
                if verdict.reason not in UNCERTAIN and len(verdict.extracted) <= LONGEST_ANSWER:
                    self._known[digest_pair(pair)] = verdict
            while len(self._known) > self._size:
                self._known.popitem(last=False)

    def clear(self) -> None:
        """Forgets all verdicts."""
        with self._lock:
            self._known.clear()


def digest_pair(pair: Pair) -> bytes:
    """Returns 16 bytes; the lengths keep ("ab", "c") apart from ("a", "bc")."""
    texts = [pair[0], *pair[1]]
    content = "".join([f"{[len(text) for text in texts]}", *texts])
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()
