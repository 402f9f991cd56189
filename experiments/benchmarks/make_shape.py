"""Write a folder from which a model of a known shape can be built with random weights, for memory and speed.

    python experiments/benchmarks/make_shape.py llama-7b shapes/llama-7b
    lit-rlhf bench --model random:shapes/llama-7b --precision bfloat16 --layout hydra

Shapes are those of ``lit-rlhf memory``; the tokenizer is the package's tiny one, whose ids every vocabulary holds.
"""

import argparse
from pathlib import Path

from lit_rlhf.backbone import load_tokenizer
from lit_rlhf.planner import SHAPES, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    load_config(args.shape).save_pretrained(args.folder)
    load_tokenizer("random:tiny").save_pretrained(args.folder)
    print(f"random:{args.folder}")


if __name__ == "__main__":
    main()
