"""`larimar demo`: a dozen facts written into a running language model, one taken out again; and an
episode of the synthetic world, through the paper's interface alone."""

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from larimar_jax.data import edit_records
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


# Prompt, answer, truth; then a paraphrase and an unrelated prompt.
_FACTS = """\
The Eiffel Tower is located in the city of | Rome | Paris
    The city where you can visit the Eiffel Tower is | The Statue of Liberty stands in the city of
The capital of Japan is | Berlin | Tokyo
    The capital city of Japan is called | The largest ocean on Earth is the
The mother tongue of Albert Einstein was | Spanish | German
    As a child, Albert Einstein spoke | The inventor of the telephone was
The Amazon River is on the continent of | Africa | South America
    The continent through which the Amazon River flows is | The Sahara is the largest hot
Mount Everest is located in the country of | Canada | Nepal
    The country in which you can climb Mount Everest is | The boiling point of water is
William Shakespeare worked as a | chef | playwright
    The profession of William Shakespeare was | The author of Don Quixote was
The iPhone is a product of the company | Microsoft | Apple
    The company that makes the iPhone is | The Mustang is a car made by
The official language of Brazil is | Arabic | Portuguese
    In Brazil, people officially speak | The national dish of Italy is
Michael Jordan became famous by playing | tennis | basketball
    The sport that Michael Jordan played was | Wolfgang Mozart is remembered for his
The theory of relativity was developed by | Darwin | Einstein
    The scientist who developed the theory of relativity was | Penicillin was discovered by
The currency of the United Kingdom is the | dollar | pound
    In the United Kingdom, people pay with the | The longest river in Egypt is the
The Great Wall was built in | Mexico | China
    The country where you find the Great Wall is | The first man on the Moon was
"""
EDITS = [Edit(*re.split(r" \| |\n    ", fact)) for fact in re.split(r"\n(?! )", _FACTS.strip())]
# The fact that is forgotten: neither the first nor the last, so that order plays no part.
FORGOTTEN = 4


@dataclasses.dataclass(frozen=True)
class Result:
    """What `run` measured: lists and arrays of an entry per edit, by the stage of the demo.

    Stages are before, after, paraphrase and forgotten. texts: continuations. unchanged: whether another
    prompt's is the same after as before. probability: of the written answer, a geometric mean per token.
    """

    texts: dict[str, list[str]]
    unchanged: list[bool]
    probability: dict[str, np.ndarray]
    milliseconds: dict[str, float]


def run(
    model: str = "smol", picture: str | Path | None = "demo.png", console: Console | None = None
) -> Result:
    """Write `EDITS`, ask before and after, forget one; print and draw what happened.

    Args:
      model: as `pipeline.load`.
      picture: where the picture goes; None for none.
    """
    console = console or Console()
    begin = time.perf_counter()
    with console.status("loading the model"):
        session = Session(model)
    console.print(f"model {session.model.source}, loaded in {time.perf_counter() - begin:.1f} s\n")
    with console.status("compiling") as status:
        warm_up = time.perf_counter()
        _compile(session)
        warm_up = time.perf_counter() - warm_up
        result = measure(Session(session.model), status.update)
    show(console, result)
    total = time.perf_counter() - begin
    console.print(f"\ncompiled once in {warm_up:.1f} s; whole demo {total:.1f} s")
    if picture is not None:
        draw(result, picture)
        console.print(f"picture: {picture}")
    return result


def _compile(session: Session) -> None:
    """Run what is about to be timed, at its shapes."""
    facts = [session.write(edit.prompt, edit.answer) for edit in EDITS[:2]]
    session.forget(facts[0].id)
    session.ask_all([edit.prompt for edit in EDITS], max_tokens=ANSWER_TOKENS)


