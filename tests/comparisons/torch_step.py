"""The training step in torch: Hugging Face towers, the memory of §3.

Its best reasonable form without a compiler: scaled-dot-product attention, one decoder pass over all
routes, autocast where ours rounds its products, no gradient of what is frozen, a fused AdamW, every
core. Pseudo-inverses are of thin matrices: with X M_ref† = W of full rank, M† = X† W (see
memory/direct.py), so that none of a posterior K x C memory is computed; that of M₀ is solved for.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from larimar_jax.config import Config
from larimar_jax.model import Larimar
from larimar_jax.train import optimizer

from . import towers
from .towers import Tensor


class TorchStep:
    """The step in torch, of the same weights as `model`; raises as `TorchLarimar`."""

    def __init__(self, config: Config, model: Larimar):
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        self._config = config
        self.larimar = TorchLarimar(config, model)
        # By identity: a tensor that fuses several of ours is stepped once.
        tensors = {id(t): t for layers in self.larimar.trained.values() for t in layers}
        self._trained = list(tensors.values())
        train = config.train
        # One rate and one decay for all: neither changes what a step costs.
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=train.learning_rate, weight_decay=train.weight_decay, fused=True
        )
        self._rounded = False

    def losses(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return loss, terms and the gradients' norm on a batch, without noise or rounding, β at its
        peak. Call it before the first step, which leaves frozen weights rounded."""
        beta = self._config.objective.kl
        loss, terms = self.larimar.loss(_tensors(batch), beta, noisy=False, rounded=False)
        loss.backward()
        squares = sum(float(tensor.grad.square().sum()) for tensor in self._trained)
        self._optimizer.zero_grad(set_to_none=True)
        values = {name: float(value.detach()) for name, value in {"loss": loss, **terms}.items()}
        return values | {"gradient_norm": squares**0.5}

    def step(self, batch: Mapping[str, np.ndarray]) -> None:
        """Take one optimiser step."""
        import torch

        if not self._rounded:
            self.larimar.round()
            self._rounded = True
        beta = self._config.objective.kl
        loss, _ = self.larimar.loss(_tensors(batch), beta, noisy=True, rounded=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, self._config.train.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def _tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    import torch

    tensors = {name: torch.from_numpy(np.array(array)) for name, array in batch.items()}
    return {n: t if t.dtype == torch.bool else t.long() for n, t in tensors.items()}


class TorchLarimar:
    """§2 and §3 around two towers. trained: what a step changes, by the paths of ours.

    Raises:
        ValueError: a pattern of train.frozen freezes a part of what Hugging Face keeps in one tensor.
    """

    def __init__(self, config: Config, model: Larimar):
        import torch

        self.encoder, self.decoder, parameters = towers.build(config, model)

        def parameter(variable, transposed: bool = False) -> Tensor:
            array = np.array(variable[...])
            return torch.nn.Parameter(torch.from_numpy(array.T.copy() if transposed else array))

        # (outputs, inputs), as torch keeps and multiplies them.
        self.to_latent, self.to_slots, self.to_embedding = (
            parameter(linear.kernel, transposed=True)
            for linear in (model.to_latent, model.to_slots, model.to_embedding)
        )
        self.prior_memory = parameter(model.memory.prior_memory)
        self.log_variance = parameter(model.memory.log_variance)
        parameters |= {
            "to_latent/kernel": [self.to_latent],
            "to_slots/kernel": [self.to_slots],
            "to_embedding/kernel": [self.to_embedding],
            "memory/prior_memory": [self.prior_memory],
            "memory/log_variance": [self.log_variance],
        }
        self.trained = _trained(parameters, config.train.frozen)
        # transformers 5.17 renamed it.
        names = inspect.signature(self.decoder.forward).parameters
        self._past = "cache" if "cache" in names else "past_key_values"
        self._pool = model.encoder.config
        self._slot_shape = model.slot_shape
        self._noise = config.memory.hyperparameters["noise"]
        self._goal = config.objective
        self._products = torch.bfloat16 if config.train.products == "bfloat16" else None

    def loss(
        self, batch: Mapping[str, Tensor], beta: float, *, noisy: bool, rounded: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return Eq. 1 as `objective.loss` has it, and its terms by the same names.

        Args:
            beta: weight of the KL term.
            noisy: with observation and addressing noise.
            rounded: products of the towers as `train.products` says, by autocast.
        """
        import torch
        from torch.nn import functional

        goal, low = self._goal, self._products if rounded else None
        facts = batch["encoder_tokens"].shape[:2]
        texts = (batch[name].flatten(0, 1) for name in ("encoder_tokens", "encoder_mask"))
        with torch.autocast("cpu", dtype=low or torch.bfloat16, enabled=low is not None):
            pooled = self._pooled(*texts)
        encodings = functional.linear(pooled.float(), self.to_latent).unflatten(0, facts)
        read, mean = self._read_back(encodings, noisy)
        zero = torch.zeros_like(encodings)
        latents = {"reconstruction": read, "autoencoding": encodings, "language": zero}
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
        """Round frozen kernels for good where products are rounded; autocast would in every step."""
        if self._products is not None:
            for tower in (self.encoder, self.decoder):
                towers.round_frozen(tower, self._products)

    def _pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return one vector per text, as `encoders.bert` pools them."""
        from torch.nn import functional

        output = self.encoder(input_ids=tokens, attention_mask=mask)
        pooled = output.pooler_output
        if self._pool.pooling == "mean":
            pooled = towers.mean_pooled(output.last_hidden_state, mask)
        return functional.normalize(pooled, dim=-1) if self._pool.normalize else pooled

    def _read_back(self, episodes: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
        """Return latents and mean weights of episodes [B, E, C] written and read by themselves."""
        import torch

        written = episodes
        if noisy:
            written = episodes + self._noise * torch.randn_like(episodes)
        keys = self._addressed(written)  # [B, E, K]
        mean = (episodes @ torch.linalg.pinv(written)) @ keys
        weights = mean
        if noisy:
            weights = mean + (0.5 * self.log_variance).exp() * torch.randn_like(mean)
        return (weights @ torch.linalg.pinv(keys)) @ written, mean

    def _addressed(self, encodings: Tensor) -> Tensor:
        """Return Z M₀† by the normal equations: factorising K x K or C x C costs less than an SVD."""
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
        """Return cross-entropies [R B E, T − 1] of every route, zero at padding, and their mask."""
        import torch
        import transformers
        from torch.nn import functional

        tokens, mask = (
            batch[name].flatten(0, 1).repeat(routes, 1)
            for name in ("decoder_tokens", "decoder_mask")
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


def _trained(parameters: towers.Parameters, frozen: Sequence[str]) -> towers.Parameters:
    """Return those that are trained; the others need no gradient from now on.

    Raises:
        ValueError: a pattern freezes a part of what Hugging Face keeps in one tensor.
    """
    trained, held = optimizer.partition(parameters, frozen)
    shared = {id(tensor) for tensors in trained.values() for tensor in tensors}
    for name, tensors in held.items():
        if any(id(tensor) in shared for tensor in tensors):
            raise ValueError(
                f"train.frozen freezes {name}, which Hugging Face's tower keeps in one tensor with "
                "parameters that are trained. Freeze all of them, or none."
            )
        for tensor in tensors:
            tensor.requires_grad_(False)
    return trained
