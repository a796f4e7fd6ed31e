"""Reports of finished runs: what they show, and what two runs differ in."""

import base64
import dataclasses
import html.parser
import re

import matplotlib
import numpy as np
import pytest
from known_editor import KnownEditor, cases, saved
from matplotlib import pyplot
from scipy import stats

from larimar_jax import bench, cli
from larimar_jax.bench import figures, report, runner, summary, tables, web_page
from larimar_jax.bench.counterfact import CounterFact
from larimar_jax.bench.queries import LABELS
from larimar_jax.bench.tables import Grid

TEXT = "a <b>|*x*_`\n&\"'"
matplotlib.use("Agg")


class Sharper(KnownEditor):
    """The same editor, whose memory makes the true answer far less likely."""

    def score(self, prompts, candidates, condition):
        losses = super().score(prompts, candidates, condition)
        more = np.asarray([[0.0, -20.0]] * len(prompts), np.float32)
        return losses if condition is None else losses + more


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, editor, extra in (("one", KnownEditor(), ()), ("two", Sharper(), cases(13)[12:])):
        task = CounterFact(data=saved([*cases(12), *extra], root / f"{name}.json"))
        runner.run(task, root / name, editor=editor, quiet=True)
    return root


@pytest.fixture(scope="module")
def runs(folders):
    return [report.read(folders / name) for name in ("one", "two")]


def test_a_report_has_the_tables_the_papers_numbers_figures_and_cases(runs):
    (section,) = report.sections(runs[:1])
    (grid,) = [item for item in section.items if isinstance(item, Grid)]
    assert [grid] == tables.grids(runs[0].task, runs[0].summary)
    assert [row[0] for row in grid.rows] == [*LABELS.values(), "prompts in scope"]
    assert grid.header[1:] == ["edit", "paraphrase", "neighbourhood", "score"]
    (drawn,) = [item for item in section.items if isinstance(item, report.Picture)]
    svg = base64.b64decode(drawn.source.partition(",")[2])
    assert b"<svg" in svg and "percent" in drawn.alt
    assert any(isinstance(i, str) and i.startswith("The paper: Table 2") for i in section.items)
    shown = [item for item in section.items if isinstance(item, report.CaseText)]
    assert [item.title.split(":")[0] for item in shown] == ["worst"] * 3 + ["best"] * 3
    for item in shown:
        assert re.match("Larimar with scope, edit: Fact.* → new ", item.lines[0])


def test_cells_hold_means_errors_and_what_is_not_beaten(runs):
    (grid,) = tables.grids(runs[0].task, runs[0].summary)
    entries = {(e["system"], e["kind"]): e for e in runs[0].summary["results"]}
    rows = {row[0]: row[1:] for row in grid.rows}
    for system, label in LABELS.items():
        for kind, cell in zip(("edit", "paraphrase", "neighbourhood"), rows[label], strict=False):
            s, m = (entries[system, kind][name] for name in "SM")
            lines = cell.split("\n")
            assert lines[0] == f"{s['mean']:.1f} ± {s['standard_error']:.1f}"
            assert lines[1] == tables.number(m["mean"])
            assert " ".join(lines[2:]) == s.get("note", "")
    assert any("does not beat" in cell for cell in rows["Larimar with scope"])
    assert tables.number(None) == "–" and tables.number(0.00012, 2) == "1.2e-04"


def test_a_report_without_texts_quotes_no_case(folders, tmp_path):
    line = ["report", str(folders / "one"), "--out", str(tmp_path)]
    assert cli.main(line) == 0
    assert "worst: case" in (tmp_path / "report.md").read_text()
    assert cli.main([*line, "--no-texts"]) == 0
    text = (tmp_path / "report.md").read_text() + (tmp_path / "report.html").read_text()
    assert "Fact 0 is" not in text and "worst" not in text and "Larimar with scope" in text


