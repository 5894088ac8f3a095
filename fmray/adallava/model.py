"""The adaptive model: a stock language or vision-language model that keeps a budget.

Given a budget, `AdaptiveVLM` embeds it as one latency token, reads K unit logits from the token's
state after the always-on layers, and runs the other layers under the plan that these give (Xu et
al. 2025; chapter 5 of the dissertation). Without a budget it is the base model, unchanged.

The latency token follows the prompt. `inline`: it stays, answers attend to it, and the first answer
token is predicted from it. `probe`: it attends to the prompt and leaves after the always-on layers,
so that a full plan is the base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from fmray.adallava import store
from fmray.adallava.cost import CostModel
from fmray.adallava.execution import Execution
from fmray.adallava.families import Backbone, load_base
from fmray.adallava.generation import answer
from fmray.adallava.layout import SwitchLayout
from fmray.adallava.passes import (
    IGNORED,
    Draw,
    Prompt,
    hidden_under,
    masked_pass,
    prefill,
    prompt_ends,
    without_last_prompt_token,
)
from fmray.adallava.proof import prove
from fmray.adallava.sampling import best_plan, random_plan, sample_plan, threshold_plan
from fmray.adallava.token_sampling import sample

# --- Latency encoder and schedulers (Xu et al. 2025, section 5.2.5) ---

FREQUENCIES = 128


class LatencyEncoder(nn.Module):
    """Encode the share of the decoder that runs as a token embedding [B, d].

    256 sinusoidal features -> LayerNorm -> Linear -> GELU -> Linear.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * FREQUENCIES)
        self.expand = nn.Linear(2 * FREQUENCIES, hidden_size)
        self.activation = nn.GELU()
        self.project = nn.Linear(hidden_size, hidden_size)

    def forward(self, share: Tensor) -> Tensor:
        """Encode share [B] in [0, 1], the quantised budget, as [B, d] in the weights' dtype."""
        # angles in float32 for every dtype of the weights: bfloat16 cannot tell 0.85 from 0.852
        index = torch.arange(FREQUENCIES, device=share.device, dtype=torch.float32)
        angles = share.float()[:, None] * 10000.0 ** (-index / FREQUENCIES)
        features = torch.cat((angles.sin(), angles.cos()), dim=1)
        features = self.norm(features.to(self.norm.weight.dtype))
        return self.project(self.activation(self.expand(features)))


class Scheduler(nn.Module):
    """Compute unit logits from the latency token's hidden state: Linear(d, K).

    Initialised to zero, so that the first plans drawn are uniform over the k-subsets.
    """

    def __init__(self, hidden_size: int, units: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, units)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden [B, d] to logits [B, K]."""
        return self.linear(hidden)


class StaticScheduler(nn.Module):
    """One learned order of the units for all inputs and budgets (baseline)."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(units))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [B, K] for hidden [B, d], of which only batch size and dtype matter."""
        return self.logits.to(hidden.dtype).expand(hidden.shape[0], -1)


# --- The model ---

Budget = float | str | Fraction
SCHEDULERS = ("learned", "static", "random", "deterministic")


@dataclass
class AdaptiveOutput:
    """Result of a forward pass. logits[:, i] predicts token i + 1 of input_ids, as in the base."""

    loss: Tensor | None  # mean over supervised tokens; None without labels
    logits: Tensor  # [B, n, V]
    plan: Tensor | None = None  # [B, K], float with a gradient in training, else bool
    plan_logits: Tensor | None = None  # [B, K] float32; plans are None without a budget


