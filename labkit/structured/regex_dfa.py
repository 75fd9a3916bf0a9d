"""A regular expression as a deterministic automaton over the bytes of UTF-8.

Three steps: the expression becomes a nondeterministic automaton over characters (Thompson 1968), that a
deterministic one by following sets of states, and that one over bytes, as each character is read along a tree
of its bytes. Which expressions there are, and what they match, is Python's: its own parser reads them.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

try:
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as parser

MOST_STATES = 10_000  # of the automaton that is not deterministic, and of the one that is
MOST_ROWS = 40_000  # of the table over bytes, each of 1 KiB
_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)  # no text that is UTF-8 has them

_UNSUPPORTED = {
    "ASSERT": "lookaround",
    "GROUPREF_EXISTS": "a condition",
    "GROUPREF": "a backreference",
    "BOUNDARY": "a word boundary",
    "AT_BEGINNING": "^ elsewhere than at the beginning",
    "AT_END": "$ elsewhere than at the end",
    "ATOMIC": "an atomic group",
    "POSSESSIVE": "a possessive repeat",
}

Ranges = tuple[tuple[int, int], ...]  # of code points, both ends included, in order and apart


@dataclass
class ByteDFA:
    """An automaton over bytes: `table[state, byte]` is the next state. State 0 is dead: nothing leads out.

    From each other state some text that the expression matches can be completed.

    Args:
        table: the transitions, int32 (states, 256).
        start: the first state; 0 if nothing matches.
        accepting: the states in which the expression is matched, bool (states,).
        shortest: the bytes of the shortest text that matches, at least.
    """

    table: np.ndarray
    start: int
    accepting: np.ndarray
    shortest: int


def regex_dfa(pattern: str, writable: frozenset[int] = frozenset(range(256))) -> ByteDFA:
    """Return the automaton of all texts that `re.fullmatch` accepts and that these bytes can write.

    Raises:
        ValueError: for a pattern that is no regular expression, or none that an automaton can match (it looks
            around, or back), or too large; the message names the part.
    """
    try:
        parsed = parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"structured: regex: {error}") from None
    if unknown := parsed.state.flags & (re.I | re.M | re.L):
        raise ValueError(f"structured: regex: the flag {re.RegexFlag(unknown)!r} is not supported")
    nfa = _NFA()
    end = nfa.add(parsed, nfa.new(), parsed.state.flags, (True, True))
    classes, reads = _classes({edge.ranges for edges in nfa.edges for edge in edges})
    steps, accepting = _subsets(nfa, end, classes)
    return _over_bytes(steps, accepting, _utf8_tree(reads, writable))


# -- characters to states ---------------------------------------------------------------------------


@dataclass
class _Edge:
    ranges: Ranges
    to: int


@dataclass
class _NFA:
    """Thompson's automaton: from each state, edges that read a character, and others that read none."""

    edges: list[list[_Edge]] = field(default_factory=list)
    free: list[list[int]] = field(default_factory=list)

    def new(self) -> int:
        if len(self.edges) >= MOST_STATES:
            raise ValueError(f"structured: regex: it has more than {MOST_STATES:,} states: repeat less")
        self.edges.append([])
        self.free.append([])
        return len(self.edges) - 1

    def add(self, items: Any, state: int, flags: int, ends: tuple[bool, bool]) -> int:
        """Add a sequence from a state on; return where it ends. `ends`: whether it is first, and last."""
        items = list(items)
        for place, (name, value) in enumerate(items):
            first, last = ends[0] and place == 0, ends[1] and place == len(items) - 1
            match str(name):
                case "MAX_REPEAT" | "MIN_REPEAT":  # lazy or not, the whole text must match
                    state = self._repeat(*value, state, flags)
                case "SUBPATTERN":
                    _, more, less, inner = value
                    if (more | less) & (re.I | re.M):
                        raise ValueError("structured: regex: the flags i and m are not supported")
                    state = self.add(inner, state, (flags | more) & ~less, (first, last))
                case "BRANCH":
                    done = self.new()
                    for inner in value[1]:
                        self.free[self.add(inner, state, flags, (first, last))].append(done)
                    state = done
                case "AT" if first and str(value).startswith("AT_BEGINNING"):
                    pass  # all of the text is matched, from its beginning to its end
                case "AT" if last and str(value).startswith("AT_END"):
                    pass
                case _:
                    after = self.new()
                    self.edges[state].append(_Edge(_ranges(name, value, flags), after))
                    state = after
        return state

    def _repeat(self, low: int, high: Any, inner: Any, state: int, flags: int) -> int:
        inside = (False, False)
        for _ in range(low):
            self.free[state].append(begin := self.new())
            state = self.add(inner, begin, flags, inside)
        self.free[state].append(done := self.new())
        for _ in range(1 if high is parser.MAXREPEAT else high - low):
            self.free[state].append(begin := self.new())
            state = self.add(inner, begin, flags, inside)
            self.free[state].append(done)
        if high is parser.MAXREPEAT:
            self.free[state].append(begin)
        return done

    def reach(self, states: Sequence[int]) -> frozenset[int]:
        """Return what these states reach without a character."""
        seen, todo = set(states), list(states)
        while todo:
            more = [state for state in self.free[todo.pop()] if state not in seen]
            seen.update(more)
            todo += more
        return frozenset(seen)