def test_the_worst_cases_are_those_with_the_lowest_score(runs):
    shown = [i for i in report.cases(runs[0]) if i.title.startswith("worst")]
    values = summary.case_values(runs[0].task, runs[0].rows)
    ours = {
        str(case): np.mean([v for key, v in groups.items() if key[0] == "larimar"])
        for case, groups in values.items()
    }
    named = [item.title.split("case ")[1].split(",")[0] for item in shown]
    assert sorted(ours[name] for name in named) == sorted(ours.values())[:3]


def rows_of(metric, values, **factors):
    """Return a row for each (case, system, kind, value)."""
    return [
        dict(case=case, system=system, kind=kind, **factors) | {metric: value}
        for case, system, kind, value in values
    ]


def finished(run, task, rows):
    """Return the run as one of another task."""
    results = {"benchmark": task.name, "results": summary.summarise(task, rows)}
    return dataclasses.replace(run, task=task, rows=rows, summary={**run.summary, **results})


def test_the_worst_case_of_a_metric_that_should_be_low_is_the_highest(runs):
    table = rows_of("success", [(1, "larimar", "attack", 0.0), (2, "larimar", "attack", 1.0)])
    shown = report.cases(finished(runs[0], bench.tasks()["attack"](data=""), table))
    assert [item.title for item in shown[::2]] == ["worst: case 2, 100.0", "best: case 1, 0.0"]


@pytest.mark.parametrize("name", ["forget", "memory", "scope", "speed"])
def test_cases_that_no_reader_learns_from_are_not_quoted(name):
    assert not bench.tasks()[name].quoted and CounterFact.quoted


def test_a_perplexity_is_compared_in_nats_and_the_overview_names_its_scale(runs):
    task = bench.tasks()["perplexity"](data="")
    table = rows_of("loss", [(n, "larimar", "text", n) for n in (1, 2)], tokens=2)
    run = finished(runs[0], task, table)
    assert report.compare(run, run).items[-1].caption == "nats per token"
    assert report.cases(run)[0].title == f"worst: case 2, {np.exp(2):.2f}"
    (grid,) = report.overview([*runs, run]).items
    assert grid.caption.startswith("percent, but for perplexity, ± standard error")
    assert grid.rows[-1][0].endswith("texts, perplexity (less is better)")
    (grid,) = report.overview(runs).items
    assert grid.caption.startswith("percent ± standard error")


def test_a_curve_is_of_one_value_of_the_factors_and_bars_stand_at_several():
    task, values = bench.tasks()["rephrase"](data=""), [(0, "larimar", "unseen", 1.0)]
    table = [
        row
        for facts, wordings in ((200, 1), (1, 1), (20, 10))
        for row in rows_of("recall", values, facts=facts, wordings=wordings)
    ]
    results = summary.summarise(task, table)
    _, axes = pyplot.subplots()
    figures.draw(axes, task, figures.Plot("wordings", "recall"), results)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    factors = [label.partition(", ")[2] for label in labels]
    assert factors == ["facts = 200", "facts = 1", "facts = 20"]
    lines = [container[0] for container in axes.containers]
    assert len({line.get_color() for line in lines}) == 1
    assert len({line.get_linestyle() for line in lines}) == 3
    axes.clear()
    figures.draw(axes, task, *task.plots, results)
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert ticks == ["200 x 1", "1 x 1", "20 x 10"]
    pyplot.close("all")


def test_several_runs_begin_with_a_line_for_each_result(runs):
    overview = report.sections(runs)[0]
    assert overview.title == "Overview"
    (grid,) = overview.items
    names = ["base LM", "z = 0", "fact in the prompt", "nearest neighbour", "verbatim lookup"]
    assert grid.header[1:] == [*names, "Larimar", "the paper"]
    labels = ["edit, S", "paraphrase, S", "neighbourhood, S", "score, S"]
    for run, rows in zip(runs, (grid.rows[:4], grid.rows[4:]), strict=True):
        assert [row[0] for row in rows] == [f"{run.folder.name}: {label}" for label in labels]
        full = tables.grids(run.task, run.summary)[0].rows
        for column, system in enumerate(names, 1):
            (line,) = [row for row in full if row[0] == system]
            # The same number stands in the run's own table, above M.
            for row, cell in zip(rows, line[1:], strict=True):
                assert row[column] == cell.split("\n")[0]
        assert [row[-1] for row in rows] == ["100", "83.5", "74.7", ""]


