"""A sweep: one program a shape, numbers of a plain loop, resumed and refused as it should be."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import cli, config, memory, schema
from larimar_jax.bench import report, runner, sweep, sweep_data

VALUES = dict(
    latent=8,
    variants=dict(
        ridge=dict(variant="streaming", ridge=[1e-2, 1.0], query_noise=[0.0, 0.5]),
        list=dict(variant="nearest"),
    ),
    slots=[6],
    facts=[3, 4],
    rephrasings=[1],
    noises=[0.0, 0.5],
    seeds=[0, 1],
)


def build(**values):
    return schema.from_dict(sweep.Sweep, VALUES | values)


def rows_of(task):
    return [row for _, row in zip(task.cases(), task.evaluate(None, task.cases()), strict=True)]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "run"
    return build(), folder, sweep.run(VALUES, folder, quiet=True)


def test_each_shape_is_compiled_once():
    task = build(noises=[0.0], seeds=[0])
    assert len(task.cases()) == (4 + 1) * 2
    assert len(rows_of(task)) == len(rows_of(task)) == 10
    assert len(task.programs) == 2
    assert [program._cache_size() for program in task.programs.values()] == [1, 1]


def test_cells_are_those_of_a_plain_loop_in_float64(done):
    task, folder, _ = done
    rows = {row["case"]: row for row in runner.read_rows(folder)}
    cells = [cell for cell in task.cases() if cell.label == "ridge"]
    assert len(cells) == 32
    for cell in cells[::3]:
        key = jax.random.split(jax.random.key(cell.seed))[0]
        facts = sweep_data.synthetic(key, 4, 8, 1, jnp.float32(cell.noise))
        keys, values = (np.float64(a)[: 2 * cell.facts] for a in (facts.keys, facts.values))
        targets, queries = (np.float64(a)[: cell.facts] for a in (facts.targets, facts.queries))
        w, m0 = keys[:, :6], np.eye(6, 8)
        size = np.square(w).sum() / 6
        shrink = cell.variant.query_noise**2 * 2.0 ** np.round(np.log2(size))
        gram = w.T @ w + (cell.variant.ridge + shrink) * np.eye(6)
        m = m0 + np.linalg.solve(gram, w.T @ (values - w @ m0) - shrink * m0)
        read = queries[:, :6] @ m
        error = np.linalg.norm(read - targets) / np.linalg.norm(targets)
        recall = np.mean(np.argmax(read @ targets.T, axis=1) == np.arange(cell.facts))
        row = rows[cell.case_id]
        assert row["error"] == pytest.approx(error, rel=1e-3)
        assert row["recall"] == pytest.approx(recall)
        assert row["facts"] == cell.facts and row["settings"]["ridge"] == cell.variant.ridge
        state = memory.build("streaming", slots=6, latent=8)
        shapes = jax.eval_shape(state.empty, state.prepare(state.init(jax.random.key(0))))
        assert row["bytes"] == sum(4 * np.prod(x.shape) for x in jax.tree.leaves(shapes))


def test_a_sweep_is_taken_up_and_refuses_another_ones_folder(done, tmp_path):
    task, folder, pictures = done
    assert runner.run(build(), tmp_path, runner.Share(0, 2), quiet=True) is None
    runner.run(build(), tmp_path, quiet=True)

    def untimed(folder):
        return [row | {"seconds": 0} for row in runner.read_rows(folder)]

    assert untimed(tmp_path) == untimed(folder)
    with pytest.raises(runner.DifferentSettings, match="seeds"):
        runner.run(build(seeds=[7]), tmp_path, quiet=True)
    names = [f"synthetic_{kind}.png" for kind in ("capacity", "retention", "pareto")]
    assert [path.name for path in pictures] == names
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in pictures)
    items = report.sections([report.read(folder)])[0].items
    assert sum(isinstance(item, report.Picture) for item in items) == 3


def test_real_facts_are_moved_by_the_differences_of_real_wordings():
    rng = np.random.default_rng(0)
    encodings = sweep_data.RealFacts(*(np.float32(rng.standard_normal((9, 5))) for _ in range(3)))
    facts = sweep_data.real(jax.random.key(0), encodings, 4, 2, jnp.float32(0.5))
    assert facts.keys.shape == (12, 5) and facts.queries.shape == (4, 5)
    prompts = np.asarray(facts.keys[::3])
    rows = [int(np.argmin(np.abs(encodings.prompts - p).sum(1))) for p in prompts]
    np.testing.assert_array_equal(encodings.values[rows], facts.targets)
    moved = (np.asarray(facts.queries) - prompts) / 0.5
    assert all(np.abs(encodings.shifts - m).sum(1).min() < 1e-4 for m in moved)


def test_a_config_that_does_not_fit_names_everything():
    variants = dict(
        a=dict(variant="streaming", rigde=1.0), b=dict(variant="nothing"), c=3,
        d=dict(variant="none", reference="x"),
    )  # fmt: skip
    with pytest.raises(schema.ConfigError) as error:
        build(variants=variants, slots=["x"], extra=1)
    for part in (
        "no setting rigde", "b: there is no memory variant 'nothing'", "c: expected a section, got 3",
        "d.reference: must be one of prior, prompts", "slots[0]", "extra: unknown",
    ):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(schema.ConfigError, match="latent is 0"):
        build(latent=0)


def test_a_reference_of_prompts_known_beforehand():
    gaussian = dict(variant="direct", query="prior", initial="normal")
    gaussian["addressing"] = dict(kind="gaussian", width=[1e-3])
    kinds = {f"by_{kind}": gaussian | dict(reference=kind) for kind in sweep.REFERENCES}
    task = build(variants=kinds, facts=[4], noises=[0.0], seeds=[0])
    rows = {row["system"]: row for row in rows_of(task)}
    # The slots are then the very prompts, and each fact has one of its own.
    assert rows["by_prompts"]["recall"] == 1.0
    assert rows["by_prompts"]["error"] < 1e-5 < rows["by_prior"]["error"]
    params = memory.build("direct", slots=3, latent=2).init(jax.random.key(0))
    prompts = jnp.arange(8.0).reshape(4, 2)
    present = jnp.array([True, True, False, False])
    known = sweep.with_known_prompts(params, prompts, present).reference_memory
    np.testing.assert_array_equal(known, [*prompts[:2], params.prior_memory[2]])


def test_the_command_runs_a_config(tmp_path, capsys):
    small = VALUES | dict(variants=dict(none=dict(variant="none")), seeds=[0], noises=[0.5])
    body = f"def get_config():\n    return ConfigDict({small!r})\n"
    (tmp_path / "small.py").write_text(f"from ml_collections import ConfigDict\n{body}")
    out = tmp_path / "run"
    line = ["sweep", "--config", str(tmp_path / "small.py"), "--out", str(out)]
    line += ["--set", "facts=[4]"]
    assert cli.main(line) == 0
    shown = capsys.readouterr().out
    assert "none" in shown and (out / "synthetic_capacity.png").is_file()
    assert json.loads((out / "summary.json").read_text())["cases"] == 1


def test_the_shipped_sweep_is_as_large_as_it_says():
    cells = schema.from_dict(sweep.Sweep, config.load_dict("configs/sweep_memory.py")).cases()
    assert (len(cells), len({cell.shape for cell in cells})) == (1296, 60)
