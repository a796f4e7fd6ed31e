"""The training step of `bench/training.py` in torch: Hugging Face towers, the memory of §3.

Its best reasonable form: scaled-dot-product attention, one decoder pass over all routes, a fused
AdamW, every core. Pseudo-inverses are torch's own, of thin matrices: with X M_ref† = W of full rank,
M† = X† W (see memory/direct.py), so that none of a posterior K x C memory is computed.
"""

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from larimar_jax import decoders, encoders
from larimar_jax.model import Larimar
from larimar_jax.settings import Config
from larimar_jax.train import optimizer
from larimar_jax.weights import fill

# torch is no dependency of the project: it is imported where it is used, and its types have no name.
Tensor: TypeAlias = Any


class Theirs:
    """The step in torch, of the same weights as `model`; see `training.comparable` for which."""

    def __init__(self, config: Config, model: Larimar):
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        self._config = config
        self._larimar = _Larimar(config, model)
        rows: dict[bool, list[Any]] = {True: [], False: []}
        for name, parameter in self._larimar.parameters.items():
            rows[parameter.ndim > 1 and not name.startswith("memory")].append(parameter)
        decay = config.train.weight_decay
        groups = [
            dict(params=found, weight_decay=decay if decayed else 0.0)
            for decayed, found in rows.items()
        ]
        self._rate = optimizer.learning_rate(config.train)
        self._optimizer = torch.optim.AdamW(groups, lr=config.train.learning_rate, fused=True)
        self._done = 0

    def losses(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Loss, its terms and the gradients' norm on a batch, without any noise."""
        loss, terms = self._larimar.loss(_tensors(batch), noisy=False)
        loss.backward()
        squares = sum(float(p.grad.square().sum()) for p in self._larimar.parameters.values())
        self._optimizer.zero_grad(set_to_none=True)
        found = {"loss": loss, **terms}
        return {n: float(v.detach()) for n, v in found.items()} | {"gradient_norm": squares**0.5}

    def step(self, batch: Mapping[str, np.ndarray]) -> None:
        """One optimiser step."""
        import torch

        for group in self._optimizer.param_groups:
            group["lr"] = float(self._rate(self._done))
        loss, _ = self._larimar.loss(_tensors(batch), noisy=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._larimar.parameters.values(), self._config.train.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._done += 1


def _tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    import torch

    tensors = {name: torch.from_numpy(np.array(array)) for name, array in batch.items()}
    return {n: t if t.dtype == torch.bool else t.long() for n, t in tensors.items()}


def _tower(module, sizes, kind: type, prefix: str, family: Any) -> Any:
    """A Hugging Face tower with the numbers of ours."""
    import torch
    import transformers

    said = dict(family.to_huggingface(sizes))
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        said[name] = 0.0
    said |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    made = kind._from_config(
        transformers.AutoConfig.for_model(**said), attn_implementation="sdpa"
    )
    state = {
        name.removeprefix(prefix): torch.from_numpy(np.array(tensor))
        for name, tensor in fill.to_source(module, family.KEYS)
    }
    found = made.load_state_dict(state, strict=False)
    # A tied head is not in ours, nor are tables of constants.
    lacking = [n for n in found.missing_keys if n != "lm_head.weight" and "position_ids" not in n]
    if lacking or found.unexpected_keys:
        raise RuntimeError(
            f"this version of transformers names {kind.__name__}'s parameters otherwise: it lacks "
            f"{found.unexpected_keys} and wants {lacking}"
        )
    made.tie_weights()
    return made.train()


class _Larimar:
    """§2 and §3 around two towers."""

    def __init__(self, config: Config, model: Larimar):
        import torch
        import transformers

        towers = config.model
        self.encoder = _tower(
            model.encoder, towers.encoder.sizes, transformers.BertModel, "bert.",
            encoders.families()[towers.encoder.family],
        )
        self.decoder = _tower(
            model.decoder, towers.decoder.sizes, transformers.GPT2LMHeadModel, "",
            decoders.families()[towers.decoder.family],
        )

        def parameter(variable, turned: bool = False) -> Tensor:
            array = np.array(variable[...])
            return torch.nn.Parameter(torch.from_numpy(array.T.copy() if turned else array))

        # (outputs, inputs), as torch keeps and multiplies them.
        self.to_latent, self.to_slots, self.to_embedding = (
            parameter(m.kernel, turned=True)
            for m in (model.to_latent, model.to_slots, model.to_embedding)
        )
        self.prior = parameter(model.memory.prior)
        self.log_variance = parameter(model.memory.log_variance)
        self.parameters: dict[str, Tensor] = {
            **{f"encoder.{name}": p for name, p in self.encoder.named_parameters()},
            **{f"decoder.{name}": p for name, p in self.decoder.named_parameters()},
            "to_latent": self.to_latent,
            "to_slots": self.to_slots,
            "to_embedding": self.to_embedding,
            "memory.prior": self.prior,
            "memory.log_variance": self.log_variance,
        }
        self._noise = config.memory.hyperparameters["noise"]
        self._goal = config.objective

    def loss(
        self, batch: Mapping[str, Tensor], *, noisy: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 1 as `objective.losses` has it, with the same terms by name."""
        import torch
        from torch.nn import functional

        goal = self._goal
        episodes, facts = batch["encoder_tokens"].shape[:2]
        pooled = self.encoder(
            input_ids=batch["encoder_tokens"].flatten(0, 1),
            attention_mask=batch["encoder_mask"].flatten(0, 1),
        ).pooler_output
        encodings = functional.linear(pooled, self.to_latent).unflatten(0, (episodes, facts))
        prior = torch.linalg.pinv(self.prior)
        read, weights = zip(
            *(self._read_back(prior, episode, noisy) for episode in encodings), strict=True
        )
        routes = torch.stack([torch.stack(read), encodings, torch.zeros_like(encodings)])
        entropy, mask = self._entropies(batch, routes.flatten(0, 2))
        count = mask.numel() if goal.count_padding else mask.sum()
        sums = entropy.unflatten(0, (3, -1)).sum(dim=(1, 2)) / (count / 3)
        terms = dict(zip(("reconstruction", "autoencoding", "language"), sums, strict=True))
        mean, spread = torch.stack(weights), self.log_variance
        element = 0.5 * (mean.square() + spread.exp() - 1.0 - spread)
        terms["kl"] = element.clamp(min=goal.free_bits).sum(dim=-1).mean()
        return sum(getattr(goal, name) * term for name, term in terms.items()), terms

    def _read_back(self, prior: Tensor, episode: Tensor, noisy: bool):
        """An episode [E, C] written and read by its own encodings: latents, mean weights."""
        import torch

        seen = episode + self._noise * torch.randn_like(episode) if noisy else episode
        keys = seen @ prior  # [E, K]
        mean = (episode @ torch.linalg.pinv(seen)) @ keys
        weights = mean
        if noisy:
            weights = mean + (0.5 * self.log_variance).exp() * torch.randn_like(mean)
        return (weights @ torch.linalg.pinv(keys)) @ seen, mean

    def _entropies(self, batch: Mapping[str, Tensor], latent: Tensor):
        """Cross-entropies [3 B E, T − 1] of every route, zero at padding, and their mask."""
        import torch
        import transformers
        from torch.nn import functional

        sizes = self.decoder.config
        tokens, mask = (
            batch[name].flatten(0, 1).repeat(3, 1) for name in ("decoder_tokens", "decoder_mask")
        )
        slots = functional.linear(latent, self.to_slots)
        slots = slots.view(len(latent), sizes.n_layer, sizes.n_head, 1, -1)
        past = transformers.DynamicCache(config=sizes)
        for layer in range(sizes.n_layer):
            past.update(slots[:, layer], slots[:, layer], layer)
        words = self.decoder.transformer.wte(tokens[:, :-1])
        words = words + functional.linear(latent, self.to_embedding)[:, None]
        logits = self.decoder(inputs_embeds=words, past_key_values=past, use_cache=True).logits
        entropy = functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        mask = mask[:, 1:]
        return torch.where(mask, entropy.view(mask.shape), 0.0), mask
