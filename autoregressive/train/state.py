"""What a training run continues from: everything, so that a killed run ends with the numbers of one that was not."""

import torch

from autoregressive.runtime.checkpoint import (
    delete_old_checkpoints,
    model_state,
    newest_whole_checkpoint,
    save_checkpoint,
)
from autoregressive.runtime.log import LOGGER


def save_state(folder, trainer, num_updates, settings, keep, session):
    """Saves a checkpoint of a Trainer after `num_updates` updates (all processes call this, rank 0 writes).

    Args:
        folder: of the checkpoints.
        trainer: Trainer, or another with whole_state, load_whole_state, sums, count and ema.
        num_updates: updates that were applied.
        settings: plain dict that travels with the weights.
        keep: number of checkpoints to keep; 0 keeps all.
        session: Session.

    Returns:
        path of the checkpoint.
    """
    path = folder / f"{num_updates:07d}.pt"
    state = trainer.whole_state()
    processes = session.gather({"cpu": torch.get_rng_state(), "sums": trainer.sums.cpu(), "count": trainer.count,
                                "cuda": torch.cuda.get_rng_state() if session.device.type == "cuda" else None})
    if session.is_main:
        save_checkpoint(path, state | {"steps": num_updates, "processes": processes, "settings": settings,
                                       "images_seen": num_updates * settings["global_batch_size"]})
        delete_old_checkpoints(folder, keep)
    return path


def resume(folder, trainer, session):
    """Continues from the newest whole checkpoint of a folder; returns its number of updates, 0 if there is none."""
    path, payload = newest_whole_checkpoint(folder)
    if path is None:
        return 0
    load_state(path, payload, trainer, session)
    LOGGER.info("continuing from %s", path)
    return payload["steps"]


def load_state(path, payload, trainer, session):
    """Loads everything that save_state saved into a Trainer.

    Raises:
        ValueError: the file holds no average but the run keeps one.
    """
    if trainer.ema and "ema" not in payload:
        raise ValueError(f"{path}: expected an average of the weights for --ema, found none; start without --ema")
    trainer.load_whole_state(payload)
    processes = payload["processes"]
    if len(processes) == session.world_size:
        own = processes[session.rank]
        trainer.sums, trainer.count = own["sums"].to(session.device), own["count"]
        torch.set_rng_state(own["cpu"])
        if own["cuda"] is not None and session.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"])
    else:
        LOGGER.warning("%s: written by %d processes, continued by %d: the data go on where they were, dropout draws "
                       "other numbers", path, len(processes), session.world_size)
        trainer.sums = (sum(process["sums"] for process in processes) / len(processes)).to(session.device)
        trainer.count = processes[0]["count"]


def weights_to_start_from(path, payload, mapping=None):
    """Returns the weights alone, of our own or published files, as a state dict of plain names.

    Args:
        path: named in errors.
        payload: what read_checkpoint returned.
        mapping: (V,) int64, old code -> token: the weights are of a GPT over codes in their original order, and the
            rows of its embedding and head are moved to their tokens; None leaves them.

    Raises:
        ValueError: there are no weights in it, or not of this codebook.
    """
    state = dict(model_state(payload, path))
    if mapping is not None:
        for name in ("tok_embeddings.weight", "output.weight"):
            if len(state.get(name, ())) != len(mapping):
                raise ValueError(f"{path}: expected {name} of {len(mapping)} codes, as the mapping has, found "
                                 f"{len(state.get(name, ()))}")
            moved = torch.empty_like(state[name])
            moved[torch.from_numpy(mapping)] = state[name]
            state[name] = moved
    return state
