"""llama.cpp's names of tensors, architecture by architecture, and how it lays them out."""

from collections.abc import Mapping
from typing import NamedTuple


class Architecture(NamedTuple):
    """llama.cpp's names of tensors, and of a layer's, → Hugging Face's; and how to read them.

    {layer} is a layer's number; a suffix .weight or .bias is kept. transposed: names whose tensors
    Hugging Face stores (in, out).
    """

    layer: str
    parts: Mapping[str, str]
    top: Mapping[str, str]
    permuted: bool = False
    transposed: tuple[str, ...] = ()


_LLAMA = Architecture(
    layer="model.layers.{layer}.",
    parts={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    top={"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    permuted=True,
)
ARCHITECTURES = {
    "llama": _LLAMA,
    "qwen2": _LLAMA._replace(permuted=False),
    "gpt2": Architecture(
        layer="transformer.h.{layer}.",
        parts={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        top={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    ),
}
