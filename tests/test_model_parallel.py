"""Divided between devices, by each of its plans, a model says and learns what it does on one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from chatmodel import GPTConfig, GPTForCausalLM, GPTModel

PLAIN = {"window_pattern": "L", "value_embeddings": False, "residual_scalars": False, "backout": False}

RANK = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from chatmodel import GPTForCausalLM

dist.init_process_group("gloo")
ids = torch.tensor(json.loads(sys.argv[3]))
whole = lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
share = lambda tensor: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()


def run(folder, **sizes):
    model = GPTForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes)).eval()
    with torch.no_grad():
        found = {"logits": model(ids).logits.tolist()}
    found["tokens"] = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
    found["share"] = sum(share(parameter) for parameter in model.parameters())
    if "pp_size" not in sizes:
        model(ids, labels=ids, use_cache=False).loss.backward()
        found["gradients"] = {name: whole(p.grad).norm().item() for name, p in model.named_parameters()}
    return found


extras, plain = sys.argv[1:3]
results = {"tp": run(extras, tp_size=2), "fsdp": run(extras, fsdp_size=2), "pp": run(plain, pp_size=2)}
if dist.get_rank() == 0:
    print("RESULTS" + json.dumps(results))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.long
def test_two_ranks_give_what_one_gives(tmp_path):
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    models = {"extras": make_model(gated_mlp=True), "plain": make_model(**PLAIN)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    (tmp_path / "rank.py").write_text(RANK)
    arguments = [str(tmp_path / "extras"), str(tmp_path / "plain"), json.dumps(ids.tolist())]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    launcher += ["--rdzv_endpoint=localhost:0", str(tmp_path / "rank.py")]
    root = Path(__file__).parents[1]
    command = [*launcher, *arguments]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=300)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    (line,) = [line for line in outcome.stdout.splitlines() if line.startswith("RESULTS")]
    results = json.loads(line.removeprefix("RESULTS"))

    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for kind, name in (("tp", "extras"), ("fsdp", "extras"), ("pp", "plain")):
        model, found = models[name], results[kind]
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(found["logits"]), model(ids).logits, atol=1e-4, rtol=0)
        assert found["tokens"] == model.generate(ids, **settings).tolist(), kind
        assert found["share"] < 0.6 * model.num_parameters(), kind
    model = models["extras"]
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    for kind in ("tp", "fsdp"):
        assert results[kind]["gradients"] == pytest.approx(expected, rel=1e-3, abs=1e-6), kind


@pytest.mark.parametrize("changes", [{}, PLAIN, {"gated_mlp": True}], ids=["extras", "plain", "gated"])
def test_every_rule_of_a_plan_names_a_part(changes):
    model = make_model(**changes)
    names = {name for name, _ in model.model.named_modules()}
    assert model.config.base_model_tp_plan
    for rule in model.config.base_model_tp_plan:
        assert any(rule.replace("*", str(n)) in names for n in range(4)), rule
    assert set(model.tp_plan) > {f"model.{rule}" for rule in model.config.base_model_tp_plan}
    linear = {name for name, part in model.model.named_modules() if isinstance(part, nn.Linear | nn.Embedding)}
    divided = {rule.replace("*", str(n)) for rule in model.config.base_model_tp_plan for n in range(4)}
    assert linear - divided == {"embed_tokens"}  # Transformers adds the rule for it
    assert model.supports_pp_plan
    if model.config.base_model_pp_plan is not None:
        assert set(model.config.base_model_pp_plan) <= names
    assert (model.config.base_model_pp_plan is None) == bool(model.config.parts_across_layers())


def test_plans_follow_the_model_and_are_not_saved(tmp_path):
    model = make_model(**PLAIN)
    model.save_pretrained(tmp_path)
    assert "plan" not in (tmp_path / "config.json").read_text()
    again = GPTConfig.from_pretrained(tmp_path)
    assert again.base_model_tp_plan == model.config.base_model_tp_plan
    assert again.base_model_pp_plan == model.config.base_model_pp_plan
    assert GPTConfig().base_model_pp_plan is None


@pytest.mark.parametrize("stage", ["first", "last"])
def test_a_stage_alone(stage):
    """As transformers and vLLM cut a model: identities stand where other stages' layers were."""

    class Absent(nn.Identity):
        def forward(self, *args, **kwargs):
            return args[0]

    def cut(model: GPTModel) -> GPTModel:
        for index in (0, 1) if stage == "last" else (2, 3):
            model.layers[index] = Absent()
        return model

    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="value_embeddings, residual_scalars, backout need more"):
        cut(make_model().model)(ids)
    plain = make_model(**PLAIN)
    states = plain.model(ids, output_hidden_states=True).hidden_states
    part = cut(GPTForCausalLM(plain.config).model)
    part.load_state_dict(plain.model.state_dict(), strict=False)
    if stage == "first":
        part.norm = nn.Identity()
        torch.testing.assert_close(part(ids).last_hidden_state, states[2])
    else:
        torch.testing.assert_close(part(inputs_embeds=states[2]).last_hidden_state, states[-1])


def test_a_rank_takes_its_heads_where_the_gate_is_quantized():
    """As after loading with torchao by a plan: the gate's weight has left the mesh, the table's is in it."""

    class Table(nn.Module):
        def __init__(self, whole: torch.Tensor, mesh: DeviceMesh) -> None:
            super().__init__()
            self.whole = whole
            self.weight = nn.Parameter(DTensor.from_local(whole[:, : whole.shape[1] // 2], mesh, [Shard(1)]))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.whole[ids]

    attention = make_model().model.layers[-1].self_attn
    whole, ids = attention.value_embed.weight.detach(), torch.tensor([[3, 1, 4]])
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        attention.value_embed = Table(whole, init_device_mesh("cpu", (2,)))
        found = attention._look_values_up(ids, None, num_heads=1)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(found, whole[ids].view(1, 3, 2, 16)[:, :, 1:])
