"""Warnings of libraries that the command line hides."""

import logging
import warnings


def silence_warnings() -> None:
    """Hide warnings about things that are so on purpose, or that only a library's next version can mend."""
    for message in (
        ".*does not have many workers.*",  # the tokenised data are in memory
        ".*module\\(s\\) in eval mode.*",  # the backbone stays in eval mode for good
        ".*treespec.*",
        ".*is_gradient_checkpointing.*",
        ".*args parameter is intended.*",
        ".*Checkpoint directory .* exists and is not empty.*",  # a run's last.ckpt is replaced when the next is whole
        ".*Could not find a config file in.*",  # of a base model that is no folder
        r".*recommended to use `self.log\('(rollout|train|time|val)/.*sync_dist=True.*",  # these are means already
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer"):
        logging.getLogger(name).addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()
