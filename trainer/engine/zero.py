"""zero2, zero3: DeepSpeed partitions the trained state; reduction, clipping and the step happen in its backward.

The frozen decoder layers of zero3 are FSDP2's, as those of fsdp (`trainer.model.fsdp`): cut while they are read,
gathered two ahead of the computation. DeepSpeed sees the adapters alone, of which it keeps partitions, gradients and
optimizer state, writes the checkpoints, and holds one whole copy while a step computes (ZeRO-3 calls such parameters
persistent). Left to DeepSpeed 0.19.8 the layers cost 325 ms and 28 host waits a step of 0.93 s on 4 H200s, and every
process read all of them.

Neither of its mixed-precision engines is used: both would cast packed 4-bit weights and fp32 adapters. What it has no
call for, or one that does not serve before the first step (`safe_get_full_optimizer_state` of stage 2, the step count,
sizes that the world size does not divide; DeepSpeed 0.19), is done here on its shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from peft import PeftModel
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from launch.errors import RunError
from trainer.distributed.collectives import run_on_all_ranks
from trainer.engine.host_read import start_read
from trainer.engine.partition import Piece, piece_of_flat, piece_of_own
from trainer.formats.key_names import ADAM_STATE_KEYS
from trainer.formats.portable import TrainedState, step_device
from trainer.formats.sharded import InMemoryCheckpointEngine, ZeroRankState

logger = get_logger("trainer")
_PERSISTENCE = "stage3_param_persistence_threshold"


class Zero:
    """The trained state in DeepSpeed's shards."""

    steps_in_backward = True
    # DeepSpeed must not divide by the micro-batches: the loss is of the whole step.
    backward_options: ClassVar[dict[str, bool]] = {"scale_wrt_gas": False}

    def __init__(self, parameters: Mapping[str, nn.Parameter], stage: int) -> None:
        self.parameters, self.stage = parameters, stage
        self.loss_factor = float(dist.get_world_size())  # DeepSpeed averages gradients over the ranks
        self._engine: Any = None
        self._sums_ready: Callable[[], None] | None = None
        self._before_next_step: Callable[[], None] | None = None
        self._unset_hf_config()

    def attach(self, wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take the engine that accelerate made of the model, before the first step. A collective of stage 3."""
        self._engine = wrapped
        # DeepSpeed's own walks over all modules: with 7B parameters the GPU waits for that after each step.
        self._engine.zero_grad = self._forget_gradients
        self._engine.step = self._take_step
        self._unset_hf_config()
        if self.stage == 3:
            _keep_adapters_whole(self._engine, self.parameters)

    def _forget_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def _unset_hf_config(self) -> None:
        """Make the libraries forget that ZeRO-3 is on, whenever they may have been told.

        trl 1.16 would gather the output head, which is not partitioned (`maybe_gather_lm_head_ctx`), and
        transformers would load its next model into partitions.
        """
        unset_hf_deepspeed_config()

    @contextmanager
    def hide_unsharded_modules(self, model: PeftModel) -> Iterator[None]:
        """While the engine is made, hide from ZeRO-3 all modules in which nothing trains: it would partition them.

        The decoder layers' are FSDP2's; tower, embeddings and output head are replicated by design. Modules that are
        back afterwards have no hooks.
        """
        if self.stage < 3:
            yield
            return
        options = AcceleratorState().deepspeed_plugin.deepspeed_config["zero_optimization"]
        before = dict(options)
        options[_PERSISTENCE] = max(parameter.numel() for parameter in self.parameters.values())
        children = [(module, dict(module._modules)) for module in model.modules()]
        for module, named in children:
            for name, child in named.items():
                if child is not None and not any(weight.requires_grad for weight in child.parameters()):
                    del module._modules[name]
        try:
            yield
        finally:
            for module, named in children:
                module._modules.clear()  # their order is that of `named_parameters`
                module._modules.update(named)
            options.clear()
            options.update(before)

    def generating(self, model: PeftModel) -> AbstractContextManager[None]:
        """Enter nothing: the adapters are whole, and FSDP2 gathers the layers of whatever calls them."""
        return nullcontext()

    def no_sync(self, accelerator: Accelerator, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """Keep nothing back: DeepSpeed reduces in every backward."""
        return nullcontext()

    def all_reduce_before_step(self, values: Tensor, use: Callable[[list[float]], None]) -> None:
        """Sum `values` [n] over the ranks; `use` gets the sums after the backward pass, before the step.

        To be called before the step's last backward pass. The host waits for them when that has been launched: between
        forward and backward the GPU would have nothing to do.
        """
        dist.all_reduce(values)
        read = start_read(values)
        self._sums_ready = lambda: use(read())

    def call_before_next_step(self, action: Callable[[], None]) -> None:
        """Call `action` once when the next step's gradients are complete, before DeepSpeed takes the step."""
        self._before_next_step = action

    def _before_step(self) -> None:
        sums_ready, self._sums_ready = self._sums_ready, None
        action, self._before_next_step = self._before_next_step, None
        if sums_ready:
            sums_ready()
        if action:
            run_on_all_ranks(self._check_all_reduced)
            action()

    def _take_step(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the engine's `step`.

        accelerate 1.15 calls it in the last backward of a step (`DeepSpeedEngineWrapper.backward`), and DeepSpeed 0.19
        has no hook there.
        """
        self._before_step()
        return type(self._engine).step(self._engine, *args, **kwargs)

    def _check_all_reduced(self) -> None:
        """Check after a backward that no gradient is left: DeepSpeed takes each away when it reduces it.

        Raises:
            RunError: a whole layer's were reduced before they were all there.
        """
        late = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        if self.stage == 3 and late:
            raise RunError(
                f"model: {len(late)} of {len(self.parameters)} adapters got their gradients after DeepSpeed had "
                f"reduced their layer's, such as {late[0]}; install the versions of constraints.txt, or use another "
                "--strategy"
            )

    def grad_norm(self, meanwhile: Callable[[], None]) -> float:
        """Return the gradients' norm of the step just taken, before clipping.

        `meanwhile` is called before the host waits for it: what it gives the GPU comes after the step, and is not
        waited for.
        """
        read = start_read(torch.as_tensor(self._engine.get_global_grad_norm()).reshape(1))
        meanwhile()
        return read()[0]

    def full_state(self) -> TrainedState | None:
        """Copy adapters and optimizer state, put together on rank 0; the others get None. A collective."""
        adapter = self.weights()
        optimizer: dict[str, Tensor] = {}
        for key in ADAM_STATE_KEYS:
            gathered = self._gather({name: state[key] for name, state in self._states().items()})
            optimizer |= {f"{name}.{key}": tensor for name, tensor in gathered.items()}
        if adapter is None:
            return None
        for name, state in self._states().items():
            optimizer[f"{name}.step"] = (
                torch.as_tensor(state["step"], dtype=torch.float32).detach().cpu().clone()
            )
        return TrainedState(adapter, optimizer)

    def rank_state(self, step: int) -> ZeroRankState:
        """Copy what DeepSpeed saves on this rank, under its own names. A collective.

        It writes in the middle of its collectives, where a rank with a full disk would leave the others waiting;
        so it is handed what only keeps the files.
        """
        engine, memory, tag = self._engine, InMemoryCheckpointEngine(), f"global_step{step}"
        original = engine.checkpoint_engine
        engine.checkpoint_engine = memory
        engine._copy_recovery_script = lambda _: None  # into the folder that is not there yet
        engine.module_state_dict = lambda **_: {}  # the frozen base, and once more what the shards hold
        try:
            engine.save_checkpoint(".", tag, save_latest=False, exclude_frozen_parameters=True)
        finally:
            engine.checkpoint_engine = original
            del engine._copy_recovery_script, engine.module_state_dict
        latest = {"latest": tag} if dist.get_rank() == 0 else {}
        return ZeroRankState(memory.files | latest)

    def weights(self) -> dict[str, Tensor] | None:
        """Return the adapters by name on rank 0, and None on the others. A collective."""
        if self._engine is None or self.stage < 3:
            weights = {
                name: parameter.detach().to("cpu", copy=True) for name, parameter in self.parameters.items()
            }
        else:
            weights = self._gather({name: shard for name, (shard, _) in self._pieces().items()})
        return weights if dist.get_rank() == 0 else None

    def load_optimizer_state(self, optimizer_state: Mapping[str, Tensor]) -> None:
        """Put a stored optimizer state into this rank's shards, before the first step or later."""
        inner: torch.optim.Optimizer = self._engine.optimizer.optimizer
        for name, (shard, piece) in self._pieces().items():
            state = inner.state[shard]
            if not state:
                state["step"] = optimizer_state[f"{name}.step"].to(step_device(inner, shard)).clone()
                state |= {key: torch.zeros_like(shard, requires_grad=False) for key in ADAM_STATE_KEYS}
                inner.state[shard] = state
            for key in ADAM_STATE_KEYS:
                flat = optimizer_state[f"{name}.{key}"].reshape(-1)[piece.begin : piece.begin + piece.count]
                state[key][piece.at : piece.at + piece.count].copy_(flat)

    def _states(self) -> dict[str, dict[str, Any]]:
        inner: torch.optim.Optimizer = self._engine.optimizer.optimizer
        return {name: inner.state[shard] for name, (shard, _) in self._pieces().items()}

    def _gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors by name on the CPU of rank 0, put together from every rank's pieces."""
        pieces = self._pieces()
        sizes = [_numel(parameter) for parameter in self.parameters.values()]
        device = next(iter(shards.values())).device
        row = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        start = 0
        for name, size in zip(self.parameters, sizes, strict=True):
            piece = pieces[name][1]
            begin = start + piece.begin
            row[begin : begin + piece.count] = shards[name].detach()[piece.at : piece.at + piece.count]
            start += size
        dist.reduce(row, dst=0)  # every element comes from one rank: a sum with zeros is exact
        parts = row.cpu().split(sizes)
        return {
            name: part.view(_shape(parameter)).clone()
            for (name, parameter), part in zip(self.parameters.items(), parts, strict=True)
        }

    def _pieces(self) -> dict[str, tuple[Tensor, Piece]]:
        """Map each name to this rank's flat fp32 shard that holds a part of it, or would, and to which part."""
        optimizer, rank = self._engine.optimizer, dist.get_rank()
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        pieces: dict[str, tuple[Tensor, Piece]] = {}
        if self.stage < 3:
            for group, shard in enumerate(optimizer.single_partition_of_fp32_groups):
                members = optimizer.round_robin_bit16_groups[group]
                for parameter, offset in zip(
                    members, optimizer.round_robin_bit16_offsets[group], strict=True
                ):
                    piece = piece_of_flat(offset, parameter.numel(), rank * shard.numel(), shard.numel())
                    pieces[names[id(parameter)]] = (shard, piece)
        else:
            for group, shard in enumerate(optimizer.fp32_partitioned_groups_flat):
                at = 0
                for parameter in optimizer.fp16_groups[group]:
                    share = parameter.partition_numel()
                    pieces[names[id(parameter)]] = (shard, piece_of_own(parameter.ds_numel, rank, share, at))
                    at += share
        return {name: pieces[name] for name in self.parameters}


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _shape(parameter: nn.Parameter) -> torch.Size:
    return cast(torch.Size, getattr(parameter, "ds_shape", parameter.shape))


def _keep_adapters_whole(engine: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """Gather the adapters of ZeRO-3 as it does after each step, and take off what watches over modules for that.

    With every parameter persistent (DeepSpeed 0.19.8, `mark_persistent_parameters`) its hooks on modules find nothing
    to fetch or to release, and cost the host time in each of them; so does its look at every module before and after
    each forward, which only finds parameters that are away. The hooks on gradients stay.

    In a step DeepSpeed lets go of every adapter, measures its gradient and gathers it again by itself, while the GPU
    has nothing else to do: a collective for each of the 112 of the 7B shape. Here they stay until the next are
    gathered, all in one, and their gradients are measured as one.
    """
    optimizer = engine.optimizer
    optimizer.parameter_offload.destroy()  # `_remove_module_hooks`
    engine._forward_prologue = lambda inputs, kwargs: None
    engine._forward_epilogue = lambda: None
    persistent = optimizer.persistent_parameters
    if len(persistent) != len(parameters):
        raise RunError(
            f"model: DeepSpeed keeps {len(persistent)} of {len(parameters)} adapters whole; install the versions of "
            "constraints.txt, or use --strategy fsdp"
        )
    persistent[0].all_gather(persistent)
    norm_of, rows = optimizer.get_grad_norm_direct, _rows_of_shards(optimizer)

    def norm_at_once(gradients: Sequence[Tensor], members: Sequence[nn.Parameter]) -> Tensor:
        return cast(Tensor, norm_of([torch.cat([each.reshape(-1) for each in gradients])], members[:1]))

    def gather_at_once(timer_names: Any) -> None:
        for shard, members, row in zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp16_groups, rows, strict=True
        ):
            _gather(shard, members, row)

    optimizer.get_grad_norm_direct = norm_at_once
    optimizer._partition_all_parameters = lambda: None
    optimizer._post_step = gather_at_once


def _rows_of_shards(optimizer: Any) -> list[Tensor]:
    """For each group, where every element of its parameters, end to end, lies among the shards of all ranks."""
    rows = []
    for shard, members in zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        at, places = 0, []
        for parameter in members:
            share = parameter.partition_numel()
            element = torch.arange(parameter.ds_numel, device=shard.device)
            places.append(element // share * shard.numel() + at + element % share)
            at += share
        rows.append(torch.cat(places))
    return rows


@torch.no_grad()
def _gather(shard: Tensor, members: Sequence[nn.Parameter], row: Tensor) -> None:
    """Put the parameters of a group together out of the shards of all ranks. A collective."""
    shards = torch.empty(dist.get_world_size() * shard.numel(), dtype=shard.dtype, device=shard.device)
    dist.all_gather_into_tensor(shards, shard)
    whole, begin = shards[row], 0
    for parameter in members:
        parameter.data = whole[begin : begin + _numel(parameter)].view(_shape(parameter))
        begin += _numel(parameter)