class AdaptiveVLM(nn.Module):
    """A stock language or vision-language model with units that switch on and off per request.

    Make one with `from_base` or `from_pretrained`.
    """

    def __init__(
        self,
        base: nn.Module,
        layout: SwitchLayout,
        latency_token: Literal["inline", "probe"] = "inline",
        scheduler: Literal["learned", "static", "random", "deterministic"] = "learned",
        tau: float = 5.0,
        penalty: float = 1.0,
    ) -> None:
        super().__init__()
        if latency_token not in ("inline", "probe"):
            raise ValueError(f"latency_token must be 'inline' or 'probe', not {latency_token!r}")
        if scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, not {scheduler!r}")
        self.base = base
        self.layout = layout
        self.latency_token = latency_token
        self.scheduler_kind = scheduler
        self.tau = tau
        self.penalty = penalty
        self.gradient_checkpointing = False
        backbone = Backbone(base)
        self.cost = CostModel(backbone.config, layout)
        hidden_size = backbone.config.hidden_size
        self.latency_encoder = LatencyEncoder(hidden_size)
        if scheduler == "static":
            self.scheduler = StaticScheduler(layout.num_units)
        elif scheduler != "random":
            self.scheduler = Scheduler(hidden_size, layout.num_units)
        else:
            self.scheduler = None
        head = base.get_output_embeddings().weight
        for module in self.adaptive_modules():
            module.to(head.device, head.dtype)
        if layout.first < backbone.deepstack_layers:
            raise ValueError(
                f"a {backbone.kind} model adds features of the image after its first"
                f" {backbone.deepstack_layers} layers, which must always run: first is"
                f" {layout.first}"
            )
        self.execution = Execution(backbone, layout)

    @classmethod
    def from_base(
        cls, model: nn.Module, layout: SwitchLayout, latency_token: str = "inline", **options: Any
    ) -> AdaptiveVLM:
        """Make a stock model adaptive, after a proof that it computes the same (`proof.prove`).

        The model is referenced, not copied; the new modules take its device and dtype. The proof
        runs a random row of text; call `prove` with a row that has an image for the rest.

        Args:
            options: `scheduler` ("learned", "static", "random" or "deterministic"); `tau`, the
                temperature of the Gumbel-softmax; `penalty`, lambda of the deterministic baseline.

        Raises:
            ValueError: a model of an unknown family, or one that computes something else layer by
                layer; or a layout made for another decoder.
        """
        adaptive = cls(model, layout, latency_token, **options)
        if not any(parameter.is_meta for parameter in model.parameters()):
            prove(adaptive)
        return adaptive

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> AdaptiveVLM:
        """Load a directory that `save_pretrained` wrote.

        Args:
            options: passed to the base's `from_pretrained` (dtype, attn_implementation, ...).

        Raises:
            ValueError: not an adaptive model, or a damaged one.
        """
        path = Path(path)
        description, weights = store.read(path)
        options.setdefault("dtype", "auto")
        base = load_base(description.base or path, **options)
        model = cls(
            base,
            description.layout,
            description.latency_token,
            description.scheduler,
            description.tau,
            description.penalty,
        )
        store.copy_weights(weights, model._adaptive_state(), path)
        if description.proven != transformers.__version__:
            prove(model)
        return model.eval()

    def save_pretrained(self, path: str | Path, include_base: bool = True) -> None:
        """Write the stock model's own files and, next to them, the adaptive parts.

        Args:
            include_base: False writes only the adaptive parts and the path that the base was
                loaded from.

        Raises:
            ValueError: the base is left out but was not loaded from a path.
        """
        reference = None if include_base else self.base.config._name_or_path
        if not include_base and not reference:
            raise ValueError(
                "the base model was not loaded from a path, so it must be saved too "
                "(include_base=True)"
            )
        description = store.Description(
            self.layout,
            self.latency_token,
            self.scheduler_kind,
            self.tau,
            self.penalty,
            reference,
            transformers.__version__,  # `from_base` or `from_pretrained` has proven it
        )
        store.write(Path(path), self.base, description, self._adaptive_state())

    def _adaptive_state(self) -> dict[str, Tensor]:
        """Return the adaptive parts of the state dict."""
        parts = ("latency_encoder.", "scheduler.")
        return {k: v for k, v in self.state_dict().items() if k.startswith(parts)}

    @property
    def backbone(self) -> Backbone:
        """The stock model's pieces."""
        return self.execution.backbone

    def adaptive_modules(self) -> list[nn.Module]:
        """Return the latency encoder and, unless plans are random, the scheduler."""
        return [m for m in (self.latency_encoder, self.scheduler) if m is not None]

    def adaptive_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the base model does not have."""
        return [p for module in self.adaptive_modules() for p in module.parameters()]

    def gradient_checkpointing_enable(self) -> None:
        """Recompute decoder layers in the backward pass of masked execution."""
        self.gradient_checkpointing = True

    def units_for(
        self, budget: Budget | Sequence[Budget] | Tensor, prompt_tokens: Tensor
    ) -> Tensor:
        """Return how many units a budget allows, int64 [B].

        The arithmetic is exact on the number as written. An inline latency token counts as one
        token of the prompt.

        Args:
            budget: one, or one per row.
            prompt_tokens: [B].

        Raises:
            ValueError: a budget is no number in (0, 1], or below the always-on layers' share.
        """
        tokens = [int(count) + (self.latency_token == "inline") for count in prompt_tokens.tolist()]
        budgets = _budgets(budget, len(tokens))
        units = [self.cost.max_units(b, n) for b, n in zip(budgets, tokens, strict=True)]
        return torch.tensor(units, device=prompt_tokens.device)

    def share_of(self, units_on: Tensor) -> Tensor:
        """Return the share of the decoder that runs, always-on layers included, float32 [B]."""
        below = self.layout.first * self.layout.units_per_layer
        return (below + units_on).float() / (below + self.layout.num_units)

    def draw_plan(self, plan_logits: Tensor, units_on: Tensor, draw: Draw) -> Tensor:
        """Return the plan [B, K]: sampled with a gradient in training, else the most probable."""
        if self.scheduler_kind == "random":
            if draw.noise is not None:
                return best_plan(draw.noise.to(units_on.device), units_on)
            return random_plan(units_on, self.layout.num_units, draw.generator)
        if self.scheduler_kind == "deterministic":
            if self.training:
                return threshold_plan(plan_logits, self.tau)
            # this baseline does not know the budget, so inference caps the number of units
            positive = (plan_logits > 0).sum(1)
            return best_plan(plan_logits, torch.minimum(positive, units_on))
        if self.training:
            return sample_plan(plan_logits, units_on, self.tau, draw.generator, draw.noise)
        return best_plan(plan_logits, units_on)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        budget: Budget | Sequence[Budget] | Tensor | None = None,
        plan: Tensor | None = None,
        units_on: Tensor | None = None,
        execution: Literal["masked", "skipped"] | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        **extras: Tensor,
    ) -> AdaptiveOutput:
        """Run prompts, or prompts with their answers, under plans.

        Give one of `budget`, `units_on` and `plan`; a plan given with a budget must keep it.
        Without any of them, the base model runs.

        Args:
            input_ids: [B, n], like attention_mask and labels; padded left or right.
            labels: -100 except on answers. A row's prompt ends where its first supervised token
                begins, so that a plan never sees the answer.
            budget: one, or one per row.
            plan: [B, K].
            units_on: int [B].
            execution: "masked" runs every layer (default in training), "skipped" only what is on.
            noise: [B, K] Gumbel noise for the draw of the plan.
            extras: further outputs of the family's processor (image_sizes, image_grid_thw, ...).
        """
        # without a budget: the base model
        if budget is None and plan is None and units_on is None:
            output = self.base(
                input_ids=input_ids,
                attention_mask=attention_mask,
                pixel_values=pixel_values,
                labels=labels,
                **extras,
            )
            return AdaptiveOutput(output.loss, output.logits)
        execution = execution or ("masked" if self.training else "skipped")
        if execution not in ("masked", "skipped"):
            raise ValueError(f"execution must be 'masked' or 'skipped', not {execution!r}")
        prompt = self.embed_prompt(
            input_ids,
            attention_mask,
            pixel_values,
            extras=extras,
            budget=budget,
            plan=plan,
            units_on=units_on,
            labels=labels,
            count=False,
        )
        run = masked_pass if execution == "masked" else prefill
        hidden, plan, plan_logits = run(self, prompt, Draw(generator, noise))[:3]
        if self.latency_token == "inline":
            hidden = without_last_prompt_token(hidden, prompt.end)
        logits = self.backbone.logits(hidden)

        # loss over supervised tokens; the deterministic baseline pays for exceeding its budget
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
            )
            if self.scheduler_kind == "deterministic" and self.training:
                excess = self.share_of(plan.sum(1)) - self.share_of(prompt.units_on)
                loss = loss + self.penalty * excess.clamp(min=0).mean()
        return AdaptiveOutput(loss, logits, plan, plan_logits)

    @torch.no_grad()
    def logits_under(
        self,
        plans: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **extras: Tensor,
    ) -> Iterator[tuple[int, Tensor]]:
        """Run one batch under each of several plans, with shared work done once.

        Args:
            plans: bool [P, K], all with the same number of units on.

        Yields:
            The index of a plan and the logits [B, n, V] that `forward(plan=...)` gives, in the
            order of `passes.hidden_under`.

        Raises:
            ValueError: plans differ in size.
        """
        sizes = set(plans.sum(1).tolist())
        if len(sizes) != 1 or plans.shape[1:] != (self.layout.num_units,):
            raise ValueError(
                f"plans must be [P, {self.layout.num_units}] with the same number of units on, "
                f"not {list(plans.shape)} with {sorted(sizes)}"
            )
        rows = input_ids.shape[0]
        units_on = plans[:1].sum(1).expand(rows).to(input_ids.device)
        prompt = self.embed_prompt(
            input_ids,
            attention_mask,
            pixel_values,
            extras=extras,
            units_on=units_on,
            labels=labels,
            count=False,
        )
        for index, hidden in hidden_under(self, prompt, plans):
            if self.latency_token == "inline":
                hidden = without_last_prompt_token(hidden, prompt.end)
            yield index, self.backbone.logits(hidden)

    def embed_prompt(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        *,
        extras: dict[str, Tensor],
        budget: Budget | Sequence[Budget] | Tensor | None = None,
        plan: Tensor | None = None,
        units_on: Tensor | None = None,
        labels: Tensor | None = None,
        count: bool = True,
    ) -> Prompt:
        """Prepare rows for the first decoder layer: embeddings, positions, ends, numbers of units.

        Args:
            count: positions count attended tokens only, as the stock `generate` does.

        Raises:
            ValueError: `extras` holds a video, a sound or another input that would be ignored.
        """
        self.backbone.check_inputs(extras)
        end = prompt_ends(input_ids, attention_mask, labels)
        units_on = self._units(budget, plan, units_on, input_ids, attention_mask, end)
        backbone = self.backbone
        features = None if pixel_values is None else backbone.image_features(pixel_values, extras)
        return Prompt(
            backbone.embed(input_ids, None, extras, features),
            attention_mask,
            backbone.positions(input_ids, attention_mask, extras, count),
            end,
            units_on,
            plan,
            backbone.added(input_ids, features),
        )

    def _units(
        self,
        budget: Budget | Sequence[Budget] | Tensor | None,
        plan: Tensor | None,
        units_on: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        end: Tensor,
    ) -> Tensor:
        """Return the number of units on per row, from the budget, plan or number given."""
        rows, units = input_ids.shape[0], self.layout.num_units
        allowed = units_on
        if budget is not None:
            seen = torch.arange(input_ids.shape[1], device=end.device) < end[:, None]
            if attention_mask is not None:
                seen = seen & attention_mask.bool()
            allowed = self.units_for(budget, seen.sum(1))
        if plan is None:
            return allowed
        if plan.shape != (rows, units):
            raise ValueError(
                f"plan must be [{rows}, {units}] (rows, units), not {list(plan.shape)}"
            )
        used = plan.detach().bool().sum(1).to(end.device)
        if allowed is not None and bool((used > allowed).any()):
            row = int((used > allowed).nonzero()[0])
            raise ValueError(
                f"the plan of row {row} has {int(used[row])} units on; "
                f"its budget allows {int(allowed[row])}"
            )
        return used

    def latency_embedding(self, units_on: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the latency token [B, d] for a number of units on, int [B]."""
        return self.latency_encoder(self.share_of(units_on)).to(dtype)

    def decide(self, hidden: Tensor, prompt: Prompt, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return plan and plan logits [B, K] from the latency token's state [B, d]."""
        if self.scheduler is None:
            logits = hidden.new_zeros((hidden.shape[0], self.layout.num_units), dtype=torch.float32)
        else:
            logits = self.scheduler(hidden).float()
        if prompt.plan is not None:
            return prompt.plan, logits
        return self.draw_plan(logits, prompt.units_on, draw), logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        budget: Budget | Sequence[Budget] | Tensor | None = None,
        plan: Tensor | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
        return_plan: bool = False,
        **extras: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Answer a batch of prompts, each under its own budget.

        Without a budget or plan, the base model's own `generate` runs. Decoding is greedy unless
        `do_sample` (temperature, top_p, generator), and stops when all rows have ended.

        Args:
            input_ids: [B, n], like attention_mask; padded left or right.
            budget: one, or one per row.
            plan: bool [B, K].

        Returns:
            Ids [B, n + new], ended rows filled with the padding id; with `return_plan` also the
            plan [B, K].
        """
        if isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be a positive integer, not {max_new_tokens!r}")
        defaults = self.base.generation_config
        eos = _ids(defaults.eos_token_id if eos_token_id is None else eos_token_id)
        pads = (pad_token_id, defaults.pad_token_id, self.backbone.config.pad_token_id, *eos, 0)
        pad = next(value for value in pads if value is not None)

        # without a budget: the base model
        if budget is None and plan is None:
            sampling = {"temperature": temperature, "top_p": top_p} if do_sample else {}
            ids = self.base.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                pixel_values=pixel_values,
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                eos_token_id=eos or None,
                pad_token_id=pad,
                **sampling,
                **extras,
            )
            return (ids, None) if return_plan else ids

        # under plans, with dropout off
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        greedy = partial(torch.argmax, dim=-1)
        drawn = partial(sample, temperature=temperature, top_p=top_p, generator=generator)
        was_training = self.training
        self.eval()
        try:
            prompt = self.embed_prompt(
                input_ids, attention_mask, pixel_values, extras=extras, budget=budget, plan=plan
            )
            tokens, plan = answer(
                self,
                prompt,
                drawn if do_sample else greedy,
                max_new_tokens=max_new_tokens,
                eos=eos,
                pad=pad,
                generator=generator,
            )
        finally:
            self.train(was_training)
        ids = torch.cat((input_ids, tokens), dim=1)
        return (ids, plan) if return_plan else ids


#: Text-only models are adaptive too.
AdaptiveModel = AdaptiveVLM


def _ids(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _budgets(budget: Budget | Sequence[Budget] | Tensor, rows: int) -> list[Budget]:
    """Return one budget per row.

    A tensor's numbers are read as the decimals that they print as, so that float32 0.6 is 0.6.
    """
    if isinstance(budget, Tensor):
        if budget.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"a {budget.dtype} tensor cannot hold a budget exactly; give float64 or strings"
            )
        budget = [str(value) for value in budget.detach().cpu().reshape(-1).numpy()]
    if isinstance(budget, (str, int, float, Fraction)):
        return [budget] * rows
    budget = list(budget)
    if len(budget) == 1:
        return budget * rows
    if len(budget) != rows:
        raise ValueError(f"{len(budget)} budgets for {rows} rows; give one, or one per row")
    return budget
