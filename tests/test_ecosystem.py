"""A finished model folder is an ordinary Transformers model: in this process, without this package, and in tools."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

import chatmodel
from chatmodel.checkpoint import save_model_folder
from chatmodel.tokenizer import calculator_table

ROOT = Path(__file__).parents[1]
QUESTION = [{"role": "user", "content": "What is 12 plus 30?"}]
# Ids of a conversation in which the assistant has just asked the calculator.
CALL = "<|bos|><|user_start|>12+30?<|user_end|><|assistant_start|><|python_start|>12+30<|python_end|>"

# As in a process where chatmodel is not installed: any import of it fails.
WITHOUT_CHATMODEL = "import sys; sys.modules['chatmodel'] = None\n"

ELSEWHERE = """
import json
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

folder, question, call = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
trusted = {"trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
model = AutoModelForCausalLM.from_pretrained(folder, **trusted)
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
after_call = torch.tensor([tokenizer.encode(call, add_special_tokens=False)])
found = {
    "config": type(AutoConfig.from_pretrained(folder, **trusted)).__name__,
    "body": type(AutoModel.from_pretrained(folder, **trusted)).__name__,
    "model": type(model).__name__,
    "logits": model(**prompt).logits[0, -1].tolist(),
    "cached": model.generate(**prompt, max_new_tokens=16, do_sample=False)[0].tolist(),
    "uncached": model.generate(**prompt, max_new_tokens=16, do_sample=False, use_cache=False)[0].tolist(),
    "after_call": tokenizer.decode(model.generate(after_call, max_new_tokens=4, do_sample=False)[0]),
    "chat": pipeline("text-generation", model=folder, **trusted)(question, max_new_tokens=16, do_sample=False),
}
print(json.dumps(found))
"""

DOCUMENTS = [
    ("Which of these is a number?", ["seven", "green", "slowly", "table"], "A"),
    ("Which of these is a colour?", ["nine", "blue and white", "under", "word"], "B"),
    ("Which of these can be read?", ["a wind", "a stone", "a book", "the sea"], "C"),
    ("Which of these is the longest?", ["a day", "a month", "an hour", "a year of twelve months"], "D"),
    ("What is half of four?", ["two", "one", "six", "ten"], "A"),
]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    model = make_model(seed=3, calculator=calculator_table(tokenizer), **sizes, **ids)
    folder = tmp_path_factory.mktemp("models") / "sft"
    save_model_folder(model, tokenizer, folder, card=["A test."])
    return folder


@pytest.fixture
def elsewhere(tmp_path):
    """How to start a Python process in another folder, offline, with caches of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "hf" / "hub").mkdir(parents=True)
    return {"cwd": tmp_path, "env": environment, "text": True}


