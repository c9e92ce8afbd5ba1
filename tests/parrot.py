"""A model whose every answer is known beforehand, for tests of what talks to it."""

import torch

from chatmodel import GPTConfig, GPTForCausalLM
from chatmodel.tokenizer import calculator_table


def make_parrot(tokenizer, beginning: str, cycle: str, context: int) -> GPTForCausalLM:
    """A model that answers anything with `beginning` (a calculator's result filled in) and `cycle` over and over.

    Its layers start as the identity, so that each token alone decides the next: every one may stand there once.
    """
    first = tokenizer.encode("<|assistant_start|>" + beginning, add_special_tokens=False)
    rest = tokenizer.encode(cycle, add_special_tokens=False)
    steps = list(zip([*first, *rest], [*first[1:], *rest, rest[0]], strict=True))
    table = calculator_table(tokenizer)
    steps.append((table["output_end"], rest[0]))
    assert len(dict(steps)) == len(steps), "a token stands twice"
    ends = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ends["eos_token_id"] = tokenizer.eos_token_id
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": context}
    model = GPTForCausalLM(GPTConfig(vocab_size=len(tokenizer), calculator=table, **sizes, **ends))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for channel, (token, following) in enumerate(steps):
            model.model.embed_tokens.weight[token] = torch.eye(64)[channel]
            model.lm_head.weight[following, channel] = 10.0
    return model
