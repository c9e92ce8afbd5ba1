"""The report on reinforcement learning: paired changes, pass@k, curves and completions with their rewards."""

from test_report_seed import seed_records, write_run

from chatmodel.report import render_report


def measured(accuracy, counts):
    pass_at_k = {"1": {"value": accuracy, "stderr": 0.02}, "8": {"value": 0.9, "stderr": 0.01}}
    return {"num_samples": 16, "counts": counts, "pass_at_k": pass_at_k}


def test_what_changed_and_how_it_went(tmp_path):
    records = seed_records()
    curve = {"reward": 0.5, "mean_length": 9.0, "entropy": 0.4, "kl": 0.01, "clipped_ratio": 0.1}
    curve |= {"frac_reward_zero_std": 0.2, "sampling_logp_difference": 0.002}
    sample = {"step": 3, "prompt": "How many 'r'?", "completion": "#### 3<|assistant_end|>", "reward": 1.0}
    records["rl"]["metrics"] |= {
        "mode": "default",
        "rollout_tokens_per_second": 123456.0,
        "history": [{"step": step} | curve for step in range(8)],
        "pass_at_1": {"before": {"correct": 20, "n": 100}, "after": {"correct": 50, "n": 100}},
        "sampled": {"before": measured(0.2, [1]), "after": measured(0.45, [7])},
        "change": {
            "greedy": {"difference": 0.3, "stderr": 0.0461},
            "pass@1": {"difference": 0.25, "stderr": 0.031},
            "pass@8": {"difference": 0.0, "stderr": 0.012},
        },
        "completions_sampled": [sample, sample | {"step": 7, "completion": "#### 4", "reward": 0.0}],
    }
    text = render_report(write_run(tmp_path, records))[0].read_text()
    assert "| change (paired) | +0.3000 ± 0.0461 |  |" in text
    assert "| pass@1 | 0.2000 ± 0.0200 | 0.4500 ± 0.0200 | +0.2500 ± 0.0310 |" in text
    assert "| pass@8 | 0.9000 ± 0.0100 | 0.9000 ± 0.0100 | +0.0000 ± 0.0120 |" in text
    assert "Completion 1 sampled, step 3: reward 1.0000" in text
    assert "Completion 2 sampled, step 7: reward 0.0000" in text
    assert "123,456" in text
    drawn = (tmp_path / "plots" / "rl_reward.svg").read_text()
    for panel in ("mean reward", "entropy", "KL to the start", "completion length"):
        assert panel in drawn
