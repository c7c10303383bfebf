"""Training by all processes, with all weights on each (DDP) or a shard of them (FSDP2).

Checkpoint files hold whole tensors: shards are read from them, and gathered to write them.
"""

import contextlib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoregressive.runtime.checkpoint import name_differences, summarise
from autoregressive.runtime.distributed import Session, backend_of
from autoregressive.runtime.entry import Parser, may_vary

PARALLEL = ("ddp", "fsdp")


def add_memory_args(parser: Parser) -> None:
    """Declares the flags that make room for larger models, at the price of time."""
    group = parser.add_argument_group("memory")
    may_vary(group.add_argument("--parallel", default="ddp", choices=PARALLEL,
                                help="ddp: every process holds all weights; fsdp: shards them, for "
                                     "XL and larger"))
    may_vary(group.add_argument("--checkpoint-activations", action="store_true",
                                help="compute each block's activations again in the backward pass: "
                                     "slower, less memory"))


def device_to_build_on(session: Session, parallel: str) -> torch.device:
    """Returns where a process builds the model that wrap_for_training is given.

    It is the CPU; but where weights are sharded, those of rank 0 count, and all others build on the
    meta device, where weights take no memory.
    """
    return torch.device("meta" if parallel == "fsdp" and not session.is_main else "cpu")


def wrap_for_training(module: nn.Module, session: Session, parallel: str = "ddp",
                      blocks: Iterable[nn.Module] = (),
                      dtype: torch.dtype | None = None) -> nn.Module:
    """Prepares a module whose backward averages gradients over all processes.

    Args:
        module: built as device_to_build_on says, or already on the session's device.
        session: Session.
        parallel: "ddp" keeps all weights on every process; "fsdp" (FSDP2) shards weights, gradients
            and the optimizer's moments.
        blocks: with fsdp, the submodules whose weights are gathered one after the other.
        dtype: with fsdp, the dtype that the weights of blocks are gathered in; None is their own.

    Returns:
        the module to call; with one process and ddp, the module itself.
    """
    if parallel == "fsdp":
        return _shard(module, session, blocks, dtype)
    module.to(session.device)
    if session.world_size == 1:
        return module
    devices = [session.device] if session.device.type == "cuda" else None
    # Each process keeps its own buffers: tables, which are equal, and statistics, of which rank 0's
    # are saved.
    options = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    is_renamed = "forward_sync_buffers" in options
    sync_buffers = "forward_sync_buffers" if is_renamed else "broadcast_buffers"    # its older name
    # Gradients are views of the buckets that are sent, not copies.
    return nn.parallel.DistributedDataParallel(
        module, device_ids=devices, gradient_as_bucket_view=True, **{sync_buffers: False})


def _shard(module: nn.Module, session: Session, blocks: Iterable[nn.Module],
           dtype: torch.dtype | None) -> nn.Module:
    """Shards a module over all processes, on their devices, as wrap_for_training says."""
    if not dist.is_initialized():                   # shards need a group, also of one process
        dist.init_process_group(backend_of(session.device), store=dist.HashStore(), rank=0,
                                world_size=1)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    whole = take_weights(module)
    mesh = init_device_mesh(session.device.type, (session.world_size,))
    # What a block is given stays as it is: under autocast, which decides what is computed in
    # `dtype`, the residual stream and the rotary table are float32, as with ddp. So are the weights
    # outside of the blocks.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fill_shards(fully_shard(module, mesh=mesh), whole, session)


def take_weights(module: nn.Module) -> dict[str, Tensor]:
    """Takes all parameters out of a module, leaving meta tensors in their place; buffers stay.

    Returns:
        name -> parameter as it was.
    """
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            on_meta = parameter.detach().to("meta")
            setattr(part, name, nn.Parameter(on_meta, parameter.requires_grad))
    return weights


@torch.no_grad()
def fill_shards(module: nn.Module, weights: dict[str, Tensor], session: Session) -> nn.Module:
    """Gives a sharded module on the meta device its weights; all processes call this.

    They are sent one after the other, so that no process holds more than one whole one besides
    those it was given.

    Args:
        module: its buffers are real.
        weights: all of them, whole; emptied on the way. Those of rank 0 count, those of others may
            be meta tensors.
        session: Session.

    Returns:
        the module, on the session's device.
    """
    from torch.distributed.tensor import distribute_tensor

    buffers = dict(module.named_buffers())
    module.to_empty(device=session.device)
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
    for name, parameter in module.named_parameters():
        weight = weights.pop(name)
        if not session.is_main:
            weight = torch.empty_like(weight, device=session.device)
        weight = weight.to(session.device)
        shard = distribute_tensor(weight, parameter.device_mesh, parameter.placements)
        local_part(parameter).copy_(local_part(shard))
    return module


