"""The adaptive model: a stock vision-language model that obeys a budget.

In: a stock transformers model, a `SwitchLayout`. Out: `AdaptiveVLM`, which for a budget embeds one
latency token, reads switch logits off it after the always-on layers, and runs the rest under a plan
(Xu et al. 2025, chapter 5 of the dissertation). Without a budget it is the base model, untouched.

The latency token sits right after the prompt. `inline`: it stays, answers attend to it, the first
answer token is predicted from it. `probe`: it only reads and leaves after the always-on layers, so
that a full plan is the base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fmray.adallava.cost import CostModel
from fmray.adallava.execution import Execution
from fmray.adallava.families import Backbone
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
from fmray.adallava.sampling import best_plan, random_plan, sample_plan, threshold_plan

# The latency encoder and the schedulers: from a budget to one token, from that token to K logits.
#
# In: the share of the decoder that will run, and the latency token's hidden state after the
# always-on layers. Out: a token embedding [B, d] and switch logits [B, K] (Xu et al. 2025, section
# 5.2.5).

FREQUENCIES = 128


class LatencyEncoder(nn.Module):
    """Scalar share in [0, 1] -> 256 sinusoidal features -> LayerNorm -> Linear -> GELU -> Linear ->
    token [B, d].
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * FREQUENCIES)
        self.expand = nn.Linear(2 * FREQUENCIES, hidden_size)
        self.activation = nn.GELU()
        self.project = nn.Linear(hidden_size, hidden_size)

    def forward(self, share: Tensor) -> Tensor:
        """share: [B] float, the quantised budget (what will really run). Returns [B, d] in the
        weights' dtype.
        """
        # angles in float32 whatever the weights are: bfloat16 cannot tell 0.85 from 0.852
        index = torch.arange(FREQUENCIES, device=share.device, dtype=torch.float32)
        angles = share.float()[:, None] * 10000.0 ** (-index / FREQUENCIES)
        features = torch.cat((angles.sin(), angles.cos()), dim=1)
        features = self.norm(features.to(self.norm.weight.dtype))
        return self.project(self.activation(self.expand(features)))


class Scheduler(nn.Module):
    """Switch logits from the latency token's hidden state: Linear(d, K).

    Starts at zero, so that the first plans drawn are uniform over the k-subsets.
    """

    def __init__(self, hidden_size: int, units: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, units)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [B, d] -> logits [B, K]."""
        return self.linear(hidden)


class StaticScheduler(nn.Module):
    """One learned order of the switches for all inputs and budgets (baseline): logits that depend
    on nothing.
    """

    def __init__(self, units: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(units))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [B, d], only its batch size and dtype are used -> logits [B, K]."""
        return self.logits.to(hidden.dtype).expand(hidden.shape[0], -1)


Budget = float | str | Fraction
SCHEDULERS = ("learned", "static", "random", "deterministic")


@dataclass
class AdaptiveOutput:
    """logits[:, i] predicts token i + 1 of input_ids, as in the base model. Plans are None without
    a budget.

    loss: mean over supervised tokens, None without labels. logits: [B, n, V]. plan: [B, K], float
    with a gradient in training, bool otherwise. plan_logits: [B, K] float32.
    """

    loss: Tensor | None
    logits: Tensor
    plan: Tensor | None = None
    plan_logits: Tensor | None = None


