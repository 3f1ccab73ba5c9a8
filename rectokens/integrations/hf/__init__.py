"""transformers integration; importing it registers the classes with transformers' Auto classes."""

from rectokens.integrations.hf.configuration import ItemAwareCausalLMConfig
from rectokens.integrations.hf.model import ItemAwareCausalLM
from rectokens.integrations.hf.tokenizer import ItemAwareTokenizer

__all__ = ["ItemAwareCausalLM", "ItemAwareCausalLMConfig", "ItemAwareTokenizer"]
