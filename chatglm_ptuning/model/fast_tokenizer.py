"""The tokenizer of a base as one of transformers' own, for programs that do not have this kit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.model.vocabulary import SPLIT_PATTERN, BytePairVocabulary, SentencePieceVocabulary

# Texts in which vocabularies of different kinds, or with different normalisation, differ.
_SAMPLES = (
    "你好",
    "今天天气很好，我想去公园散步。It's 25°C; let's go!",
    "  def add(a, b):\n\treturn a + b  # 1234567890\n\n",
    "ＡＢＣ１２３　㈱①ﬁ½é é",
    "龘𠮷🙂👍🏽\u200b\u00a0",
    "问：北京到上海有多远？\n\n答：大约 1,200 公里。",
    " ",
    "a  b   c",
)


def fast_tokenizer(tokenizer: ChatGLMTokenizer) -> PreTrainedTokenizerFast | None:
    """A tokenizer of transformers' own with the same ids, for texts without special tokens and for rendered prompts.

    Unlike in this kit's, a text can spell special tokens.

    Returns:
        None if there is none that gives the same ids, which is checked on samples.
    """
    vocabulary = tokenizer.vocabulary
    candidates = _byte_pairs if isinstance(vocabulary, BytePairVocabulary) else _sentence_pieces
    special = {token: index for token, index in vocabulary.special_ids.items()}
    for backend in candidates(vocabulary):
        # A word of letters alone is only a special token where it is a word.
        added = [AddedToken(token, special=True, normalized=False, single_word=token.isalpha()) for token in special]
        end = tokenizer.eos_token
        backend.add_special_tokens(
            added if end in special else [*added, AddedToken(end, special=True, normalized=False)]
        )
        start = tokenizer.convert_ids_to_tokens(tokenizer.start_ids)
        backend.post_processor = processors.TemplateProcessing(
            single=[*start, "$A"],
            pair=[*start, "$A", "$B:1", f"{end}:1"],
            special_tokens=[*zip(start, tokenizer.start_ids, strict=True), (end, tokenizer.eos_token_id)],
        )
        ids = {token: backend.token_to_id(token) for token in special}
        if ids == special and all(backend.encode(text).ids == tokenizer(text)["input_ids"] for text in _SAMPLES):
            return PreTrainedTokenizerFast(
                tokenizer_object=backend,
                eos_token=end,
                pad_token=tokenizer.pad_token,
                padding_side="left",
                model_input_names=["input_ids", "attention_mask"],
                clean_up_tokenization_spaces=False,
                chat_template=tokenizer.chat_template,
                chat_format=tokenizer.chat_format,
            )
    return None


def _byte_pairs(vocabulary: BytePairVocabulary) -> Iterator[Tokenizer]:
    tokens = {vocabulary.token(rank): rank for rank in vocabulary.bytes_of}
    backend = Tokenizer(models.BPE(tokens, generate_merges(tokens, None), ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    yield backend


def _sentence_pieces(vocabulary: SentencePieceVocabulary) -> Iterator[Tokenizer]:
    """Both kinds of models that sentencepiece has: its file says which, but not to its Python interface."""
    processor = vocabulary.processor
    pieces = [processor.id_to_piece(index) for index in range(vocabulary.pieces)]
    scores = [processor.get_score(index) for index in range(vocabulary.pieces)]
    tokens = {piece: index for index, piece in enumerate(pieces)}
    unknown = processor.unk_id()
    unmerged = [
        piece
        for index, piece in enumerate(pieces)
        if processor.is_byte(index) or processor.is_control(index) or processor.is_unknown(index)
    ]
    byte_pairs = partial(
        models.BPE, tokens, generate_merges(tokens, dict(zip(pieces, scores, strict=True)), unmerged), fuse_unk=True
    )
    unigram = partial(models.Unigram, list(zip(pieces, scores, strict=True)), unknown)
    for model in (byte_pairs(unk_token=pieces[unknown], byte_fallback=True), unigram(byte_fallback=True)):
        backend = Tokenizer(model)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1, right=0),
            ]
        )
        yield backend