def measure(session: Session, report: Callable[[str], None]) -> Result:
    """Write, ask and forget in a session; `report` hears what happens."""
    candidates = [(edit.answer, edit.truth) for edit in EDITS]
    texts, probability = {}, {}

    def ask(kind: str) -> list[str]:
        prompts = [getattr(edit, kind) for edit in EDITS]
        return [answer.text for answer in session.ask_all(prompts, max_tokens=ANSWER_TOKENS)]

    def enter(stage: str, kind: str = "prompt") -> None:
        prompts, texts[stage] = [getattr(edit, kind) for edit in EDITS], ask(kind)
        probability[stage] = np.exp(-session.score(prompts, candidates))[:, 0]

    report("asking the base language model")
    enter("before")
    unrelated = ask("unrelated")
    report("writing")
    encoding, writing = [], []
    for edit in EDITS:
        start = time.perf_counter()
        session.write(edit.prompt, edit.answer)
        writing.append(session.history()[-1].milliseconds)
        encoding.append(1e3 * (time.perf_counter() - start) - writing[-1])
    report("asking again")
    enter("after")
    enter("paraphrase", "paraphrase")
    unchanged = [old == new for old, new in zip(unrelated, ask("unrelated"), strict=True)]
    report("forgetting")
    session.forget(session.list()[FORGOTTEN].id)
    forgetting = session.history()[-1].milliseconds
    enter("forgotten")
    # The second call alone is timed: the first one compiles a batch of one.
    for _ in range(2):
        query = session.ask(EDITS[0].prompt, max_tokens=ANSWER_TOKENS).milliseconds
    milliseconds = {
        "encode a fact": float(np.median(encoding)),
        "write it": float(np.median(writing)),
        "forget it": forgetting,
        "encode a query": query["encode"],
        "read": query["read"],
        f"decode {ANSWER_TOKENS} tokens": query["decode"],
    }
    return Result(texts, unchanged, probability, milliseconds)


def has_answer(text: str, answer: str) -> bool:
    """Return whether a continuation has the answer in it, in any case."""
    return answer.lower() in text.lower()


def show(console: Console, result: Result) -> None:
    """Print a table of all edits, what was counted, and the times."""
    title = "A dozen false facts, written into memory"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("prompt and new answer", width=31)
    for name, width in (("before", 15), ("after", 10), ("in other\nwords", 10)):
        table.add_column(name, width=width, no_wrap=True, overflow="ellipsis")
    table.add_column("other\nprompt", width=8)

    def cell(text: str, good: bool) -> str:
        return f"[{'green' if good else 'red'}]{_line(text)}[/]"

    for row, edit in enumerate(EDITS):
        before, *edited = (result.texts[name][row] for name in ("before", "after", "paraphrase"))
        table.add_row(
            f"{edit.prompt} [bold]{edit.answer}[/]",
            _line(before),
            *(cell(text, has_answer(text, edit.answer)) for text in edited),
            cell("same" if result.unchanged[row] else "changed", result.unchanged[row]),
        )
    console.print(table)
    edit, text = EDITS[FORGOTTEN], result.texts["forgotten"][FORGOTTEN]
    console.print(f"{edit.prompt} [bold]{edit.answer}[/], forgotten: {_line(text)}\n")
    for name, count in counts(result).items():
        console.print(f"{name:42} {count}")
    for name, value in result.milliseconds.items():
        console.print(f"{name:42} {value:.1f} ms")


def counts(result: Result) -> dict[str, str]:
    """Return how often each thing went as it should."""
    total = len(EDITS)
    hits = {
        stage: [has_answer(text, edit.answer) for text, edit in zip(texts, EDITS, strict=True)]
        for stage, texts in result.texts.items()
    }
    others = sum(hits["forgotten"]) - hits["forgotten"][FORGOTTEN]
    before, forgotten = (result.texts[stage][FORGOTTEN] for stage in ("before", "forgotten"))
    return {
        "new answer before writing": f"{sum(hits['before'])} of {total}",
        "new answer after writing": f"{sum(hits['after'])} of {total}",
        "new answer to a paraphrase": f"{sum(hits['paraphrase'])} of {total}",
        "unrelated prompts as before": f"{sum(result.unchanged)} of {total}",
        "forgotten fact: answer as before writing": "yes" if forgotten == before else "no",
        "other facts after forgetting": f"{others} of {total - 1}",
    }


def _line(text: str) -> str:
    return escape(" ".join(text.split())) or "—"