class AdaptiveVLM(nn.Module):
    """A stock vision-language model with switches. See `from_base` and `from_pretrained`."""

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
        self.execution = Execution(backbone, layout)

    @classmethod
    def from_base(
        cls, model: nn.Module, layout: SwitchLayout, latency_token: str = "inline", **options: Any
    ) -> AdaptiveVLM:
        """Make a stock model adaptive. It is held, not copied; the new parts take its device and
        dtype.

        options: scheduler "learned" | "static" | "random" | "deterministic"; tau, the temperature
        of the Gumbel-softmax; penalty, lambda of the deterministic baseline. Raises ValueError for
        a model of an unknown family, or a layout made for another decoder.
        """
        return cls(model, layout, latency_token, **options)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> AdaptiveVLM:
        """Load a directory that `save_pretrained` wrote; options go to the base's
        `from_pretrained`.
        """
        from fmray.adallava.store import load

        return load(cls, Path(path), **options)

    def save_pretrained(self, path: str | Path, include_base: bool = True) -> None:
        """Write a plain directory of safetensors: the stock model's own files, and the adaptive
        parts beside them.
        """
        from fmray.adallava.store import save

        save(self, Path(path), include_base)

    @property
    def backbone(self) -> Backbone:
        """The stock model's pieces."""
        return self.execution.backbone

    def adaptive_modules(self) -> list[nn.Module]:
        """Latency encoder and scheduler (where there is one)."""
        return [m for m in (self.latency_encoder, self.scheduler) if m is not None]

    def adaptive_parameters(self) -> list[nn.Parameter]:
        """The parameters the base model does not have."""
        return [p for module in self.adaptive_modules() for p in module.parameters()]

    def gradient_checkpointing_enable(self) -> None:
        """Recompute decoder layers in the backward pass (masked execution)."""
        self.gradient_checkpointing = True

    def units_for(
        self, budget: Budget | Sequence[Budget] | Tensor, prompt_tokens: Tensor
    ) -> Tensor:
        """How many switches a budget allows: one budget, or one a row; prompt_tokens [B] -> int64
        [B].

        Exact arithmetic on the number as written; the latency token counts where it stays. Raises
        ValueError for a budget that is no number in (0, 1] or lies below the always-on layers' own
        share.
        """
        tokens = [int(count) + (self.latency_token == "inline") for count in prompt_tokens.tolist()]
        budgets = _budgets(budget, len(tokens))
        units = [self.cost.max_units(b, n) for b, n in zip(budgets, tokens, strict=True)]
        return torch.tensor(units, device=prompt_tokens.device)

    def share_of(self, units_on: Tensor) -> Tensor:
        """Share of the decoder's units that run, the always-on layers included: int [B] -> float32
        [B].
        """
        below = self.layout.first * self.layout.units_per_layer
        return (below + units_on).float() / (below + self.layout.num_units)

    def draw_plan(self, plan_logits: Tensor, units_on: Tensor, draw: Draw) -> Tensor:
        """The plan this scheduler gives: sampled with a gradient in training, the most probable one
        otherwise.
        """
        if self.scheduler_kind == "random":
            if draw.noise is not None:
                return best_plan(draw.noise.to(units_on.device), units_on)
            return random_plan(units_on, self.layout.num_units, draw.generator)
        if self.scheduler_kind == "deterministic":
            if self.training:
                return threshold_plan(plan_logits, self.tau)
            wanted = (plan_logits > 0).sum(1)
            return best_plan(
                plan_logits, torch.minimum(wanted, units_on)
            )  # a budget is kept all the same
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
        """One pass over prompts, or over prompts with their answers.

        input_ids, attention_mask, labels: [B, n], padded left or right; labels are -100 except on
        answers, and the prompt of a row ends where its first supervised token begins (a plan never
        sees the answers it serves). budget: one, or one a row; or units_on: int [B], the number of
        switches directly; or plan: [B, K], run as it is (with a budget too, it must keep it). None
        of the three: the base model itself. execution: "masked" runs every layer (default in
        training), "skipped" only what is on. noise: [B, K] Gumbel noise for the draw. extras: what
        the family's processor gives beside these (image_sizes, image_grid_thw, ...).
        """
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
            budget,
            plan,
            extras,
            labels,
            units_on,
            count=False,
        )
        run = masked_pass if execution == "masked" else prefill
        hidden, plan, plan_logits = run(self, prompt, Draw(generator, noise))[:3]
        if self.latency_token == "inline":
            hidden = without_last_prompt_token(hidden, prompt.end)
        logits = self.backbone.logits(hidden)
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
        """`forward(plan=...).logits` of one batch under each of several plans, for much less than a
        forward each: plans bool [P, K], of one size -> (index of the plan, logits [B, n, V]).

        The order is that of the passes (see `passes.hidden_under`). Raises ValueError for plans of
        different sizes.
        """
        sizes = set(plans.sum(1).tolist())
        if len(sizes) != 1 or plans.shape[1:] != (self.layout.num_units,):
            raise ValueError(
                f"plans must be [P, {self.layout.num_units}] with the same number of switches on, "
                f"not {list(plans.shape)} with {sorted(sizes)}"
            )
        rows = input_ids.shape[0]
        units_on = plans[:1].sum(1).expand(rows).to(input_ids.device)
        prompt = self.embed_prompt(
            input_ids,
            attention_mask,
            pixel_values,
            None,
            None,
            extras,
            labels,
            units_on,
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
        budget: Budget | Sequence[Budget] | Tensor | None,
        plan: Tensor | None,
        extras: dict[str, Tensor],
        labels: Tensor | None = None,
        units_on: Tensor | None = None,
        count: bool = True,
    ) -> Prompt:
        """Everything up to the first decoder layer: where prompts end, how many switches,
        embeddings, positions.
        """
        end = prompt_ends(input_ids, attention_mask, labels)
        units_on = self._units(budget, plan, units_on, input_ids, attention_mask, end)
        return Prompt(
            self.backbone.embed(input_ids, pixel_values, extras),
            attention_mask,
            self.backbone.positions(input_ids, attention_mask, extras, count),
            end,
            units_on,
            plan,
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
        """The number of switches on for each row, from whichever of the three the caller gave."""
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
                f"plan must be [{rows}, {units}] (rows, switches), not {list(plan.shape)}"
            )
        used = plan.detach().bool().sum(1).to(end.device)
        if allowed is not None and bool((used > allowed).any()):
            row = int((used > allowed).nonzero()[0])
            raise ValueError(
                f"the plan of row {row} has {int(used[row])} switches on; "
                f"its budget allows {int(allowed[row])}"
            )
        return used

    def latency_embedding(self, units_on: Tensor, dtype: torch.dtype) -> Tensor:
        """The latency token for a number of switches: int [B] -> [B, d]."""
        return self.latency_encoder(self.share_of(units_on)).to(dtype)

    def decide(self, hidden: Tensor, prompt: Prompt, draw: Draw) -> tuple[Tensor, Tensor]:
        """Latency token's state [B, d] after the always-on layers -> plan and logits [B, K]."""
        if self.scheduler is None:
            logits = hidden.new_zeros((hidden.shape[0], self.layout.num_units), dtype=torch.float32)
        else:
            logits = self.scheduler(hidden).float()
        if prompt.plan is not None:
            return prompt.plan, logits
        return self.draw_plan(logits, prompt.units_on, draw), logits

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        budget: Budget | Sequence[Budget] | Tensor | None = None,
        plan: Tensor | None = None,
        max_new_tokens: int = 20,
        **options: Any,
    ) -> Tensor:
        """Answers for a batch of prompts, each under its own budget: see
        `fmray.adallava.generation.generate`.
        """
        from fmray.adallava.generation import generate

        return generate(
            self, input_ids, attention_mask, pixel_values, budget, plan, max_new_tokens, **options
        )


def _budgets(budget: Budget | Sequence[Budget] | Tensor, rows: int) -> list[Budget]:
    """One budget a row. A tensor's numbers are read as the decimals they print as, so float32 0.6
    is 0.6.
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
        raise ValueError(f"{len(budget)} budgets for {rows} rows; give one, or one a row")
    return budget
