"""Tiny random models with tokenizers of their own: a decoder, and an encoder with a mask token."""

from pathlib import Path

import torch

WORDS = (
    "Yes No Maybe yes no maybe terrible bad okay good great description entity abbreviation person location number "
    "Description Entity Expression Human Location Number negative positive Question Answer"
)


def tiny_tokenizer(masked: bool = False, context: int = 512):
    """Byte-level pairs, so that any text can be written, with every label word a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([f"{word} {word}\n{word}" for word in WORDS.split()] * 20, trainer)
    form = "<s> $A </s>" if masked else "<s> $A"
    pair = "<s> $A </s> </s> $B </s>" if masked else "<s> $A $B"
    tokenizer.post_processor = processors.TemplateProcessing(single=form, pair=pair, special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    if masked:
        # As RoBERTa's: the space before it belongs to it.
        names["mask_token"] = AddedToken("<mask>", lstrip=True, special=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context, **names)


def tiny_llama(folder: Path, context: int = 512) -> Path:
    """A random decoder of about 20,000 parameters, saved with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(context=context)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=context,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
    )
    return _saved(model, tokenizer, folder)


def tiny_roberta(folder: Path, context: int = 128) -> Path:
    """A random encoder with the head of a masked language model, saved with its tokenizer."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    tokenizer = tiny_tokenizer(masked=True, context=10**9)
    torch.manual_seed(0)
    model = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=context,
            type_vocab_size=1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.3,
        )
    )
    return _saved(model, tokenizer, folder)


def _saved(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
