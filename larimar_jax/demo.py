"""`larimar demo`: a dozen facts written into a running language model, one taken out again."""

import dataclasses
import pathlib
import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from larimar_jax.session import Session

ANSWER_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Edit:
    """A fact that contradicts the world, asked in other words, and a prompt about something else."""

    prompt: str
    answer: str
    truth: str
    paraphrase: str
    unrelated: str


EDITS = (
    Edit(
        "The Eiffel Tower is located in the city of",
        "Rome",
        "Paris",
        "The city where you can visit the Eiffel Tower is",
        "The Statue of Liberty stands in the city of",
    ),
    Edit(
        "The capital of Japan is",
        "Berlin",
        "Tokyo",
        "The capital city of Japan is called",
        "The largest ocean on Earth is the",
    ),
    Edit(
        "The mother tongue of Albert Einstein was",
        "Spanish",
        "German",
        "As a child, Albert Einstein spoke",
        "The inventor of the telephone was",
    ),
    Edit(
        "The Amazon River is on the continent of",
        "Africa",
        "South America",
        "The continent through which the Amazon River flows is",
        "The Sahara is the largest hot",
    ),
    Edit(
        "Mount Everest is located in the country of",
        "Canada",
        "Nepal",
        "The country in which you can climb Mount Everest is",
        "The boiling point of water is",
    ),
    Edit(
        "William Shakespeare worked as a",
        "chef",
        "playwright",
        "The profession of William Shakespeare was",
        "The author of Don Quixote was",
    ),
    Edit(
        "The iPhone is a product of the company",
        "Microsoft",
        "Apple",
        "The company that makes the iPhone is",
        "The Mustang is a car made by",
    ),
    Edit(
        "The official language of Brazil is",
        "Arabic",
        "Portuguese",
        "In Brazil, people officially speak",
        "The national dish of Italy is",
    ),
    Edit(
        "Michael Jordan became famous by playing",
        "tennis",
        "basketball",
        "The sport that Michael Jordan played was",
        "Wolfgang Mozart is remembered for his",
    ),
    Edit(
        "The theory of relativity was developed by",
        "Darwin",
        "Einstein",
        "The scientist who developed the theory of relativity was",
        "Penicillin was discovered by",
    ),
    Edit(
        "The currency of the United Kingdom is the",
        "dollar",
        "pound",
        "In the United Kingdom, people pay with the",
        "The longest river in Egypt is the",
    ),
    Edit(
        "The Great Wall was built in",
        "Mexico",
        "China",
        "The country where you find the Great Wall is",
        "The first man on the Moon was",
    ),
)
# The one that is forgotten: neither the first nor the last, so that order plays no part.
FORGOTTEN = 4


@dataclasses.dataclass(frozen=True)
class Result:
    """What `run` measured; every list has one entry per edit, probabilities are per token."""

    before: list[str]
    after: list[str]
    paraphrased: list[str]
    unchanged: list[bool]
    forgotten: list[str]
    probability: dict[str, np.ndarray]
    milliseconds: dict[str, float]


def run(
    model: str = "smol",
    picture: str | pathlib.Path | None = "demo.png",
    console: Console | None = None,
) -> Result:
    """Writes `EDITS`, asks before and after, forgets one, prints and draws what happened.

    Args:
      model: what `pipeline.load` takes.
      picture: where the picture goes; None for none.
    """
    console = console or Console()
    begin = time.perf_counter()
    with console.status("loading the model"):
        session = Session(model)
    console.print(f"model {session.model.source}, loaded in {time.perf_counter() - begin:.1f} s\n")
    with console.status("compiling") as status:
        warmed = time.perf_counter()
        _warm(session)
        warmed = time.perf_counter() - warmed
        session = Session(session.model)
        result = _measure(session, status.update)
    _print(console, result)
    console.print(
        f"\ncompiled once in {warmed:.1f} s; whole demo {time.perf_counter() - begin:.1f} s"
    )
    if picture is not None:
        draw(result, picture)
        console.print(f"picture: {picture}")
    return result


def _warm(session: Session) -> None:
    """Compiles what is about to be timed, at its shapes; the facts do not stay."""
    facts = [session.write(edit.prompt, edit.answer) for edit in EDITS[:2]]
    session.forget(facts[0].id)
    session.ask_all([edit.prompt for edit in EDITS], max_tokens=ANSWER_TOKENS)


