"""Which class runs a task of CORE or ChatCORE in lm_eval? One for each way of answering: scores, letters, replies.

Data, prompts and judgement are those of our own scorer; only the model is run by lm_eval.
"""

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task, TaskConfig
from lm_eval.filters import build_filter_ensemble

from chatmodel.evaluation.chat_tasks import (
    BASELINES,
    ChatExample,
    cut_prompt,
    example_letters,
    judge_reply,
    load_chat_examples,
    render_chat_prompts,
)
from chatmodel.evaluation.chatcore import find_letter_ids
from chatmodel.evaluation.core import is_right
from chatmodel.evaluation.core_tasks import CoreTask, build_requests, render_prompts
from chatmodel.evaluation.lm_eval_tasks.requests import SCORE_TOKENS, TokenRequest
from chatmodel.evaluation.lm_eval_tasks.settings import (
    TaskSettings,
    find_chatcore_folder,
    find_context,
    find_core_cut,
    find_limit,
    load_bundle,
    load_task_tokenizer,
)
from chatmodel.evaluation.scoring import Request, Score, encode_texts
from chatmodel.evaluation.statistics import center_accuracy
from chatmodel.runtime import UserError, logger

ASIDE = "none", [["take_first", None]]  # lm_eval's filter of answers that leaves them as they are


class Benchmark(Task):  # type: ignore[misc]
    """A task whose examples are numbered documents, each judged right or wrong.

    `acc` and `centered` are means over the examples, with their standard errors; a group's mean of `centered` is then
    CORE or ChatCORE. CORE's tasks also have `centered_dclm`, by DCLM's corrected baselines.
    """

    VERSION = 1
    OUTPUT_TYPE = SCORE_TOKENS
    baseline: float

    def __init__(self, config: dict[str, Any]) -> None:
        # Not the base class's: it would load a data set from the Hub.
        self._config = TaskConfig(
            task=config["task"], output_type="multiple_choice", num_fewshot=0, metadata=config["metadata"]
        )
        self._filters = [build_filter_ensemble(*ASIDE)]
        self._instances: list[Instance] | None = None
        self.settings = TaskSettings.read(config["metadata"])
        self.label: str = config["metadata"]["label"]

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_task_tokenizer(self.settings)

    def has_training_docs(self) -> bool:
        """Few-shot examples are drawn from the examples themselves."""
        return False

    def has_validation_docs(self) -> bool:
        """There is but one split."""
        return False

    def has_test_docs(self) -> bool:
        """There is but one split."""
        return True

    def fewshot_context(self, doc: Any, *args: Any, **kwargs: Any) -> str:
        """Prompts are made whole in `construct_requests`."""
        return ""

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        """For lm_eval's logs."""
        return str(doc["prompt"])

    def doc_to_target(self, doc: dict[str, Any]) -> str:
        """For lm_eval's logs."""
        return str(doc["target"])

    def judge(self, right: bool) -> dict[str, float]:
        """The two metrics of one example."""
        return {"acc": float(right), "centered": center_accuracy(float(right), self.baseline)}

    def aggregation(self) -> dict[str, Any]:
        """lm_eval's own mean, of which it knows the standard error."""
        return {"acc": mean, "centered": mean, "centered_dclm": mean}

    def higher_is_better(self) -> dict[str, bool]:
        """For lm_eval's tables."""
        return {"acc": True, "centered": True, "centered_dclm": True}


