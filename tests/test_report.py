"""Reports of finished runs: what they show, and what two runs differ in."""

import base64
import dataclasses
import html.parser
import json
import types

import numpy as np
import pytest
from rich.table import Table
from scipy import stats
from test_bench import KnownEditor, cases

from larimar_jax import cli
from larimar_jax.bench import counterfact, pages, report, runner

TEXT = "a <b>|*x*_`\n&\"'"


class Sharper(KnownEditor):
    """The same editor, whose losses of what is asked through the memory are higher on odd rows."""

    def score(self, prompts, candidates, condition):
        found = super().score(prompts, candidates, condition)
        if condition is not None:
            found = found + np.asarray([[0.0, -20.0]] * len(prompts), np.float32)
        return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, editor in (("one", KnownEditor()), ("two", Sharper())):
        made = counterfact.CounterFact(editor, cases(12), data={"name": "x", "sha256": name})
        runner.run(made, root / name, quiet=True)
    return root


@pytest.fixture(scope="module")
def runs(folders):
    return [report.read(folders / name) for name in ("one", "two")]


def test_a_report_has_the_tables_the_papers_numbers_pictures_and_cases(runs):
    (section,) = report.sections(runs[:1])
    grids = [item for item in section.items if isinstance(item, report.Grid)]
    wanted = [report.grid(table) for table in counterfact.tables(runs[0].summary)]
    assert grids == wanted and len(grids[0].rows) == 7
    (drawn,) = [item for item in section.items if isinstance(item, report.Picture)]
    svg = base64.b64decode(drawn.source.partition(",")[2])
    assert b"<svg" in svg and "percent" in drawn.alt
    assert any(isinstance(i, str) and i.startswith("The paper: Table 2") for i in section.items)
    shown = [item for item in section.items if isinstance(item, report.Case)]
    assert [item.title.split(":")[0] for item in shown] == ["worst"] * 3 + ["best"] * 3
    assert all(line for item in shown for line in item.lines)


def test_a_report_without_texts_quotes_no_case(folders, tmp_path):
    line = ["report", str(folders / "one"), "--out", str(tmp_path)]
    assert cli.main(line) == 0
    assert "written: " in (tmp_path / "report.md").read_text()
    assert cli.main([*line, "--no-texts"]) == 0
    told = (tmp_path / "report.md").read_text() + (tmp_path / "report.html").read_text()
    assert "written: " not in told and "worst" not in told and "Larimar with scope" in told


def test_the_worst_cases_are_those_with_the_lowest_score(runs):
    shown = [i for i in report.cases(runs[0]) if i.title.startswith("worst")]
    ours = {
        str(record["case_id"]): np.mean(
            [v for k, v in counterfact.values(record).items() if k.startswith("Larimar with scope")]
        )
        for record in runs[0].records
    }
    named = [item.title.split("case ")[1].split(",")[0] for item in shown]
    assert sorted(ours[name] for name in named) == sorted(ours.values())[:3]


def test_several_runs_begin_with_a_line_for_each_result(runs):
    overview = report.sections(runs)[0]
    assert overview.title == "Overview"
    (grid,) = overview.items
    names = ["base LM", "z = 0", "fact in the prompt", "nearest neighbour", "Larimar", "the paper"]
    assert grid.header[1:] == names
    labels = ["edit S", "paraphrase S", "neighbourhood S", "score"]
    for run, rows in zip(runs, (grid.rows[:4], grid.rows[4:]), strict=True):
        assert [row[0] for row in rows] == [f"{run.folder.name}: {label}" for label in labels]
        full = report.grid(counterfact.tables(run.summary)[0]).rows
        for column, system in enumerate(("base LM", "z = 0", "fact in the prompt"), 1):
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
    name = "Larimar with scope, edit"
    before, after = (
        np.asarray([counterfact.values(record)[name] for record in run.records]) for run in runs
    )
    assert rows[name][1:3] == [f"{100 * before.mean():.1f}", f"{100 * after.mean():.1f}"]
    if np.ptp(after - before) > 0:
        assert rows[name][4] == f"{stats.ttest_rel(after, before).pvalue:.2g}"
    assert rows["base LM, edit"][4] == "1" and rows["base LM, edit"][6] == ""
    for number, row in enumerate(table.rows):
        assert (number in table.marks) == (row[6] == "differs")


def test_rounding_is_no_difference(runs):
    """Accuracies of ⅓ and ⅔, once from float32 and once from float64, are the same in every case."""
    shares = np.tile([1 / 3, 2 / 3, 0.0], 4)
    module = types.ModuleType("shares")
    module.values = lambda record: {"share": record["share"]}
    first, second = (
        dataclasses.replace(
            run,
            module=module,
            records=[
                record | {"share": float(kind(share))}
                for record, share in zip(run.records, shares, strict=True)
            ],
        )
        for run, kind in zip(runs, (np.float32, np.float64), strict=True)
    )
    ((row,),) = [item.rows for item in report.compare(first, second).items if hasattr(item, "rows")]
    assert row[3].startswith("0.0") and row[4:] == ["1", "12", ""]


