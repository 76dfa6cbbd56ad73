"""An accelerator that is neither a CPU nor CUDA, emulated on the CPU, as fussy as Apple's MPS.

It has no float64, takes no tensor that lies elsewhere (but scalars and indices), and knows only operators of which
PyTorch has MPS kernels; its pooling wants sizes that divide each other. Whatever runs here should run on MPS, where
no test of ours ever ran.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchgen
import yaml
from accelerate import PartialState
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from training_toys import in_child

NAME = "elsewhere"
can_emulate = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
LATE = {"_upsample_bicubic2d_aa": "2.6"}  # operators that MPS has today, and not in the oldest release we support
aten = torch.ops.aten


def passes_elsewhere(job: Callable[..., Any], *arguments: Any) -> bool:
    """Whether `job` goes through, and returns nothing or 0, in a forked process that has the device "elsewhere:0"."""
    return in_child(_with_device, job, *arguments) == 0


def trains_elsewhere(job: Callable[..., Any], *arguments: Any) -> bool:
    """The same in a fresh process: autograd, once it ran, knows of no new devices. `job` is found by its name."""
    child = multiprocessing.get_context("spawn").Process(target=_with_device, args=(job, *arguments))
    child.start()
    child.join(240)
    child.kill()  # if it hangs
    return child.exitcode == 0


def _with_device(job: Callable[..., Any], *arguments: Any) -> None:
    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    PartialState.default_device = property(lambda state: torch.device(NAME, 0))  # of trainings
    torch.accelerator.synchronize = lambda device=None: None  # there is nothing to wait for
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with Elsewhere():
        assert not job(*arguments)


class ElsewhereTensor(torch.Tensor):
    """A tensor on the device; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> ElsewhereTensor:
        if inner.dtype in (torch.float64, torch.complex128):
            raise AssertionError(f"{NAME} has no {inner.dtype}")
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=torch.device(NAME, 0), **layout)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, operator, types, arguments=(), options=None):
        return compute(operator, arguments, options or {})

    def __repr__(self) -> str:
        return f"ElsewhereTensor({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **options: Any) -> None:
        raise AssertionError(f"numbers of {NAME} must be brought to the CPU first")

    def storage(self) -> torch.TypedStorage:
        return self.inner.storage()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()


class Elsewhere(TorchDispatchMode):
    """Under it tensors can be made on the device, and brought there."""

    def __enter__(self) -> Elsewhere:
        # torch.tensor(..., device=...) makes them on the CPU then, and brings them to the device
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        return compute(operator, arguments, options or {})


def compute(operator: Any, arguments: tuple, options: dict) -> Any:
    """What an operator gives, computed on the CPU if the device would have."""
    tensors = [value for value in tree_flatten((arguments, options))[0] if isinstance(value, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, ElsewhereTensor)]
    device = options.get("device")
    if there and operator not in (aten._to_copy.default, aten.copy_.default):
        check(operator, arguments, tensors)
    inner_arguments, inner_options = tree_map(_inner, (arguments, options))
    if device is not None and torch.device(device).type == NAME:
        inner_options["device"] = torch.device("cpu")
    made = operator(*inner_arguments, **inner_options)
    if operator is aten.copy_.default:
        return arguments[0]
    if not (there if device is None else torch.device(device).type == NAME):
        return made
    same = {id(tensor.inner): tensor for tensor in there}  # what works in place gives back its own tensor
    wrap = lambda value: same.get(id(value)) if id(value) in same else ElsewhereTensor(value)  # noqa: E731
    return tree_map(lambda value: wrap(value) if isinstance(value, torch.Tensor) else value, made)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, ElsewhereTensor) else value


def check(operator: Any, arguments: tuple, tensors: list[torch.Tensor]) -> None:
    """Raise AssertionError for what MPS would not do, or do wrongly."""
    name = operator._schema.name.removeprefix("aten::")
    overload = operator._schema.overload_name
    if not has_kernel(f"{name}.{overload}" if overload else name):
        raise AssertionError(f"MPS has no {name}")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if name in LATE:
        raise AssertionError(f"MPS has no {name} in PyTorch {LATE[name]}")
    if name == "adaptive_max_pool2d":
        raise AssertionError(f"{name} {shapes}: MPS errs with sizes that do not divide each other")
    if name == "_adaptive_avg_pool2d":
        raise AssertionError(f"{name} {shapes}: MPS takes only sizes that divide each other")
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        tensors = [arguments[0], *arguments[2:3]]  # the indices may lie on the CPU
    if any(tensor.ndim and not isinstance(tensor, ElsewhereTensor) for tensor in tensors):
        raise AssertionError(f"{name} {shapes}: on two devices")


@cache
def has_kernel(name: str) -> bool:
    """Whether PyTorch has an MPS kernel of an operator, or makes it of others; by its own list."""
    entry = _native_functions().get(name)
    if entry is None:
        return True  # made by autograd and the like
    if "structured_delegate" in entry:
        return has_kernel(entry["structured_delegate"])
    keys = [key.strip() for keys in entry.get("dispatch", {"Composite": ""}) for key in keys.split(",")]
    return any(key == "MPS" or key.startswith("Composite") for key in keys)


@cache
def _native_functions() -> dict[str, dict]:
    file = next(Path(torchgen.__file__).parent.rglob("native_functions.yaml"))
    entries = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {entry["func"].split("(")[0]: entry for entry in entries}
