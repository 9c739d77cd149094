"""Where needles are hidden: a synthetic language of few words, or real text cut into pieces.

Both make pieces of text whose tokens can be counted one by one: a text put together from them has
the sum of their tokens, so prompts and documents come out at a length given in tokens.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from fulmen.data.shards import IntArray

END_OF_DOCUMENT = "<end_of_document>"
KINDS = ("needle", "multi_value", "tracking", "passage")
_CITY_NAMES = (
    "Accra Algiers Amman Amsterdam Ankara Antwerp Athens Atlanta Auckland Baghdad Baku Bangkok "
    "Barcelona Beijing Beirut Belgrade Berlin Bern Bilbao Bogota Bologna Boston Brisbane Brussels "
    "Bucharest Budapest Cairo Calgary Caracas Casablanca Chicago Cologne Copenhagen Dakar Dallas "
    "Damascus Delhi Denver Dhaka Dresden Dubai Dublin Durban Edinburgh Florence Frankfurt Geneva "
    "Genoa Glasgow Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta Karachi Kathmandu Kiev "
    "Kigali Kyoto Lagos Lahore Leipzig Lima Lisbon Ljubljana London Lusaka Lyon Madrid Malaga "
    "Manila Marseille Melbourne Memphis Miami Milan Minsk Montreal Moscow Mumbai Munich Nairobi "
    "Nantes Naples Nicosia Odessa Osaka Oslo Ottawa Palermo Paris Perth Porto Prague Quito "
    "Riga Rome Rotterdam Salzburg Santiago Sarajevo Seattle Seoul Seville Shanghai Singapore Sofia "
    "Stockholm Stuttgart Sydney Taipei Tallinn Tbilisi Tehran Tokyo Toronto Tripoli Tunis Turin "
    "Valencia Vancouver Venice Vienna Vilnius Warsaw Wellington Yerevan Zagreb Zurich"
)
_CITIES = _CITY_NAMES.split()
# A passage is asked for by so many of its first words.
_QUOTED_WORDS = 10
_DISTRICTS = ["", "old ", "new ", "upper ", "lower ", "inner ", "outer ", "little ", "great "]


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of text and its tokens."""

    text: str
    ids: IntArray

    @property
    def num_tokens(self) -> int:
        """How many."""
        return len(self.ids)


@dataclass(frozen=True)
class Exercise:
    """Facts to hide, in this order, and what is asked about them; `end` follows the answer."""

    facts: tuple[str, ...]
    question: str
    answer: str
    end: str