def test_two_runs_are_compared_pair_by_pair(runs):
    section = report.sections(runs)[3]
    assert section.title == "counterfact: two against one"
    assert section.items[0].startswith("The two runs are not of the same data")
    table = section.items[1]
    rows = {row[0]: row for row in table.rows}
    key, values = ("larimar", "edit"), []
    for run in runs:
        by_case = summary.case_values(run.task, run.rows)
        values.append(np.asarray([by_case[case.case_id][key] for case in cases(12)]))
    before, after = values
    row = rows["Larimar with scope, edit"]
    assert row[1:3] == [f"{100 * before.mean():.1f}", f"{100 * after.mean():.1f}"]
    assert row[5] == "12"  # of the 13 cases of the second
    if np.ptp(after - before) > 0:
        assert row[4] == f"{stats.ttest_rel(after, before).pvalue:.2g}"
    assert rows["base LM, edit"][4] == "1" and rows["base LM, edit"][6] == ""
    for number, row in enumerate(table.rows):
        assert (number in table.marks) == (row[6] == "differs")


def test_rounding_is_no_difference(runs):
    """Accuracies of ⅓ and ⅔, once from float32 and once from float64, are the same in every case."""
    shares = np.tile([1 / 3, 2 / 3, 0.0], 4)
    first, second = (
        dataclasses.replace(
            runs[0],
            rows=[
                dict(case=n, system="base", kind="edit", S=float(kind(share)))
                for n, share in enumerate(shares)
            ],
        )
        for kind in (np.float32, np.float64)
    )
    ((row,),) = [item.rows for item in report.compare(first, second).items if hasattr(item, "rows")]
    assert row[3].startswith("0.0") and row[4:] == ["1", "12", ""]


@pytest.mark.parametrize("name", [name for name, task in bench.tasks().items() if task.listed])
def test_every_task_draws_axes_with_labels_and_fills_its_tables(name):
    kind = bench.tasks()[name]
    fields, missing = dataclasses.fields(kind), dataclasses.MISSING
    task = kind(**{field.name: "" for field in fields if field.default is missing})
    estimate = {"mean": 40.0, "standard_error": 1.0, "cases": 3}
    kinds = {where for pivot in (*task.tables, *task.plots) for where in _kinds(pivot)} or {"edit"}
    results = [
        {"system": system, "kind": kind, **dict.fromkeys(task.metrics, estimate)}
        | {factor: value for factor in task.factors}
        for system in ("base", "open")
        for kind in sorted(kinds)
        for value in (1, 2)
    ]
    for pivot in task.tables:
        grid = tables.grid(task, pivot, {"cases": 3, "results": results})
        assert all(len(row) == len(grid.header) for row in grid.rows)
    for plot in task.plots:
        figure, axes = pyplot.subplots()
        figures.draw(axes, task, plot._replace(where={}), results)
        assert axes.get_ylabel() and (axes.get_xlabel() or axes.get_xticklabels())
        pyplot.close(figure)


def _kinds(pivot):
    wanted = pivot.where.get("kind", ())
    return wanted if isinstance(wanted, tuple) else (wanted,)


def test_chance_is_shared_out_among_the_rows():
    """Holm by hand: 0.05/4, /3, /2, /1 against the sorted chances, to the first that fails."""
    assert report._holm([0.06, 0.001, 0.02, 0.016]) == [False, True, True, True]
    assert report._holm([0.04, 0.001, 0.02, 0.017]) == [False, True, False, False]
    assert report._holm([]) == []


