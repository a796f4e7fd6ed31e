"""How often a session answers as it should, by kind of input: the tables of docs/session.md.

    python tests/long/session_rates.py --count 20 --people 50

Names, relations and numbers are drawn from lists by a seed. An answer counts where it is the written
one, whole and nothing after it; or the base LM's and not empty, where nothing written applies.
"""

import argparse
import random
import warnings
from collections.abc import Callable, Iterable

from larimar_jax.session import NotKept, Session
from larimar_jax.session_file import Answer

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
ELSEWHERE = [
    "My neighbour was hungry. She ate her",
    "The largest planet is",
    "Water boils at a temperature of",
    "I opened the window because the room was",
    "The first month of the year is",
]
QUESTIONS = [
    "Who painted the ceiling?",
    "How many wheels does a cart have?",
    "What is the colour of snow?",
    "Please write a poem.",
    "Why is the sky blue?",
]
FILLER = (
    "The market was open, and people stood in front of the stalls with their baskets until noon. "
)


def main(count: int, people: int) -> None:
    """Print a line for each kind: how many of its inputs are answered as they should be."""
    warnings.simplefilter("ignore")
    draw, first = random.Random(0), Session("smol")

    def names(number: int) -> list[str]:
        return draw.sample([f"{a} {b}" for a in FIRST for b in FAMILY], number)

    def session(facts: Iterable[tuple[str, str]]) -> tuple[Session, int]:
        """Return a session with these facts, and how many it refused."""
        opened, refused = Session(first.model), 0
        for fact in facts:
            try:
                opened.write(*fact)
            except NotKept:
                refused += 1
        return opened, refused

    def report(kind: str, opened: Session, asks: Iterable[tuple[str, str | None]], note="") -> None:
        """Ask prompts whose answers are known; None is the base LM's, and not empty."""
        asks = list(asks)
        answers = opened.ask_all([prompt for prompt, _ in asks])
        wrong = [
            (prompt[-60:], wanted, have.fact, have.text)
            for (prompt, wanted), have in zip(asks, answers, strict=True)
            if not is_right(have, wanted)
        ]
        print(f"{kind:42} {len(asks) - len(wrong):4} of {len(asks):4}  {note}", flush=True)
        for line in wrong[:6]:
            print("     ", line)

    def is_right(have: Answer, wanted: str | None) -> bool:
        if wanted is None:
            return not have.in_scope and have.text.strip() != ""
        return have.in_scope and have.text.strip() == wanted

    def table(subjects: Iterable[str], form: int = 0) -> list[tuple[str, str]]:
        """Return facts about all attributes of subjects, by one of the two wordings."""
        drawn = random.Random(1)
        return [
            (row[form].format(name), drawn.choice(row[2].split()))
            for name in subjects
            for row in ATTRIBUTES
        ]

    subjects = names(people)
    facts = table(subjects)
    opened, refused = session(facts)
    report(f"{len(facts)} facts, verbatim", opened, facts, f"{refused} refused at the write")
    report("the same, capitals only", opened, [(p.upper(), a) for p, a in facts[:count]])

    subjects = names(10)
    opened, _ = session(table(subjects))
    asks = table(subjects, 1)
    report("10 people x 5, in other words", opened, asks)
    matched = [answer.fact for answer in opened.ask_all([p for p, _ in asks], max_tokens=1)]
    own = [fact.id for fact in opened.list()]
    print(f"      .fact is right {sum(a == b for a, b in zip(matched, own, strict=True))} times")

    places = [
        (f"The capital of {place} is", name.split()[1])
        for place, name in zip(PLACES, names(12), strict=True)
    ]
    opened, _ = session(places)
    some_places = [draw.choice(places) for _ in range(count)]

    def asks_of(form: Callable[[str, str], tuple[str, str | None]]) -> list[tuple[str, str | None]]:
        return [form(*fact) for fact in some_places]

    forms = {
        "another thing after a mention": lambda p, a: (
            f"Last year we saw {p[15:-3]}. {draw.choice(ELSEWHERE)}",
            None,
        ),
        "another thing after the very fact": lambda p, a: (
            f"{p} {a}. {draw.choice(ELSEWHERE)}",
            None,
        ),
        "the fact after another thing": lambda p, a: (f"{draw.choice(ELSEWHERE)} late. {p}", a),
        "a sentence that refers back": lambda p, a: (
            f"What is the capital of {p[15:-3]}? It is",
            a,
        ),
    }
    for kind, form in forms.items():
        report(kind, opened, asks_of(form))
    report(
        "a question of other things", opened, [(draw.choice(QUESTIONS), None) for _ in range(count)]
    )
    report(
        "the fact in chat markup", opened, asks_of(lambda p, a: (draw.choice(CHAT).format(p), a))
    )
    report(
        "another question in chat markup",
        opened,
        asks_of(lambda p, a: (draw.choice(CHAT).format(draw.choice(QUESTIONS)), None)),
    )
    report(
        "700 tokens, then the fact",
        opened,
        asks_of(lambda p, a: (FILLER * 35 + p, a))[: count // 4],
    )
    report(
        "700 tokens, then another thing",
        opened,
        asks_of(lambda p, a: (p + f" {a}. " + FILLER * 35 + "My favourite dish is", None))[
            : count // 4
        ],
    )

    long = []
    for number, name in enumerate(names(count)):
        digits = " ".join(str(draw.randrange(10**4, 10**5)) for _ in range(1 + number % 4))
        link = (
            f"https://{name.split()[0].lower()}.example.net/p?id={draw.randrange(10**6)}&q={number}"
        )
        story = f"a {draw.choice(PLACES)} expedition of {draw.randrange(1700, 2000)}, " * (
            1 + number
        )
        long += [
            (f"The telephone number of {name} is", f"+47 {digits}"),
            (f"The page of {name} is at", link),
            (f"{name} is remembered for", story.rstrip(", ")),
        ]
    opened, refused = session(long)
    report("numbers, links, up to 300 tokens, whole", opened, long, f"{refused} refused")
    blank = [
        (
            f"The script of {name} is",
            draw.choice(["a\nb", "x = 1\n\n\ty = 2", "one  two", "\\t\n-"]),
        )
        for name in names(count)
    ]
    opened, refused = session(blank)
    report("white space in answers", opened, blank, f"{refused} refused")
    again = [
        (place, answer)
        for place, (_, answer) in zip((p.lower() for p, _ in places), places[::-1], strict=True)
    ]
    opened, _ = session([*places, *again])
    report(
        "corrected in lower case",
        opened,
        [(p, a) for (p, _), (_, a) in zip(places, again, strict=True)],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--people", type=int, default=50)
    main(**vars(parser.parse_args()))
