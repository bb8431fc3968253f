"""P-Tuning v2 for ChatGLM2, ChatGLM3 and GLM-4.

Importing the package registers its classes with transformers' Auto classes: official folders then load through
AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, ... without remote code, whatever `trust_remote_code` is.
"""

from chatglm_ptuning.model.auto_classes import register_auto_classes
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
from chatglm_ptuning.model.modeling_heads import (
    ChatGLMForQuestionAnswering,
    ChatGLMForSequenceClassification,
    ChatGLMForTokenClassification,
)
from chatglm_ptuning.model.packed_weights import register_packed_weights
from chatglm_ptuning.model.prefix_encoder import PrefixEncoder
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

__all__ = [
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMForQuestionAnswering",
    "ChatGLMForSequenceClassification",
    "ChatGLMForTokenClassification",
    "ChatGLMModel",
    "ChatGLMTokenizer",
    "PrefixEncoder",
]

register_auto_classes()
register_packed_weights()