def sync_gradients(module: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
    """Returns a context that averages gradients over processes only if `enabled`.

    It has to hold the forward and the backward pass of a micro-batch; the last of a step averages.
    """
    if hasattr(module, "set_requires_gradient_sync"):               # FSDP2
        module.set_requires_gradient_sync(enabled)
    elif hasattr(module, "no_sync") and not enabled:                # DDP
        return module.no_sync()
    return contextlib.nullcontext()


def whole_tensor(tensor: Tensor) -> Tensor:
    """Returns a tensor itself, or what its shards on all processes make up (all call this)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_part(tensor: Tensor) -> Tensor:
    """Returns a tensor itself, or the shard of it that this process holds, of the same memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def copy_part(name: str, whole: Tensor, target: Tensor) -> None:
    """Copies a whole tensor into one of its shape, or this process's rows of it into its shard.

    Of a tensor that is mapped from a file nothing but these rows is read.

    Raises:
        ValueError: the shapes differ; `name` is what the message calls the tensor.
    """
    if whole.shape != target.shape:
        raise ValueError(f"{name}: expected shape {tuple(target.shape)}, found "
                         f"{tuple(whole.shape)}; take a checkpoint of this model")
    if hasattr(target, "device_mesh"):
        mesh = target.device_mesh
        # Of a process, as torch.chunk divides them; the last may have fewer.
        rows = -(-len(whole) // mesh.size())
        whole = whole[rows * mesh.get_local_rank():][:rows]
    local_part(target).copy_(whole)


def gather_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors whole and on the CPU on rank 0, nothing on others (all processes call this).

    They are gathered one after the other, so that no more than one of them lies whole on a device
    or on another process.
    """
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    gathered = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor.detach())
        if is_main:
            gathered[name] = whole.cpu()
        del whole                                   # before the next one is there
    return gathered


def gather_state(model: nn.Module,
                 optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the state dicts of a model and its optimizer, whole and on the CPU, on rank 0.

    All processes call this. The optimizer's state is keyed by names of parameters, so that it fits
    any number of processes and either way of running in parallel. It changes nothing, unlike
    torch.distributed.checkpoint, which takes a step with an optimizer that has no state yet.
    """
    # First: FSDP2 leaves weights whole after a forward without a backward, and shards them again
    # for this call.
    weights = gather_tensors(model.state_dict())
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {names[parameter]: gather_tensors(moments)
             for parameter, moments in optimizer.state.items()}
    groups = []
    for group in optimizer.param_groups:
        groups.append(group | {"params": [names[parameter] for parameter in group["params"]]})
    return weights, {"state": state, "param_groups": groups}


def scatter_state(model: nn.Module, model_state: dict[str, Tensor],
                  optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any]) -> None:
    """Loads what gather_state returned, read on every process, into a model and its optimizer.

    The optimizer's options stay. It copies in place, so that the peak is not above what training
    holds, and reads no more than its shards.

    Raises:
        ValueError: the names or shapes are those of another model.
    """
    own = model.state_dict()
    parameters = dict(model.named_parameters())
    check_names("weights", own, model_state)
    if optimizer_state["state"]:                    # none before the first step
        check_names("moments", parameters, optimizer_state["state"])
    for name, tensor in own.items():
        copy_part(name, model_state[name], tensor)
    for name, moments in optimizer_state["state"].items():
        parameter = parameters[name]
        filled = {}
        for kind, value in moments.items():
            like = parameter if value.dim() else value          # the number of steps is a scalar
            filled[kind] = torch.empty_like(like, device=parameter.device, requires_grad=False)
            copy_part(f"{kind} of {name}", value, filled[kind])
        optimizer.state[parameter] = filled


def check_names(what: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raises ValueError if the names of a state are not those of the model."""
    if differences := name_differences(expected, found):
        raise ValueError(f"expected the {what} of this model, found {summarise(differences)}")
