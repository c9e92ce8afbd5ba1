"""Which features of a model can another format not express?"""

from collections.abc import Collection, Mapping

from chatmodel.model import GPTConfig
from chatmodel.runtime import UserError


def list_features(config: GPTConfig) -> dict[str, str]:
    """What sets a model apart from the plainest one: by the configuration's name, as a sentence may call it."""
    rope = config.rope_parameters or {}
    features = {
        "value_embeddings": config.value_embeddings,
        "residual_scalars": config.residual_scalars,
        "backout": config.backout,
        "smear": config.smear,
        "sliding_window": config.sliding_window,
        "qk_scale": config.qk_scale if config.qk_scale != 1.0 else None,
        "final_logit_softcapping": config.final_logit_softcapping,
        "gated_mlp": config.gated_mlp,
        "hidden_act": config.hidden_act,
        "rope_type": rope["rope_type"] if rope.get("rope_type") != "default" else None,
        "attention_dropout": config.attention_dropout,
    }
    return {
        name: name if value is True else f"{name}={value}"
        for name, value in features.items()
        if value not in (None, False)
    }


def refuse_features(
    config: GPTConfig, target: str, *, can: Collection[str], needs: Mapping[str, str], advice: str
) -> None:
    """Refuse a model whose features `target` cannot express.

    Args:
        can: features it can express, by name ("qk_scale") or with their only value ("hidden_act=silu").
        needs: those it cannot do without, with the words for a model that lacks them.
        advice: what to do instead, as the end of a sentence.

    Raises:
        UserError: naming each of them.
    """
    found = list_features(config)
    obstacles = [said for name, said in found.items() if name not in can and said not in can]
    obstacles += [lacking for name, lacking in needs.items() if name not in found]
    if obstacles:
        raise UserError(f"{target} cannot express {', '.join(obstacles)}; {advice}")
