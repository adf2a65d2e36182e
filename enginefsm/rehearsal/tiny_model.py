"""A tiny language model with random weights, made offline in seconds: enough for a real SGLang server on a CPU."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

_CONTEXT = 2048
_SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
# A wider spread than usual: with random weights, it makes the next token depend on the prompt.
_WEIGHT_SPREAD = 0.2


def make_tiny_model(directory: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Write a GPT-2 of two layers and a byte-level tokenizer into `directory` (made if missing), and return its path.

    GPT-2, because it has no rotary embedding: SGLang's kernels for that are missing from the wheels for CPUs.

    Raises:
        ImportError: torch, transformers or tokenizers is not installed.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    # One token a byte, and no merges: nothing to train.
    tokens = [*_SPECIAL_TOKENS.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    byte_level = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, model_max_length=_CONTEXT, **_SPECIAL_TOKENS)

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=_CONTEXT,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=_WEIGHT_SPREAD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a tiny random model that SGLang serves on a CPU.")
    parser.add_argument("directory")
    make_tiny_model(parser.parse_args().directory)
