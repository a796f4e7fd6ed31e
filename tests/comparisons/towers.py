"""Hugging Face's towers in torch with the numbers of ours.

The numbers come from the model that was built, so that nothing is fetched a second time. LoRA factors
are added to what a linear map returns, as other programs that train them do.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from larimar_jax import lora
from larimar_jax import model as models
from larimar_jax.config import Config
from larimar_jax.model import Larimar
from larimar_jax.weights import key_table

# torch is no dependency of the project: it is imported where it is used, and its types have no name.
Tensor: TypeAlias = Any
# Our parameters by '/'-joined path, and what holds them in torch: one tensor a layer. A tensor is under
# several paths where Hugging Face fuses ours.
Parameters: TypeAlias = dict[str, list[Tensor]]


class Towers(NamedTuple):
    """Both towers, and their parameters."""

    encoder: Any
    decoder: Any
    parameters: Parameters


def build(config: Config, model: Larimar) -> Towers:
    """Return the towers of a model that `config`, with the sizes of both towers, describes.

    Raises:
        RuntimeError: this version of transformers names its parameters otherwise.
    """
    arrays = models.parameters(model)
    factors = {name: array for name, array in arrays.items() if lora.is_factor(name)}
    # The same numbers without factors, which Hugging Face's files have no names for.
    lean = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=None))
    plain = models.AbstractModel(models.abstract(lean)).model(
        {name: array for name, array in arrays.items() if name not in factors}
    )
    modules = {name: from_ours(getattr(plain, name)) for name in ("encoder", "decoder")}
    parameters: Parameters = {}
    for name, module in modules.items():
        parameters |= _paths(module, type(getattr(plain, name)), name)
    if factors:
        parameters |= _add_factors(modules, parameters, factors, config.model.lora.scale)
    return Towers(**modules, parameters=parameters)


def from_ours(tower: Any) -> Any:
    """Return Hugging Face's module with the numbers of an encoder or a decoder, without dropout.

    Raises:
        RuntimeError: this version of transformers names its parameters otherwise.
    """
    import torch
    import transformers

    family = type(tower)
    settings = tower.config.to_huggingface()
    dropouts = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout")
    settings |= dict.fromkeys(dropouts, 0.0)
    settings |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    kind, more = getattr(transformers, settings["architectures"][0]), {}
    if settings["model_type"] == "bert":
        more = dict(add_pooling_layer=tower.config.pooling == "cls")
    sizes = transformers.AutoConfig.for_model(**settings)
    module = kind._from_config(sizes, attn_implementation="sdpa", **more)
    prefix = _prefix(family)
    state = {
        name.removeprefix(prefix): torch.from_numpy(np.array(tensor))
        for name, tensor in key_table.to_source(tower, family.hf_keys)
    }
    mismatch = module.load_state_dict(state, strict=False)
    # A tied head is not in ours, nor are tables of constants.
    lacking = [
        name
        for name in mismatch.missing_keys
        if name != "lm_head.weight" and "position_ids" not in name
    ]
    if lacking or mismatch.unexpected_keys:
        raise RuntimeError(
            f"this version of transformers names {type(module).__name__}'s parameters otherwise: it "
            f"lacks {mismatch.unexpected_keys} and wants {lacking}"
        )
    module.tie_weights()
    return module.train()


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean [B, D] of the real tokens' vectors [B, S, D], float32."""
    weight = mask.unsqueeze(-1).float()
    return (hidden.float() * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)


def round_frozen(module: Any, dtype: Any) -> None:
    """Put the frozen kernels of linear maps into this dtype, in place; a tied table stays as it is."""
    import torch

    for part in module.modules():
        if isinstance(part, torch.nn.Linear) and not part.weight.requires_grad:
            part.weight = torch.nn.Parameter(part.weight.detach().to(dtype), requires_grad=False)


def _prefix(family: type) -> str:
    """Return what names in a file have before those of the module."""
    return "bert." if "bert" in family.model_types else ""


def _paths(module: Any, family: type, tower: str) -> Parameters:
    """Return a module's parameters by the paths of ours, each path's layers in order."""
    table = [
        (key_table.pattern(template), target.removesuffix("?").replace(".", "/"))
        for template, target, _ in family.hf_keys
        if target is not None
    ]
    parameters: Parameters = {}
    for name, parameter in module.named_parameters():
        for pattern, path in table:
            if pattern.fullmatch(_prefix(family) + name):
                parameters.setdefault(f"{tower}/{path}", []).append(parameter)
    return parameters


def _add_factors(
    modules: Mapping[str, Any], known: Parameters, factors: Mapping[str, Any], scale: float
) -> Parameters:
    """Add scale · (x A) B to every linear map that has factors; return these, each of its layers."""
    import torch

    linear = {
        id(part.weight): part
        for module in modules.values()
        for part in module.modules()
        if isinstance(part, torch.nn.Linear)
    }
    parameters: Parameters = {}
    for owner in sorted({name.rpartition("/")[0] for name in factors}):
        names = [f"{owner}/{factor}" for factor in lora.FACTORS]
        stacks = [np.asarray(factors[name]) for name in names]
        for layer, kernel in enumerate(known[f"{owner}/kernel"]):
            # (outputs, inputs), as torch keeps and multiplies them.
            pair = [torch.nn.Parameter(torch.from_numpy(stack[layer].T.copy())) for stack in stacks]
            linear[id(kernel)].register_forward_hook(_plus_product(*pair, scale))
            for name, factor in zip(names, pair, strict=True):
                parameters.setdefault(name, []).append(factor)
    return parameters


def _plus_product(narrow: Tensor, wide: Tensor, scale: float) -> Any:
    from torch.nn import functional

    def hook(_, inputs, output):
        return output + scale * functional.linear(functional.linear(inputs[0], narrow), wide)

    return hook
