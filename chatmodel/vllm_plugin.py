"""How vLLM learns of the model: named in pyproject.toml as an entry point of `vllm.general_plugins`."""

import sys

import chatmodel


def register() -> None:
    """Make the model known to a vLLM process; vLLM calls this in each of its processes, possibly again.

    Importing chatmodel is most of it: the Auto classes then give our classes, without `--trust-remote-code`. vLLM
    looks for the architecture in Transformers' namespace and runs it by its Transformers backend. The calculator stays
    silent there, since a vLLM server does not call `generate`.
    """
    for name in ("GPTForCausalLM", "GPTForSequenceClassification"):
        setattr(sys.modules["transformers"], name, getattr(chatmodel, name))
