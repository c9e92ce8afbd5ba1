"""Our report of the seed's run (nanochat c75fe54, depth 10, one RTX 5090) against what the seed's own report says."""

import re
from datetime import datetime, timedelta
from typing import Any

import pytest

from chatmodel.report import render_report
from chatmodel.runs import Run
from chatmodel.runtime import write_json

ENVIRONMENT = {
    "git": {
        "branch": "master",
        "commit": "c75fe54",
        "message": "readme tweak, link to new discussion and add file structure",
        "dirty": True,
    },
    "hardware": {
        "platform": "Linux",
        "cpu_cores": 16,
        "cpu_threads": 32,
        "memory_gib": 23.0,
        "gpus": [{"name": "NVIDIA GeForce RTX 5090", "memory_gib": 31.8}],
    },
    "software": {"python": "3.10.18", "torch": "2.8.0+cu128", "cuda": "12.8"},
}
TOKENIZER_TEXTS = {  # text: (bytes, GPT-2 tokens, GPT-4 tokens, ours)
    "news": (1819, 404, 387, 374),
    "korean": (893, 745, 364, 712),
    "code": (1259, 576, 309, 494),
    "math": (1834, 936, 832, 966),
    "science": (1112, 260, 249, 228),
    "fwe-train": (4208518, 900364, 874799, 856862),
    "fwe-val": (4908443, 1059062, 1029691, 1010560),
}
CORE_TASKS = {
    "hellaswag_zeroshot": 0.0769,
    "jeopardy": 0.0038,
    "bigbench_qa_wikidata": 0.3168,
    "arc_easy": 0.3401,
    "arc_challenge": 0.0057,
    "copa": 0.2600,
    "commonsense_qa": 0.1165,
    "piqa": 0.2383,
    "openbook_qa": 0.0560,
    "lambada_openai": 0.2562,
    "hellaswag": 0.0746,
    "winograd": 0.1355,
    "winogrande": 0.0008,
    "bigbench_dyck_languages": 0.1140,
    "agi_eval_lsat_ar": 0.1467,
    "bigbench_cs_algorithms": 0.3826,
    "bigbench_operators": 0.1238,
    "bigbench_repeat_copy_logic": 0.0000,
    "squad": 0.0169,
    "coqa": 0.0724,
    "boolq": -0.1315,
    "bigbench_language_identification": 0.1802,
}
SAMPLES = {
    "<|bos|>The capital of France is": " Paris. The capital is Paris. The capital is Paris. The capital is Paris",
    "<|bos|>If 5x + 3 = 13, then x is": " 13. If 5x + 3 = 13, then",
}
CHAT_EVALUATIONS = {
    "mid": (0.0081, {"ARC-Easy": 0.2685, "ARC-Challenge": 0.2628, "MMLU": 0.2551}),
    "sft": (0.0079, {"ARC-Easy": 0.2660, "ARC-Challenge": 0.2662, "MMLU": 0.2533}),
    "rl": (None, {"GSM8K": 0.0129}),
}
FINISHED = {  # time stamps of the seed report
    "tokenizer": "2025-10-27T01:25:07",
    "base": "2025-10-27T04:51:10",
    "base_eval": "2025-10-27T05:11:05",
    "mid": "2025-10-27T05:46:45",
    "mid_eval": "2025-10-27T06:40:36",
    "sft": "2025-10-27T06:45:09",
    "sft_eval": "2025-10-27T07:38:18",
    "rl": "2025-10-27T12:35:02",
    "rl_eval": "2025-10-27T13:14:07",
}
STARTED = "2025-10-27T01:24:38"


def chat_metrics(stage: str) -> dict[str, Any]:
    chatcore, tasks = CHAT_EVALUATIONS[stage]
    if stage != "rl":
        tasks = {**tasks, "GSM8K": 0.0, "HumanEval": 0.0, "SpellingBee": 0.0}
    return {"chatcore": {"chatcore": chatcore, "tasks": {name: {"accuracy": value} for name, value in tasks.items()}}}