def test_with_chatmodel_imported_no_trust_is_needed(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is chatmodel.GPTForCausalLM
    assert type(AutoModel.from_pretrained(folder)) is chatmodel.GPTModel
    assert type(AutoConfig.from_pretrained(folder)) is chatmodel.GPTConfig
    chat = pipeline("text-generation", model=str(folder))(QUESTION, max_new_tokens=4, do_sample=False)
    assert [message["role"] for message in chat[0]["generated_text"]] == ["user", "assistant"]


def test_a_plain_generate_calls_the_calculator(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([tokenizer.encode(CALL, add_special_tokens=False)])
    for options in ({}, {"use_cache": False}, {"num_beams": 2}, {"do_sample": True, "temperature": 2.0}):
        output = model.generate(prompt, **({"max_new_tokens": 6, "do_sample": False} | options))
        assert tokenizer.decode(output[0]).startswith(CALL + "<|output_start|>42<|output_end|>"), options


def test_an_adapter_gives_what_the_merged_model_gives(folder, tokenizer, tmp_path):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().eval()
    save_model_folder(merged, tokenizer, tmp_path / "merged", card=[])

    start = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer("What is 12 plus 30?", return_tensors="pt")
    with torch.no_grad():
        before = start(**inputs).logits
        with_adapter = PeftModel.from_pretrained(start, tmp_path / "adapter").eval()(**inputs).logits
        from_merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(**inputs).logits
    torch.testing.assert_close(with_adapter, from_merged, atol=1e-4, rtol=0)
    assert (with_adapter - before).abs().max() > 0.01, "the adapter does nothing"


@pytest.mark.slow
def test_everything_works_where_chatmodel_cannot_be_imported(folder, tokenizer, elsewhere):
    command = [sys.executable, "-c", WITHOUT_CHATMODEL + ELSEWHERE, str(folder), json.dumps(QUESTION), CALL]
    outcome = subprocess.run(command, capture_output=True, check=False, **elsewhere)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    found = json.loads(outcome.stdout.splitlines()[-1])
    assert (found["config"], found["body"], found["model"]) == ("GPTConfig", "GPTModel", "GPTForCausalLM")
    assert found["cached"] == found["uncached"]
    assert found["after_call"].startswith(CALL + "<|output_start|>42<|output_end|>")

    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert found["cached"] == model.generate(**prompt, max_new_tokens=16, do_sample=False)[0].tolist()
    with torch.no_grad():
        expected = model(**prompt).logits[0, -1]
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, atol=1e-5, rtol=1e-5)
    question, answer = found["chat"][0]["generated_text"]
    assert question == QUESTION[0]
    assert answer["role"] == "assistant"


def score_choices(folder, tokenizer) -> dict[str, float]:
    """What lm-eval should find: the choice of the highest log-probability, as a sum and per character."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    right = {"acc,none": 0, "acc_norm,none": 0}
    for question, choices, answer in DOCUMENTS:
        context = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        sums = []
        for choice in choices:
            ids = torch.tensor([tokenizer(f"Question: {question}\nAnswer: {choice}")["input_ids"]])
            with torch.no_grad():
                log_probabilities = model(ids).logits[0, :-1].log_softmax(-1)
            each = log_probabilities.gather(1, ids[0, 1:, None])[len(context) - 1 :]
            sums.append(each.sum().item())
        means = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        right["acc,none"] += sums.index(max(sums)) == "ABCD".index(answer)
        right["acc_norm,none"] += means.index(max(means)) == "ABCD".index(answer)
    return {name: count / len(DOCUMENTS) for name, count in right.items()}


@pytest.mark.slow
def test_lm_eval_runs_a_built_in_task(folder, tokenizer, elsewhere, tmp_path):
    """arc_easy as it is, on made-up questions: `datasets` prefers a local folder of the data set's name."""
    data = tmp_path / "allenai" / "ai2_arc"
    (data / "ARC-Easy").mkdir(parents=True)
    rows = [
        {"id": str(n), "question": question, "choices": {"text": choices, "label": list("ABCD")}, "answerKey": answer}
        for n, (question, choices, answer) in enumerate(DOCUMENTS)
    ]
    splits = ("train", "validation", "test")
    for split in splits:
        (data / "ARC-Easy" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = "".join(f"  - {{split: {split}, path: ARC-Easy/{split}.jsonl}}\n" for split in splits)
    (data / "README.md").write_text(f"---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n{files}---\n")

    program = WITHOUT_CHATMODEL + "from lm_eval.__main__ import cli_evaluate\ncli_evaluate()"
    options = ["--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True", "--tasks", "arc_easy"]
    options += ["--device", "cpu", "--batch_size", "4", "--output_path", str(tmp_path / "out")]
    outcome = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, check=False, **elsewhere)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    (result,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(result.read_text())["results"]["arc_easy"]
    expected = score_choices(folder, tokenizer)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def request(url: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
        return answer.read().decode()


@pytest.mark.slow
def test_the_server_answers(folder, elsewhere):
    port = find_free_port()
    url = f"http://localhost:{port}"
    serve = str(ROOT / "scripts" / "serve.py")
    command = [sys.executable, serve, str(folder), "--device", "cpu", "--port", str(port)]
    log = elsewhere["cwd"] / "serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, **elsewhere)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                health = request(f"{url}/health")
                break
            except URLError:
                time.sleep(0.2)
        assert json.loads(health) == {"status": "ok"}
        body = {"model": str(folder), "messages": QUESTION, "max_tokens": 8, "temperature": 0}
        answer = json.loads(request(f"{url}/v1/chat/completions", body))
        text = answer["choices"][0]["message"]["content"]
        assert answer["usage"]["completion_tokens"] == 8
        events = request(f"{url}/v1/chat/completions", body | {"stream": True}).splitlines()
        chunks = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
        streamed = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        # A character whose last byte is missing at the end is never streamed.
        assert streamed == text.rstrip("\N{REPLACEMENT CHARACTER}") != ""
    finally:
        server.terminate()
        server.wait()
