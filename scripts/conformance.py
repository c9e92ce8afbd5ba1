"""Run Transformers' own model tests on this project's model: `python scripts/conformance.py CHECKOUT`.

CHECKOUT is Transformers' repository at the version that is installed (`git clone --depth 1 --branch v5.23.0
https://github.com/huggingface/transformers`); its tests are not in the wheel. They also need `pip install pytest
parameterized`. Prints what passed, failed and was skipped, and why, for three configurations; exit code 1 if a test
failed.
"""

import argparse
import importlib
import json
import os
import re
import sys
import tempfile
import unittest
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import initialization as init
from transformers.models.auto import modeling_auto

from chatmodel import GPTConfig, GPTForCausalLM, GPTForSequenceClassification, GPTModel
from chatmodel.model.modeling_gpt import GPTPreTrainedModel
from chatmodel.runtime import UserError, entry_point
from chatmodel.tokenizer import train_tokenizer

NEEDED = ("causal_lm_tester.py", "distributed_testing_utils.py", "test_modeling_common.py", "generation/test_utils.py")
PLAIN = {"window_pattern": "L", "value_embeddings": False, "residual_scalars": False, "backout": False}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "extras": {"window_pattern": "L"},
    "windows": {"window_pattern": "S", "sliding_window": 3},  # the tests use rows of 7 tokens and more
    "gated": PLAIN | {"gated_mlp": True, "hidden_act": "silu", "final_logit_softcapping": None},
}
DEFAULT = ["plain", "extras", "windows"]
TESTER_SETTINGS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
]
# Why tests are skipped; the first pattern that is found in Transformers' reason decides.
REASONS = (
    ("needs a GPU, or a package that needs one", r"accelerator|[Ff]lash [Aa]ttention|MPS|kernels library|deepspeed"),
    ("not written yet upstream", r"currently not implemented"),
    ("tasks of other models", r"a pipeline of|question answering|token classification|Timm|PyTesseract|requires av"),
    ("a package is missing", r"[Tt]est requires"),
    ("parts this model does not have", r""),
)
WIDE_WINDOW = 400


def draw_every_matrix() -> None:
    """Make new models without zeros: a fresh one's layers are the identity, which hides mistakes.

    It stands at the top of the file because the ranks of distributed tests begin by reading this file.
    """
    draw = GPTPreTrainedModel._init_matrix

    def draw_random(self: GPTPreTrainedModel, weight: torch.Tensor, role: str, *, uniform: bool) -> None:
        if role == "head":
            init.normal_(weight, std=0.02)
        else:
            draw(self, weight, "input" if role == "output" else role, uniform=uniform)

    GPTPreTrainedModel._init_matrix = draw_random  # type: ignore[method-assign]


draw_every_matrix()


def make_test_class(name: str) -> type:
    """Transformers' tests of a causal language model, for one of our configurations."""
    introduce_model()
    causal_lm_tester = importlib.import_module("tests.causal_lm_tester")  # the checkout's
    changes = CONFIGURATIONS[name]

    class Tester(causal_lm_tester.CausalLMModelTester):  # type: ignore[misc, name-defined]
        config_class = GPTConfig
        base_model_class = GPTModel
        causal_lm_class = GPTForCausalLM
        sequence_classification_class = GPTForSequenceClassification

        def get_config(self) -> GPTConfig:
            return GPTConfig(**({setting: getattr(self, setting) for setting in TESTER_SETTINGS} | changes))

        def __init__(self, parent: Any) -> None:
            super().__init__(parent=parent, hidden_act="relu2")
            self.attention_probs_dropout_prob = 0.0

    bases: tuple[type, ...] = (Adjusted, causal_lm_tester.CausalLMModelTest, unittest.TestCase)
    if name == "windows":
        bases = (Windowed, *bases)
    # Skipped for models that are older than 2023, which is read from a file's copyright.
    facts = {"model_tester_class": Tester, "changes": changes, "test_can_init_all_missing_weights_before_2023": True}
    return type(f"Test{name.capitalize()}", bases, facts)


def introduce_model() -> None:
    """Enter the model where the tests look it up, and where they list those few that are tested on several ranks."""
    modeling_auto.MODEL_MAPPING_NAMES["chatmodel"] = "GPTModel"
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["chatmodel"] = "GPTForCausalLM"
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["chatmodel"] = "GPTForSequenceClassification"
    tp_tests: Any = importlib.import_module("tests.test_tensor_parallel_mixin")
    tp_tests.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
    fsdp_tests: Any = importlib.import_module("tests.test_fsdp_mixin")
    fsdp_tests.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
    fsdp_tests._get_available_fsdp_workers = lambda: 4