def seed_metrics() -> dict[str, dict[str, Any]]:
    """The seed's numbers in our metrics schema."""
    return {
        "tokenizer": {
            "vocab_size": 65536,
            "num_special_tokens": 9,
            "max_chars": 1_000_000_000,
            "doc_cap": 10_000,
            "train_seconds": 20.7890,
            "token_bytes": {"min": 1, "max": 32, "mean": 6.9240, "std": 2.8765},
            "comparison": {
                "texts": [
                    {"text": name, "bytes": size, "gpt2": gpt2, "gpt4": gpt4, "ours": ours}
                    for name, (size, gpt2, gpt4, ours) in TOKENIZER_TEXTS.items()
                ],
                "not_run": None,
                "how": None,
            },
        },
        "base": {
            "plan": {
                "depth": 10,
                "sequence_length": 2048,
                "target_param_data_ratio": 20,
                "device_batch_size": 8,
                "total_batch_size": 524_288,
                "embedding_lr": 0.2,
                "unembedding_lr": 0.004,
                "weight_decay": 0.0,
                "matrix_lr": 0.02,
                "grad_clip": 1.0,
                "warmup_ratio": 0.0,
                "warmdown_ratio": 0.2,
                "final_lr_frac": 0.0,
            },
            "parameters": 133_038_080,
            "flops_per_token": 7.038566e08,
            "total_flops": 1.872795e18,
            "train_tokens": 2_660_761_600,
            "steps": 5075,
            "train_seconds": 194.68 * 60,
            "mfu": 0.1631,
            "peak_memory_bytes": int(7496.89 * 2**20),
            "world_size": 1,
            "val_bpb_min": 0.9539,
            "val_bpb_final": 0.9539,
            "history": [{"step": step, "loss": 10.4 * 0.8 ** (step / 250)} for step in range(0, 5075, 25)],
            "evaluations": [{"step": 250, "val_bpb": 1.3}, {"step": 5075, "val_bpb": 0.9539, "core": 0.1334}],
        },
        "base_eval": {
            "bpb": {"train": 0.9586, "validation": 0.9540},
            "samples": [{"prompt": prompt, "completion": text} for prompt, text in SAMPLES.items()],
            "core": {"core": 0.1266, "tasks": {name: {"centered": value} for name, value in CORE_TASKS.items()}},
        },
        "mid": {
            "steps": 813,
            "world_size": 1,
            "evaluations": [{"step": 813, "validation_bpb": 0.85}],
            "total_batch_size": 524_288,
        },
        "mid_eval": chat_metrics("mid"),
        "sft": {"rows": 22_439, "steps": 701, "train_loss": 5.0734, "validation_loss": 4.5011},
        "sft_eval": chat_metrics("sft"),
        "rl": {"task": "gsm8k"},
        "rl_eval": chat_metrics("rl"),
    }


SETTINGS = {
    "base": {"eval_every": 250, "eval_tokens": 10_485_760, "core_metric_every": 2000, "core_metric_max_per_task": 500},
    "sft": {"target_examples_per_step": 32, "init_lr_frac": 0.02, "eval_metrics_max_problems": 1024},
    "rl": {"examples_per_step": 16, "num_samples": 16, "max_new_tokens": 256, "init_lr_frac": 0.05, "top_k": 50},
    "rl_eval": {"task_name": "GSM8K", "temperature": 0.0, "max_new_tokens": 512},
}


def seed_records() -> dict[str, dict[str, Any]]:
    """The seed's run as the contents of `results/*.json`; each stage starts where the one before ended."""
    records = {}
    started = STARTED
    for stage, metrics in seed_metrics().items():
        finished = FINISHED[stage]
        seconds = (datetime.fromisoformat(finished) - datetime.fromisoformat(started)) / timedelta(seconds=1)
        records[stage] = {
            "stage": stage,
            "id": f"id-{stage}",
            "command": f"python recipes/x.py --stage {stage}",
            "settings": SETTINGS.get(stage, {}),
            "inputs": {},
            "started": started,
            "finished": finished,
            "seconds": seconds,
            "environment": ENVIRONMENT,
            "metrics": metrics,
        }
        started = finished
    return records


def write_run(folder, records: dict[str, Any]) -> Run:
    run = Run(folder)
    for stage, record in records.items():
        write_json(run.result_path(stage), record)
    return run


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> dict[str, str]:
    """Title -> Markdown of the section, in the report on the seed's run."""
    run = write_run(tmp_path_factory.mktemp("seed"), seed_records())
    text = render_report(run, hourly_rate=2.0)[0].read_text()
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# Our section: what the seed report prints in its own, in the same digits.
EXPECTED = {
    "Environment": """master|c75fe54 (dirty)|readme tweak, link to new discussion and add file structure|Linux|16|32
        23.0 GiB|1x NVIDIA GeForce RTX 5090 (31.8 GiB)|12.8|3.10.18|2.8.0+cu128|\\$2.00 / hour""",
    "Code size": "Characters|Lines|Files|Tokens (approx)|Dependencies",
    "Tokenizer training": """max_chars: 1,000,000,000|doc_cap: 10,000|vocab_size: 65,536|20.8 s|token_bytes_std: 2.8765
        num_special_tokens: 9|token_bytes_min: 1|token_bytes_max: 32|token_bytes_mean: 6.9240""",
    "Base model training": """depth: 10|2,048|target_param_data_ratio: 20|device_batch_size: 8|524,288
        embedding_lr: 0.2000|unembedding_lr: 0.0040|weight_decay: 0.0000|matrix_lr: 0.0200|grad_clip: 1.0000
        warmup_ratio: 0.0000|warmdown_ratio: 0.2000|final_lr_frac: 0.0000|eval_every: 250|eval_tokens: 10,485,760
        core_metric_every: 2,000|core_metric_max_per_task: 500|133,038,080|7.038566e8|5,075|2,660,761,600
        ratio: 20.0000|Number of processes: 1|Minimum validation bpb: 0.9539|Final validation bpb: 0.9539
        CORE metric estimate: 0.1334|MFU: 16.31 %|1.872795e18|3 h 14 min|7,496.9 MiB""",
    "Base model loss": """train bpb, over whole rows: 0.9586|val bpb, over whole rows: 0.9540
        Paris. The capital is Paris. The capital is Paris.
        13. If 5x + 3 = 13, then""",
    "Base model evaluation": "0.1266|22 of 22 run",
    "Midtraining": "Number of iterations: 813|Number of processes: 1|Minimum validation bpb: 0.8500|524,288",
    "Chat evaluation mid": "0.2685|0.2628|0.2551|GSM8K|HumanEval|SpellingBee|0.0000|ChatCORE metric: 0.0081",
    "Chat SFT": """Training rows: 22,439|Number of iterations: 701|Training loss: 5.0734|Validation loss: 4.5011
        target_examples_per_step: 32|init_lr_frac: 0.0200|eval_metrics_max_problems: 1,024""",
    "Chat evaluation sft": "0.2660|0.2662|0.2533|GSM8K|HumanEval|SpellingBee|0.0000|ChatCORE metric: 0.0079",
    "Chat RL": "examples_per_step: 16|num_samples: 16|max_new_tokens: 256|init_lr_frac: 0.0500|top_k: 50",
    "Chat evaluation rl": "task_name: GSM8K|temperature: 0.0000|max_new_tokens: 512|0.0129",
}


