"""What `transformers serve` needs to serve this project's models, and to serve strangers.

Mends of the server of Transformers 5.23, put where it looks for them: its own model is known to it, nothing else is
loaded, `Gate` stands before it, what is wrong with a request is said in one sentence, a temperature is obeyed, and the
model's context ends an answer.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import torch
from transformers import StoppingCriteriaList

import chatmodel
from chatmodel.chat.calls_aside import CallsAside, split_reply
from chatmodel.chat.gate import Gate
from chatmodel.chat.limits import Limits
from chatmodel.model.generation_gpt import check_prompt
from chatmodel.model_folders import check_model_name
from chatmodel.runtime import UserError, logger


def mend_server(limits: Limits, api_keys: Sequence[str]) -> None:
    """Put the mends in their places; the server is started by the command-line interface of Transformers.

    Raises:
        ImportError: the server's packages are not installed.
    """
    from transformers.cli.serving import chat_completion, model_manager, response, server, utils

    build_server, build_settings = server.build_server, utils.BaseHandler._build_generation_config

    def build_mended_server(manager: Any, *args: Any, **kwargs: Any) -> Any:
        if manager.force_model is None:
            raise UserError("name the model folder to serve: python scripts/serve.py runs/cpu/sft")
        app = build_server(manager, *args, **kwargs)
        add_answers_to_bad_requests(app)
        list_served_model(manager)
        app.add_middleware(Gate, limits=limits, api_keys=api_keys, knows_tools=shows_tools(manager))
        return app

    def build_sampling_settings(self: Any, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        settings = build_settings(self, body, *args, **kwargs)
        if body.get("temperature"):
            settings.do_sample = True  # otherwise a model whose default is greedy would stay so
        settings.max_new_tokens = min(settings.max_new_tokens or limits.max_new_tokens, limits.max_new_tokens)
        return settings

    server.build_server = build_mended_server
    utils.BaseHandler._build_generation_config = build_sampling_settings
    utils.CBGenerateManager.init_cb = tell_of_shared_sampling(utils.CBGenerateManager.init_cb)
    utils.GenerateManager.generate_non_streaming = stop_when_gone(utils.GenerateManager.generate_non_streaming)
    for manager in (utils.GenerateManager, utils.CBGenerateManager):
        manager.generate_streaming = fit_to_context(manager.generate_streaming)
        manager.generate_non_streaming = fit_to_context(manager.generate_non_streaming)
    set_calls_aside(chat_completion, show_calls=True)
    set_calls_aside(response, show_calls=False)  # its events know of no text between two thoughts
    load = model_manager.ModelManager.load_model_and_processor
    model_manager.ModelManager.load_model_and_processor = load_only_named(load)
    # The server of 5.23 looks every architecture up in this namespace, so no model with code of its own would start.
    # It is the module of this moment that counts: the command-line interface has put a new one in the old one's place.
    sys.modules["transformers"].GPTForCausalLM = chatmodel.GPTForCausalLM  # type: ignore[attr-defined]


def load_only_named(load: Callable[..., Any]) -> Callable[..., Any]:
    """Load nothing but the model that the server was started with, and trust no code but that in its folder."""

    def load_named(self: Any, name_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        if name_and_revision != self.process_model_name(self.force_model or ""):
            raise ValueError(f"only {self.force_model} is served here")
        check_model_name(self.force_model)
        if self.trust_remote_code:
            check_trusted_folder(Path(self.force_model))
        try:
            return load(self, name_and_revision, *args, **kwargs)
        except OSError as error:  # neither a folder nor a name that is found
            first_line = str(error).strip().split("\n")[0]
            raise UserError(f"the model {self.force_model} cannot be loaded: {first_line}") from error

    return load_named


def check_trusted_folder(folder: Path) -> None:
    """Refuse to trust code that does not lie in `folder`.

    Raises:
        UserError: there is no such folder, or its files name code of another repository ("owner/name--module.Class").
    """
    if not folder.is_dir():
        raise UserError(f"--trust-remote-code runs the code in a folder of this machine, and {folder} is none")
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue  # Transformers will say so, if it needs the file
        named = json.dumps(content.get("auto_map", {})) if isinstance(content, dict) else ""
        if "--" in named:
            raise UserError(f"{path} names code of another repository ({named[:120]}), which is not trusted")


def add_answers_to_bad_requests(app: Any) -> None:
    """A bad conversation or prompt is the client's mistake (400, with a sentence), not the server's (500)."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from jinja2.exceptions import TemplateError
    from starlette.exceptions import HTTPException

    def say(status: int, message: str) -> JSONResponse:
        error = {"message": message, "type": "invalid_request_error", "code": status}
        return JSONResponse({"error": error}, status_code=status)

    async def answer(_: Any, error: Exception) -> JSONResponse:
        return say(400, str(error))

    async def answer_status(_: Any, error: Any) -> JSONResponse:
        return say(error.status_code, str(error.detail))

    for kind in (ValueError, TemplateError, RequestValidationError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, answer_status)


def list_served_model(model_manager: Any) -> None:
    """`/v1/models` names the model that is served; left alone it lists the Hub's cache, and fails if there is none."""
    name = model_manager.force_model
    created = int(Path(name).stat().st_mtime) if Path(name).exists() else 0
    served = {"id": name, "object": "model", "created": created, "owned_by": "chatmodel"}
    model_manager.get_gen_models = lambda *_, **__: [served]


def shows_tools(model_manager: Any) -> bool:
    """Whether the chat template of the served model shows a client's tools to the model."""
    _, processor = model_manager.load_model_and_processor(model_manager.process_model_name(model_manager.force_model))
    return "tools" in str(getattr(processor, "chat_template", ""))


def fit_to_context(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Check the prompt before an answer begins, and end it with the context, which then is the reason it gives."""

    def generate_fitted(self: Any, model: Any, processor: Any, inputs: Any, settings: Any, **options: Any) -> Any:
        room = check_prompt(model.config, torch.as_tensor(inputs["input_ids"]).reshape(1, -1))
        settings.max_new_tokens = min(settings.max_new_tokens or room, room)
        return generate(self, model, processor, inputs, settings, **options)

    return generate_fitted


def stop_when_gone(generate: Callable[..., Any]) -> Callable[..., Any]:
    """End an answer that is not streamed when its client goes away, as the server itself ends a stream."""

    async def generate_while_wanted(
        self: Any, model: Any, processor: Any, inputs: Any, settings: Any, **options: Any
    ) -> Any:
        gone = Event()

        def stop(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), gone.is_set(), device=input_ids.device)

        wanted = {**inputs, "stopping_criteria": StoppingCriteriaList([stop])}
        work = asyncio.ensure_future(generate(self, model, processor, wanted, settings, **options))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            gone.set()
            raise

    return generate_while_wanted


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


def set_calls_aside(module: Any, *, show_calls: bool) -> None:
    """Let a module of the server tell the calculator's calls from text; left alone they run into each other."""
    build_parser, parse = module.build_response_parser, module.parse_assistant_message

    def has_calculator(model: Any) -> bool:
        return getattr(model.config, "calculator", None) is not None

    def build_response_parser(processor: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if has_calculator(model):
            return CallsAside(show_calls=show_calls)
        return build_parser(processor, model, *args, **kwargs)

    def parse_assistant_message(processor: Any, model: Any, generated_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if has_calculator(model):
            ids = torch.as_tensor(generated_ids).tolist()
            return *split_reply(processor, ids, show_calls=show_calls), None
        return parse(processor, model, generated_ids, *args, **kwargs)

    module.build_response_parser, module.parse_assistant_message = build_response_parser, parse_assistant_message
