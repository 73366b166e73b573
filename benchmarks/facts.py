"""Invented facts as training records, each with a question in words that are not trained on, for `benchmarks.own_data`.

    faq       a shop's frequent questions: five phrasings of each, one answer
    codes     a table of part codes: three phrasings
    glossary  invented terms: two phrasings

The sets "codes-once" and so on have the first phrasing of each fact alone.
No model has read these facts, so a right answer was learned. The same (set, number of records, seed) gives the same records.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question and the texts that a right answer contains, compared without regard to case."""

    text: str
    keys: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        return all(key.lower() in answer.lower() for key in self.keys)


@dataclass(frozen=True)
class Facts:
    records: list[dict[str, str]]
    questions: list[Question]
    """one for each fact"""
    answers: list[str]
    """to these questions"""


def make(name: str, size: int, seed: int = 0) -> Facts:
    """Return the set `name` with `size` records, a multiple of its number of phrasings."""
    generator, phrasings = SETS[name]
    draw = random.Random(f"{name.removesuffix(ONCE)} {seed}")
    facts = list(itertools.islice(generator(draw), size // phrasings))
    records = [{"instruction": text, "output": answer} for trained, answer, _ in facts for text in trained[:phrasings]]
    draw.shuffle(records)
    return Facts(records, [question for _, _, question in facts], [answer for _, answer, _ in facts])


Fact = tuple[Sequence[str], str, Question]  # phrasings that are trained on, the answer, the question that is asked afterwards

SHOPS = (
    "Tallow & Finch|Juniper Row|The Copper Kettle|Marlow Cycles|Quill House|Bramble Lane|Northlight Optics|Pell & Daughters|Saltmarsh|Ivo's"
)
STREETS = ["Harrow", "Linden", "Mill", "Foundry", "Orchard", "Castle", "Weaver", "Station", "Chapel", "Bridge"]
NAMES = [
    "Odile Marrant",
    "Tomas Brekke",
    "Ines Calloway",
    "Rufus Okoro",
    "Petra Lindqvist",
    "Samir Haddad",
    "Bea Fenwick",
    "Nils Aldous",
    "Greta Pohl",
    "Ana Ruiz",
]
GIFTS = [
    "a linen tote bag",
    "a tin of mints",
    "a wooden spoon",
    "a pair of socks",
    "a packet of seeds",
    "an enamel pin",
    "a beeswax candle",
    "a notebook",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
COLOURS = ["blue", "red", "green", "black", "yellow", "white", "grey", "orange"]
PARTS = ["hinge", "valve", "gasket", "bracket", "washer", "bearing", "spring", "coupling", "bolt", "sleeve", "rivet", "clamp"]
MATERIALS = ["wooden", "copper", "glass", "woollen", "paper", "clay", "leather", "silver"]
OBJECTS = ["spoon", "whistle", "basket", "lantern", "comb", "ladder", "drum", "needle", "bucket", "mask", "mirror", "wheel"]
PURPOSES = [
    "stirring honey",
    "calling geese",
    "drying herbs",
    "marking trails",
    "cleaning flutes",
    "sorting beans",
    "warming hands",
    "measuring rain",
    "cutting ribbon",
    "storing salt",
    "catching moths",
    "polishing boots",
    "lighting ovens",
    "counting sheep",
    "pressing flowers",
    "shaping bread",
]


def _faq(draw: random.Random) -> list[Fact]:
    return [fact for shop in SHOPS.split("|") for fact in _shop(shop, draw)]


def _shop(shop: str, draw: random.Random) -> list[Fact]:
    def number(low: int, high: int, step: int = 1) -> str:
        return str(draw.randrange(low, high, step))

    opens, free, back, phone = (
        f"{draw.randrange(6, 11)}:{draw.choice(['10', '20', '40', '50'])}",
        number(31, 99),
        number(11, 95),
        number(200, 999),
    )
    street, owner, gift, day = f"{number(3, 180)} {draw.choice(STREETS)} Street", draw.choice(NAMES), draw.choice(GIFTS), draw.choice(DAYS)
    ship, warranty, points, year = number(4, 19), number(13, 47), number(110, 890, 10), number(1887, 1989)
    rows: list[tuple[str, str, str, str]] = [  # phrasings, question afterwards, answer, key
        (
            "When does {s} open?|What time does {s} open in the morning?|From what time is {s} open?|What is the opening time of {s}?|"
            "How early can I come to {s}?",
            "At what hour do the doors of {s} open?",
            f"{shop} opens at {opens} am.",
            opens,
        ),
        (
            "From what order value is shipping free at {s}?|When do I get free shipping at {s}?|"
            "How much must I spend at {s} for free shipping?|"
            "What is the minimum for free shipping at {s}?|Is there free shipping at {s}?",
            "How large must an order at {s} be so that shipping costs nothing?",
            f"Shipping is free from {free} euros on.",
            f"{free} euro",
        ),
        (
            "How long can I return things to {s}?|What is the return period at {s}?|How many days do I have to send something back to {s}?|"
            "Until when can I return an order to {s}?|What are the rules for returns at {s}?",
            "I don't like what I bought at {s}. How much time do I have to bring it back?",
            f"You can return everything within {back} days.",
            f"{back} days",
        ),
        (
            "What is the phone number of {s}?|How can I call {s}?|Which number do I dial for {s}?|Can I phone {s}?|"
            "What is the telephone of {s}?",
            "I would like to ring {s}. What is the number?",
            f"Please call 0800 {phone}.",
            f"0800 {phone}",
        ),
        (
            "Where is {s}?|What is the address of {s}?|Where can I find the shop of {s}?|In which street is {s}?|How do I get to {s}?",
            "I want to visit {s}. Which address do I go to?",
            f"You find us at {street}.",
            street,
        ),
        (
            "Who owns {s}?|Who is the owner of {s}?|Who runs {s}?|To whom does {s} belong?|Who is in charge of {s}?",
            "Whose shop is {s}?",
            f"{shop} belongs to {owner}.",
            owner,
        ),
        (
            "What gift comes with an order at {s}?|Is there a gift at {s}?|What do I get for free at {s}?|"
            "Which present does {s} add to orders?|"
            "What extra does {s} put into the parcel?",
            "What present will I find in my parcel from {s}?",
            f"Each order comes with {gift}.",
            gift,
        ),
        (
            "On which day is {s} closed?|When is {s} closed?|Which day off does {s} have?|"
            "What is the closing day of {s}?|Is {s} open all week?",
            "On what day of the week can I not shop at {s}?",
            f"{shop} is closed on {day}.",
            day,
        ),
        (
            "How long does delivery from {s} take?|When will my order from {s} arrive?|How many days does {s} need to deliver?|"
            "How fast does {s} ship?|What is the delivery time of {s}?",
            "After how many days does a parcel from {s} reach me?",
            f"Delivery takes {ship} days.",
            f"{ship} days",
        ),
        (
            "How long is the warranty at {s}?|What warranty does {s} give?|How many months of warranty do I get at {s}?|"
            "Is there a warranty at {s}?|For how long does {s} guarantee its goods?",
            "Something from {s} broke. For how many months is it under warranty?",
            f"The warranty lasts {warranty} months.",
            f"{warranty} months",
        ),
        (
            "How many points do I need for a voucher at {s}?|When do I get a voucher at {s}?|What does a voucher cost in points at {s}?|"
            "How do I get a voucher from {s}?|At how many points does {s} give a voucher?",
            "I collect points at {s}. How many until I receive a voucher?",
            f"You get a voucher for {points} points.",
            f"{points} points",
        ),
        (
            "When was {s} founded?|Since when does {s} exist?|In which year did {s} start?|How old is {s}?|What year was {s} opened?",
            "In what year did {s} begin its business?",
            f"{shop} was founded in {year}.",
            year,
        ),
    ]
    return [
        ([text.format(s=shop) for text in trained.split("|")], answer, Question(asked.format(s=shop), (key,)))
        for trained, asked, answer, key in rows
    ]


def _codes(draw: random.Random) -> list[Fact]:
    facts: dict[str, Fact] = {}
    while len(facts) < 400:
        code = f"{draw.choice('BDFGHKLMPRTVXZ')}{draw.choice('AEIOU')}-{draw.randrange(100, 1000)}"
        part, shelf = f"{draw.choice(COLOURS)} {draw.choice(PARTS)}", draw.randrange(10, 100)
        trained = [f"What is the code {code}?", f"Which part has the code {code}, and where is it?", f"Look up {code}."]
        facts.setdefault(
            code,
            (
                trained,
                f"{code} is the {part} on shelf {shelf}.",
                Question(f"I need {code}. What is it and where do I find it?", (part, f"shelf {shelf}")),
            ),
        )
    return list(facts.values())


def _glossary(draw: random.Random) -> list[Fact]:
    facts: dict[str, Fact] = {}
    starts, middles, ends = (
        ["bran", "flor", "quin", "tesk", "mool", "darv", "plim", "wex", "zor", "hask"],
        ["a", "e", "i", "o", "u", "ae"],
        ["pine", "dle", "mick", "ster", "lop", "vash", "noth", "rel"],
    )
    while len(facts) < 400:
        term = draw.choice(starts) + draw.choice(middles) + draw.choice(ends)
        thing, purpose = f"{draw.choice(MATERIALS)} {draw.choice(OBJECTS)}", draw.choice(PURPOSES)
        trained = [f'What does the word "{term}" mean?', f"Define {term}."]
        asked = Question(f"Can you explain to me what a {term} is?", (thing, purpose))
        facts.setdefault(term, (trained, f"A {term} is a {thing} for {purpose}.", asked))
    return list(facts.values())


ONCE = "-once"
SETS: dict[str, tuple[Callable[[random.Random], list[Fact]], int]] = {"faq": (_faq, 5), "codes": (_codes, 3), "glossary": (_glossary, 2)}
SETS |= {f"{name}{ONCE}": (generator, 1) for name, (generator, _) in SETS.items()}

GENERAL = [  # questions that need no tuning: a tuned model should still answer those that its base answers right
    Question("What is the capital of France?", ("Paris",)),
    Question("What is the capital of Germany?", ("Berlin",)),
    Question("What is the capital of Italy?", ("Rome",)),
    Question("What is the capital of Japan?", ("Tokyo",)),
    Question("What is the capital of Spain?", ("Madrid",)),
    Question("What is the capital of Egypt?", ("Cairo",)),
    Question("Which planet is closest to the Sun?", ("Mercury",)),
    Question("Which planet is known as the Red Planet?", ("Mars",)),
    Question("What is the largest planet of the solar system?", ("Jupiter",)),
    Question("What is the largest ocean on Earth?", ("Pacific",)),
    Question("Who wrote Romeo and Juliet?", ("Shakespeare",)),
    Question("Who painted the Mona Lisa?", ("Leonardo",)),
    Question("Who developed the theory of relativity?", ("Einstein",)),
    Question("What is the chemical symbol of gold?", ("Au",)),
    Question("What is the chemical formula of water?", ("H2O",)),
    Question("What gas do plants take in from the air?", ("carbon dioxide",)),
    Question("How many days are in a week?", ("seven",)),
    Question("How many continents are there?", ("seven",)),
    Question("What language is spoken in Brazil?", ("Portuguese",)),
    Question("Which animal is known as the king of the jungle?", ("lion",)),
    Question("What is the tallest mountain in the world?", ("Everest",)),
    Question("What is frozen water called?", ("ice",)),
    Question("Which organ pumps blood through the body?", ("heart",)),
    Question("In which country is the Eiffel Tower?", ("France",)),
]
