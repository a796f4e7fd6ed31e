"""The commands of `larimar` that measure: bench, sweep, compare, report and reproduce; see cli.py.

What is heavy to import is imported inside them.
"""

import argparse
import inspect
import sys
from typing import Any

from larimar_jax.train.train_commands import Count


def add_benchmarks(bench: argparse.ArgumentParser, common: dict[str, Any]) -> None:
    """Add a parser for each benchmark, with the options of its task."""
    from larimar_jax.bench import runner, task, tasks

    names = bench.add_subparsers(title="benchmarks", metavar="NAME", dest="name", required=True)
    out = "folder of the run; resumed if it exists"
    part = "compute the Ith of N shares, from 0, in a folder that all N processes see; the one that is "
    part += "done last writes the result"
    for name, kind in tasks().items():
        if not kind.listed:
            continue
        text = inspect.cleandoc(kind.__doc__)
        single = names.add_parser(name, help=text.partition("\n")[0], description=text, **common)
        task.add_arguments(single, kind)
        single.add_argument("--out", required=True, metavar="DIR", help=out)
        single.add_argument("--share", type=runner.share, metavar="I/N", help=part)


def bench(**options: Any) -> None:
    """Run a benchmark, or go on with one that was stopped.

    Example: larimar bench counterfact --data counterfact.json --limit 200 --out runs/counterfact
    """
    from larimar_jax.bench import runner, task, tasks

    name, out, part = (options.pop(key) for key in ("name", "out", "share"))
    runner.run(task.build(tasks()[name], options), out, part)


def moments(
    *,
    model: str = "smol",
    editors: str = "rome",
    editor_settings: tuple[str, ...] = (),
    corpus: str = "wikipedia-summaries",
    tokens: Count = 100_000,
) -> None:
    """Compute the second moments of keys that other editors need, and keep them in the cache.

    `larimar bench --editors` computes what is missing from the packaged summaries; this is for another
    corpus or more of it. Rows are split over all devices. It goes on where it was stopped.

    Args:
      model MODEL: a shipped name, an exported file or a run
      editors NAMES: those whose layers are read
      editor_settings KEY=VALUE: such as rome.layer=9
      corpus NAME: a name or file as of data.corpus
      tokens N: at least so many, or the whole corpus
    Example: larimar moments --model smol --editors rome,memit --tokens 1000000
    """
    from larimar_jax import config as configs
    from larimar_jax import editors as peers
    from larimar_jax import pipeline
    from larimar_jax.editors import moments

    configs.cache_programs()
    chosen = peers.build(editors, editor_settings)
    loaded = pipeline.load(model)
    base = peers.BaseLM(loaded.model, loaded.decoder_tokenizer)
    layers = sorted({layer for each in chosen.values() for layer in each.needs_moments(base)})
    for layer, sums in moments.load(base, layers, corpus, tokens).items():
        print(f"layer {layer}: {sums.tokens:,} tokens of {sums.documents:,} documents")


def sweep(*, config: str, out: str, overrides: tuple[str, ...] = ()) -> None:
    """Measure every memory over a grid of settings, sizes and noise.

    A variant is compiled once for a shape, and all its cells run in that program. Writes rows.jsonl,
    summary.json and pictures.

    Args:
      config FILE: a file with get_config()
      out DIR: folder of the run; resumed if it exists
      overrides KEY=VALUE: settings that differ from the file, such as slots=[64]
    Example: larimar sweep --config=configs/sweep_memory.py --out runs/sweep
    """
    from larimar_jax import config as configs
    from larimar_jax import schema
    from larimar_jax.bench import sweep as sweeps

    values = schema.override(configs.load_dict(config), overrides)
    for path in sweeps.run(values, out):
        print(f"drawn: {path}", file=sys.stderr)


def compare(
    *,
    config: str,
    memories: str | None = None,
    variants: str | None = None,
    seeds: Count = 3,
    data: str | None = None,
    out: str = "runs/compare",
    overrides: tuple[str, ...] = (),
) -> None:
    """Train memories, or other variants of a config, and measure what each does to editing.

    Each variant is trained from scratch, all its seeds side by side in one compiled program, and then
    edited through its own memory: one fact and its paraphrases, N facts at once, forgetting, a stream of
    single writes. It goes on where it was stopped, and a variant that is finished is not trained again.
    Writes rows.jsonl, summary.json, report.md, report.html and compare.png.

    Args:
      config FILE: a file with get_config()
      memories NAMES: such as direct,kanerva; a memory takes those settings of the config's that it has
        (default: every file of larimar_jax/memory/, unless there is --variants)
      variants FILE: a Python file whose get_variants() returns {name: [settings as of --set]}
      seeds N: how many of each
      data FILE: edits of names that the corpus does not have (default: of the world of data/world.py)
      out DIR: a folder for each variant, and the report
      overrides KEY=VALUE: settings of all variants that differ from the file, such as train.steps=200
    Example: larimar compare --config=configs/world.py --memories direct,kanerva --out runs/compare
    """
    from larimar_jax import config as configs
    from larimar_jax import schema
    from larimar_jax.bench import compare as comparison

    configs.cache_programs()
    values = schema.override(configs.load_dict(config), overrides)
    names = tuple(filter(None, (memories or "").split(",")))
    options = dict(memories=names, variants=variants, seeds=seeds, data=data)
    for path in comparison.run(values, out, **options):
        print(f"written: {path}", file=sys.stderr)


def report(
    folders: tuple[str, ...], *, out: str, title: str = "Larimar: results", texts: bool = True
) -> None:
    """Make a report of finished benchmark runs, and compare them.

    Tables beside the paper's numbers, pictures, and the worst and best cases with their texts. Where two
    runs are of one benchmark, each later one is compared with the first, case by case, and what differs
    by more than chance is marked. The page needs nothing beside it.

    Args:
      folders RUN: folders of runs that have ended, or folders of such folders
      out DIR: where report.md and report.html go
      title TEXT: of the report
      texts: leave out cases with their texts, which are the benchmark's data
    Example: larimar report runs/counterfact runs/batch --out runs/report
    """
    from larimar_jax.bench import report as reports
    from larimar_jax.bench import web_page

    runs = [reports.read(run) for folder in folders for run in reports.inside(folder)]
    for path in web_page.write(reports.sections(runs, texts), out, title):
        print(f"written: {path}", file=sys.stderr)


def reproduce(
    *, config: str, out: str, texts: bool = True, overrides: tuple[str, ...] = ()
) -> None:
    """Run all the benchmarks of a config, and make their report.

    Each runs in a folder of its own. A finished run is not repeated.

    Args:
      config FILE: a file with get_config()
      out DIR: the folders, and the report
      texts: leave cases with their texts out of the report
      overrides KEY=VALUE: settings that differ from the file, such as data.zsre=FILE
    Example: larimar reproduce --config=configs/bench_paper.py --out runs/paper
        --set data.counterfact=FILE data.zsre=FILE
    """
    from larimar_jax import config as configs
    from larimar_jax import schema
    from larimar_jax.bench import reproduce as reproduces

    values = schema.override(configs.load_dict(config), overrides)
    for path in reproduces.run(values, out, texts=texts):
        print(f"written: {path}", file=sys.stderr)