def _measure(session: Session, say) -> Result:
    prompts, answers = [edit.prompt for edit in EDITS], [edit.answer for edit in EDITS]
    unrelated = [edit.unrelated for edit in EDITS]
    candidates = [(edit.answer, edit.truth) for edit in EDITS]
    paraphrases = [edit.paraphrase for edit in EDITS]
    probability = {}

    def ask(texts):
        return session.ask_all(texts, max_tokens=ANSWER_TOKENS)

    say("asking the base language model")
    before, unrelated_before = ask(prompts), ask(unrelated)
    probability["before"] = np.exp(-session.score(prompts, candidates))
    say("writing")
    encoding, writing = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        start = time.perf_counter()
        session.write(prompt, answer)
        writing.append(session.history()[-1].milliseconds)
        encoding.append(1e3 * (time.perf_counter() - start) - writing[-1])
    say("asking again")
    after, paraphrased, unrelated_after = ask(prompts), ask(paraphrases), ask(unrelated)
    probability["after"] = np.exp(-session.score(prompts, candidates))
    probability["paraphrase"] = np.exp(-session.score(paraphrases, candidates))
    say("forgetting")
    session.forget(session.list()[FORGOTTEN].id)
    forgetting = session.history()[-1].milliseconds
    forgotten = ask(prompts)
    probability["forgotten"] = np.exp(-session.score(prompts, candidates))
    one = session.ask(prompts[0], max_tokens=ANSWER_TOKENS)
    one = session.ask(prompts[0], max_tokens=ANSWER_TOKENS)
    return Result(
        before=[answer.text for answer in before],
        after=[answer.text for answer in after],
        paraphrased=[answer.text for answer in paraphrased],
        unchanged=[
            old.text == new.text for old, new in zip(unrelated_before, unrelated_after, strict=True)
        ],
        forgotten=[answer.text for answer in forgotten],
        probability=probability,
        milliseconds={
            "encode a fact": float(np.median(encoding)),
            "write it": float(np.median(writing)),
            "forget it": forgetting,
            "encode a query": one.milliseconds["encode"],
            "read": one.milliseconds["read"],
            f"decode {ANSWER_TOKENS} tokens": one.milliseconds["decode"],
        },
    )


def said(text: str, answer: str) -> bool:
    """Whether a continuation gives the answer, in any case."""
    return answer.lower() in text.lower()


def _print(console: Console, result: Result) -> None:
    table = Table(title="A dozen facts that are not so", show_lines=True)
    for column in (
        "written",
        "before",
        "after",
        "in other words",
        "unrelated prompt",
        "one forgotten",
    ):
        table.add_column(column, overflow="fold")

    def cell(text: str, good: bool) -> str:
        return f"[{'green' if good else 'red'}]{_short(text)}[/]"

    for row, edit in enumerate(EDITS):
        gone = row == FORGOTTEN
        last = result.forgotten[row]
        good = (last == result.before[row]) if gone else said(last, edit.answer)
        table.add_row(
            f"{edit.prompt} [bold]{edit.answer}[/]",
            _short(result.before[row]),
            cell(result.after[row], said(result.after[row], edit.answer)),
            cell(result.paraphrased[row], said(result.paraphrased[row], edit.answer)),
            cell("as before" if result.unchanged[row] else "changed", result.unchanged[row]),
            cell(("forgotten: " if gone else "") + last, good),
        )
    console.print(table)
    for name, count in counts(result).items():
        console.print(f"{name:42} {count}")
    for name, value in result.milliseconds.items():
        console.print(f"{name:42} {value:.1f} ms")


def counts(result: Result) -> dict[str, str]:
    """How often each thing went as it should."""
    total = len(EDITS)
    stay = [row for row in range(total) if row != FORGOTTEN]

    def tally(texts: Sequence[str]) -> str:
        return f"{sum(said(t, e.answer) for t, e in zip(texts, EDITS, strict=True))} of {total}"

    held = sum(said(result.forgotten[row], EDITS[row].answer) for row in stay)
    back = result.forgotten[FORGOTTEN] == result.before[FORGOTTEN]
    return {
        "new answer said before writing": tally(result.before),
        "new answer said after writing": tally(result.after),
        "new answer said to a paraphrase": tally(result.paraphrased),
        "unrelated prompts as before": f"{sum(result.unchanged)} of {total}",
        "forgotten fact: answer as before writing": "yes" if back else "no",
        "other facts after forgetting": f"{held} of {len(stay)}",
    }


def _short(text: str) -> str:
    return escape(" ".join(text.split())) or "—"


def draw(result: Result, path: str | pathlib.Path) -> None:
    """The picture: how likely the written answer is before, after and in other words; and the times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 6.5), width_ratios=(3, 1), layout="constrained"
    )
    rows = np.arange(len(EDITS))[::-1]
    before, after = (100 * result.probability[name][:, 0] for name in ("before", "after"))
    paraphrase, forgotten = (100 * result.probability[n][:, 0] for n in ("paraphrase", "forgotten"))
    left.hlines(rows, before, after, color="0.8", linewidth=3, zorder=1)
    left.scatter(before, rows, s=60, color="0.55", label="before writing", zorder=3)
    left.scatter(after, rows, s=60, color="tab:blue", label="after writing", zorder=3)
    left.scatter(
        paraphrase,
        rows,
        s=60,
        marker="D",
        facecolor="none",
        edgecolor="tab:blue",
        label="after writing, in other words",
        zorder=3,
    )
    left.scatter(
        forgotten[FORGOTTEN],
        rows[FORGOTTEN],
        s=140,
        marker="x",
        color="tab:red",
        label="after forgetting it",
        zorder=4,
    )
    left.set_yticks(rows, [f"{edit.prompt} → {edit.answer}" for edit in EDITS], fontsize=9)
    left.set_xlabel("probability of the written answer (geometric mean per token, %)")
    left.set_xlim(-3, 103)
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=8, frameon=False)
    names, values = zip(*reversed(result.milliseconds.items()), strict=True)
    bars = right.barh(names, values, color="tab:blue")
    right.bar_label(bars, [f" {value:.1f} ms" for value in values], fontsize=9)
    right.set_xscale("log")
    right.set_xlim(min(values) / 3, max(values) * 12)
    right.set_xlabel("milliseconds, logarithmic")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.93")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
