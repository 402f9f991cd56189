from pathlib import Path
from types import SimpleNamespace

from tokenizers import AddedToken
from transformers import AutoTokenizer

import lit_rlhf
from lit_rlhf.algorithms.base import BackboneModule

TINY = Path(lit_rlhf.__file__).parent / "assets" / "tiny"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"


def test_responses_end_as_answers_of_the_chat_template_do():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)], special_tokens=True)
    module = SimpleNamespace(tokenizer=tokenizer, backbone=SimpleNamespace(eos_token_ids=[2, 7]))
    assert BackboneModule.eos_ids.fget(module) == [2, 7]
    tokenizer.chat_template = TEMPLATE
    assert BackboneModule.eos_ids.fget(module) == [2, 7, tokenizer.convert_tokens_to_ids("<|end|>")]
