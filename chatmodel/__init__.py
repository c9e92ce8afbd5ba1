"""chatmodel: the whole life of a small chat model. Importing it registers the model with the Auto classes and PEFT."""

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from chatmodel.model import GPTConfig, GPTForCausalLM, GPTForSequenceClassification, GPTModel

__all__ = ["LORA_TARGETS", "GPTConfig", "GPTForCausalLM", "GPTForSequenceClassification", "GPTModel"]

# Every matrix of a layer but the value gates, which "all-linear" would take in too.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

AutoConfig.register(GPTConfig.model_type, GPTConfig, exist_ok=True)
AutoModel.register(GPTConfig, GPTModel, exist_ok=True)
AutoModelForCausalLM.register(GPTConfig, GPTForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(GPTConfig, GPTForSequenceClassification, exist_ok=True)
# Whoever saves a model (Trainer, PEFT, a user) also saves its code, so that the folder loads without this package.
GPTConfig.register_for_auto_class()
GPTModel.register_for_auto_class("AutoModel")
GPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
GPTForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
# A LoraConfig() that names no modules finds ours.
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[GPTConfig.model_type] = LORA_TARGETS
