"""Training with Megatron's own schedules, on made-up tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func

from . import checkpoint
from .arguments import SEQUENCE_LENGTH, VOCABULARY
from .building import Trainee, build, initialize

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .spec import Run


def train(
    run: Run,
    steps: int,
    load: str | None = None,
    save: str | None = None,
    save_every: int = 0,
    *,
    load_optimizer: bool = True,
) -> dict[int, str]:
    """Train a new or a saved model.

    Args:
        run: what to train.
        steps: how many iterations.
        load: root of the checkpoint to start from.
        save: root of the checkpoints to write.
        save_every: after how many iterations.
        load_optimizer: not so is ``--no-load-optim``.

    Returns:
        the loss of each iteration, exact (``float.hex``); nothing where it is not known.
    """
    trainee = build(initialize(run))
    first = (
        0 if load is None else checkpoint.load(trainee, Path(load), with_optimizer=load_optimizer)
    )
    trainee.config.grad_scale_func = trainee.optimizer.scale_loss
    trainee.config.finalize_model_grads_func = finalize_model_grads
    losses = {}
    for iteration in range(first + 1, first + steps + 1):
        loss = _step(trainee, iteration)
        if loss is not None:
            losses[iteration] = loss
        if save is not None and iteration % save_every == 0:
            checkpoint.save(trainee, Path(save), iteration)
    return losses


def _step(trainee: Trainee, iteration: int) -> str | None:
    """As ``train_step``; the loss, where it is known."""
    for chunk in trainee.chunks:
        chunk.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    reports = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[_microbatches(iteration) for _ in trainee.chunks],
        model=trainee.chunks,
        num_microbatches=get_num_microbatches(),
        seq_length=SEQUENCE_LENGTH,
        micro_batch_size=trainee.args.micro_batch_size,
        decoder_seq_length=SEQUENCE_LENGTH,
        forward_only=False,
    )
    trainee.optimizer.step()
    trainee.scheduler.step(increment=trainee.args.global_batch_size)
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    loss = torch.stack([report["loss"] for report in reports]).mean()
    dist.all_reduce(loss, dist.ReduceOp.AVG, parallel_state.get_data_parallel_group())
    return float(loss).hex()


def _microbatches(iteration: int) -> Iterator[torch.Tensor]:
    """Tokens that follow from iteration and data-parallel rank, one more than a model is fed."""
    rank = parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(iteration * 1000 + rank)
    for _ in range(get_num_microbatches()):
        start = torch.randint(VOCABULARY, (1, 1), generator=generator)
        noise = torch.randint(3, (1, SEQUENCE_LENGTH + 1), generator=generator)
        yield (start + 5 * torch.arange(SEQUENCE_LENGTH + 1) + noise) % VOCABULARY


def _forward_step(microbatches: Iterator[torch.Tensor], chunk: Any) -> Any:
    tokens = next(microbatches)
    ahead = torch.ones(1, 1, SEQUENCE_LENGTH, SEQUENCE_LENGTH, dtype=torch.bool).triu(1)
    positions = torch.arange(SEQUENCE_LENGTH).unsqueeze(0)
    output = chunk(tokens[:, :-1], positions, attention_mask=ahead, labels=tokens[:, 1:])
    return output, _mean_loss


def _mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}
