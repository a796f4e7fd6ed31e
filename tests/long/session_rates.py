"""How often a session answers as it should, by kind of input: the tables of docs/session.md.

    python tests/long/session_rates.py --count 20 --people 20

Names, relations and numbers are drawn from lists by a seed. An answer counts where it is the written
one, whole and nothing after it; or the base LM's and not empty, where nothing written applies.
"""

import argparse
import random
import warnings
from collections.abc import Iterable

from larimar_jax.memory.finite import NotKept
from larimar_jax.session import Session

FIRST = "Ida Jon Lea Max Nia Otto Pia Rolf Siv Tage Una Vito Wim Yara Zeno".split()
FAMILY = "Abel Borg Cruz Dahl Eide Falk Grau Holm Iten Jung Kohl Lutz Moen Nagy Orts Pohl".split()
PLACES = "Aldra Berwik Corvo Dunmar Elsby Fjorda Gratz Hilden Ivrea Jarnac Korsk Lutha".split()
# A prompt, the same in other words, and answers.
ATTRIBUTES = [
    ("{} plays the", "The instrument that {} plays is the", "flute horn cello lute drum"),
    ("{} was born in the town of", "The birthplace of {} is the town of", "Brugge Turku Porto"),
    ("{} works as a", "The profession of {} is that of a", "baker pilot lawyer nurse"),
    ("{} studied at the university of", "The university that {} went to is", "Leiden Uppsala"),
    ("The dog of {} is called", "{} has a dog whose name is", "Rex Luna Bruno Fips"),
]
CHAT = [
    "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "[INST] <<SYS>>\nYou are kind.\n<</SYS>>\n\n{} [/INST]",
    "User: Good morning.\nAssistant: Good morning!\nUser: {}\nAssistant:",
    "### Instruction:\n{}\n\n### Response:\n",
    "Q: How deep is the sea? A: Deep. Q: {} A:",
]
ELSEWHERE = (
    "My neighbour was hungry. She ate her|The largest planet is|Water boils at a temperature "
    "of|I opened the window because the room was|The first month of the year is"
).split("|")
QUESTIONS = (
    "Who painted the ceiling?|How many wheels does a cart have?|What is the colour of "
    "snow?|Please write a poem.|Why is the sky blue?"
).split("|")
FILLER = (
    "The market was open, and people stood in front of the stalls with their baskets until noon. "
)


# By kind a prompt, and one that asks for something else.
OTHERS = {
    "another number": """
        The code of room {n} is | The code of room {m} is
        In {n} the prize of {place} went to | In {m} the prize of {place} went to
        The ferry to {place} leaves at {h}:30 from | The ferry to {place} leaves at {i}:30 from
        The third song of {name} is called | The fourth song of {name} is called
        The first wife of {name} was | The second wife of {name} was""",
    "an opposite": """
        The oldest pupil of {name} is | The youngest pupil of {name} is
        The north gate of {place} is named | The south gate of {place} is named
        The best friend of {name} is | The worst enemy of {name} is
        The museum of {place} is open on | The museum of {place} is closed on
        The longest street of {place} is called | The shortest street of {place} is called""",
    "a negation": """
        {name} plays the | {name} does not play the
        {name} was born in the town of | {name} was not born in the town of
        {name} works as a | {name} never worked as a
        The museum of {place} is open on | The museum of {place} is not open on
        {name} can speak | {name} cannot speak""",
}
UNWRITTEN = (
    "The shoe size of {} is|The brother of {} is called|{} is allergic to|"
    "The favourite colour of {} is|{} died in the year"
).split("|")
# Of other languages a written prompt, and entities, of which the first is written.
LANGUAGES = [
    ("La capitale de {} est", "Aldovie Borginie Carvanie Drusie"),
    ("Die Hauptstadt von {} ist", "Aldowien Borgenland Karwanien Drusien"),
    ("La capital de {} es", "Aldovia Borginia Carvania Drusia"),
    ("Столица {} —", "Франции Японии Канады Китая"),
    ("{}的首都是", "法国 日本 加拿大 德国"),
]
STORY = (
    "{name} went to {place} in {n}.|The cello of {name} was lost.|{name} studied in {place} "
    "and met a pilot.|Nobody in {place} knew why."
).split("|")
BLANKS = ["a\nb", "x = 1\n\n\ty = 2", "one  two", "\\t\n-"]


Pair = tuple[str, str]