class CoreBenchmark(Benchmark):
    """A task of CORE, named by its label in the bundle."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        bundle = load_bundle(self.settings.eval_bundle, self.settings.max_per_task)
        if self.label not in bundle:
            raise UserError(f"the CORE bundle has no task {self.label}; it has {', '.join(bundle)}")
        self.task: CoreTask = bundle[self.label]
        self.baseline = self.task.baseline
        self._config.num_fewshot = self.task.num_fewshot
        self.num_scored: dict[int, list[int]] = {}

    @cached_property
    def documents(self) -> list[dict[str, Any]]:
        """The examples; prompts are long, so they are made when they are asked for."""
        return [
            {"index": index, "prompt": "", "target": example.get("gold", example.get("continuation")), **example}
            for index, example in enumerate(self.task.examples)
        ]

    def test_docs(self) -> list[dict[str, Any]]:
        """The examples in nanochat's order, cut to `max_per_task`."""
        return self.documents

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """One request per choice, or one for language modelling."""
        texts, requests = self._build(doc["index"])
        self.num_scored[doc["index"]] = [len(request.tokens) - request.start for request in requests]
        made = []
        for index, (text, request) in enumerate(zip(texts[-len(requests) :], requests, strict=True)):
            # lm_eval refuses to score nothing; such a choice counts as NaN all the same.
            start = min(request.start, len(request.tokens) - 1)
            tokens = list(request.tokens)
            made.append(
                TokenRequest(tokens, start, text=text, doc=doc, index=index, metadata=kwargs["metadata"]),
            )
        return made

    def _build(self, index: int) -> tuple[list[str], list[Request]]:
        # lm_eval's --num_fewshot has been put into the config by now.
        task = replace(self.task, num_fewshot=self._config.num_fewshot)
        texts = render_prompts(task, index)
        encoded = encode_texts(self.tokenizer, texts)
        return texts, build_requests(task.kind, encoded, max_length=find_core_cut(self.settings))

    def process_results(self, doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
        """Right or wrong, from (sum of log-probabilities, whether greedy) of each request."""
        index = doc["index"]
        if index not in self.num_scored:  # requests came from lm_eval's cache
            self.num_scored[index] = [len(request.tokens) - request.start for request in self._build(index)[1]]
        scores = [
            Score(-total / count if count else math.nan, bool(greedy))
            for (total, greedy), count in zip(results, self.num_scored[index], strict=True)
        ]
        right = is_right(self.task.kind, scores, doc.get("gold"))
        return self.judge(right) | {"centered_dclm": center_accuracy(float(right), self.task.dclm_baseline)}


class ChatBenchmark(Benchmark):
    """A task of ChatCORE."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.baseline = BASELINES[self.label]
        self.examples: list[ChatExample] = load_chat_examples(
            self.label, folder=find_chatcore_folder(self.settings), max_per_task=self.settings.max_per_task
        )
        self.prompts = render_chat_prompts(self.tokenizer, [example.messages for example in self.examples])

    @cached_property
    def documents(self) -> list[dict[str, Any]]:
        """Question and reference reply of each example."""
        return [
            {"index": index, "prompt": example.messages[0]["content"], "target": example.messages[-1]["content"]}
            for index, example in enumerate(self.examples)
        ]

    def test_docs(self) -> list[dict[str, Any]]:
        """The examples in nanochat's order, cut to `max_per_task`."""
        return self.documents


class LetterBenchmark(ChatBenchmark):
    """Answered by the likeliest of the allowed letters as the first token of the reply."""

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """One request per letter; lm_eval computes their common prompt once."""
        letters = example_letters(self.label, self.examples[doc["index"]])
        ids = find_letter_ids(self.tokenizer, set(letters))
        prompt = cut_prompt(
            self.prompts[doc["index"]], find_context(self.settings), hard_limit=find_limit(self.settings)
        )
        return [
            TokenRequest(
                [*prompt, ids[letter]],
                len(prompt),
                text=doc["prompt"],
                doc=doc,
                index=index,
                metadata=kwargs["metadata"],
            )
            for index, letter in enumerate(letters)
        ]

    def process_results(self, doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
        """The first of equal letters wins."""
        letters = example_letters(self.label, self.examples[doc["index"]])
        scores = [total for total, _ in results]
        return self.judge(letters[scores.index(max(scores))] == doc["target"])


class ReplyBenchmark(ChatBenchmark):
    """Answered by a greedy reply, written with the calculator by models that have one; the text of it is judged.

    lm_eval drops control tokens from a reply's text, so one within the answer itself is judged more kindly here.
    """

    OUTPUT_TYPE = "generate_until"
    warned = False

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Instance:
        """A prompt that leaves no room for a reply is replaced by its last token, and counts as wrong."""
        prompt = self.prompts[doc["index"]]
        room = self._find_room(prompt)
        text = self.tokenizer.decode(prompt if room > 0 else prompt[-1:])
        if room > 0:
            self._check_text(text, prompt)
        length = min(self.settings.max_new_tokens, max(1, room))
        return Instance(
            request_type="generate_until",
            doc=doc,
            arguments=(text, {"until": [], "max_gen_toks": length, "do_sample": False}),
            idx=0,
            metadata=kwargs["metadata"],
        )

    def _find_room(self, prompt: list[int]) -> int:
        context = find_context(self.settings)
        return self.settings.max_new_tokens if context is None else context - len(prompt)

    def _check_text(self, text: str, prompt: list[int]) -> None:
        """Say so once where lm_eval, which takes text here, would encode a prompt otherwise."""
        begins = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        if not self.warned and self.tokenizer.encode(text, add_special_tokens=not begins) != prompt:
            self.warned = True
            logger.warning(
                "%s: lm_eval encodes a prompt otherwise than this tokenizer's chat template (a doubled BOS, or a "
                "control token spelled in the text), so replies may differ; try add_bos_token=False in --model_args",
                self.label,
            )

    def process_results(self, doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        """Right or wrong, from the text of the reply."""
        index = doc["index"]
        answered = self._find_room(self.prompts[index]) > 0
        return self.judge(answered and judge_reply(self.label, self.examples[index], results[0]))


class ProgramBenchmark(ReplyBenchmark):
    """HumanEval: programs that the model wrote are run, contained; lm_eval asks for --confirm_run_unsafe_code."""

    UNSAFE_CODE = True
