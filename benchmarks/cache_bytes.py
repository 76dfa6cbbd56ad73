"""Peak bytes of the key/value cache by plan, for the published sizes: `python -m benchmarks.cache_bytes`.

Exact and computed, not timed: the plans' own caches run on tensors without storage, two rows an image (guidance), bf16.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.elastic import as_table
from evaluation.command import Parser, add_out, in_one_line
from evaluation.report import result, write_result
from sample.costs import cache_peak
from sample.files import write_text
from sample.plan_text import PlanConfig
from var.presets import PRESETS
from var.transformer import NextScaleTransformer

PLANS = [
    {},
    {"plan": "supernet:6", "depth": 16},
    {"plan": "supernet:6", "depth": 8},
    {"plan": "supernet:6", "depth": 2},
    *({"plan": f"code:{border}"} for border in (9, 8, 7, 6)),
    *({"cache": f"{policy}:{share}%"} for share in (20, 10, 4) for policy in ("scalekv", "snapkv")),
    {"plan": "supernet:6", "depth": 16, "cache": "10%"},
    {"plan": "code:6", "cache": "10%"},
]


def sized(size: str) -> NextScaleTransformer:
    """A published size without storage; which layers are drafters does not change the bytes."""
    depth = PRESETS[size]["depth"]
    index = [[float(layer)] * 10 for layer in range(depth)]
    with torch.device("meta"):
        return NextScaleTransformer(**PRESETS[size], schedule="var256", selectivity=index)


def measure() -> list[dict[str, Any]]:
    """A row for each plan."""
    model, refiner = sized("d30"), sized("d16")
    rows = []
    for words in PLANS:
        plan = PlanConfig(**words).build(model, refiner=refiner)
        size = cache_peak(plan, 1, torch.bfloat16)
        rows.append({"row": " ".join(f"{name} {value}" for name, value in words.items()) or "var"})
        rows[-1] |= {"peak_cache_mib": size / 2**20, "cache_of_full": 1.0}
    for row in rows:
        row["cache_of_full"] = row["peak_cache_mib"] / rows[0]["peak_cache_mib"]
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Compute, write the result and its table."""
    parser = Parser(prog="python -m benchmarks.cache_bytes", description=__doc__.split("\n")[0])
    add_out(parser, "results/cache_bytes.json", "result and table")
    out = parser.parse_args(argv).out
    with in_one_line(parser):
        rows = measure()
        settings = {"model": "d30", "refiner": "d16", "schedule": "var256", "dtype": "bfloat16", "rows_per_image": 2}
        write_result(out, result(rows, command="python -m benchmarks.cache_bytes", n=1, seeds=None, settings=settings))
        write_text(out.with_suffix(".md"), as_table(rows) + "\n")
        print(as_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
