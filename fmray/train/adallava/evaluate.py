"""Evaluates an adaptive model: accuracy at each budget, under its own plans and under others.

`evaluate_run` (jobs/evaluate.py) writes a folder with `results.json`, `questions.parquet` (a row
per question, budget and kind of plans, for paired tests), `budget_curve.png` and, with example
answers, `plans.png`. Units that are off are skipped, not masked. Needs no Ray.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from fmray.adallava import AdaptiveVLM, best_plan
from fmray.adallava.passes import prompt_ends
from fmray.adallava.static_plans import best_static_plan, importance_scores
from fmray.adallava.store import is_adaptive
from fmray.config import EvaluateConfig, LoadedRecipe
from fmray.data.loader import Batch, evaluation_batches, evaluation_samples
from fmray.data.processor import load_processor, unknown_token
from fmray.data.store import StoreSplit
from fmray.plots import budget as plots
from fmray.runtime import tracking
from fmray.runtime.console import say
from fmray.runtime.files import atomic_path, write_json
from fmray.train.adallava.batches import draw, model_inputs, score_answers
from fmray.train.mirror import find_model

# --- Statistics: intervals of shares, paired tests, plans against question types ---

Z_95 = 1.959963984540054  # two-sided normal quantile


@dataclass(frozen=True)
class Dependence:
    """Mutual information between question types and plans."""

    bits: float
    shuffled_bits: float  #: mean over shuffled labels
    p_value: float  #: of a permutation test


@dataclass(frozen=True)
class PairedTest:
    """Accuracy of a minus accuracy of b over the same questions."""

    difference: float
    only_a: int  #: questions that only a answers
    only_b: int
    p_value: float  #: McNemar's exact test, two-sided
    low: float  #: 95 % interval of the difference (Bonett and Price 2012)
    high: float


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson's score interval), within [0, 1]."""
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"{right} right of {total} is not a share")
    share, square = right / total, Z_95**2 / total
    center = (share + square / 2) / (1 + square)
    half = Z_95 * math.sqrt(share * (1 - share) / total + square / (4 * total)) / (1 + square)
    # exactly 0 and 1 at the ends, where rounding would miss them
    return (center - half if right else 0.0), (center + half if right < total else 1.0)


def paired_test(a: np.ndarray, b: np.ndarray) -> PairedTest:
    """Test whether two kinds of plans differ in accuracy; a, b: bool [n], right or wrong.

    McNemar's exact test: without a difference, a question that only one of them answers is as
    likely to be a's as b's. The interval is Wald's with one question added to each side, so that it
    has a width even if no question tells the two apart.
    """
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired answers must be two arrays [n], not {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, i) for i in range(min(only_a, only_b) + 1))
    p_value = min(1.0, float(2 * tail / 2**discordant)) if discordant else 1.0
    share_a, share_b = (only_a + 1) / (len(a) + 2), (only_b + 1) / (len(a) + 2)
    center = share_a - share_b
    half = Z_95 * math.sqrt((share_a + share_b - center**2) / (len(a) + 2))
    low, high = max(-1.0, center - half), min(1.0, center + half)
    return PairedTest((only_a - only_b) / len(a), only_a, only_b, p_value, low, high)


def dependence(
    labels: np.ndarray, plans: np.ndarray, shuffles: int = 1000, seed: int = 0
) -> Dependence:
    """Test whether plans depend on the question; labels [n] and plans [n] of any type.

    Mutual information in a finite sample is positive by chance (more so with many plans), so it is
    compared with shuffled labels: p = (1 + number at least as large) / (1 + shuffles).
    """
    _, label_codes = np.unique(labels, return_inverse=True)
    _, plan_codes = np.unique(plans, return_inverse=True)
    generator = np.random.default_rng(seed)
    bits = _bits(label_codes, plan_codes)
    chance = np.array(
        [_bits(generator.permutation(label_codes), plan_codes) for _ in range(shuffles)]
    )
    # ties up to rounding count as "at least as large"
    larger = int((chance >= bits - 1e-12).sum())
    return Dependence(bits, float(chance.mean()), (1 + larger) / (1 + shuffles))


