"""The registry of families: one class a file, found by the file's name."""

import types

import pytest

from larimar_jax import decoders, encoders, registry


def test_families_are_classes_by_file_and_by_model_type():
    assert set(decoders.families()) >= {"llama", "gpt2", "gptj"}
    assert set(encoders.families()) >= {"bert"}
    assert decoders.family("mistral") is decoders.family("qwen2") is decoders.families()["llama"]
    with pytest.raises(ValueError, match="unknown decoder family 'lama'; known: .*llama"):
        decoders.family("lama")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            [("Half", registry.FAMILY[:1])],
            "half.Half looks like a family but does not define model_types",
        ),
        ([("One", registry.FAMILY), ("Two", registry.FAMILY)], "half defines two families"),
    ],
)
def test_an_unfinished_family_or_a_second_one_in_a_file_is_an_error(monkeypatch, classes, message):
    members = {
        name: type(name, (), {"__module__": "half", **dict.fromkeys(attributes)})
        for name, attributes in classes
    }
    fake = types.SimpleNamespace(__path__=[], __name__="half", **members)
    monkeypatch.setattr(
        registry.pkgutil, "iter_modules", lambda path: [types.SimpleNamespace(name="half")]
    )
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: fake)
    with pytest.raises(TypeError, match=message):
        registry.families("anything")
