"""What the machine and its processes can do for a training; what they cannot is told, or refused."""

from __future__ import annotations

import os
import shutil
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from tokenizer.precision import native_bfloat16, native_half


def tell_of_emulation(accelerator: Accelerator) -> None:
    """One line on stderr if training is to be in a precision that this device has no instructions for."""
    device = accelerator.device
    if accelerator.mixed_precision == "bf16" and device.type in ("cpu", "cuda") and not native_bfloat16(device):
        name = "GPU" if device.type == "cuda" else "CPU"
        other = "fp16" if native_half(device) == torch.float16 else "no"
        advice = f"this {name} only emulates bf16, several times slower than float32: take --run.precision={other}"
        accelerator.print(advice, file=sys.stderr)


def can_compile(accelerator: Accelerator) -> bool:
    """Whether torch.compile works here; if not, one line on stderr: what is computed is the same without."""
    from torch._inductor import cpp_builder, exc
    from torch.utils._triton import has_triton

    device, missing = accelerator.device.type, None
    if device == "cpu":
        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            missing = "there is no C++ compiler"
    elif device != "cuda":
        missing = f"it was never tried on {device}"
    elif not has_triton():
        missing = "there is no Triton"
    elif not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        missing = "there is no C compiler, which Triton needs"
    if missing:
        accelerator.print(f"run.compile is left out: {missing}", file=sys.stderr)
    return missing is None


def check_sharding(accelerator: Accelerator) -> None:
    """Raise ValueError if parameters are to be split in a way that this loop does not know."""
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP version 1 is not supported: fsdp_version must be 2, as in configs/accelerate/fsdp2.yaml")
    if kind == DistributedType.FSDP and accelerator.device.type == "cpu" and not shards_on_cpus():
        raise ValueError(f"torch {torch.__version__} splits parameters (FSDP) on GPUs only: take a newer release")
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{kind.value} is not supported: launch with configs/accelerate/ddp.yaml, or fsdp2.yaml to split parameters"
        )


def shards_on_cpus() -> bool:
    """Whether this release of torch can split parameters over processes on CPUs: 2.6 cannot."""
    return hasattr(torch.cpu.Stream, "record_event")
