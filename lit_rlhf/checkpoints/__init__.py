"""Checkpoints: files, folders of shards, what a run has saved."""

from lit_rlhf.checkpoints.files import load_file, local_path
from lit_rlhf.checkpoints.io import AtomicCheckpointIO
from lit_rlhf.checkpoints.lookup import is_last_epoch, is_saved, last_checkpoint, model_checkpoints
from lit_rlhf.errors import CheckpointError

__all__ = [
    "AtomicCheckpointIO",
    "CheckpointError",
    "is_last_epoch",
    "is_saved",
    "last_checkpoint",
    "load_file",
    "local_path",
    "model_checkpoints",
]
