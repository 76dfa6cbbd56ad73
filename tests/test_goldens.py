"""Every number the official implementations recorded, against ours: `pytest tests/test_goldens.py --goldens DIR`.

A golden folder has config.json, io.safetensors and mostly weights.safetensors; sizes and settings are read from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from golden_hmar import FAMILIES as MASKED_FAMILIES
from golden_infinity import FAMILIES as BITWISE_FAMILIES
from golden_outputs import FAMILIES as INDEX_FAMILIES
from golden_outputs import Golden, Tensors

FAMILIES = INDEX_FAMILIES | MASKED_FAMILIES | BITWISE_FAMILIES
DEFAULT = Path(__file__).parent / "goldens"

# Largest absolute error by what a tensor went through; integers must be equal. First match wins.
TOLERANCES = (
    (r"masked_logits_", 0.0),
    (r"probs_", 1e-6),
    (r"grad\.", 5e-5),
    (r"(.*_)?(img|rec|dec|encoder_out|f$|f_after|train_(vq|total|usages)).*", 5e-5),  # through the convolutions
    (r"(.*_)?(logits|hidden|train_ce).*", 2e-5),
    (r"(.*_)?(fhat|var_input|token_hub).*", 1e-5),
)


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    folder: str
    tensor: str
    error: float
    tolerance: float
    status: str


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = Path(metafunc.config.getoption("--goldens") or DEFAULT)
    found = sorted(path.parent for path in root.rglob("config.json") if (path.parent / "io.safetensors").exists())
    if not found:
        raise pytest.UsageError(f"--goldens {root}: no folder there has config.json and io.safetensors")
    if "folder" in metafunc.fixturenames:
        metafunc.parametrize("folder", found, ids=[str(path.relative_to(root)) for path in found])


class Summary:
    """Prints the table at the session's end: every kind of tensor with --goldens, else each folder's worst."""

    def __init__(self, lines: list[Line]):
        self.lines = lines

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        terminalreporter.section("golden outputs: worst errors")
        for text in table(self.lines, by_kind=config.getoption("--goldens") is not None):
            terminalreporter.write_line(text)


@pytest.fixture(scope="module")
def lines(request: pytest.FixtureRequest) -> list[Line]:
    """Collects the rows of the table."""
    collected: list[Line] = []
    request.config.pluginmanager.register(Summary(collected))
    return collected


@pytest.mark.filterwarnings("ignore")
def test_golden(folder: Path, lines: list[Line]) -> None:
    golden = Golden(folder)
    if golden.family not in FAMILIES:
        lines.append(Line(folder.name, f"(family {golden.family})", float("nan"), float("nan"), "NOT BUILT"))
        pytest.skip(f"not built: family {golden.family}")
    try:
        ours = FAMILIES[golden.family](golden)
    except Exception:
        lines.append(Line(folder.name, "(nothing: see above)", float("inf"), 0.0, "FAILED"))
        raise
    compared = [compare(golden, name, derived(ours, name, golden.io[name])) for name in golden.outputs]
    lines.extend(compared)
    assert compared, f"{folder} records no output"
    wrong = [line for line in compared if line.status == "WRONG"]
    assert not wrong, "; ".join(f"{line.tensor}: {line.error:.3g} > {line.tolerance:.3g}" for line in wrong)


def derived(ours: Tensors, name: str, recorded: torch.Tensor) -> torch.Tensor | None:
    """Our tensor of that name, or the part of one that the name says was kept (_stride8, _every7, _corner)."""
    if name in ours:
        return ours[name]
    found = re.fullmatch(r"(\w+)_(stride|every|corner)(\d*)", name)
    if not found or found[1] not in ours:
        return None
    whole, step = ours[found[1]], int(found[3] or 1)
    if found[2] == "corner":
        h, w = recorded.shape[-2:]
        return whole[..., -h:, -w:]
    return whole[..., ::step, ::step] if found[2] == "stride" else whole[:, ::step]


def compare(golden: Golden, name: str, ours: torch.Tensor | None) -> Line:
    """One recorded tensor against ours; what the folder calls OPTIONAL is reported but never fails."""
    recorded, optional = golden.io[name], "OPTIONAL" in golden.meaning(name)
    tolerance = 0.0
    if recorded.is_floating_point():
        tolerance = next((limit for pattern, limit in TOLERANCES if re.match(pattern, name)), 1e-5)
    if "cfg_logits" in name:
        tolerance *= guidance_gain(golden)
    if re.match(r"greedy_(insert_)?logits_", name):
        tolerance *= bitwise_gain(golden)
    if ours is None or ours.shape != recorded.shape:
        error = float("inf")
    else:
        difference = (ours.double() - recorded.double()).abs()
        error = torch.where(ours == recorded, 0.0, difference).nan_to_num(nan=float("inf")).max().item()
    if error <= tolerance:
        return Line(golden.path.name, name, error, tolerance, "ok")
    return Line(golden.path.name, name, error, tolerance, "optional, differs" if optional else "WRONG")


def guidance_gain(golden: Golden) -> float:
    """How much more than at the usual 1.5 guidance multiplies rounding errors: (1 + t) and t of two terms, t = cfg."""
    cfg = golden.config.get("cfg", golden.config.get("constructor", {}).get("cfg", 1.5))
    return max(1.0, (1 + 2 * float(cfg)) / (1 + 2 * 1.5))


def bitwise_gain(golden: Golden) -> float:
    """How much Infinity's cfg and tau multiply the rounding errors of two logits: cfg / tau and (cfg - 1) / tau."""
    constructor = golden.config.get("constructor", {})
    if "cfg_list" not in constructor:
        return 1.0
    cfg, tau = (torch.as_tensor(constructor[name]).float().flatten() for name in ("cfg_list", "tau_list"))
    return max(1.0, float((2 * cfg.max() - 1) / tau.min()))


def table(lines: list[Line], *, by_kind: bool) -> list[str]:
    """The worst tensor of each folder or, `by_kind`, of each kind in it (scales and parameters folded together)."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        kind = re.sub(r"(scale|block)\d+", r"\1*", re.sub(r"^grad\..*", "grad.*", line.tensor))
        groups.setdefault((line.folder, kind) if by_kind else (line.folder,), []).append(line)
    rows = [f"{'folder':24} {'worst of':>8} {'tensor':36} {'error':>9} {'allowed':>9}  status"]
    for (folder, *_), group in groups.items():
        worst = max(group, key=lambda line: (line.status in ("WRONG", "FAILED"), line.error / (line.tolerance or 1)))
        rows.append(
            f"{folder:24} {len(group):8d} {worst.tensor:36} {worst.error:9.2e} {worst.tolerance:9.1e}  {worst.status}"
        )
    return rows
