"""A study: its recipes are runs, and its table is what their metrics say."""

import dataclasses

import pytest
import world

from larimar_jax import cli, config
from larimar_jax.train import loop, metrics, study


def _values(**more):
    return dict(name="s", base="b", shared=["train.edits=2"], recipes=dict(a=[]), **more)


def test_what_does_not_fit_is_named_at_once():
    wrong = _values(recipe=1)
    wrong["recipes"] = dict(a=["train.steps=2"], b="train.steps=2")
    del wrong["base"]
    with pytest.raises(config.ConfigError) as refused:
        study.parse(wrong)
    for words in ("recipe: unknown key", "base: missing", "recipes.b: expected a list"):
        assert words in str(refused.value)
    with pytest.raises(config.ConfigError, match="recipes: expected a section"):
        study.parse(_values() | dict(recipes={}))


def test_a_recipe_that_is_no_config_is_named_before_any_is_trained(tmp_path):
    told = study.parse(_values() | dict(recipes=dict(a=[], b=["train.step=2"])))
    base = config.load_dict("configs/tiny.py")
    with pytest.raises(config.ConfigError, match="recipe 'b': .*train.step=2"):
        study.train(told, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(config.ConfigError, match="no recipe c; known: a, b"):
        study.only(told, ["a", "c"])
    assert list(study.only(told, ["b"]).recipes) == ["b"]


@pytest.mark.parametrize("name", ["recipes_smol", "recipes_smol_parts"])
def test_recipes_of_the_shipped_studies_are_configs(name):
    told = study.parse(config.load_dict(f"configs/{name}.py"))
    base = config.load_dict(told.base)
    made = {name: dataclasses.asdict(told.config(name, base)) for name in told.recipes}
    assert len({str(one) for one in made.values()}) == len(made) > 5


def test_recipes_are_trained_once_and_shown_side_by_side(tmp_path, capsys, monkeypatch):
    corpus = world.write(tmp_path / "world.jsonl")
    base = config.to_dict(world.config(corpus))
    written = tmp_path / "base.py"
    body = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({!r})\n"
    written.write_text(body.format(base))
    told = dict(
        name="s",
        base=str(written),
        shared=["train.steps=4", "train.evaluate_every=2", "train.edits=4"],
        recipes={"base": [], "one-slot": ["model.slots_per_layer=1"]},
    )
    path = tmp_path / "study.py"
    path.write_text(body.format(told))
    out = tmp_path / "out"
    command = ["study", f"--config={path}", "--out", str(out)]
    assert cli.main([*command, "--only", "one-slot"]) == 0
    assert not (out / "base").exists()
    trained = []
    real = loop.train
    monkeypatch.setattr(loop, "train", lambda one, run: trained.append(run.name) or real(one, run))
    assert cli.main(command) == 0
    assert trained == ["base"]
    rows = [
        [cell.strip() for cell in line.strip("|\n ").split("|")]
        for line in (out / study.TABLE).read_text().splitlines()
    ]
    assert rows[0][:4] == ["recipe", "step 0", "step 2", "step 4"] and len(rows) == 4
    for row in rows[2:]:
        lines = metrics.read(out / row[0] / "metrics.jsonl")
        found = [line for line in lines if line["kind"] == "evaluation"]
        assert row[1:4] == [f"{line['reconstruction']:.3f}" for line in found]
        assert row[4:6] == [f"{found[-1]['language']:.3f}", f"{found[-1]['edit_gain']:+.3f}"]
    last = [float(row[3]) for row in rows[2:]]
    assert last == sorted(last)
    assert (out / study.CURVES).stat().st_size > 10_000
    # What was trained with other settings is not shown as if it had these.
    assert cli.main([*command, "--set", "train.seed=5"]) == 2
    assert "train.seed: 0 in the folder, 5 now" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no finished run"):
        study.curve(tmp_path / "nothing")