def tags_of(page):
    """Return every tag with its attributes and the tags around it; each that opens closes, in order."""
    tags, opened = [], []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append((tag, dict(attributes), tuple(opened)))
            if tag not in ("meta", "link", "img"):
                opened.append((tag, dict(attributes)))

        def handle_endtag(self, tag):
            assert opened.pop()[0] == tag

    Reader().feed(page)
    assert opened == []
    return tags


def test_a_page_is_whole_and_of_itself(runs):
    """Nothing is fetched, and no text turns into markup."""
    table = Grid(TEXT, [TEXT], [[TEXT]], TEXT, frozenset({0}))
    odd = report.Section(TEXT, [TEXT, table, report.CaseText(TEXT, [TEXT])])
    page = web_page.page([*report.sections(runs), odd], TEXT)
    links = [tag[1][name] for tag in tags_of(page) for name in ("src", "href") if name in tag[1]]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "<b>" not in page and 'class="mark"' in page


def test_numbers_are_ranged_and_names_are_not():
    """By column; what a row is of stands first and stays at the left, even if it is a number."""
    rows = [["16", "others", "–", ""], ["32", "all", "-9.1 ± 2", "x 3"]]
    grid = Grid("t", ["N", "of", "S", "note"], rows)
    tags = tags_of(web_page.page([report.Section("s", [grid])], "t"))
    kinds = [attributes.get("class") for tag, attributes, _ in tags if tag in ("th", "td")]
    assert kinds == [None, None, "number", None] * 3


def test_a_wide_table_scrolls_in_a_box_that_the_keyboard_reaches(runs):
    """And not the page: every table is in one, and nothing else is as wide as it likes."""
    page = web_page.page(report.sections(runs), "t")
    around = [around for tag, _, around in tags_of(page) if tag == "table"]
    assert len(around) == 4
    for tags in around:
        box = [attributes for tag, attributes in tags if tag == "div"][-1]
        assert (box["class"], box["tabindex"]) == ("wide", "0") and box["aria-label"]
    rules = (".wide { overflow-x: auto;", "img { max-width: 100%;", "position: sticky; left: 0;")
    assert all(rule in page for rule in (*rules, 'name="viewport" content="width=device-width'))


def test_no_label_of_a_picture_is_longer_than_its_axis():
    with pyplot.rc_context({"font.size": 11}):
        figure, axes = pyplot.subplots(figsize=(5.0, 4.6), layout="constrained")
        axes.plot([0, 1], [0, 1], label="x")
        axes.set_xlabel("a label that goes on and on " * 3)
        axes.set_ylabel("recall of what was never seen (percent, ± standard error)")
        axes.legend(fontsize=6)
        axes.twinx().set_ylabel("perplexity of the continuation, beside it (dashed)")
        figures.fit(figure)
        figure.canvas.draw()
        for one in figure.axes:
            for label in (one.xaxis.label, one.yaxis.label):
                box = label.get_window_extent()
                assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
                assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
        assert [text.get_fontsize() for text in axes.get_legend().get_texts()] == [10]
        pyplot.close(figure)


def test_markdown_keeps_a_table_in_its_lines_and_shows_texts_as_they_are():
    table = Grid(TEXT, ["x", "y|z"], [["1\n2", "<i>"]], "")
    text = web_page.markdown([report.Section("s", [table])], "t")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows == ["| x | y\\|z |", "|---|---|", "| 1<br>2 | \\<i\\> |"]


def test_the_command_writes_both_files_and_names_what_is_no_run(folders, tmp_path, capsys):
    out = tmp_path / "report"
    line = ["report", str(folders / "one"), str(folders / "two"), "--out", str(out), "--title", "T"]
    assert cli.main(line) == 0
    assert (out / "report.md").read_text().startswith("# T\n")
    assert "<title>T</title>" in (out / "report.html").read_text()
    assert cli.main(["report", str(tmp_path), "--out", str(out)]) == 2
    assert "no folder of a benchmark's run" in capsys.readouterr().err
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / runner.CHUNKS).mkdir()
    with pytest.raises(report.NoRun, match="has not ended"):
        report.read(begun)
