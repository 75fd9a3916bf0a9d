"""Notebook 13: a form as an automaton, its states as rows over a vocabulary, one of them as a mask."""

from __future__ import annotations

from labkit.notebook.pictures.svg import MARGIN, Drawing, Sheet
from labkit.structured.regex_dfa import regex_dfa
from labkit.structured.trie import Trie

_FORM = "yes|yet|no"
_TOKENS = ("y", "ye", "yes", "yeah", "es", "s", "t", "n", "o", "no", "not")
_SCORES = (1, 0, 4, 6, 2, 3, 1, 2, 1, 5, 7)
_STATES = ("", "y", "ye", "n", "no")
_HERE = "ye"
_LEFT, _WIDE, _TALL = 144, 50, 24


def mask_over_tokens() -> Drawing:
    """Draw an automaton over characters, what each of its states allows, and one of these rows as a mask."""
    sheet = Sheet(f"The form {_FORM}: its states, and what each allows of {len(_TOKENS)} tokens", 460)
    _automaton(sheet)
    dfa = regex_dfa(_FORM, frozenset(range(256)))
    trie = Trie([token.encode() for token in _TOKENS])
    twin = ["characters: start -y-> y -e-> ye -s-> yes, ye -t-> yet, start -n-> n -o-> no", ""]
    for i, token in enumerate(_TOKENS):
        sheet.text(_LEFT + _WIDE * (i + 0.5), 188, token, anchor="middle", bold=True)
    sheet.text(MARGIN, 188, "allowed after", size=12, color="faint")
    rows = {}
    for number, text in enumerate(_STATES):
        state = dfa.start
        for byte in text.encode():
            state = int(dfa.table[state, byte])
        rows[text] = (trie.walk(dfa.table, state) > 0).tolist()
        y = 198 + (_TALL + 4) * number
        sheet.text(MARGIN, y + 17, _name(text), bold=text == _HERE)
        for i, fits in enumerate(rows[text]):
            color = (0 if text == _HERE else 1) if fits else "empty"
            sheet.box(_LEFT + _WIDE * i + 2, y, _WIDE - 4, _TALL, int(fits), color=color, size=11)
        some = [token for token, fits in zip(_TOKENS, rows[text], strict=True) if fits]
        twin.append(f"allowed after {_name(text):<8} {', '.join(some) or 'nothing: the answer ends'}")
    y = 198 + (_TALL + 4) * len(_STATES) + 18
    masked = [str(score) if fits else "-inf" for score, fits in zip(_SCORES, rows[_HERE], strict=True)]
    for words, numbers in (("logits", list(map(str, _SCORES))), (f'after "{_HERE}"', masked)):
        sheet.text(MARGIN, y + 17, words, size=12)
        for i, number in enumerate(numbers):
            color = "paper" if number == "-inf" else "empty"
            sheet.box(_LEFT + _WIDE * i + 2, y, _WIDE - 4, _TALL, number, color=color, size=12)
        y += _TALL + 4
    lines = (
        'The model prefers "not" (7). The mask leaves "s" (3) and "t" (1): it will be "yes".',
        "A token is allowed if all of its characters lead on: it may end in the middle of a word.",
    )
    twin.append("")
    for words, scores in (("logits", _SCORES), (f"after {_name(_HERE)}", masked)):
        pairs = (f"{token} {score}" for token, score in zip(_TOKENS, scores, strict=True))
        twin.append(f"{words:<13} {'  '.join(pairs)}")
    for number, line in enumerate(lines):
        sheet.text(MARGIN, y + 22 + 20 * number, line)
    return sheet.drawing(*twin, "", *lines)


def _name(text: str) -> str:
    return f'"{text}"' if text else "nothing"


def _automaton(sheet: Sheet) -> None:
    places = {"": (60, 100), "y": (190, 74), "ye": (320, 74), "yes": (470, 54), "yet": (470, 96)}
    places |= {"n": (190, 136), "no": (320, 136)}
    for text, (x, y) in places.items():
        if text:
            x0, y0 = places[text[:-1]]
            sheet.arrow((x0 + 28, y0), (x - 28, y))
            sheet.text((x0 + x) / 2, (y0 + y) / 2 - 7, text[-1], anchor="middle", size=12)
    for text, (x, y) in places.items():
        whole = text in _FORM.split("|")
        color = 0 if text == _HERE else 2 if whole else "empty"
        sheet.box(x - 28, y - 13, 56, 26, text or "start", color=color, bold=whole)
    sheet.text(520, 78, "here an answer is complete", size=12, color="faint")
