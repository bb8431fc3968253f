"""A byte-pair vocabulary with byte fallback, as ChatGLM has it, trained on a few sentences."""

from __future__ import annotations

from pathlib import Path

import sentencepiece

TEXTS = """
春天来了，河边的柳树发了芽，孩子们在草地上放风筝。
这家店的面条很好吃，老板也热情，下次还会再来。
手机的电池不耐用，充一次电只能用半天，有点失望。
请把下面的句子翻译成英文：今天的天气真不错。
The weather is fine today, so we walked along the river to the old bridge.
她每天早上六点起床，先跑步，再读半个小时的书。
这件外套用的是羊毛面料，版型宽松，适合秋冬穿着。
问：北京到上海有多远？答：大约一千二百公里。
我们公司下个月要搬到新的办公楼，离地铁站很近。
def add(a, b):  return a + b
他喜欢在下雨天泡一壶茶，听着雨声写信。
图书馆周末开放到晚上九点，借书需要带上证件。
""".strip().splitlines()


def train(path: Path, **options) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(path.with_suffix("")), vocab_size=560, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, **options,
    )  # fmt: skip
    return path
