"""Helpers of the data tests: an in-memory tokenizer, a module that records batches, a row."""

import torch
from lightning.pytorch import LightningModule, Trainer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<user>",
    "<assistant>",
    *"abcdefghij",
    "Human",
    "Assistant",
    ":",
]
CHAT_TEMPLATE = (
    "<bos>{% for m in messages %}"
    "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
VOCAB = {word: index for index, word in enumerate(WORDS)}


def make_tokenizer(close_with_eos=False, **special):
    """Word-level tokenizer: <pad>=0 <bos>=1 <eos>=2 <unk>=3 <user>=4 <assistant>=5, a=6 ... j=15."""
    core = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if close_with_eos else "<bos> $A", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    named = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        **special,
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        **{key: value for key, value in named.items() if value is not None},
    )


def pair_row(prompt="a b", chosen="c", rejected="d", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


class Recorder(LightningModule):
    """Trains one weight and keeps every batch it is given."""

    def __init__(self, tokenizer=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokenizer = tokenizer
        self.train_batches, self.val_batches = [], []

    def training_step(self, batch, batch_idx):
        self.train_batches.append((self.current_epoch, batch))
        return self.weight**2

    def validation_step(self, batch, batch_idx):
        self.val_batches.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, data, **kwargs):
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"max_epochs": 1, "num_sanity_val_steps": 0, "enable_model_summary": False, **silent, **kwargs}
    Trainer(accelerator="cpu", devices=1, **options).fit(module, datamodule=data)
