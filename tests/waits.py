"""Finds where code would wait for a GPU, on a machine without one."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# A value that Python reads (item, tolist, if), and results whose size depends on the values.
WAITING = {"aten::_local_scalar_dense", "aten::bincount", "aten::nonzero", "aten::masked_select",
           "aten::_unique2"}


class NoWaits(TorchDispatchMode):
    """A block in which an operator that would wait for a GPU is an error.

    Copies to the CPU are not seen.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        name = func._schema.name
        if name in WAITING:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))