def _bits(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mutual information of two arrays of codes 0, 1, ... in bits (plug-in estimate)."""
    columns = int(b.max()) + 1
    joint = np.bincount(a * columns + b, minlength=(int(a.max()) + 1) * columns) / len(a)
    joint = joint.reshape(-1, columns)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


# --- Examples: a few held-out questions, answered at several budgets, as one figure ---

TOKENS = 16  # of an answer; the figure has no room for more


def draw_examples(
    model_dir: Path, store: Path, budgets: Sequence[float], path: Path, count: int = 6
) -> None:
    """Answer the first question of each type (at most `count`) at each budget; draw a PNG.

    Each example shows image, question, answer and which units ran. Answers are generated, not
    teacher-forced.
    """
    processor = load_processor(store / "processor")
    model = AdaptiveVLM.from_pretrained(model_dir)
    dtype = next(model.parameters()).dtype
    examples: list[plots.PlanExample] = []
    seen: set[str | None] = set()
    for batch in evaluation_batches(store, "validation", processor, batch=1, rows=50 * count):
        [tag] = batch.tags
        if (tag is not None and tag in seen) or batch.pixel_values is None:
            continue
        seen.add(tag)
        inputs = model_inputs(batch, dtype, torch.device("cpu"))
        labels = inputs.pop("labels")[0]
        end = int((labels >= 0).nonzero()[0])
        for name in ("input_ids", "attention_mask"):
            inputs[name] = inputs[name][:, :end]
        tokenizer = processor.tokenizer
        for budget in budgets:
            ids, plan = model.generate(
                **inputs, budget=budget, max_new_tokens=TOKENS, return_plan=True
            )
            examples.append(
                plots.PlanExample(
                    _pixels(batch, processor),
                    _question(tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)),
                    tokenizer.decode(ids[0, end:], skip_special_tokens=True).strip(),
                    tokenizer.decode(labels[labels >= 0], skip_special_tokens=True).strip(),
                    budget,
                    plan[0].tolist(),
                    model.layout.first * model.layout.units_per_layer,
                )
            )
        if len(seen) == count:
            break
    plots.plan_examples(examples, path)


def _question(prompt: str) -> str:
    """Return the last question of a prompt, without the mark that asks for an answer."""
    return prompt.strip().removesuffix("ASSISTANT:").split("\n")[-1].strip()


def _pixels(batch: Batch, processor: object) -> np.ndarray:
    """Return the image as the model sees it: uint8 [height, width, 3]."""
    steps = processor.image_processor
    pixels = batch.pixel_values.reshape(-1, *batch.pixel_values.shape[-3:])[0].float().numpy()
    mean, deviation = (np.array(v)[:, None, None] for v in (steps.image_mean, steps.image_std))
    return (255 * (pixels * deviation + mean)).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


# --- Evaluation ---

BASE = "base"  # in the column `plans`: the model without a budget
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("turn", pa.int32()),
        ("tag", pa.string()),
        ("plans", pa.string()),
        ("budget", pa.float64()),  # null: no budget
        ("correct", pa.bool_()),
        ("loss", pa.float64()),  # nats, summed over the answer's tokens
        ("share", pa.float64()),  # of the decoder's operations over the prompt
        ("plan", pa.string()),  # "1011...": a digit per unit; null without a budget
    ]
)

Plan = Callable[[AdaptiveVLM, Batch, Tensor], Tensor | None]


@dataclass(frozen=True)
class Point:
    """The result of one kind of plans at one budget."""

    plans: str
    budget: float
    accuracy: float
    low: float  #: 95 % interval of the accuracy
    high: float
    loss: float  #: nats per answer
    share: float  #: of the decoder's operations, mean over questions
    questions: int


@dataclass(frozen=True)
class BudgetReport:
    """The results of a model at all budgets."""

    base: Point  #: without a budget
    points: list[Point]
    dependence: dict[float, Dependence]  #: of learned plans on question types, by budget
    paired: dict[tuple[str, float], PairedTest]  #: learned against another kind, by (kind, budget)
    questions: Path  #: the table of questions

    def table(self) -> str:
        """Format everything for the terminal, in 80 columns for three kinds of plans.

        Accuracy by budget; how much better learned plans are than each other kind on the same
        questions, with McNemar's p; and whether plans depend on the type of question.
        """
        tables = [self.accuracy_table(), self._paired_table(), self._dependence_table()]
        return "\n\n".join(table for table in tables if table)

    def accuracy_table(self) -> str:
        """Format accuracy with its 95 % interval, a line per budget."""
        rows = [["budget", "share", *self._kinds()]]
        for budget in self._budgets():
            points = {point.plans: point for point in self.points if point.budget == budget}
            share = next(iter(points.values())).share
            rows.append(
                [f"{budget:g}", f"{share:.3f}", *(_cell(points[kind]) for kind in self._kinds())]
            )
        text = _columns(rows) if self.points else []
        samples = f"{self.base.questions} samples"
        return "\n".join([*text, f"base model, no budget: {_cell(self.base)} over {samples}"])

    def _paired_table(self) -> str:
        kinds = [kind for kind in self._kinds() if any(kind == other for other, _ in self.paired)]
        if not kinds:
            return ""
        rows = [["budget"]]
        for kind in kinds:
            rows[0] += [f"over {kind} [95 %]", "p"]
        for budget in self._budgets():
            row = [f"{budget:g}"]
            for test in (self.paired[kind, budget] for kind in kinds):
                interval = f"[{test.low:+.3f}, {test.high:+.3f}]"
                row += [f"{test.difference:+.3f} {interval}", f"{test.p_value:.1g}"]
            rows.append(row)
        return "\n".join(["accuracy of learned plans minus that of others:", *_columns(rows)])

    def _dependence_table(self) -> str:
        if not self.dependence:
            return ""
        rows = [["budget", "information", "shuffled", "p"]]
        for budget, value in sorted(self.dependence.items()):
            bits = [f"{value.bits:.2f} bits", f"{value.shuffled_bits:.2f} bits"]
            rows.append([f"{budget:g}", *bits, f"{value.p_value:.1g}"])
        title = "what learned plans tell about the type of question:"
        return "\n".join([title, *_columns(rows)])

    def _kinds(self) -> list[str]:
        return list(dict.fromkeys(point.plans for point in self.points))

    def _budgets(self) -> list[float]:
        return sorted({point.budget for point in self.points})


def evaluate(
    model_dir: Path,
    store: Path,
    config: EvaluateConfig,
    out: Path,
    base_dir: Path | None = None,
    max_length: int | None = None,
) -> BudgetReport:
    """Evaluate a model on the validation split of a store.

    Args:
        max_length: `data.max_length`; default: that of the store.
        base_dir: the stock model it was made from, evaluated on the same questions. None: the base
            point is the model itself without a budget.

    Raises:
        ValueError: a budget is below the cost of the layers that always run, or parts of the store
            or of the model are missing.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(store / "processor")
    adaptive = is_adaptive(model_dir)
    load = AdaptiveVLM if adaptive else AutoModelForImageTextToText
    model = load.from_pretrained(model_dir).to(device).eval()
    dtype = next(model.parameters()).dtype

    def batches(split: str, rows: int | None) -> Iterator[Batch]:
        return evaluation_batches(
            store, split, processor, config.batch, rows, max_length=max_length
        )

    base = model
    if base_dir is not None:
        base = AutoModelForImageTextToText.from_pretrained(base_dir).to(device, dtype).eval()
    names = row_ids(store)
    kinds: dict[str, Plan] = {}
    if adaptive:
        calibration = [
            model_inputs(batch, dtype, device)
            for batch in batches("train", config.calibration_rows)
            if {"static", "importance"} & set(config.plans)
        ]
        kinds = {kind: _plans(kind, model, calibration) for kind in config.plans}
    budgets = config.budgets if adaptive else ()
    evaluated = evaluation_samples(StoreSplit(store, "validation"), config.rows, max_length)
    if evaluated.left_out:
        say(f"evaluation on {evaluated}")
    held_out = batches("validation", config.rows)
    unknown = unknown_token(processor)
    return measure(model, base, kinds, budgets, held_out, names, out, unknown)


def measure(
    model: nn.Module,
    base: nn.Module,
    kinds: Mapping[str, Plan],
    budgets: Sequence[float],
    batches: Iterable[Batch],
    names: Mapping[int, str],
    out: Path,
    unknown: int | None = None,
) -> BudgetReport:
    """Answer every question at each budget under each kind of plans; write the results to `out`.

    Args:
        base: the model to answer without a budget.
        budgets: empty for a stock model.
        names: source row -> id.
        unknown: see `score_answers`.

    Raises:
        ValueError: a budget is below the cost of the layers that always run.
    """
    first = next(model.parameters())
    dtype, device = first.dtype, first.device
    records: list[dict[str, Any]] = []
    answered: Counter[int] = Counter()  # answers of a row so far; a row's turns come in order
    for batch in batches:
        inputs = model_inputs(batch, dtype, device)
        questions = _questions(batch, names, answered)
        records += _records(questions, BASE, None, None, _score(base, inputs, {}, unknown))
        for budget in budgets:
            ends = prompt_ends(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
            units_on = model.units_for(budget, ends)
            for kind, plan in kinds.items():
                given = {"budget": budget, "plan": plan(model, batch, units_on)}
                scored = _score(model, inputs, given, unknown)
                shares = [
                    model.cost.share(tokens, used.count("1"))
                    for tokens, used in zip(ends.tolist(), scored[2], strict=True)
                ]
                records += _records(questions, kind, budget, shares, scored)

    out.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(records, schema=SCHEMA)
    file = out / "questions.parquet"
    with atomic_path(file) as temporary:
        pq.write_table(table, temporary)
    result = _summary(table, tuple(kinds), budgets, file)
    _write_results(result, out / "results.json")
    if result.points:
        curve = [
            plots.CurvePoint(p.plans, p.budget, p.accuracy, (p.high - p.low) / 2)
            for p in result.points
        ]
        plots.budget_curve(curve, result.base.accuracy, out / "budget_curve.png")
    return result


def evaluate_run(loaded: LoadedRecipe, run_id: str) -> BudgetReport:
    """Evaluate the model of a training run, and show the tables; see `measure_run`."""
    result = measure_run(loaded, run_id)
    say(result.table())
    return result


def measure_run(loaded: LoadedRecipe, run_id: str) -> BudgetReport:
    """Evaluate the model of the training run `run_id`; write to its folder and its MLflow run.

    Raises:
        ValueError: the run has no model yet.
    """
    recipe = loaded.recipe
    run_dir = recipe.cluster.storage / run_id
    model_dir = find_model(recipe.cluster, run_dir, "jobs/train.py")
    out = run_dir / "evaluation"
    adaptive = is_adaptive(model_dir)
    source = Path(recipe.model.source)
    base_dir = source if adaptive and source.is_dir() and not is_adaptive(source) else None
    with tracking.open_job_run(recipe, run_id) as run:
        data = recipe.data
        result = evaluate(model_dir, data.store, recipe.evaluate, out, base_dir, data.max_length)
        if adaptive:
            budgets = sorted(recipe.evaluate.budgets)[:: max(1, len(recipe.evaluate.budgets) // 3)]
            draw_examples(model_dir, recipe.data.store, budgets, out / "plans.png")
        metrics = {f"evaluate/{p.plans}/{p.budget:g}": p.accuracy for p in result.points}
        run.log(0, **metrics, **{f"evaluate/{BASE}": result.base.accuracy})
        run.artifact(out)
    return result


def _plans(kind: str, model: AdaptiveVLM, calibration: list[dict[str, Tensor]]) -> Plan:
    """Return the function of a kind of plans: (model, batch, units_on [B]) -> plans [B, K]."""
    if kind == "learned":
        return lambda model, batch, units_on: None  # the model's own scheduler decides
    if kind == "random":
        return random_plans
    if kind == "importance":
        scores = importance_scores(model, calibration)
        return lambda model, batch, units_on: best_plan(
            scores.to(units_on.device).expand(len(units_on), -1), units_on
        )
    assert kind == "static", kind
    known: dict[int, Tensor] = {}

    def static(model: AdaptiveVLM, batch: Batch, units_on: Tensor) -> Tensor:
        for units in set(units_on.tolist()) - known.keys():
            known[units] = best_static_plan(model, calibration, units)
        return torch.stack([known[units] for units in units_on.tolist()]).to(units_on.device)

    return static


def random_plans(model: AdaptiveVLM, batch: Batch, units_on: Tensor) -> Tensor:
    """Draw plans [B, K], uniform over the subsets with `units_on` units, seeded by the question."""
    _, noise = draw(batch, 0, 0, range(model.layout.num_units + 1))
    return best_plan(noise.to(units_on.device), units_on)


@torch.no_grad()
def _score(
    model: nn.Module, inputs: dict[str, Tensor], given: dict[str, Any], unknown: int | None
) -> tuple[list[bool], list[float], list[str] | None]:
    """Return for each row whether the answer is right, its loss, and the plan it ran under."""
    if given:
        output = model(**inputs, **given)
        plans = ["".join("01"[on] for on in row) for row in output.plan.int().tolist()]
    else:
        output = model(**inputs)
        plans = None
    _, right, _, loss = score_answers(output.logits, inputs["labels"], unknown)
    return right.bool().tolist(), loss.tolist(), plans


def _questions(batch: Batch, names: dict[int, str], answered: Counter[int]) -> list[dict[str, Any]]:
    """Return the columns that identify the question of each sample."""
    questions = []
    for row, tag in zip(batch.rows, batch.tags, strict=True):
        questions.append({"id": names[row], "row": row, "turn": answered[row], "tag": tag})
        answered[row] += 1
    return questions


def _records(
    questions: list[dict[str, Any]],
    kind: str,
    budget: float | None,
    shares: list[float] | None,
    scored: tuple[list[bool], list[float], list[str] | None],
) -> Iterator[dict[str, Any]]:
    correct, losses, plans = scored
    for index, question in enumerate(questions):
        yield question | {
            "plans": kind,
            "budget": budget,
            "correct": correct[index],
            "loss": losses[index],
            "share": 1.0 if shares is None else shares[index],
            "plan": None if plans is None else plans[index],
        }


def _summary(
    table: pa.Table, kinds: Sequence[str], budgets: Sequence[float], questions: Path
) -> BudgetReport:
    """Summarise the table of questions."""
    columns = {name: np.array(table[name].to_pylist()) for name in ("plans", "tag", "plan")}
    columns["budget"] = table["budget"].to_numpy()
    columns["correct"] = np.array(table["correct"].to_pylist(), dtype=bool)
    for name in ("loss", "share"):
        columns[name] = table[name].to_numpy()

    def chosen(kind: str, budget: float) -> dict[str, np.ndarray]:
        rows = (columns["plans"] == kind) & (columns["budget"] == budget)
        return {name: values[rows] for name, values in columns.items()}

    base = {name: values[columns["plans"] == BASE] for name, values in columns.items()}
    points: list[Point] = []
    paired: dict[tuple[str, float], PairedTest] = {}
    dependences: dict[float, Dependence] = {}
    for budget in budgets:
        learned = chosen("learned", budget)
        for kind in kinds:
            rows = chosen(kind, budget)
            points.append(_point(kind, budget, rows))
            if kind != "learned" and "learned" in kinds:
                paired[kind, budget] = paired_test(learned["correct"], rows["correct"])
        tagged = np.array([tag is not None for tag in learned["tag"]], dtype=bool)
        if len(set(learned["tag"][tagged])) > 1:
            dependences[budget] = dependence(
                learned["tag"][tagged].astype(str), learned["plan"][tagged].astype(str)
            )
    return BudgetReport(_point(BASE, 1.0, base), points, dependences, paired, questions)


def _point(kind: str, budget: float, rows: dict[str, np.ndarray]) -> Point:
    right, total = int(rows["correct"].sum()), len(rows["correct"])
    low, high = wilson_interval(right, total)
    return Point(
        kind,
        budget,
        right / total,
        low,
        high,
        float(rows["loss"].mean()),
        float(rows["share"].mean()),
        total,
    )


def _cell(point: Point) -> str:
    return f"{point.accuracy:.3f} [{point.low:.3f}-{point.high:.3f}]"


def _columns(lines: list[list[str]]) -> list[str]:
    """Align cells to the right; lines may be shorter than the first."""
    widths = [max(len(line[k]) for line in lines if k < len(line)) for k in range(len(lines[0]))]
    return [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=False))
        for line in lines
    ]


def row_ids(store: Path) -> dict[int, str]:
    """Return source row -> id of the validation split."""
    names: dict[int, str] = {}
    for file in StoreSplit(store, "validation").files:
        part = pq.read_table(file, columns=["row", "id"])
        names |= dict(zip(part["row"].to_pylist(), part["id"].to_pylist(), strict=True))
    return names


def _write_results(result: BudgetReport, path: Path) -> None:
    values = {
        "base": asdict(result.base),
        "points": [asdict(point) for point in result.points],
        "dependence": [{"budget": b, **asdict(d)} for b, d in result.dependence.items()],
        "paired": [
            {"plans": kind, "budget": budget, **asdict(test)}
            for (kind, budget), test in result.paired.items()
        ],
    }
    write_json(path, values)
