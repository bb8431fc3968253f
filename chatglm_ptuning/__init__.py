"""P-Tuning v2 for ChatGLM2, ChatGLM3 and GLM-4.

Importing the package registers its classes with transformers' Auto classes: official folders then load through
AutoConfig, AutoModel, AutoModelForCausalLM and AutoTokenizer without remote code.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
from chatglm_ptuning.model.modeling_heads import (
    ChatGLMForQuestionAnswering,
    ChatGLMForSequenceClassification,
    ChatGLMForTokenClassification,
)
from chatglm_ptuning.model.packed_weights import register_packed_weights
from chatglm_ptuning.model.prefix_encoder import PrefixEncoder
from chatglm_ptuning.model.tokenization_chatglm import ChatGLM4Tokenizer, ChatGLMTokenizer

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

AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
# As in the official files, whose `auto_map` gives AutoModel the class that can chat.
AutoModel.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
AutoModelForSequenceClassification.register(ChatGLMConfig, ChatGLMForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(ChatGLMConfig, ChatGLMForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(ChatGLMConfig, ChatGLMForQuestionAnswering, exist_ok=True)
# The second is registered by its name alone, which GLM-4's tokenizer_config.json gives.
AutoTokenizer.register(ChatGLMConfig, ChatGLMTokenizer, slow_tokenizer_class=ChatGLM4Tokenizer, exist_ok=True)
register_packed_weights()
