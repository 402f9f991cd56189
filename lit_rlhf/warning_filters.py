"""Library warnings that the command line hides."""

import logging
import warnings


def silence_warnings() -> None:
    """Hide warnings about what is intended, or what only the library itself can fix."""
    for message in (
        ".*does not have many workers.*",  # the tokenized data are in memory
        ".*module\\(s\\) in eval mode.*",  # the backbone stays in eval mode on purpose
        ".*treespec.*",
        ".*is_gradient_checkpointing.*",
        ".*args parameter is intended.*",
        ".*Checkpoint directory .* exists and is not empty.*",  # a run's last.ckpt is replaced when the next is whole
        ".*Could not find a config file in.*",  # the base model is not a local folder
        r".*recommended to use `self.log\('(rollout|train|time|val)/.*sync_dist=True.*",  # these are averaged already
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer"):
        logging.getLogger(name).addFilter(_is_not_an_advertisement)


def _is_not_an_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()