class Language(Protocol):
    """What retrieval.py builds prompts and documents with."""

    spacing: tuple[int, int]
    """Least and most tokens of a document for each exercise in it."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def haystack(
        self, rng: np.random.Generator, num_tokens: int, *, without: Collection[str] = ()
    ) -> list[Piece]:
        """Pieces of exactly `num_tokens` in all, none of them one of the texts `without`."""
        ...

    def exercises(self, rng: np.random.Generator) -> "Exercises":
        """A source of exercises which share no key and no value: one for each document."""
        ...


class Exercises(Protocol):
    """Makes exercises until its keys, values or passages are used up."""

    def make(self, kind: str) -> Exercise | None:
        """The next exercise of a kind; None when there is nothing left to make it of."""
        ...


def piece_of(language: Language, text: str) -> Piece:
    """A text with its tokens."""
    return Piece(text, np.array(language.encode(text), np.int64))


class Words:
    """A language of single-token words, made to be learnt by a small model in minutes.

    The haystack repeats the sentences of a small fixed book, so it is soon predicted and the
    answers are what is left to learn. A fact and its question put the key right before the value,
    and no key or value comes twice among the facts of a document: retrieving is one look-up.
    """

    def __init__(self, *, num_keys: int = 1024, num_fillers: int = 256) -> None:
        self.spacing = (24, 512)
        self.keys = [f"k{number}" for number in range(num_keys)]
        # A value is two words, and multi_value takes several.
        self.values = [f"v{number}" for number in range(2 * num_keys)]
        self.fillers = [f"w{number}" for number in range(num_fillers)]
        marks = ["note", "ask", "add", "all", "set", "copy", "holders", "quote", "."]
        words = [END_OF_DOCUMENT, "<unknown>", *marks, *self.fillers, *self.keys, *self.values]
        self._ids = {word: number for number, word in enumerate(words)}
        book = np.random.default_rng(0)  # of the language, not of the data
        self._book = []
        for _ in range(64):
            sentence = book.choice(self.fillers, book.integers(6, 17)).tolist()
            self._book.append(piece_of(self, " ".join(sentence) + " . "))
        self._book_tokens = np.array([sentence.num_tokens for sentence in self._book])

    @property
    def vocab_size(self) -> int:
        """Number of words, the end of a document included."""
        return len(self._ids)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that launch/prepare_data.py needs: a token a word."""
        tokenizer = Tokenizer(models.WordLevel(self._ids, unk_token="<unknown>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return [self._ids[word] for word in text.split()]

    def haystack(
        self, rng: np.random.Generator, num_tokens: int, *, without: Collection[str] = ()
    ) -> list[Piece]:
        """Sentences of the book at random; the last is cut."""
        shortest = int(self._book_tokens.min())
        chosen = rng.integers(len(self._book), size=num_tokens // shortest + 1)
        ends = np.cumsum(self._book_tokens[chosen])
        whole = int(np.searchsorted(ends, num_tokens, side="right"))
        pieces = [self._book[number] for number in chosen[:whole]]
        left = num_tokens - (int(ends[whole - 1]) if whole else 0)
        if left:
            words = self._book[chosen[whole]].text.split()[-left:]
            pieces.append(piece_of(self, " ".join(words) + " "))
        return pieces

    def exercises(self, rng: np.random.Generator) -> "Exercises":
        """Exercises of one document."""
        return _WordExercises(self, rng)


class _WordExercises:
    def __init__(self, words: Words, rng: np.random.Generator) -> None:
        self._rng, self._fillers = rng, words.fillers
        self._keys = _shuffled(words.keys, rng)
        self._values = _shuffled(words.values, rng)

    def make(self, kind: str) -> Exercise | None:
        try:
            return self._make(kind)
        except StopIteration:
            return None

    def _make(self, kind: str) -> Exercise:
        if kind == "needle":
            key, value = next(self._keys), self._value()
            return Exercise((f"note {key} {value} . ",), f"ask {key} ", f"{value} ", ". ")
        if kind == "multi_value":
            key, values = next(self._keys), [self._value() for _ in range(3)]
            facts = tuple(f"add {key} {value} . " for value in values)
            return Exercise(facts, f"all {key} ", " ".join(values) + " ", ". ")
        if kind == "tracking":
            keys, value = [next(self._keys) for _ in range(4)], self._value()
            copies = [f"copy {after} {key} . " for key, after in pairwise(keys)]
            facts = (f"set {keys[0]} {value} . ", *copies)
            return Exercise(facts, f"holders {value} ", " ".join(keys) + " ", ". ")
        assert kind == "passage"
        quoted = self._rng.choice(self._fillers, 16).tolist()
        begin, rest = " ".join(quoted[:6]) + " ", " ".join(quoted[6:]) + " "
        return Exercise((f"{begin}{rest}. ",), f"quote {begin}", rest, ". ")

    def _value(self) -> str:
        return f"{next(self._values)} {next(self._values)}"


class Prose:
    """Real text as the haystack, with facts and questions as MiniMax-01 and RULER put them.

    `texts` are cut into pieces of some lines which begin and end where a tokenizer of the
    byte-level kind never merges: after a line's end and before a letter. `encode_special_tokens`
    of the tokenizer should be set, as load_tokenizer does.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
        self.spacing = (192, 4096)
        self._tokenizer = tokenizer
        cut = [piece for text in texts for piece in _cut_text(text)]
        encoded = tokenizer.encode_batch_fast(cut, add_special_tokens=False)
        self._pieces = [
            Piece(text, np.array(one.ids, np.int64))
            for text, one in zip(cut, encoded, strict=True)
            if one.ids
        ]
        if not self._pieces:
            raise ValueError("input: the haystack's texts hold no words: give other texts")
        self._filler = self._find_filler()
        # What is quoted must be long enough, and its beginning must not be found twice.
        begins = [tuple(piece.text.split()[:_QUOTED_WORDS]) for piece in self._pieces]
        times = Counter(begins)
        self.passages = [
            piece.text
            for piece, begin in zip(self._pieces, begins, strict=True)
            if times[begin] == 1 and len(piece.text.split()) >= 24
        ]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def haystack(
        self, rng: np.random.Generator, num_tokens: int, *, without: Collection[str] = ()
    ) -> list[Piece]:
        """Consecutive pieces from a random place on, around the end; the last is cut."""
        pieces: list[Piece] = []
        first, left = int(rng.integers(len(self._pieces))), num_tokens
        for place in count(first):
            if left == 0:
                break
            piece = self._pieces[place % len(self._pieces)]
            if piece.text in without:
                if place - first > len(self._pieces) and not pieces:
                    raise ValueError("input: all of the haystack's text is quoted: give more text")
                continue
            if piece.num_tokens > left:
                piece = self._cut(piece, left)
            pieces.append(piece)
            left -= piece.num_tokens
        return pieces

    def exercises(self, rng: np.random.Generator) -> "Exercises":
        """Exercises of one document."""
        return _ProseExercises(self.passages, rng)

    def _find_filler(self) -> str:
        for word in (" a", " the", " .", " -", " 1", ".", "a", "\n"):
            text = "word" + word * 9
            if len(self.encode(text)) - len(self.encode("word")) == 9:
                return word
        raise ValueError(
            "tokenizer: it has no token for any of the short words that fill a text up to its "
            "length: give another tokenizer"
        )

    def _cut(self, piece: Piece, num_tokens: int) -> Piece:
        words = piece.text.split()[:num_tokens]
        while True:
            text = " ".join(words)
            missing = num_tokens - 1 - len(self.encode(text))
            if missing >= 0:
                filled = piece_of(self, text + self._filler * missing + "\n")
                if filled.num_tokens == num_tokens:
                    return filled
            if not words:
                return piece_of(self, self._filler * num_tokens)
            words = words[: len(words) - max(1, -missing // 8)]


class _ProseExercises:
    def __init__(self, passages: Sequence[str], rng: np.random.Generator) -> None:
        self._rng = rng
        self._keys = _shuffled([d + city for d in _DISTRICTS for city in _CITIES], rng)
        self._numbers: set[str] = set()
        self._passages = passages
        self._quoted: set[int] = set()

    def make(self, kind: str) -> Exercise | None:
        try:
            return self._make(kind)
        except StopIteration:
            return None

    def _make(self, kind: str) -> Exercise:
        if kind in ("needle", "multi_value"):
            key, values = next(self._keys), [self._value()]
            while kind == "multi_value" and len(values) < 3:
                values.append(self._value())
            several = "numbers are" if len(values) > 1 else "number is"
            facts = tuple(f"The special magic {key} number is: {value}.\n" for value in values)
            question = f"Question: What {'are all' if len(values) > 1 else 'is'} the special magic "
            question += f"{key} number{'s' if len(values) > 1 else ''}? Answer: The special magic "
            return Exercise(facts, f"{question}{key} {several}:", f" {', '.join(values)}", ".\n")
        if kind == "tracking":
            names, value = [self._variable() for _ in range(5)], self._value()
            facts = (
                f"VAR {names[0]} = {value}\n",
                *(f"VAR {after} = VAR {before}\n" for before, after in pairwise(names)),
            )
            question = (
                f"Question: Find all variables that are assigned the value {value} in the text "
                "above. Answer: They are:"
            )
            return Exercise(facts, question, f" {', '.join(names)}", ".\n")
        assert kind == "passage"
        if len(self._quoted) >= min(len(self._passages), 1024):
            raise StopIteration
        number = int(self._rng.integers(len(self._passages)))
        while number in self._quoted:
            number = int(self._rng.integers(len(self._passages)))
        self._quoted.add(number)
        words = self._passages[number].split()
        # Quoted as one line, whatever the passage's line ends are.
        quoted, rest = words[:_QUOTED_WORDS], words[_QUOTED_WORDS : _QUOTED_WORDS + 12]
        question = f'Question: How does the passage above go on that says "{" ".join(quoted)}"? '
        question += "Answer: It goes on with:"
        answer = f" {' '.join(rest)}"
        return Exercise((self._passages[number],), question, answer, "\n")

    def _value(self) -> str:
        while True:
            value = str(int(self._rng.integers(10**6, 10**7)))
            if value not in self._numbers:
                self._numbers.add(value)
                return value

    def _variable(self) -> str:
        while True:
            name = "".join(chr(ord("A") + int(c)) for c in self._rng.integers(26, size=5))
            if name not in self._numbers:
                self._numbers.add(name)
                return name


def _shuffled(items: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    return (items[number] for number in rng.permutation(len(items)))


def _cut_text(text: str) -> Iterator[str]:
    """Runs of lines of some fifty words."""
    lines: list[str] = []
    words = 0
    for line in text.splitlines():
        if not line.strip() and not lines:
            continue
        lines.append(line)
        words += len(line.split())
        if words >= 24 and (words >= 48 or not line.strip()):
            yield "\n".join(lines).strip() + "\n"
            lines, words = [], 0
    if words:
        yield "\n".join(lines).strip() + "\n"


def language_of(tokenizer: Tokenizer, texts: Iterable[str]) -> Words | Prose:
    """The language that a model with this tokenizer reads; `texts` are the haystack of prose."""
    vocabulary = tokenizer.get_vocab()
    num_keys, num_fillers = (
        sum(word[:1] == letter and word[1:].isdigit() for word in vocabulary) for letter in "kw"
    )
    words = Words(num_keys=max(1, num_keys), num_fillers=max(1, num_fillers))
    return words if words.tokenizer().get_vocab() == vocabulary else Prose(tokenizer, texts)
