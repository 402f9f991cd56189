"""Settings that cannot work are refused together, before a run makes a folder."""

from pathlib import Path

import pytest

from lit_rlhf.cli import main

RUN = [
    "fit",
    "--model",
    "PPO",
    "--model.model",
    "random:tiny",
    "--model.optimizer",
    "torch.optim.AdamW",
    "--data",
    "PromptData",
    "--data.train",
    "prompts.jsonl",
    "--trainer.accelerator",
    "cpu",
]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--model.clip=-1", "--model.inner_epochs=0"], ["clip must be positive", "inner_epochs must be positive"]),
        (["--data.batch_size=0", "--data.limit=0"], ["batch_size must be at least 1", "limit must be at least 1"]),
    ],
)
def test_all_at_once_and_no_folder_is_left(
    wrong: list[str],
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(SystemExit):
        main([*RUN, *wrong])
    message = capsys.readouterr().err
    assert all(part in message for part in said), message
    assert not Path("runs").exists()