def _ranges(name: Any, value: Any, flags: int) -> Ranges:
    """Return the characters that an item of the parsed expression stands for."""
    match str(name):
        case "LITERAL":
            return _union([(value, value)])
        case "NOT_LITERAL":
            return _others([(value, value)])
        case "ANY":
            return _others([] if flags & re.S else [(10, 10)])
        case "RANGE":
            return _union([value])
        case "CATEGORY":
            return _category(str(value), bool(flags & re.A))
        case "IN":
            negate = str(value[0][0]) == "NEGATE"
            inside = [pair for item in value[negate:] for pair in _ranges(*item, flags)]
            return _others(inside) if negate else _union(inside)
    what = str(value if str(name) == "AT" else name)
    words = next((words for key, words in _UNSUPPORTED.items() if key in what), what.lower())
    raise ValueError(f"structured: regex: {words} is not supported")


@lru_cache
def _category(name: str, ascii_only: bool) -> Ranges:
    letter = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}[name.split("_")[-1]]
    letter = letter.upper() if "_NOT_" in name else letter
    everything = "".join(map(chr, range(_LAST + 1)))
    found = re.finditer(rf"\{letter}+", everything, re.A if ascii_only else 0)
    return _union([(match.start(), match.end() - 1) for match in found])


def _union(pairs: Sequence[tuple[int, int]]) -> Ranges:
    return _others(_others(pairs))


def _others(pairs: Sequence[tuple[int, int]]) -> Ranges:
    """Return all characters outside of these ranges, which may overlap."""
    found, begin = [], 0
    for low, high in sorted([*pairs, _SURROGATES, (_LAST + 1, _LAST + 1)]):
        if begin < low:
            found.append((begin, low - 1))
        begin = max(begin, high + 1)
    return tuple(found)


# -- one state at a time ----------------------------------------------------------------------------


def _classes(sets: Iterable[Ranges]) -> tuple[dict[Ranges, tuple[int, ...]], list[tuple[int, int, int]]]:
    """Put characters that no set tells apart into one class.

    Returns the classes of each set, and where each class is: first and last character, and its number.
    """
    sets = list(sets)
    cuts = sorted({cut for ranges in sets for low, high in ranges for cut in (low, high + 1)})
    place = {cut: i for i, cut in enumerate(cuts)}
    members: list[list[int]] = [[] for _ in cuts]
    for number, ranges in enumerate(sets):
        for low, high in ranges:
            for i in range(place[low], place[high + 1]):
                members[i].append(number)
    numbers: dict[tuple[int, ...], int] = {}
    found: dict[Ranges, dict[int, None]] = {ranges: {} for ranges in sets}
    reads = []
    for i, inside in enumerate(members):
        if inside:
            number = numbers.setdefault(tuple(inside), len(numbers))
            reads.append((cuts[i], cuts[i + 1] - 1, number))
            for one in inside:
                found[sets[one]][number] = None
    return {ranges: tuple(own) for ranges, own in found.items()}, reads


