"""The training step of `bench/training.py` in torch: Hugging Face towers, the memory of §3.

Its best reasonable form without a compiler: scaled-dot-product attention, one decoder pass over all
routes, autocast where ours rounds its products, no gradient of what is frozen, a fused AdamW, every
core. Pseudo-inverses are of thin matrices: with X M_ref† = W of full rank, M† = X† W (see
memory/direct.py), so that none of a posterior K x C memory is computed; that of M₀ is solved for.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from larimar_jax import objective
from larimar_jax.bench import torch_towers
from larimar_jax.bench.torch_towers import Tensor
from larimar_jax.model import Larimar
from larimar_jax.settings import Config
from larimar_jax.train import optimizer


class Theirs:
    """The step in torch, of the same weights as `model`; see `training.comparable` for which.

    Raises:
        ValueError: a pattern of train.frozen freezes a part of what Hugging Face keeps in one tensor.
    """

    def __init__(self, config: Config, model: Larimar):
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        self._config = config
        self._larimar = _Larimar(config, model)
        # By identity: a tensor that fuses several of ours is stepped once.
        rows: dict[bool, dict[int, Tensor]] = {True: {}, False: {}}
        for name, tensors in self._larimar.trained.items():
            rows[optimizer.decayed(name)] |= {id(tensor): tensor for tensor in tensors}
        self._trained = [tensor for found in rows.values() for tensor in found.values()]
        train, goal = config.train, config.objective
        groups = [
            dict(params=list(found.values()), weight_decay=train.weight_decay if decayed else 0.0)
            for decayed, found in rows.items()
            if found
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)
        self._rate = jax.jit(optimizer.learning_rate(train))
        self._beta = jax.jit(
            lambda done: objective.beta_schedule(done, train.steps, goal.kl, goal.kl_cycles)
        )
        self._done = 0

    def losses(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Loss, its terms and the gradients' norm on a batch, without noise or rounding, β at its peak.

        Of the weights before the first step, which leaves frozen ones rounded.
        """
        beta = self._config.objective.kl
        loss, terms = self._larimar.loss(_tensors(batch), beta, noisy=False, rounded=False)
        loss.backward()
        squares = sum(float(tensor.grad.square().sum()) for tensor in self._trained)
        self._optimizer.zero_grad(set_to_none=True)
        found = {"loss": loss, **terms}
        return {n: float(v.detach()) for n, v in found.items()} | {"gradient_norm": squares**0.5}

    def step(self, batch: Mapping[str, np.ndarray]) -> None:
        """One optimiser step."""
        import torch

        if not self._done:
            self._larimar.round()
        done = np.int32(self._done)
        for group in self._optimizer.param_groups:
            group["lr"] = float(self._rate(done))
        beta = float(self._beta(done))
        loss, _ = self._larimar.loss(_tensors(batch), beta, noisy=True, rounded=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, self._config.train.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._done += 1


def _tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    import torch

    tensors = {name: torch.from_numpy(np.array(array)) for name, array in batch.items()}
    return {n: t if t.dtype == torch.bool else t.long() for n, t in tensors.items()}


class _Larimar:
    """§2 and §3 around two towers."""

    def __init__(self, config: Config, model: Larimar):
        import torch

        towers = torch_towers.make(config, model)
        self.encoder, self.decoder = towers.encoder, towers.decoder

        def parameter(variable, turned: bool = False) -> Tensor:
            array = np.array(variable[...])
            return torch.nn.Parameter(torch.from_numpy(array.T.copy() if turned else array))

        # (outputs, inputs), as torch keeps and multiplies them.
        self.to_latent, self.to_slots, self.to_embedding = (
            parameter(m.kernel, turned=True)
            for m in (model.to_latent, model.to_slots, model.to_embedding)
        )
        self.prior_memory = parameter(model.memory.prior_memory)
        self.log_variance = parameter(model.memory.log_variance)
        self.trained = _trained(
            towers.parameters
            | {
                "to_latent/kernel": [self.to_latent],
                "to_slots/kernel": [self.to_slots],
                "to_embedding/kernel": [self.to_embedding],
                "memory/prior_memory": [self.prior_memory],
                "memory/log_variance": [self.log_variance],
            },
            config.train.frozen,
        )
        # transformers 5.17 renamed it.
        named = inspect.signature(self.decoder.forward).parameters
        self._past = "cache" if "cache" in named else "past_key_values"
        self._pool = config.model.encoder.sizes
        self._slot_shape = model.slot_shape
        self._noise = config.memory.hyperparameters["noise"]
        self._goal = config.objective
        self._products = torch.bfloat16 if config.train.products == "bfloat16" else None

    def loss(
        self, batch: Mapping[str, Tensor], beta: float, *, noisy: bool, rounded: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 1 as `objective.losses` has it, with the same terms by name.

        beta: weight of the KL term. noisy: with observation and addressing noise. rounded: products of
        the towers as `train.products` says, by autocast.
        """
        import torch
        from torch.nn import functional

        goal, low = self._goal, self._products if rounded else None
        facts = batch["encoder_tokens"].shape[:2]
        seen = (batch[name].flatten(0, 1) for name in ("encoder_tokens", "encoder_mask"))
        with torch.autocast("cpu", dtype=low or torch.bfloat16, enabled=low is not None):
            pooled = self._pooled(*seen)
        encodings = functional.linear(pooled.float(), self.to_latent).unflatten(0, facts)
        read, mean = self._read_back(encodings, noisy)
        latents = {
            "reconstruction": read,
            "autoencoding": encodings,
            "language": torch.zeros_like(encodings),
        }
        used = [name for name in latents if getattr(goal, name) != 0.0]
        routes = torch.stack([latents[name] for name in used]).flatten(0, 2)
        entropy, mask = self._entropies(batch, routes, len(used), low)
        count = mask.numel() if goal.count_padding else mask.sum()
        sums = entropy.unflatten(0, (len(used), -1)).sum(dim=(1, 2)) / (count / len(used))
        terms = dict(zip(used, sums, strict=True))
        spread = self.log_variance
        element = 0.5 * (mean.square() + spread.exp() - 1.0 - spread)
        terms["kl"] = element.clamp(min=goal.free_bits).sum(dim=-1).mean()
        weighted = [getattr(goal, name) * terms[name] for name in used]
        return sum(weighted) + beta * terms["kl"], terms

    def round(self) -> None:
        """Where products are rounded, rounds frozen kernels for good; autocast would in every step."""
        if self._products is not None:
            for tower in (self.encoder, self.decoder):
                torch_towers.round_frozen(tower, self._products)

    def _pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """One vector per text, as `encoders.bert` pools them."""
        from torch.nn import functional

        found = self.encoder(input_ids=tokens, attention_mask=mask)
        pooled = found.pooler_output
        if self._pool.pooling == "mean":
            pooled = torch_towers.mean_pooled(found.last_hidden_state, mask)
        return functional.normalize(pooled, dim=-1) if self._pool.normalize else pooled

    def _read_back(self, episodes: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
        """Episodes [B, E, C] written and read by their own encodings: latents, mean weights."""
        import torch

        seen = episodes
        if noisy:
            seen = episodes + self._noise * torch.randn_like(episodes)
        keys = self._addressed(seen)  # [B, E, K]
        mean = (episodes @ torch.linalg.pinv(seen)) @ keys
        weights = mean
        if noisy:
            weights = mean + (0.5 * self.log_variance).exp() * torch.randn_like(mean)
        return (weights @ torch.linalg.pinv(keys)) @ seen, mean

    def _addressed(self, encodings: Tensor) -> Tensor:
        """Z M₀† by the normal equations: factorising K x K or C x C costs less than an SVD of M₀."""
        import torch

        prior = self.prior_memory
        wide = prior.shape[0] <= prior.shape[1]
        gram = prior @ prior.T if wide else prior.T @ prior
        factor = torch.linalg.cholesky(gram)
        rows = encodings.flatten(0, 1)
        rows = rows @ prior.T if wide else rows
        solved = torch.cholesky_solve(rows.T, factor).T
        return (solved if wide else solved @ prior.T).unflatten(0, encodings.shape[:2])

    def _entropies(
        self, batch: Mapping[str, Tensor], latent: Tensor, routes: int, low: Any
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropies [R B E, T − 1] of every route, zero at padding, and their mask."""
        import torch
        import transformers
        from torch.nn import functional

        tokens, mask = (
            batch[name].flatten(0, 1).repeat(routes, 1) for name in ("decoder_tokens", "decoder_mask")
        )
        slots = functional.linear(latent, self.to_slots).to(low or torch.float32)
        # [layers, rows, key and value, heads, slots, d]: as they are, unturned at position 0.
        slots = slots.view(len(latent), *self._slot_shape).permute(1, 0, 3, 4, 2, 5)
        past = transformers.DynamicCache(config=self.decoder.config)
        for layer, pair in enumerate(slots):
            past.update(pair[:, 0], pair[:, -1], layer)
        words = self.decoder.get_input_embeddings()(tokens[:, :-1])
        words = words + functional.linear(latent, self.to_embedding)[:, None]
        with torch.autocast("cpu", dtype=low or torch.bfloat16, enabled=low is not None):
            logits = self.decoder(
                inputs_embeds=words,
                # However many slots there are, they take one position.
                position_ids=torch.arange(1, tokens.shape[1])[None],
                use_cache=True,
                **{self._past: past},
            ).logits
        entropy = functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        mask = mask[:, 1:]
        return torch.where(mask, entropy.view(mask.shape), 0.0), mask


def _trained(parameters: torch_towers.Parameters, frozen: Sequence[str]) -> torch_towers.Parameters:
    """Those that are trained; the others are told to need no gradient.

    Raises:
        ValueError: a pattern freezes a part of what Hugging Face keeps in one tensor.
    """
    trained, held = optimizer.partition(parameters, frozen)
    kept = {id(tensor) for tensors in trained.values() for tensor in tensors}
    for name, tensors in held.items():
        if any(id(tensor) in kept for tensor in tensors):
            raise ValueError(
                f"train.frozen freezes {name}, which Hugging Face's tower keeps in one tensor with "
                "parameters that are trained. Freeze all of them, or none."
            )
        for tensor in tensors:
            tensor.requires_grad_(False)
    return trained