class Adjusted:
    """What has to be said differently for this model."""

    changes: dict[str, Any]

    def _get_tiny_config(self) -> tuple[type, dict[str, Any]]:
        """Three layers in tests that compare weights after training.

        With two, the middle one is the last, and the final norm takes the backout's scale out again: its gradient is
        nothing but rounding, which Adam makes as large as any other.
        """
        config_class, settings = super()._get_tiny_config()  # type: ignore[misc]
        settings = {key: value for key, value in settings.items() if key != "layer_types"}
        return config_class, settings | {"num_hidden_layers": 3} | self.changes

    def test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions(self) -> None:
        """Without the classifier: Transformers' own one has annotations that this test cannot read, and it skips."""
        self.all_model_classes = [GPTModel, GPTForCausalLM]
        super().test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions()  # type: ignore[misc]


class Windowed:
    """What has to be said differently where layers see a window: the tests take every layer for a full one."""

    changes: dict[str, Any]

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: Any, seq_length: int, config: GPTConfig
    ) -> None:
        """A full layer keeps all keys, a windowed one no more than its window, unless it must be able to go back."""
        assert config.layer_types is not None
        assert config.sliding_window is not None
        assert len(past_key_values) == config.num_hidden_layers
        for kind, layer in zip(config.layer_types, past_key_values.layers, strict=True):
            least = most = seq_length
            if kind == "sliding_attention":
                least = min(seq_length, config.sliding_window - 1)
                most = seq_length if getattr(layer, "record_past", False) else min(seq_length, config.sliding_window)
            for states in (layer.keys, layer.values):
                rows, heads, keys, head_dim = states.shape
                assert (rows, heads, head_dim) == (batch_size, config.num_key_value_heads, config.head_dim)
                assert least <= keys <= most

    def _check_attentions_for_generate(
        self,
        batch_size: int,
        attentions: Any,
        prompt_length: int,
        output_length: int,
        config: GPTConfig,
        decoder_past_key_values: Any,
    ) -> None:
        """Weights on as many keys as there are; in a windowed layer on no key outside the window."""
        assert config.layer_types is not None
        assert config.sliding_window is not None
        cache = decoder_past_key_values
        assert len(attentions) == output_length - prompt_length
        for step, layers in enumerate(attentions):
            seen = prompt_length + step
            queries = 1 if cache is not None and step else seen
            is_static = cache is not None and cache.is_compileable
            keys = cache.get_max_length(config.num_hidden_layers - 1) if is_static else seen
            for kind, weights in zip(config.layer_types, layers, strict=True):
                assert weights.shape[:3] == (batch_size, config.num_attention_heads, queries)
                if kind == "full_attention":
                    assert weights.shape[3] == keys
                else:
                    assert min(seen, config.sliding_window) <= weights.shape[3] <= keys
                    assert ((weights > 0).sum(dim=-1) <= config.sliding_window).all()

    def _export_in_a_wide_window(self, test: str) -> None:
        """Transformers 5.23 exports the cache of a windowed layer as a full one, on purpose: so a window that is."""
        kept, self.changes["sliding_window"] = self.changes["sliding_window"], WIDE_WINDOW
        try:
            getattr(super(), test)()
        finally:
            self.changes["sliding_window"] = kept

    def test_torch_export_static(self) -> None:
        self._export_in_a_wide_window("test_torch_export_static")

    def test_torch_export_dynamic(self) -> None:
        self._export_in_a_wide_window("test_torch_export_dynamic")

    def test_torch_export_generate_static(self) -> None:
        self._export_in_a_wide_window("test_torch_export_generate_static")

    def test_torch_export_generate_dynamic(self) -> None:
        self._export_in_a_wide_window("test_torch_export_generate_dynamic")

    def test_torch_export_generate_dynamic_static_cache(self) -> None:
        self._export_in_a_wide_window("test_torch_export_generate_dynamic_static_cache")

    def test_onnx_export_generate_dynamic_static_cache(self) -> None:
        self._export_in_a_wide_window("test_onnx_export_generate_dynamic_static_cache")


class Counts:
    """A plug-in of pytest that counts the outcomes by configuration."""

    def __init__(self) -> None:
        self.failed: set[str] = set()
        self.finished: dict[str, str] = {}
        self.skips: dict[str, Counter[str]] = {}
        self.skipped_parts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for every phase of every test, and for every part of one (subtest)."""
        name = re.findall(r"::Test(\w+)::", report.nodeid)[0].lower()
        is_part = type(report).__name__ == "SubtestReport"
        if report.outcome == "failed":
            self.failed.add(report.nodeid)
        elif is_part:
            self.skipped_parts[name] += report.outcome == "skipped"
        elif report.when == "call" or report.outcome == "skipped":
            self.finished[report.nodeid] = report.outcome
        if report.outcome == "skipped":
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
            self.skips.setdefault(name, Counter())[simplify(reason)] += 1

    def count_outcomes(self, name: str) -> Counter[str]:
        """How many tests of a configuration passed, failed (a part of one is enough) and were skipped."""
        outcomes = self.finished | dict.fromkeys(self.failed, "failed")
        return Counter(outcome for test, outcome in outcomes.items() if f"::Test{name.capitalize()}::" in test)


def simplify(reason: str) -> str:
    """A reason without the names in it that would make every one different."""
    reason = re.sub(r".*`[\w-]+` is not in `self.pipeline_model_mapping`.*", "a pipeline of other models", reason)
    reason = re.sub(r"<class '[\w.]+\.(\w+)'>", r"\1", reason)
    return re.sub(r"\bGPT(Model|ForCausalLM|ForSequenceClassification)\b", "the model", reason)


def group_of(reason: str) -> str:
    """The heading a reason stands under."""
    return next(group for group, pattern in REASONS if re.search(pattern, reason))


def print_counts(counts: Counts, names: list[str]) -> None:
    """The outcomes of each configuration, then why tests, and parts of tests, were skipped."""
    outcomes = {name: counts.count_outcomes(name) for name in names}
    print(f"\ntransformers {transformers.__version__}, torch {torch.__version__}")
    print(f"\n{'':60}" + "".join(f"{name:>9}" for name in names))
    for outcome in ("passed", "failed", "skipped"):
        print(f"{outcome:60}" + "".join(f"{outcomes[name][outcome]:9}" for name in names))
    print(f"{'parts of passed tests that were skipped':60}" + "".join(f"{counts.skipped_parts[n]:9}" for n in names))
    skips = sum(counts.skips.values(), Counter())
    for group in dict.fromkeys(group for group, _ in REASONS):
        reasons = [reason for reason, _ in skips.most_common() if group_of(reason) == group]
        totals = [sum(counts.skips.get(name, Counter())[reason] for reason in reasons) for name in names]
        print(f"\n{group:60}" + "".join(f"{total:9}" for total in totals))
        for reason in reasons:
            row = "".join(f"{counts.skips.get(name, Counter())[reason]:9}" for name in names)
            print(f"  {reason[:57]:58}{row}")


def write_tiny_models(folder: Path) -> None:
    """The models that the tests of pipelines load, as Transformers lays out its own."""
    text = " ".join(f"{number} and {number * 7}" for number in range(2000))
    tokenizer = train_tokenizer([text, *CONFIGURATIONS], 300, max_chars=100_000, doc_cap=100_000, model_max_length=256)
    config = GPTConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    summary = {}
    for model_class in (GPTModel, GPTForCausalLM, GPTForSequenceClassification):
        name = model_class.__name__
        model_class(config).save_pretrained(folder / "chatmodel" / name)
        tokenizer.save_pretrained(str(folder / "chatmodel" / name))
        summary[name] = {
            "tokenizer_classes": ["PreTrainedTokenizerFast"],
            "processor_classes": [],
            "model_classes": [name],
        }
    (folder / "reports").mkdir()
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary), encoding="utf-8")


def check_checkout(checkout: Path) -> None:
    """Refuse a folder that is not Transformers' repository at the installed version."""
    repository = "https://github.com/huggingface/transformers"
    advice = f"git clone --depth 1 --branch v{transformers.__version__} {repository}"
    missing = [name for name in NEEDED if not (checkout / "tests" / name).is_file()]
    if missing:
        raise UserError(f"{checkout} has no tests/{missing[0]} (PyPI's source package leaves it out); {advice}")
    source = (checkout / "src" / "transformers" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"', source, re.MULTILINE)
    if version is None or version[1] != transformers.__version__:
        found = "unknown" if version is None else version[1]
        raise UserError(f"{checkout} has version {found}, but {transformers.__version__} is installed; {advice}")


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("checkout", type=Path, help="Transformers' repository at the installed version")
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=DEFAULT)
    return parser.parse_known_args()  # the rest is for pytest, e.g. -k beam


def run_tests(checkout: Path, configurations: list[str], options: list[str], folder: Path) -> Counts:
    """Run the tests in this process, from files in `folder`, which is empty."""
    write_tiny_models(folder / "tiny")
    os.environ.update(RUN_SLOW="1", TRANSFORMERS_TINY_MODEL_PATH=str(folder / "tiny"), HF_HUB_OFFLINE="1")
    lines = ["from conformance import make_test_class"]
    lines += [f"Test{name.capitalize()} = make_test_class({name!r})" for name in configurations]
    (folder / "test_conformance.py").write_text("\n".join(lines), encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    sys.path.insert(0, str(checkout.resolve()))
    counts = Counts()
    settings = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--import-mode", "importlib", "--rootdir", str(folder)]
    pytest.main([str(folder / "test_conformance.py"), *settings, *options], plugins=[counts])
    return counts


def main() -> None:
    args, options = read_arguments()
    check_checkout(args.checkout)
    with tempfile.TemporaryDirectory() as folder:
        counts = run_tests(args.checkout, args.configurations, options, Path(folder))
    if not counts.finished and not counts.failed:
        raise UserError(f"no test ran; pytest was given {' '.join(options) or 'no options'}")
    print_counts(counts, args.configurations)
    sys.exit(bool(counts.failed))


if __name__ == "__main__":
    entry_point(main)