@pytest.mark.parametrize("title", EXPECTED)
def test_section_has_the_seeds_numbers(sections, title):
    missing = [value.strip() for value in re.split(r"[|\n]", EXPECTED[title]) if value.strip() not in sections[title]]
    assert not missing


def test_tokenizer_tables_equal_the_seeds(sections):
    text = sections["Tokenizer evaluation"]
    for line in (
        "| news | 1,819 | 404 | 4.50 | 374 | 4.86 | +7.4 % |",
        "| korean | 893 | 745 | 1.20 | 712 | 1.25 | +4.4 % |",
        "| code | 1,259 | 576 | 2.19 | 494 | 2.55 | +14.2 % |",
        "| math | 1,834 | 936 | 1.96 | 966 | 1.90 | -3.2 % |",
        "| science | 1,112 | 260 | 4.28 | 228 | 4.88 | +12.3 % |",
        "| fwe-train | 4,208,518 | 900,364 | 4.67 | 856,862 | 4.91 | +4.8 % |",
        "| fwe-val | 4,908,443 | 1,059,062 | 4.63 | 1,010,560 | 4.86 | +4.6 % |",
        "| korean | 893 | 364 | 2.45 | 712 | 1.25 | -95.6 % |",
        "| code | 1,259 | 309 | 4.07 | 494 | 2.55 | -59.9 % |",
        "| fwe-val | 4,908,443 | 1,029,691 | 4.77 | 1,010,560 | 4.86 | +1.9 % |",
    ):
        assert line in text


def test_core_table_has_every_task(sections):
    rows = re.findall(r"^\| (\S+) \| not recorded \| (-?[\d.]+) \|", sections["Base model evaluation"], re.MULTILINE)
    assert {name: float(value) for name, value in rows} == CORE_TASKS


def test_summary_table_equals_the_seeds(sections):
    text = sections["Summary"]
    for line in (
        "| Metric | BASE | MID | SFT | RL |",
        "| CORE | 0.1266 | - | - | - |",
        "| ARC-Challenge | - | 0.2628 | 0.2662 | - |",
        "| ARC-Easy | - | 0.2685 | 0.2660 | - |",
        "| GSM8K | - | 0.0000 | 0.0000 | 0.0129 |",
        "| HumanEval | - | 0.0000 | 0.0000 | - |",
        "| MMLU | - | 0.2551 | 0.2533 | - |",
        "| ChatCORE | - | 0.0081 | 0.0079 | - |",
    ):
        assert line in text


def test_time_and_cost(sections, tmp_path):
    # 01:24:38 to 13:14:07 is 11 h 49 min 29 s = 42,569 s; at 2 dollars an hour 23.65.
    assert "Total wall clock time (sum of the stages): 11 h 49 min" in sections["Summary"]
    assert "From first start to last finish: 11 h 49 min" in sections["Summary"]
    assert r"Cost at \$2.00 per hour: \$23.65" in sections["Summary"]
    # The seed stopped its clock before RL: 6h13m.
    before_rl = {stage: record for stage, record in seed_records().items() if not stage.startswith("rl")}
    text = render_report(write_run(tmp_path, before_rl))[0].read_text()
    assert "Total wall clock time (sum of the stages): 6 h 13 min" in text
    assert "Cost" not in text
    assert (
        "not run: the stage was not started. To get it: `python recipes/grpo.py --config recipes/configs/cpu/grpo.yaml"
        in text
    )


def test_each_section_names_its_source(sections):
    for title, stage in {"Base model training": "base", "Chat SFT": "sft", "Chat evaluation rl": "rl_eval"}.items():
        line = f"From [results/{stage}.json](results/{stage}.json) (id id-{stage}, finished "
        assert line in sections[title].replace(r"\_", "_")
        assert f"made by `python recipes/x.py --stage {stage}`" in sections[title]
