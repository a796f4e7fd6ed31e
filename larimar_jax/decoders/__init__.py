"""Causal language models, one family per file: each defines CONFIG, MODEL, KEYS, from_huggingface.

A decoder has `config.{width, depth, kv_heads, head_size, vocab_size, max_length}`,
`hidden(tokens, prefix, cache, start)`, `logits(hidden)`, `empty_cache(batch, length)` and
`embeddings`; `decoders/llama.py` documents them.
"""

from collections.abc import Mapping
from types import ModuleType

from larimar_jax import registry


def families() -> Mapping[str, ModuleType]:
    """Every decoder family in this folder, by file name."""
    return registry.scan(__name__, "CONFIG", "MODEL", "KEYS", "from_huggingface")


def family(name: str) -> ModuleType:
    """The family file of that name; ValueError lists the known ones."""
    return registry.lookup(families(), name, "decoder family")
