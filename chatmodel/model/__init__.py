"""The model: flat files that travel inside every checkpoint and import nothing from the rest of the package."""

from .configuration_gpt import GPTConfig
from .modeling_gpt import GPTForCausalLM, GPTForSequenceClassification, GPTModel, GPTPreTrainedModel

__all__ = ["GPTConfig", "GPTForCausalLM", "GPTForSequenceClassification", "GPTModel", "GPTPreTrainedModel"]
