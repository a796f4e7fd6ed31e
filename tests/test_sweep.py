"""A sweep: one program a shape, numbers of a plain loop, resumed and refused as it should be."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import cli, memory
from larimar_jax.bench import pictures, runner, sweep, sweep_data

VALUES = dict(
    name="test",
    latent=8,
    paired=False,
    zsre="",
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


def changed(**values):
    return json.loads(json.dumps(VALUES)) | values


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "run"
    made = sweep.Sweep(sweep.parse(VALUES))
    return made, folder, runner.run(made, folder, quiet=True)


def test_each_shape_is_compiled_once(done):
    made, _, summary = done
    assert len(made.cases) == (4 + 1) * 2 * 2 * 2
    assert summary["results"]["shapes"] == made.compiled == 2
    again = made.run(made.cases[:5])
    assert made.compiled == 2 and len(again) == 5


def test_cells_are_those_of_a_plain_loop_in_float64(done):
    made, folder, _ = done
    records = {record["case_id"]: record for record in runner.read_cases(folder)}
    cells = [cell for cell in made.cases if cell.label == "ridge"]
    assert len(cells) == 32
    for cell in cells[::3]:
        key = jax.random.split(jax.random.key(cell.seed))[0]
        facts = sweep_data.synthetic(key, 4, 8, 1, jnp.float32(cell.noise))
        keys, values = (np.float64(a)[: 2 * cell.facts] for a in (facts.keys, facts.values))
        targets, queries = (np.float64(a)[: cell.facts] for a in (facts.targets, facts.queries))
        real = dict(cell.real)
        w, m0 = keys[:, :6], np.eye(6, 8)
        size = np.square(w).sum() / 6
        shrink = real["query_noise"] ** 2 * 2.0 ** np.round(np.log2(size))
        gram = w.T @ w + (real["ridge"] + shrink) * np.eye(6)
        m = m0 + np.linalg.solve(gram, w.T @ (values - w @ m0) - shrink * m0)
        read = queries[:, :6] @ m
        error = np.linalg.norm(read - targets) / np.linalg.norm(targets)
        recall = np.mean(np.argmax(read @ targets.T, axis=1) == np.arange(cell.facts))
        found = records[cell.case_id]
        assert found["error"] == pytest.approx(error, rel=1e-3)
        assert found["recall"] == pytest.approx(recall)
        assert found["facts"] == cell.facts and found["ridge"] == pytest.approx(real["ridge"])
        state = memory.build("streaming", slots=6, latent=8)
        shapes = jax.eval_shape(state.empty, state.prepare(state.init(jax.random.key(0))))
        assert found["bytes"] == sum(4 * np.prod(x.shape) for x in jax.tree.leaves(shapes))


def test_a_sweep_goes_on_where_its_cells_end(done, tmp_path):
    made, folder, _ = done
    lines = (folder / runner.CASES).read_bytes().splitlines(keepends=True)
    (tmp_path / runner.CASES).write_bytes(b"".join(lines[:3]) + lines[3][:20])
    (tmp_path / runner.SETTINGS).write_bytes((folder / runner.SETTINGS).read_bytes())
    other = sweep.Sweep(sweep.parse(VALUES))
    runner.run(other, tmp_path, quiet=True)
    timed = ("seconds", "seconds_compiling")

    def plain(folder):
        return [{k: v for k, v in r.items() if k not in timed} for r in runner.read_cases(folder)]

    assert plain(tmp_path) == plain(folder)
    with pytest.raises(runner.DifferentSettings, match="seeds"):
        runner.run(sweep.Sweep(sweep.parse(changed(seeds=[7]))), tmp_path, quiet=True)


def test_pictures_are_drawn_of_every_source(done, tmp_path):
    _, folder, _ = done
    made = pictures.draw(runner.read_cases(folder), tmp_path)
    assert [path.name for path in made] == [
        "synthetic_capacity.png", "synthetic_retention.png", "synthetic_pareto.png"
    ]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in made)


def test_real_facts_are_moved_by_the_differences_of_real_wordings():
    rng = np.random.default_rng(0)
    encodings = sweep_data.Encodings(*(np.float32(rng.standard_normal((9, 5))) for _ in range(3)))
    facts = sweep_data.real(jax.random.key(0), encodings, 4, 2, jnp.float32(0.5))
    assert facts.keys.shape == (12, 5) and facts.queries.shape == (4, 5)
    prompts = np.asarray(facts.keys[::3])
    rows = [int(np.argmin(np.abs(encodings.prompts - p).sum(1))) for p in prompts]
    np.testing.assert_array_equal(encodings.values[rows], facts.targets)
    moved = (np.asarray(facts.queries) - prompts) / 0.5
    assert all(np.abs(encodings.shifts - m).sum(1).min() < 1e-4 for m in moved)


def test_a_config_that_does_not_fit_names_everything():
    variants = dict(a=dict(variant="streaming", rigde=1.0), b=dict(variant="nothing"))
    with pytest.raises(sweep.SweepError) as error:
        sweep.parse(changed(variants=variants, slots=["x"], extra=1))
    for part in ("no setting rigde", "variants.b.variant: must be one of", "slots[0]", "extra: unknown"):
        assert part in str(error.value)


def test_a_reference_of_prompts_known_beforehand():
    kinds = {f"by_{r}": dict(variant="direct", query="prior", initial="normal", addressing="gaussian",
                             reference=r) for r in ("prior", "prompts")}
    made = sweep.Sweep(sweep.parse(changed(variants=kinds, facts=[4], noises=[0.0], seeds=[0])))
    found = {record["label"]: record for record in made.run(made.cases)}
    assert {record["reference"] for record in found.values()} == {"prior", "prompts"}
    # The slots are then the very prompts, and each fact has one of its own.
    assert found["by_prompts"]["recall"] == 1.0
    assert found["by_prompts"]["error"] < 1e-5 < found["by_prior"]["error"]
    params = memory.build("direct", slots=3, latent=2).init(jax.random.key(0))
    prompts = jnp.arange(8.0).reshape(4, 2)
    known = sweep._known(params, prompts, jnp.array([True, True, False, False])).reference_memory
    np.testing.assert_array_equal(known, [*prompts[:2], params.prior_memory[2]])
    with pytest.raises(sweep.SweepError, match="variants.a.reference: must be one of prior, prompts"):
        sweep.parse(changed(variants=dict(a=dict(variant="none", reference="x"))))
    with pytest.raises(sweep.SweepError, match="latent is 0"):
        sweep.Sweep(sweep.parse(changed(latent=0)))


def test_the_command_runs_a_config(tmp_path, capsys):
    path = tmp_path / "small.py"
    small = changed(variants=dict(none=dict(variant="none")), seeds=[0], noises=[0.5])
    path.write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({small!r})\n"
    )
    line = ["sweep", "--config", str(path), "--out", str(tmp_path / "run"), "--set", "facts=[4]"]
    assert cli.main(line) in (0, None)
    said = capsys.readouterr()
    assert "recall, held out" in said.out.replace("\n", " ") or "none" in said.out
    assert (tmp_path / "run" / "synthetic_capacity.png").is_file()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["cases"] == 1


def test_the_shipped_sweep_is_as_large_as_it_says():
    from larimar_jax import config as configs

    made = sweep.cells(sweep.parse(configs.load_dict("configs/sweep_memory.py")))
    assert (len(made), len({cell.shape for cell in made})) == (1296, 60)
