"""``lit-rlhf export``: a PEFT adapter folder or a merged model, loadable without lit_rlhf."""

import shutil
from pathlib import Path
from typing import Literal

from lit_rlhf.errors import OutputExistsError

CARD = """---
library_name: peft
---
LoRA adapter of the role `{role}`, trained with lit_rlhf on the base model `{model}`.

    from peft import PeftModel
    model = PeftModel.from_pretrained(base_model, "this folder")
"""


def export(
    checkpoint: str,
    out: str,
    format: Literal["peft", "merged"] = "peft",
    role: str = "actor",
) -> None:
    """Write a role of a checkpoint for use elsewhere.

    Args:
        checkpoint: The ``.ckpt`` file of any stage.
        out: Folder to write; must not exist.
        format: ``peft`` writes an adapter that ``peft.PeftModel.from_pretrained`` loads on the base model (adapters of
            several stages are summed into one, exactly; DoRA adapters of several stages have no sum and need
            ``merged``); ``merged`` writes a model for ``AutoModelForCausalLM.from_pretrained``. After training on a
            quantized trunk, the adapter is exact on the base model quantized in the same way; ``merged`` adds it to the
            plain weights.
        role: The role to write. A scalar head that the checkpoint trained is added as ``heads.safetensors``.
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    from lit_rlhf.backbone import StageCheckpoint, load_tokenizer

    target = Path(out)
    if target.exists():
        raise OutputExistsError(f"{target} exists already; choose another folder, or remove it")
    stage = StageCheckpoint.read(checkpoint)
    tokenizer = load_tokenizer(stage.spec.tokenizer or stage.spec.model)
    found = stage.role_model(role)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if format == "peft":
            adapter = found.as_peft()
            adapter.peft_config["default"].base_model_name_or_path = stage.spec.model
            adapter.save_pretrained(str(partial))
            # PEFT's card is an empty form that names the base model's folder on this machine.
            (partial / "README.md").write_text(CARD.format(model=stage.spec.model, role=role), encoding="utf-8")
        else:
            model = found.merged()
            if model.generation_config is None:
                model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
            model.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
        head = stage.layout.roles[role].head
        if head != "lm" and (state := stage.head_state(head)) is not None:
            save_file(
                {f"{head}.{name}": tensor.contiguous() for name, tensor in state.items()},
                partial / "heads.safetensors",
            )
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"wrote {format} export of role {role} to {target}")


def main(argv: list[str]) -> None:
    """Parse the arguments and run."""
    from lit_rlhf.commands.run import run

    run(export, argv, "export")
