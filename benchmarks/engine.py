"""The engine against stock transformers, with the same weights, in one process.

    python benchmarks/engine.py [--runs 3] [--tokens 128] [--new 48]
    python benchmarks/engine.py --soak [--requests 10000]

Compares 8 concurrent requests of mixed budgets with stock `generate` at full budget, one by one and
batched; a mixed batch with the share of operations that its budgets allow; one request at full
budget with stock `generate`; a decoding step of 8 rows with a step of one row. Prints medians,
paired ratios and bars, met or missed. The decoder has 113 M parameters; a GPU is used, in bfloat16,
if there is one. `--soak` sends 10^4 small requests to a tiny model and prints memory in between.
"""

from __future__ import annotations

import argparse
import gc
import resource
from collections.abc import Callable
from itertools import count

import torch
from skip import IMAGE_ID, IMAGE_TOKENS, stock_model
from timing import compare
from torch import Tensor, nn

from fmray.adallava import AdaptiveVLM, SwitchLayout
from fmray.engine.engine import Engine
from fmray.engine.requests import Request, Sampling

BUDGETS = ["1", "0.9", "0.8", "0.75", "0.7", "0.6", "0.55", "0.5"]
NAMES = count()


def rows_of(tokens: int, device: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Return 8 prompts of different lengths, `tokens` on average, each with an image."""
    torch.manual_seed(1)
    rows = []
    for number in range(8):
        length = tokens + 4 * number - 14
        ids = torch.randint(4, 1024, (1, length), device=device)
        ids[:, 1 : 1 + IMAGE_TOKENS] = IMAGE_ID
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.randn(1, 3, 64, 64, device=device, dtype=dtype),
            }
        )
    return rows


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return `rows` as one batch, padded on the left."""
    width = max(row["input_ids"].shape[1] for row in rows)
    ids = [nn.functional.pad(r["input_ids"], (width - r["input_ids"].shape[1], 0)) for r in rows]
    mask = [
        nn.functional.pad(r["attention_mask"], (width - r["input_ids"].shape[1], 0)) for r in rows
    ]
    return {
        "input_ids": torch.cat(ids),
        "attention_mask": torch.cat(mask),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
    }


def requests_for(
    model: AdaptiveVLM, rows: list[dict[str, Tensor]], budgets: list[str], new: int
) -> list[Request]:
    """Return one request per row, with new ids and without cached prefixes to reuse."""
    made = []
    for row, budget in zip(rows, budgets, strict=True):
        units = int(model.units_for(budget, torch.tensor([row["input_ids"].shape[1]]))[0])
        made.append(
            Request(str(next(NAMES)), row, None, units, sampling=Sampling(max_new_tokens=new))
        )
    return made


def finish(engine: Engine, requests: list[Request], new: int) -> list[float]:
    """Run all requests; return the share of the decoder's operations that each one used."""
    for request in requests:
        engine.start(request)
    shares = []
    while engine.active:
        for event in engine.step():
            if event.finished:
                assert event.finished == "length", event.error
                assert event.result.completion_tokens == new
                shares.append(event.result.share)
    return shares


def decoding(engine: Engine, requests: list[Request], steps: int) -> Callable[[], None]:
    """Prefill `requests`; return a function that runs `steps` of their decoding steps."""
    for request in requests:
        engine.start(request)
    while engine.stats.rows_waiting:
        engine.step()

    def run() -> None:
        for _ in range(steps):
            engine.step()
            assert engine.timing.rows == len(requests)

    return run


def benchmark(options: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = stock_model(device, dtype)
    base.generation_config.eos_token_id = None
    base.generation_config.pad_token_id = 0
    decoder = sum(p.numel() for p in base.model.language_model.layers.parameters())
    print(
        f"decoder {decoder / 1e6:.0f} M parameters, prompts of {options.tokens} tokens on average, "
        f"{options.new} new tokens, {device} {dtype}, {torch.get_num_threads()} threads"
    )
    layout = SwitchLayout.layers(base.config.text_config)
    model = AdaptiveVLM.from_base(base, layout, latency_token="probe").eval()
    nn.init.normal_(model.scheduler.linear.weight)  # plans that differ between requests
    rows, new, runs = rows_of(options.tokens, device, dtype), options.new, options.runs
    batch = padded(rows)
    nothing_kept = {"prefix_bytes": 0, "vision_bytes": 0, "eos": ()}
    engine = Engine(model, None, **nothing_kept)
    full = ["1"] * 8
    shares = finish(engine, requests_for(model, rows, BUDGETS, new), new)
    mean = sum(shares) / len(shares)
    print(f"mixed budgets: {mean:.3f} of the decoder's operations on average")

    def mixed(budgets: list[str], new: int = new) -> Callable[[], object]:
        return lambda: finish(engine, requests_for(model, rows, budgets, new), new)

    def stock(inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return base.generate(**inputs, max_new_tokens=new, do_sample=False)

    one = rows[3]
    alone = requests_for(model, [one], ["1"], new)[0]
    engine.start(alone)
    tokens = [token for _ in range(new) for event in engine.step() for token in event.tokens]
    same = tokens == stock(one)[0, one["input_ids"].shape[1] :].tolist()
    print(f"one request at b = 1: the stock model's tokens: {'yes' if same else 'NO'}")

    compare(
        "1 request, b = 1: engine / stock generate",
        lambda: finish(engine, requests_for(model, [one], ["1"], new), new),
        lambda: stock(one),
        runs,
        1.05,
    )
    compare(
        "8 requests: engine, mixed / stock one by one at b = 1",
        mixed(BUDGETS),
        lambda: [stock(row) for row in rows],
        runs,
        1 / 3,
    )
    compare(
        "8 requests: engine, mixed / stock batched at b = 1",
        mixed(BUDGETS),
        lambda: stock(batch),
        runs,
        1.0,
    )
    compare(
        "8 requests: engine, b = 1 / stock batched at b = 1",
        mixed(full),
        lambda: stock(batch),
        runs,
        None,
    )
    ratio = compare(
        f"8 requests: mixed / b = 1, both in the engine, {new} new",
        mixed(BUDGETS),
        mixed(full),
        runs,
        1.15 * mean,
    )
    print(f"    {ratio / mean:.3f} of the share that the budgets allow (bar 1.15)")
    ratio = compare(
        "8 requests: mixed / b = 1, both in the engine, 1 new (prefill)",
        mixed(BUDGETS, 1),
        mixed(full, 1),
        runs,
        1.15 * mean,
    )
    print(f"    {ratio / mean:.3f} of the share that the budgets allow (bar 1.15)")
    steps = 8
    length = 16 + steps * (runs + 1)
    for name, budgets in (("b = 1", full), ("mixed", BUDGETS)):
        eight, single = (Engine(model, None, **nothing_kept) for _ in range(2))
        compare(
            f"decoding step: 8 rows, {name} / 1 row, b = 1",
            decoding(eight, requests_for(model, rows, budgets, length), steps),
            decoding(single, requests_for(model, [one], ["1"], length), steps),
            runs,
            None,
        )
    keeping = Engine(model, None, eos=())

    def asked(engine: Engine, budget: str) -> None:
        [request] = requests_for(model, [one], [budget], 1)
        finish(engine, [Request(request.id, one, "k", request.units_on, None, Sampling(1))], 1)

    asked(keeping, "1")
    compare(
        "first token at b = 0.6: prompt seen at another budget / new",
        lambda: asked(keeping, "0.6"),
        lambda: asked(engine, "0.6"),
        runs,
        None,
    )
    heads = AdaptiveVLM.from_base(
        base, SwitchLayout.heads(base.config.text_config, unit=4), latency_token="probe"
    ).eval()
    nn.init.normal_(heads.scheduler.linear.weight)
    packed = Engine(heads, None, **nothing_kept)
    compare(
        "8 requests: design H, mixed / design L, mixed",
        lambda: finish(packed, requests_for(heads, rows, BUDGETS, new), new),
        mixed(BUDGETS),
        runs,
        None,
    )
    stats = packed.stats
    print(
        f"    design H: {stats.packed_unshared} of {stats.packed_calls} calls ran one row while "
        f"other rows ran the layer; {stats.packed_unsaved} layer steps could save nothing"
    )


def soak(requests: int) -> None:
    """Run many kinds of requests, a tenth of them cancelled; print memory, which must not grow."""
    torch.manual_seed(0)
    base = stock_model("cpu", torch.float32, hidden=16, layers=2, heads=2, image_size=16)
    layout = SwitchLayout.layers(base.config.text_config)
    model = AdaptiveVLM.from_base(base, layout, latency_token="probe")
    engine = Engine(model, None, prefix_bytes=1 << 18, prefix_block=4, vision_bytes=1 << 14)
    rows = []
    for number in range(500):
        ids = torch.randint(4, 64, (1, 6 + number % 20))
        ids[:, 1:5] = IMAGE_ID
        rows.append({"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)})
    sent = ended = 0
    while ended < requests:
        while sent < requests:
            row, new = sent // 2 * 7 % 500, 1 + sent % 5  # each row twice in turn
            request = Request(str(sent), rows[row], f"k{row}", (sent // 3) % 2, None, Sampling(new))
            if not engine.can_start(request):
                break
            engine.start(request)
            if sent % 10 == 3:
                engine.cancel(str(sent))
            sent += 1
        done = sum(event.finished is not None for event in engine.step())
        if done and (ended + done) * 10 // requests > ended * 10 // requests:
            gc.collect()
            stats = engine.stats
            print(
                f"{ended + done:6d} ended: {len(gc.get_objects())} objects, peak resident "
                f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB, kv "
                f"{stats.kv_bytes} (bound {stats.kv_bound}), vision {stats.vision_bytes}, "
                f"prefix {stats.prefix_bytes} bytes",
                flush=True,
            )
        ended += done
    print(engine.stats)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="mean length of a prompt")
    parser.add_argument("--new", type=int, default=48, help="length of an answer, tokens")
    parser.add_argument("--soak", action="store_true", help="run the soak instead")
    parser.add_argument("--requests", type=int, default=10_000, help="number, for --soak")
    options = parser.parse_args()
    if options.soak:
        soak(options.requests)
    else:
        benchmark(options)


if __name__ == "__main__":
    main()