def test_chance_is_shared_out_among_the_rows():
    """Holm by hand: 0.05/4, /3, /2, /1 against the sorted chances, to the first that fails."""
    assert report._holm([0.06, 0.001, 0.02, 0.016]) == [False, True, True, True]
    assert report._holm([0.04, 0.001, 0.02, 0.017]) == [False, True, False, False]
    assert report._holm([]) == []


def test_a_page_is_whole_closed_and_of_itself(runs):
    """Every tag that opens closes, in order; nothing is fetched; no text turns into markup."""
    void, opened, fetched = {"meta", "link", "img"}, [], []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            fetched.extend(
                value
                for name, value in attributes
                if name in ("src", "href") and not value.startswith(("data:", "#"))
            )
            if tag not in void:
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    table = report.Grid(TEXT, [TEXT], [[TEXT]], TEXT, frozenset({0}))
    odd = report.Section(TEXT, [TEXT, table, report.Case(TEXT, [TEXT])])
    page = pages.page([*report.sections(runs), odd], TEXT)
    Reader().feed(page)
    assert opened == [] and fetched == [] and "<b>" not in page and 'class="mark"' in page


def test_numbers_are_ranged_and_names_are_not():
    """By column; what a row is of stands first and stays at the left, even if it is a number."""
    grid = report.Grid(
        "t", ["N", "of", "S", "note"], [["16", "others", "–", ""], ["32", "all", "-9.1 ± 2", "x 3"]]
    )
    kinds = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag in ("th", "td"):
                kinds.append(dict(attributes).get("class"))

    Reader().feed(pages.page([report.Section("s", [grid])], "t"))
    assert kinds == [None, None, "number", None] * 3


def test_a_wide_table_scrolls_in_a_box_that_the_keyboard_reaches(runs):
    """And not the page: every table is in one, and nothing else is as wide as it likes."""
    outside, boxes = [], []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag == "div":
                boxes.append(dict(attributes))
            if tag == "table" and not (boxes and boxes[-1].get("class") == "wide"):
                outside.append(tag)

        def handle_endtag(self, tag):
            if tag == "div":
                assert boxes[-1]["tabindex"] == "0" and boxes.pop()["aria-label"]

    page = pages.page(report.sections(runs), "t")
    Reader().feed(page)
    assert page.count("<table>") == 4 and outside == []
    for rule in (".wide { overflow-x: auto;", "img { max-width: 100%;", "position: sticky; left: 0;"):
        assert rule in page
    assert 'name="viewport" content="width=device-width' in page


def test_no_label_of_a_picture_is_longer_than_its_axis():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 11}):
        figure, axes = pyplot.subplots(figsize=(5.0, 4.6), layout="constrained")
        axes.plot([0, 1], [0, 1], label="x")
        axes.set_xlabel("a label that goes on and on " * 3)
        axes.set_ylabel("recall of what was never seen (percent, ± standard error)")
        axes.legend(fontsize=6)
        axes.twinx().set_ylabel("perplexity of the continuation, beside it (dashed)")
        report.fit(figure)
        figure.canvas.draw()
        for one in figure.axes:
            for label in (one.xaxis.label, one.yaxis.label):
                box = label.get_window_extent()
                assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
                assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
        assert [text.get_fontsize() for text in axes.get_legend().get_texts()] == [10]
        pyplot.close(figure)


def test_markdown_keeps_a_table_in_its_lines_and_shows_texts_as_they_are():
    table = report.Grid(TEXT, ["x", "y|z"], [["1\n2", "<i>"]], "")
    text = pages.markdown([report.Section("s", [table])], "t")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows == ["| x | y\\|z |", "|---|---|", "| 1<br>2 | \\<i\\> |"]


def test_a_rich_table_keeps_its_cells():
    table = Table("a", "b", title="t", caption="c")
    table.add_row("1", "2")
    table.add_row("3", "")
    assert report.grid(table) == report.Grid("t", ["a", "b"], [["1", "2"], ["3", ""]], "c")


def test_the_command_writes_both_files_and_names_what_is_no_run(folders, tmp_path, capsys):
    out = tmp_path / "report"
    told = ["report", str(folders / "one"), str(folders / "two"), "--out", str(out), "--title", "T"]
    assert cli.main(told) == 0
    assert (out / "report.md").read_text().startswith("# T\n")
    assert "<title>T</title>" in (out / "report.html").read_text()
    assert cli.main(["report", str(tmp_path), "--out", str(out)]) == 2
    assert "no folder of a benchmark's run" in capsys.readouterr().err
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / runner.CASES).write_text(json.dumps({"case_id": 1}) + "\n")
    with pytest.raises(report.NoRun, match="has not ended"):
        report.read(begun)