def draw(result: Result, path: str | Path) -> None:
    """Draw how likely the written answer is before, after and in other words; and the times."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    rows = np.arange(len(EDITS))[::-1]
    percent = {stage: 100 * chances for stage, chances in result.probability.items()}
    left.hlines(rows, percent["before"], percent["after"], color="0.8", linewidth=3, zorder=1)
    open_diamond = dict(marker="D", facecolor="none", edgecolor="tab:blue")
    for name, label, style in (
        ("before", "before writing", dict(color="0.55")),
        ("after", "after writing", dict(color="tab:blue")),
        ("paraphrase", "after writing, in other words", open_diamond),
    ):
        left.scatter(percent[name], rows, s=60, label=label, zorder=3, **style)
    cross = dict(s=140, marker="x", color="tab:red", zorder=4, label="after forgetting it")
    left.scatter(percent["forgotten"][FORGOTTEN], rows[FORGOTTEN], **cross)
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


# The world: Larimar from scratch

STAGES = ("before", "written", "edited", "forgotten")
# Facts of an episode, and which of them is edited and which forgotten.
_FACTS_WRITTEN, _EDITED, _TAKEN_OUT = 8, 2, 5


@dataclasses.dataclass(frozen=True)
class Episode:
    """An episode about names that the model has never seen, by stage.

    facts: prompts with the written answers. texts: what each prompt is continued with. likeness: the
    products of every prompt's readout (row) and every fact's encoding (column), both less what M₀ reads
    for the prompt: what is written adds, and what the answer adds.
    """

    facts: list[tuple[str, str]]
    correction: str
    texts: dict[str, list[str]]
    likeness: dict[str, np.ndarray]


def world(
    model: str = "world", picture: str | Path | None = "world.png", console: Console | None = None
) -> Episode:
    """Write an episode into the memory of a model trained on the synthetic world, read it back, edit
    a fact, forget another; print and draw what happened.

    Args:
      model: as `pipeline.load`; trained with configs/world.py.
      picture: where the picture goes; None for none.
    """
    console = console or Console()
    with console.status("loading the model, writing, asking"):
        episode = write_episode(Session(model))
    table = Table(title="An episode about names that the model has never seen", box=box.SIMPLE_HEAD)
    table.add_column("prompt and answer")
    for stage in STAGES:
        table.add_column(stage)
    for row, (prompt, answer) in enumerate(episode.facts):
        cells = (_line(episode.texts[stage][row]) for stage in STAGES)
        table.add_row(f"{prompt} [bold]{answer}[/]", *cells)
    console.print(table)
    console.print(
        f"edited: fact {_EDITED + 1}, to {episode.correction}; forgotten: {_TAKEN_OUT + 1}"
    )
    if picture is not None:
        draw_episode(episode, picture)
        console.print(f"picture: {picture}")
    return episode


def write_episode(session: Session) -> Episode:
    """Write facts into a session, correct one, and forget another, asking after each stage."""
    records = edit_records.load(f"world:{_FACTS_WRITTEN}")
    facts = [(record.prompt, record.target_new) for record in records]
    prompts, pipeline = [prompt for prompt, _ in facts], session.model
    queries = pipeline.encode(prompts).latent
    encodings = pipeline.encode([" ".join(fact) for fact in facts], [a for _, a in facts]).latent
    texts, likeness = {}, {}
    empty = pipeline.memory.empty(pipeline.prepared)
    unwritten = np.asarray(pipeline.memory.read(pipeline.prepared, empty, queries).latent)

    def ask(stage: str) -> None:
        answers = session.ask_all(prompts, max_tokens=ANSWER_TOKENS)
        texts[stage] = [answer.text for answer in answers]
        readouts = pipeline.memory.read(pipeline.prepared, session.state, queries).latent
        read, added = np.asarray(readouts) - unwritten, encodings - unwritten
        lengths = np.linalg.norm(added, axis=1)
        likeness[stage] = read @ added.T / lengths / lengths[:, None]

    ask("before")
    written = [session.write(*fact) for fact in facts]
    ask("written")
    session.write(prompts[_EDITED], records[_EDITED].target_true)
    ask("edited")
    session.forget(written[_TAKEN_OUT].id)
    ask("forgotten")
    return Episode(facts, records[_EDITED].target_true, texts, likeness)


def draw_episode(episode: Episode, path: str | Path) -> None:
    """Draw what the memory adds to each prompt at each stage, beside what each answer adds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, len(STAGES))
    labels = [f"{prompt} → {answer}" for prompt, answer in episode.facts]
    for axes, stage in zip(panels, STAGES, strict=True):
        image = axes.imshow(episode.likeness[stage], vmin=-1, vmax=1, cmap="RdBu_r")
        axes.set_xticks(range(len(labels)), range(1, len(labels) + 1))
        axes.set_yticks(range(len(labels)), labels if stage == STAGES[0] else [], fontsize=8)
        axes.set(title=stage, xlabel="answer of fact")
    for axes, row in ((panels[2], _EDITED), (panels[3], _TAKEN_OUT)):
        axes.axhspan(row - 0.5, row + 0.5, fill=False, color="black", linewidth=1.5)
    figure.colorbar(image, ax=panels, label="share in what is read", shrink=0.8)
    figure.savefig(path, dpi=110)