def _subsets(
    nfa: _NFA, end: int, classes: dict[Ranges, tuple[int, ...]]
) -> tuple[list[dict[int, int]], list[bool]]:
    """Return the deterministic automaton: each state's next by class, and whether it accepts. 0 is first."""
    begin = nfa.reach([0])
    known, todo, steps = {begin: 0}, [begin], []
    while todo:
        reached: defaultdict[int, set[int]] = defaultdict(set)
        for edge in (edge for state in todo.pop(0) for edge in nfa.edges[state]):
            for number in classes[edge.ranges]:
                reached[number].add(edge.to)
        steps.append({})
        for number, states in reached.items():
            after = nfa.reach(list(states))
            if after not in known:
                if len(known) >= MOST_STATES:
                    raise ValueError(f"structured: regex: it has more than {MOST_STATES:,} states")
                known[after] = len(known)
                todo.append(after)
            steps[-1][number] = known[after]
    return steps, [end in states for states in known]


# -- characters to bytes ----------------------------------------------------------------------------


def _utf8_tree(reads: Sequence[tuple[int, int, int]], writable: frozenset[int]) -> np.ndarray:
    """Return the tree by which bytes become classes of characters, int32 (nodes, 256).

    Row 0 is the root. An entry is the next node, or -1 - the class of the character that the byte completes,
    or 0 where there is no such character. A node that comes after another never leads to it.
    """
    entries = np.zeros(5 * 64**3, np.int32)  # what each code point becomes; then each 64 of them, by a node
    for low, high, number in reads:
        entries[low : high + 1] = -1 - number
    no_bytes = np.array([byte not in writable for byte in range(256)])
    root = np.zeros(256, np.int32)
    root[:0x80] = entries[:0x80]
    known = {bytes(256): 0}  # equal subtrees are one
    for least, first, last in ((0x80, 0xC0, 0xE0), (0x800, 0xE0, 0xF0), (0x10000, 0xF0, 0xF5)):
        entries[: least * len(entries) // (5 * 64**3)] = 0  # a shorter form is the only right one
        blocks = np.where(no_bytes[0x80:0xC0], np.int32(0), entries.reshape(-1, 64))
        entries = np.array([known.setdefault(block.tobytes(), len(known)) for block in blocks], np.int32)
        root[first:last] = entries[: last - first]
    root[no_bytes] = 0
    blocks = np.frombuffer(b"".join(known), np.int32).reshape(-1, 64)
    tree = np.pad(blocks, ((0, 0), (0x80, 0x40)))
    tree[0] = root
    return tree


def _over_bytes(steps: list[dict[int, int]], accepting: list[bool], tree: np.ndarray) -> ByteDFA:
    """Put the tree in place of each state, and leave out what leads nowhere."""
    nodes, count = len(tree), len(steps)
    if nodes * count > MOST_ROWS:
        raise ValueError(f"structured: regex: its table has more than {MOST_ROWS:,} rows: repeat less")
    num_classes = 1 + max((number for step in steps for number in step), default=0)
    below = np.full((nodes, num_classes), np.inf)  # the fewest bytes from a node to a class
    for node in (*range(1, nodes), 0):
        for entry in set(tree[node].tolist()) - {0}:
            if entry < 0:
                below[node, -1 - entry] = 1
            else:
                below[node] = np.minimum(below[node], 1 + below[entry])
    left = _distances(steps, accepting, below[0])
    table = np.zeros((1 + count * nodes, 256), np.int32)
    for state, step in enumerate(steps):
        after = np.zeros(num_classes, np.int32)
        for number, then in step.items():
            if left[then] < math.inf:
                after[number] = 1 + then * nodes
        leads = np.isfinite(below[:, after > 0]).any(axis=1)  # whether a node leads to a class that goes on
        inside = np.where((tree > 0) & leads[tree.clip(0)], 1 + state * nodes + tree, 0)
        block = np.where(tree < 0, after[(-1 - tree).clip(0)], inside)
        table[1 + state * nodes : 1 + (state + 1) * nodes] = block
    accepts = np.zeros(len(table), bool)
    accepts[1 + nodes * np.flatnonzero(accepting)] = True
    possible = left[0] < math.inf
    return ByteDFA(table, int(possible), accepts, int(left[0]) if possible else 0)


def _distances(steps: list[dict[int, int]], accepting: list[bool], costs: np.ndarray) -> list[float]:
    """Return the fewest bytes from each state to one that accepts, by the fewest bytes of each class."""
    left = [0.0 if accepts else math.inf for accepts in accepting]
    changed = True
    while changed:
        changed = False
        for state in reversed(range(len(steps))):  # most steps lead to later states
            for number, then in steps[state].items():
                if left[then] + costs[number] < left[state]:
                    left[state], changed = left[then] + costs[number], True
    return left
