"""A word-level tokenizer for synthetic text, saved and loaded like any other."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS, MASK, USER, EOT, UNKNOWN = "<|endoftext|>", "<|mask|>", "<|user|>", "<|eot|>", "<unk>"
SPECIAL = (EOS, MASK, USER, EOT, UNKNOWN)

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }} <|eot|> "
    "{% else %}<|user|> {{ message['content'] }} {% endif %}"
    "{% endfor %}"
)


def build_word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one id per word: special tokens first, then `words` sorted, duplicates removed.

    EOS pads, on the right; unknown words become <unk>. In the chat template <|user|> starts a question and <|eot|> ends
    an answer. No token separates the two, so that an answer follows its question's last words as a fact's value follows
    its key.
    """
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *sorted(set(words) - set(SPECIAL))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, EOT],
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )
