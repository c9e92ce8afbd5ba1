"""The script around Transformers' own tests, on a checkout with eleven tests: what it counts, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

SCRIPT = Path(__file__).parents[1] / "scripts" / "conformance.py"

CAUSAL_LM_TESTER = """
import torch


class CausalLMModelTester:
    vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 99, 32, 37, 2, 2
    num_key_value_heads, max_position_embeddings, pad_token_id, bos_token_id, eos_token_id = 2, 512, 0, 1, 2

    def __init__(self, parent, hidden_act):
        pass


class CausalLMModelTest:
    def setUp(self):
        self.config = self.model_tester_class(self).get_config()

    def test_no_weight_is_zero(self):
        torch.manual_seed(0)
        model = self.model_tester_class.causal_lm_class(self.config)
        for name, parameter in model.named_parameters():
            self.assertTrue((parameter != 0).any(), name)

    def test_with_windows_alone_it_fails(self):
        self.assertIsNone(self.config.sliding_window)

    def test_one_part_is_skipped(self):
        with self.subTest("a part"):
            self.skipTest("GPTModel declares no recurrent layer types")

    def test_flash_attention(self):
        self.skipTest("test requires Flash Attention 3")

    def passes(self):
        pass

    test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions = passes
    test_torch_export_static = test_torch_export_dynamic = test_torch_export_generate_static = passes
    test_torch_export_generate_dynamic = test_torch_export_generate_dynamic_static_cache = passes
    test_onnx_export_generate_dynamic_static_cache = passes
"""


@pytest.fixture
def checkout(tmp_path):
    files = {
        "src/transformers/__init__.py": f'__version__ = "{transformers.__version__}"\n',
        "tests/__init__.py": "",
        "tests/causal_lm_tester.py": CAUSAL_LM_TESTER,
        **{f"tests/test_{name}.py": "" for name in ("modeling_common", "fsdp_mixin", "tensor_parallel_mixin")},
        "tests/distributed_testing_utils.py": "",
        "tests/generation/test_utils.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run(checkout, *options):
    command = [sys.executable, str(SCRIPT), str(checkout), *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    return outcome.returncode, outcome.stdout, outcome.stderr


@pytest.mark.slow
def test_outcomes_are_counted_by_configuration(checkout):
    code, text, _ = run(checkout, "--configurations", "plain", "windows")
    rows = [line.rsplit(maxsplit=2) for line in text.partition("\ntransformers ")[2].splitlines() if line.strip()]
    assert [row for row in rows if row[1:] != ["0", "0"]][2:] == [
        ["passed", "10", "9"],
        ["failed", "0", "1"],
        ["skipped", "1", "1"],
        ["parts of passed tests that were skipped", "1", "1"],
        ["needs a GPU, or a package that needs one", "1", "1"],
        ["  test requires Flash Attention 3", "1", "1"],
        ["parts this model does not have", "1", "1"],
        ["  the model declares no recurrent layer types", "1", "1"],
    ]
    assert code == 1


@pytest.mark.slow
def test_a_checkout_of_another_version_is_refused(checkout):
    (checkout / "src" / "transformers" / "__init__.py").write_text('__version__ = "4.0.0"\n')
    code, _, complaint = run(checkout)
    assert code == 2
    assert f"has version 4.0.0, but {transformers.__version__} is installed; git clone" in complaint
