"""Serve a model folder with the OpenAI protocol: `python scripts/serve.py runs/cpu/sft --device cpu --port 8000`.

This is `transformers serve` (all its options work) with this project's model made known to it, and mended where a
client would learn nothing: what is wrong with a request is said in one sentence, a temperature is obeyed, and the
model's context ends an answer.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import chatmodel
from chatmodel.model.generation_gpt import check_prompt
from chatmodel.runtime import logger


def add_answers_to_bad_requests(app: Any) -> None:
    """A bad conversation or prompt is the client's mistake (400, with a sentence), not the server's (500)."""
    from fastapi.responses import JSONResponse
    from jinja2.exceptions import TemplateError

    async def answer(_: Any, error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    app.add_exception_handler(ValueError, answer)
    app.add_exception_handler(TemplateError, answer)


def list_served_model(model_manager: Any) -> None:
    """`/v1/models` names the model that is served; left alone it lists the Hub's cache, and fails if there is none."""
    name = model_manager.force_model
    if name is not None:
        created = int(Path(name).stat().st_mtime) if Path(name).exists() else 0
        served = {"id": name, "object": "model", "created": created, "owned_by": "chatmodel"}
        model_manager.get_gen_models = lambda *_, **__: [served]


def fit_to_context(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Check the prompt before an answer begins, and end it with the context, which then is the reason it gives."""

    def generate_fitted(self: Any, model: Any, processor: Any, inputs: Any, settings: Any, **options: Any) -> Any:
        room = check_prompt(model.config, torch.as_tensor(inputs["input_ids"]).reshape(1, -1))
        settings.max_new_tokens = min(settings.max_new_tokens or room, room)
        return generate(self, model, processor, inputs, settings, **options)

    return generate_fitted


def tell_of_shared_sampling(init_batching: Callable[..., Any]) -> Callable[..., Any]:
    """Continuous batching samples every request as the first one asked for; say so where another differs."""

    def init_and_tell(self: Any, model: Any, settings: Any) -> None:
        init_batching(self, model, settings)
        shared = self._cb.generation_config
        for name in ("do_sample", "temperature", "top_p"):
            wanted, kept = getattr(settings, name), getattr(shared, name)
            if wanted != kept:
                logger.warning(
                    "%s=%s of a request is not obeyed: all are sampled with the first's, %s", name, wanted, kept
                )

    return init_and_tell


def mend_server() -> None:
    """Put the mends where the server of Transformers 5.23 looks for them."""
    from transformers.cli.serving import server, utils

    build_server, build_settings = server.build_server, utils.BaseHandler._build_generation_config

    def build_mended_server(model_manager: Any, *args: Any, **kwargs: Any) -> Any:
        app = build_server(model_manager, *args, **kwargs)
        add_answers_to_bad_requests(app)
        list_served_model(model_manager)
        return app

    def build_sampling_settings(self: Any, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        settings = build_settings(self, body, *args, **kwargs)
        if body.get("temperature"):
            settings.do_sample = True  # otherwise a model whose default is greedy would stay so
        return settings

    server.build_server = build_mended_server
    utils.BaseHandler._build_generation_config = build_sampling_settings
    utils.CBGenerateManager.init_cb = tell_of_shared_sampling(utils.CBGenerateManager.init_cb)
    for manager in (utils.GenerateManager, utils.CBGenerateManager):
        manager.generate_streaming = fit_to_context(manager.generate_streaming)
        manager.generate_non_streaming = fit_to_context(manager.generate_non_streaming)


def main() -> None:
    try:
        from transformers.cli.transformers import main as run_transformers

        mend_server()
    except ImportError as error:
        sys.exit(f"error: {error}; install the server's packages with: pip install -e '.[serve]'")
    # The server of 5.23 looks every architecture up in this namespace, so no model with code of its own would start.
    # It is the module of this moment that counts: the command-line interface has put a new one in the old one's place.
    sys.modules["transformers"].GPTForCausalLM = chatmodel.GPTForCausalLM  # type: ignore[attr-defined]
    sys.argv.insert(1, "serve")
    run_transformers()


if __name__ == "__main__":
    main()
