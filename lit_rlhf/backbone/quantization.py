"""Frozen trunks in 8 or 4 bits, by bitsandbytes."""

import importlib.util
import logging
import tempfile
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lit_rlhf.backbone.adapters import LoraArgs
from lit_rlhf.backbone.roles import Layout
from lit_rlhf.errors import ConfigError, MissingPackageError

Quantization = Literal["int8", "nf4"]


def check_quantization(quantization: Quantization | None, layout: Layout, lora: LoraArgs | None) -> None:
    """Refuse a quantized run that cannot work; loads no model.

    Raises:
        ValueError: The layout trains a whole trunk, DoRA meets int8, or there is no CUDA device.
        ImportError: bitsandbytes is not installed.
    """
    if quantization is None:
        return
    if layout.trained_trunks:
        raise ConfigError(
            f"quantization {quantization} needs frozen trunks, but this layout trains "
            f"{', '.join(map(repr, layout.trained_trunks))} as a whole; train adapters instead"
        )
    if quantization == "int8" and lora is not None and lora.use_dora:
        raise ConfigError("lora.use_dora does not work with quantization int8; choose nf4, or remove one of them")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError(f"quantization {quantization} needs: pip install bitsandbytes")
    if not _device_is_there():
        raise ConfigError(f"quantization {quantization} needs a CUDA device, and this machine has none")


def _device_is_there() -> bool:
    return torch.cuda.is_available()


class _Once(logging.Filter):
    """Lets each message through once; bitsandbytes repeats one in every forward pass of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record's message is new."""
        message = record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new


_ONCE = _Once()


def load_quantized(path: str, dtype: torch.dtype, quantization: Quantization) -> PreTrainedModel:
    """Load a model whose linear layers are quantized; embeddings and norms keep ``dtype``.

    Args:
        path: Folder or hub name of a plain model.
        dtype: Dtype of the other weights, and of what the quantized layers compute and return.
        quantization: ``nf4`` (QLoRA's 4-bit floats in blocks of 64) or ``int8`` (LLM.int8(), which computes a column
            in 16 bits where any token of the batch is an outlier in it: outputs depend, within 8-bit rounding, on
            the other rows and on padding, so the first minibatch's ratio is 1 only within that rounding).

    Raises:
        ValueError: The output embedding came out quantized; log-probs use its weight.
    """
    if quantization == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_ONCE)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config)
    if not model.get_output_embeddings().weight.is_floating_point():
        raise ConfigError(f"{type(model).__name__}: its output embedding was quantized; log-probs need it plain")
    model.eval()
    return model


def quantize(model: PreTrainedModel, quantization: Quantization) -> PreTrainedModel:
    """Return a quantized copy of a plain model, through a temporary folder of the model's size."""
    with tempfile.TemporaryDirectory(prefix="lit_rlhf_") as folder:
        saved: Any = model
        # Every rank has its own folder, and transformers 5.23 would write only the first rank's.
        saved.should_save_on_this_rank = lambda is_main_process: True
        saved.save_pretrained(folder)
        return load_quantized(folder, model.dtype, quantization)