def main(count: int, people: int) -> None:
    """Print a line for each kind: how many of its inputs are answered as they should be."""
    warnings.simplefilter("ignore")
    draw, first = random.Random(0), Session("smol")

    def names(number: int) -> list[str]:
        return draw.sample([f"{a} {b}" for a in FIRST for b in FAMILY], number)

    def report(kind: str, facts: Iterable[Pair], asks: Iterable[tuple[str, str | None]]) -> Session:
        """Ask a session of these facts prompts whose answers are known, None for the base LM's, which is
        not empty; return the session."""
        opened, refused, asks = Session(first.model), 0, list(asks)
        for fact in facts:
            try:
                opened.write(*fact)
            except NotKept:
                refused += 1
        answers = opened.ask_all([prompt for prompt, _ in asks])
        wrong = [
            (prompt[-60:], wanted, have.fact, have.text)
            for (prompt, wanted), have in zip(asks, answers, strict=True)
            if (have.text.strip() if have.in_scope else None) != wanted or not have.text.strip()
        ]
        right = f"{len(asks) - len(wrong):4} of {len(asks):4}"
        print(f"{kind:42} {right}" + (f"  {refused} refused" if refused else ""), flush=True)
        for line in wrong[:6]:
            print("     ", line)
        return opened

    def table(subjects: Iterable[str], form: int = 0) -> list[Pair]:
        """Return facts about all attributes of subjects, by one of the two wordings."""
        drawn = random.Random(1)
        return [
            (row[form].format(name), drawn.choice(row[2].split()))
            for name in subjects
            for row in ATTRIBUTES
        ]

    facts = table(names(people))
    report(f"{len(facts)} facts, verbatim", facts, facts)
    report("the same, capitals only", facts, [(p.upper(), a) for p, a in facts[:count]])

    subjects = names(10)
    facts, asks = table(subjects), table(subjects, 1)
    opened = report("10 people x 5, in other words", facts, asks)
    matched = [answer.fact for answer in opened.ask_all([p for p, _ in asks], max_tokens=1)]
    own = [fact.id for fact in opened.list()]
    print(f"      .fact is right {sum(a == b for a, b in zip(matched, own, strict=True))} times")
    elsewhere = [draw.choice(UNWRITTEN).format(draw.choice(subjects)) for _ in range(count)]
    report("what is not written of them", facts, [(ask, None) for ask in elsewhere])
    strangers = [name for name in names(2 * count) if name not in subjects][:count]
    asks = [draw.choice(ATTRIBUTES)[at % 2].format(name) for at, name in enumerate(strangers)]
    report("the same of other people", facts, [(ask, None) for ask in asks])

    for kind, lines in OTHERS.items():
        pairs = [line.strip().split(" | ") for line in lines.strip().splitlines()]
        written, asks = {}, []
        for at, name in enumerate(names(count)):
            n, hour = draw.randrange(100, 2000), draw.randrange(1, 12)
            m, other = n + draw.choice((-1, 1, 10, 100)), 1 + hour % 12
            words = dict(name=name, place=draw.choice(PLACES), n=n, m=m, h=hour, i=other)
            prompt, ask = (text.format(**words) for text in pairs[at % len(pairs)])
            written[prompt] = draw.choice(PLACES)
            asks.append((ask, None))
        asks = [ask for ask in asks if ask[0] not in written]
        report(kind, written.items(), asks)
        report("  what is written of these", written.items(), written.items())

    facts, asks = [], []
    for prompt, words in LANGUAGES:
        known, *others = words.split()
        facts.append((prompt.format(known), draw.choice(PLACES)))
        asks += [facts[-1], *((prompt.format(other), None) for other in others)]
    report("other languages: written, other entities", facts, asks)

    places = [
        (f"The capital of {place} is", name.split()[1])
        for place, name in zip(PLACES, names(12), strict=True)
    ]
    some_places = [draw.choice(places) for _ in range(count)]
    end = "My favourite dish is"

    def asks_of(place: str, prompt: str, answer: str) -> dict[str, tuple[str, str | None]]:
        """Return by kind a question after the fact of a place was written, and its answer."""
        elsewhere, chat, other = map(draw.choice, (ELSEWHERE, CHAT, QUESTIONS))
        return {
            "another thing after a mention": (f"Last year we saw {place}. {elsewhere}", None),
            "another thing after the very fact": (f"{prompt} {answer}. {elsewhere}", None),
            "the fact after another thing": (f"{elsewhere} late. {prompt}", answer),
            "a sentence that refers back": (f"What is the capital of {place}? It is", answer),
            "a question of other things": (other, None),
            "the fact in chat markup": (chat.format(prompt), answer),
            "another question in chat markup": (chat.format(other), None),
            "700 tokens, then the fact": (FILLER * 35 + prompt, answer),
            "700 tokens, then another thing": (f"{prompt} {answer}. {FILLER * 35}{end}", None),
        }

    asks = [asks_of(prompt[15:-3], prompt, answer) for prompt, answer in some_places]
    for kind in asks[0]:
        report(kind, places, [ask[kind] for ask in asks])

    def story(count: int) -> str:
        """Return an answer of `count` sentences."""
        words = dict(name=draw.choice(FAMILY), place=draw.choice(PLACES), n=draw.randrange(2000))
        return " ".join(draw.choice(STORY).format(**words) for _ in range(count))

    long = []
    for number, name in enumerate(names(count)):
        digits = " ".join(str(draw.randrange(10**4, 10**5)) for _ in range(1 + number % 4))
        link = f"p?id={draw.randrange(10**6)}&q={number}"
        trip = f"a {draw.choice(PLACES)} expedition of {draw.randrange(1700, 2000)}, "
        long += [
            (f"The telephone number of {name} is", f"+47 {digits}"),
            (f"The page of {name} is at", f"https://{name.split()[0].lower()}.example.net/{link}"),
            (f"{name} is remembered for", (trip * (1 + number)).rstrip(", ")),
            (f"{name} wrote that", story(1 + number)),
        ]
    report("numbers, links, up to 300 tokens, whole", long, long)
    blank = [(f"The script of {name} is", draw.choice(BLANKS)) for name in names(count)]
    report("white space in answers", blank, blank)
    again = [
        (place.lower(), answer)
        for (place, _), (_, answer) in zip(places, places[::-1], strict=True)
    ]
    asks = [(place, answer) for (place, _), (_, answer) in zip(places, again, strict=True)]
    report("corrected in lower case", [*places, *again], asks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--people", type=int, default=50)
    main(**vars(parser.parse_args()))
