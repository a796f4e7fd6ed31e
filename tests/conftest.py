"""Every test runs on eight virtual CPU devices, with strict promotion and run-time shape checks."""

import gc
import importlib.metadata
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # The first halves the time to compile; what is compiled is too small to be split among threads.
        # Another release, which may not know them, would refuse to start.
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        if importlib.metadata.version("jaxlib").startswith("0.10.")
        else "",
    ]
)
# Tokenised corpora of the tests, apart from those of a user.
os.environ["LARIMAR_CACHE"] = str(pathlib.Path(__file__).parents[1] / ".cache/corpora")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in cli.py
# Programs as small as these take seconds to optimise and milliseconds to run, and the same ones recur
# in the workers, in subprocesses and in the next run: optimise less, and compile once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache/jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Places in the source would make equal programs differ.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

# Without a deadline: the first example compiles.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.register_profile("long", deadline=None, max_examples=20_000)
hypothesis.settings.load_profile("tests")
# Shape annotations are checked by beartype on every call while the tests run.
install_import_hook("larimar_jax", "beartype.beartype")

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Tracing makes many objects and few cycles: by default the collector looks for them far too often.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session")
def cpu_devices():
    """The eight virtual devices that stand in for one node of GPUs."""
    devices = jax.devices()
    assert len(devices) == 8, "XLA_FLAGS must be set before jax is first imported"
    return devices


@pytest.fixture(scope="session")
def minilm():
    """The packaged MiniLM: (module, tokenizer), loaded once."""
    from larimar_jax import weights

    return weights.load_encoder("minilm")


@pytest.fixture(scope="session")
def smollm2():
    """The packaged SmolLM2: (module, tokenizer), loaded once."""
    from larimar_jax import weights

    return weights.load_decoder("smollm2")


@pytest.fixture(scope="session")
def tiny():
    """A `Pipeline` over tiny random towers and 24 memory slots."""
    return tiny_pipeline()


def tiny_pipeline(**settings):
    """Return a `Pipeline` over tiny random towers; settings of `model` differ.

    Random encodings are all alike, so its scope lets through what is all but the written prompt.
    """
    # Imported here, so that the hook above sees every module of the package.
    import numpy as np
    from flax import nnx

    from larimar_jax import config, model
    from larimar_jax.pipeline import Pipeline
    from larimar_jax.weights.tokenizer import Tokenizer

    words = "Fact Neighbour Says says of fact is new true the capital France Japan city"
    tokenizer = Tokenizer.train([f"{words} 0 1 2 3 4 5 6 7"] * 3, 420)
    sizes = dict(vocab_size=tokenizer.vocab_size, depth=2, max_length=128)
    values = tiny_config()
    values["model"]["encoder"] |= dict(normalize=True, **sizes)
    values["model"]["decoder"] |= sizes
    values["model"] |= settings
    values["editing"] |= dict(
        key_features=dict(count=4, scale=0.5, length=1.0),
        answer_code=dict(positions=3, width=32, limit=20.0),
    )
    parsed = config.parse(values)
    # Compiling the initialisers takes far longer than everything that is tested with this model.
    graph, abstract = nnx.split(nnx.eval_shape(lambda: model.build(parsed, jax.random.key(0))))
    draw = np.random.default_rng(0)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        if jax.numpy.issubdtype(leaf.dtype, jax.numpy.integer):
            return jax.numpy.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)
        if "scale" in name or "bias" in name:  # Drawn, they would make all texts alike.
            return jax.numpy.full(leaf.shape, "scale" in name, leaf.dtype)
        return jax.numpy.asarray(draw.normal(0, 0.3, leaf.shape), leaf.dtype)

    larimar = nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, abstract))
    names = dict(source="tiny", fingerprint="tiny")
    return Pipeline(parsed, larimar, tokenizer.framed(), tokenizer, **names)


def tiny_config():
    """Return a config as a nested dict, which tests change."""
    tower = dict(vocab_size=300, width=16, depth=1, heads=2, mlp=32, max_length=64)
    tokens = dict(encoder_tokens=16, decoder_tokens=16)
    every = dict(log_every=1, evaluate_every=100, checkpoint_every=100)
    return dict(
        name="test",
        model=dict(
            encoder=dict(family="bert", type_vocab=1, pooling="mean", **tower),
            decoder=dict(family="gpt2", **tower),
            latent=16,
            slots_per_layer=2,
            tied_slots=False,
        ),
        memory=dict(variant="direct", slots=24, initial="normal"),
        objective=dict(kl_cycles=2),
        data=dict(unit="sentence", episode=(3,), batch=2, vocabulary=300, **tokens),
        train=dict(steps=4, learning_rate=1e-3, warmup_steps=1, keep=2, **every),
        # Weights over slots that are drawn are longer than those over an identity.
        editing=dict(scope_threshold=0.999, session_ridge=1e-3),
    )
