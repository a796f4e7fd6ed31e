"""Hugging Face's towers in torch with the numbers of ours, for `bench/torch_step.py`.

The numbers come from the model that was built, so that nothing is fetched a second time. Low-rank
changes (lora.py) are added to what a linear map returns, as other programs that train them do.
"""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from larimar_jax import decoders, encoders, lora
from larimar_jax import model as models
from larimar_jax.model import Larimar
from larimar_jax.settings import Config, TowerConfig
from larimar_jax.weights import fill

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


def make(config: Config, model: Larimar) -> Towers:
    """The towers of a model.

    Args:
        config: with the sizes of both towers.
        model: as `model.build` makes it of the config.

    Raises:
        RuntimeError: this version of transformers names its parameters otherwise.
    """
    arrays = models.parameters(model)
    factors = {name: array for name, array in arrays.items() if lora.is_factor(name)}
    # The same numbers without factors, of which Hugging Face's files know nothing.
    lean = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=None))
    plain = models.AbstractModel(models.abstract(lean)).model(
        {name: array for name, array in arrays.items() if name not in factors}
    )
    towers, known = config.model, {}
    made = []
    for name, tower, families in (
        ("encoder", towers.encoder, encoders.families()),
        ("decoder", towers.decoder, decoders.families()),
    ):
        family = families[tower.family]
        module = _empty(tower, family)
        _fill(module, family, getattr(plain, name))
        known |= _paths(module, family, name)
        made.append(module)
    if factors:
        known |= _change(made, known, factors, config.model.lora.scale)
    return Towers(*made, known)


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean [B, D] of the real tokens' vectors [B, S, D], float32."""
    weight = mask.unsqueeze(-1).float()
    return (hidden.float() * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)


def round_frozen(module: Any, dtype: Any) -> None:
    """Puts the frozen kernels of linear maps into this dtype, in place; a tied table stays as it is."""
    import torch

    for part in module.modules():
        if isinstance(part, torch.nn.Linear) and not part.weight.requires_grad:
            part.weight = torch.nn.Parameter(part.weight.detach().to(dtype), requires_grad=False)


def _empty(tower: TowerConfig, family: ModuleType) -> Any:
    """Hugging Face's module of these sizes, with numbers that mean nothing yet."""
    import transformers

    said = dict(family.to_huggingface(tower.sizes))
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout"):
        said[name] = 0.0
    said |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    kind, more = getattr(transformers, said["architectures"][0]), {}
    if said["model_type"] == "bert":
        more = dict(add_pooling_layer=tower.sizes.pooling == "cls")
    sizes = transformers.AutoConfig.for_model(**said)
    return kind._from_config(sizes, attn_implementation="sdpa", **more)


def _fill(module: Any, family: ModuleType, ours: Any) -> None:
    import torch

    prefix = _prefix(family)
    state = {
        name.removeprefix(prefix): torch.from_numpy(np.array(tensor))
        for name, tensor in fill.to_source(ours, family.KEYS)
    }
    found = module.load_state_dict(state, strict=False)
    # A tied head is not in ours, nor are tables of constants.
    lacking = [n for n in found.missing_keys if n != "lm_head.weight" and "position_ids" not in n]
    if lacking or found.unexpected_keys:
        raise RuntimeError(
            f"this version of transformers names {type(module).__name__}'s parameters otherwise: it "
            f"lacks {found.unexpected_keys} and wants {lacking}"
        )
    module.tie_weights()
    module.train()


def _prefix(family: ModuleType) -> str:
    """What names of a file have before those of the module."""
    return "bert." if family.__name__.endswith(".bert") else ""


def _paths(module: Any, family: ModuleType, tower: str) -> Parameters:
    """A module's parameters by the paths of ours, each path's layers in order."""
    table = [
        (fill.pattern(template), target.removesuffix("?").replace(".", "/"))
        for template, target, _ in family.KEYS
        if target is not None
    ]
    found: Parameters = {}
    for name, parameter in module.named_parameters():
        for pattern, path in table:
            if pattern.fullmatch(_prefix(family) + name):
                found.setdefault(f"{tower}/{path}", []).append(parameter)
    return found


def _change(
    modules: list[Any], known: Parameters, factors: Mapping[str, Any], scale: float
) -> Parameters:
    """Adds scale · (x A) B to every linear map that has factors; returns these, each of its layers."""
    import torch

    linear = {
        id(part.weight): part
        for module in modules
        for part in module.modules()
        if isinstance(part, torch.nn.Linear)
    }
    made: Parameters = {}
    for owner in sorted({name.rpartition("/")[0] for name in factors}):
        names = [f"{owner}/{factor}" for factor in lora.FACTORS]
        stacks = [np.asarray(factors[name]) for name in names]
        for layer, kernel in enumerate(known[f"{owner}/kernel"]):
            # (outputs, inputs), as torch keeps and multiplies them.
            pair = [torch.nn.Parameter(torch.from_numpy(stack[layer].T.copy())) for stack in stacks]
            linear[id(kernel)].register_forward_hook(_changed(*pair, scale))
            for name, factor in zip(names, pair, strict=True):
                made.setdefault(name, []).append(factor)
    return made


def _changed(narrow: Tensor, wide: Tensor, scale: float) -> Any:
    from torch.nn import functional

    def hook(_, inputs, output):
        return output + scale * functional.linear(functional.linear(inputs[0], narrow), wide)

    return hook
