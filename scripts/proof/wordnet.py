"""Short texts about everything and questions on them, made of WordNet's definitions.

Princeton University's WordNet describes 117,000 senses of English words in a line each, and says which
are kinds, parts and opposites of which; Debian's wordnet-base is a copy. A document is a definition,
often among those of related senses, and a question asks for it: what a team's own unlabelled queries and
texts are to a distillation. The files' format is that of the manual page wndb(5WN).
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
# Files of animals and plants: Latin names of species for the most part.
SPECIES = {5, 20}
LEAST_WORDS = 6
# Kinds of, kind of, parts, wholes, similar, derived.
NEAR = {"@", "~", "#p", "%p", "&", "+"}
KIND_OF, KINDS = "@", "~"
ASKS_OF_A_VERB = ("how do you {}", "how to {}", "why would someone {}", "when should I {}")
ASKS_OF_A_THING = (
    "what is {}",
    "what does {} mean",
    "how does {} work",
    "why is {} important",
    "what is {} used for",
    "tell me about {}",
)
ASKS_FOR_A_WORD = ("what do you call {}", "what is the word for {}", "{}")
BETWEEN = ("and", "of", "versus", "for", "in")

# Part of speech, and place in its file.
Key = tuple[str, str]


@dataclass
class Sense:
    """One line of a data file."""

    words: list[str]
    definition: str
    examples: list[str]
    pointers: list[tuple[str, Key]]
    lexicographer: int


def sense(line: str) -> Sense:
    """Reads a line of a data file."""
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    count = int(fields[3], 16)
    words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
    first = 5 + 2 * count
    last = first + 4 * int(fields[first - 1])
    kinds, places, parts = (fields[first + skip : last : 4] for skip in range(3))
    pointers = [(kind, (part, place)) for kind, place, part in zip(kinds, places, parts)]
    definition = re.sub(r'[;,]?\s*"[^"]*"[^;]*', "", gloss).strip(" ;")
    return Sense(words, definition, re.findall(r'"([^"]+)"', gloss), pointers, int(fields[1]))


def read(directory: Path) -> dict[Key, Sense]:
    """All senses."""
    senses = {}
    for name, part in PARTS.items():
        for line in (directory / f"data.{name}").read_text("utf-8").splitlines():
            # The licence stands before the senses, indented.
            if not line.startswith(" "):
                senses[part, line.split(maxsplit=1)[0]] = sense(line)
    return senses


def common_words(directory: Path) -> set[str]:
    """Words that occur in the texts in which WordNet's authors marked senses."""
    lines = (directory / "cntlist.rev").read_text("utf-8").splitlines()
    return {line.partition("%")[0].replace("_", " ") for line in lines}


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return text[:1].upper() + text[1:].rstrip(".:") + "."


def neighbours(senses: dict[Key, Sense], key: Key, dice: random.Random) -> list[Sense]:
    """Senses that are near this one, in a random order: a few of those under the same kind too."""
    near = [target for kind, target in senses[key].pointers if kind in NEAR and target in senses]
    above = [target for kind, target in senses[key].pointers if kind == KIND_OF]
    beside = [
        target
        for kind, target in (senses[above[0]].pointers if above else [])
        if kind == KINDS and target != key
    ]
    near += dice.sample(beside, min(3, len(beside)))
    dice.shuffle(near)
    return [senses[target] for target in near if len(senses[target].definition.split()) >= LEAST_WORDS]


def described(it: Sense, dice: random.Random) -> str:
    """Its definition, in one case of two behind one of its words."""
    if dice.random() < 0.5:
        return sentence(it.definition)
    return sentence(f"{dice.choice(it.words)}: {it.definition}")


def documents_of(it: Sense, near: list[Sense], dice: random.Random) -> list[str]:
    """A sentence, and where there is more to say, that sentence at one end of a paragraph."""
    answer = described(it, dice)
    more = [described(other, dice) for other in near[: dice.randint(0, 4)]]
    more += [sentence(text) for text in it.examples[:1] if dice.random() < 0.5]
    dice.shuffle(more)
    paragraph = [answer, *more] if dice.random() < 0.6 else [*more, answer]
    return [answer, " ".join(paragraph)] if more else [answer]


def question_on(it: Sense, is_verb: bool, near: list[Sense], dice: random.Random) -> str:
    """One that its definition answers, more or less."""
    word, kind = dice.choice(it.words), dice.random()
    if kind < 0.3:
        return dice.choice(ASKS_OF_A_VERB if is_verb else ASKS_OF_A_THING).format(word)
    if kind < 0.5 and it.examples:
        return dice.choice(it.examples)
    if kind < 0.7 and near:
        return f"{word} {dice.choice(BETWEEN)} {dice.choice(near[0].words)}"
    if kind < 0.85:
        return dice.choice(ASKS_FOR_A_WORD).format(it.definition.split(";")[0])
    return word


def texts(directory: Path, count: int, dice: random.Random) -> Iterator[tuple[str, list[str]]]:
    """For each of `count` senses a question, and documents on it."""
    senses, common = read(directory), common_words(directory)
    keys = [
        key
        for key, it in senses.items()
        if it.lexicographer not in SPECIES
        and it.words[0].islower()
        and len(it.definition.split()) >= LEAST_WORDS
        and (it.examples or any(word.lower() in common for word in it.words))
    ]
    for key in dice.sample(keys, count):
        near = neighbours(senses, key, dice)
        it, is_verb = senses[key], key[0] == PARTS["verb"]
        yield question_on(it, is_verb, near, dice), documents_of(it, near, dice)
