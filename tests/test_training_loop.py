"""A run that is stopped in any way goes on as if it never had been, and says in one sentence why it stopped."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_pretraining import SETTINGS, build, copy_run, find_late_word, make_run, write_text

from chatmodel import checkpoint
from chatmodel.checkpoint import list_checkpoints
from chatmodel.data.rows import PackedRows
from chatmodel.runs import Run
from chatmodel.runtime import UserError
from chatmodel.train_step import StepUnderway, TrainStep
from chatmodel.training import loop
from chatmodel.training.arguments import PretrainArguments
from chatmodel.training.batch_size import list_candidates
from chatmodel.training.evaluation import Measurements


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Collecting the garbage of the whole test session takes longer than a tiny run."""
    monkeypatch.setattr(loop, "freeze_garbage", lambda: None)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "shards")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tokenizer, text):
    """The run that nothing happens to."""
    pretraining = build(make_run(tmp_path_factory.mktemp("runs") / "unbroken", tokenizer, text), text)
    pretraining.train()
    return pretraining


@pytest.fixture
def run(unbroken, tmp_path):
    return copy_run(unbroken.run, tmp_path / "run")


def saved_steps(run):
    return [int(folder.name.removeprefix("step-")) for folder in list_checkpoints(run.checkpoints("base"))]


def assert_equal(found, expected):
    weights = expected.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.model.state_dict().items())
    for one, other in zip(found.state.history, expected.state.history, strict=True):
        assert one | {"tokens_per_second": 0} == other | {"tokens_per_second": 0}
    assert found.state.evaluations == expected.state.evaluations


def at_step(monkeypatch, step, action):
    """Do something when the loop is about to finish a step."""
    begin_update = TrainStep.begin_update

    def begin_with_action(self, number):
        if number == step:
            action()
        return begin_update(self, number)

    monkeypatch.setattr(TrainStep, "begin_update", begin_with_action)


@pytest.fixture(params=("at once", "later"))
def when_known(request, monkeypatch):
    """When a step's result is looked at: at once, as on the CPU, or behind the next micro-batches, as on a GPU."""
    if request.param == "later":
        monkeypatch.setattr(StepUnderway, "is_known", False)
    return request.param


def test_a_result_that_is_known_late_changes_nothing(run, text, unbroken, monkeypatch):
    order = []
    for name in ("accumulate", "begin_update"):
        method = getattr(TrainStep, name)

        def record(self, argument, name=name, method=method):
            order.append(name)
            return method(self, argument)

        monkeypatch.setattr(TrainStep, name, record)
    wait = StepUnderway.wait
    monkeypatch.setattr(StepUnderway, "wait", lambda self: order.append("wait") or wait(self))
    monkeypatch.setattr(StepUnderway, "is_known", False)
    pretraining = build(run, text, log_every=3, max_steps=8)
    pretraining.train()
    weights = unbroken.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pretraining.model.state_dict().items())
    assert pretraining.state.evaluations == unbroken.state.evaluations
    assert saved_steps(run) == [6, 8]
    step = ["accumulate", "accumulate", "begin_update"]
    # The first compiles; saving is due after 3 and 6, a measurement after 4 and 8.
    at_once, late = [*step, "wait"], [*step, "accumulate", "accumulate", "wait", "begin_update", "wait"]
    assert order == [*at_once, *late, *at_once, *late, *late]


def test_the_log_keeps_what_a_step_found(unbroken):
    assert [record["step"] for record in unbroken.state.history] == list(range(1, 9))
    assert all(record["gradient_norm"] > 0 for record in unbroken.state.history)
    assert unbroken.state.first_steps == 1
    assert 0 < unbroken.state.first_step_seconds < unbroken.state.train_seconds
    assert [record["step"] for record in unbroken.state.evaluations] == [0, 4, 8]
    assert saved_steps(unbroken.run) == [6, 8]


def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(run, text, unbroken, monkeypatch, when_known):
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match="stopped by SIGTERM after step 5, which is saved"):
        build(run, text).train()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert saved_steps(run) == [4, 5]
    monkeypatch.undo()
    torch.rand(7)  # whatever else has drawn random numbers
    resumed = build(run, text)
    resumed.train()
    assert_equal(resumed, unbroken)


def test_a_signal_during_a_measurement_stops_it_at_once(run, text, unbroken, monkeypatch):
    measure = Measurements.validation_bpb

    def be_stopped(self):
        if list_checkpoints(run.checkpoints("base")):
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the measurement went on")
        return measure(self)

    monkeypatch.setattr(Measurements, "validation_bpb", be_stopped)
    with pytest.raises(UserError, match="stopped by SIGTERM after step 4, which is saved"):
        build(run, text).train()
    assert saved_steps(run) == [3, 4]
    monkeypatch.undo()
    resumed = build(run, text)
    resumed.train()
    assert_equal(resumed, unbroken)


def test_a_measurement_that_fails_costs_no_step(run, text, monkeypatch):
    def fail(self):
        if list_checkpoints(run.checkpoints("base")):
            raise KeyError("a bug")
        return 1.0

    monkeypatch.setattr(Measurements, "validation_bpb", fail)
    with pytest.raises(KeyError, match="a bug"):
        build(run, text).train()
    assert saved_steps(run) == [3, 4]


def test_the_clock_saves_too(run, text, when_known):
    build(run, text, max_steps=3, save_every=1000, eval_every=1000, save_every_minutes=1e-9).train()
    assert saved_steps(run) == [2, 3]


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(run, text, unbroken, monkeypatch, caplog):
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(UserError, match="after step 5"):
        build(run, text).train()
    monkeypatch.undo()
    last = list_checkpoints(run.checkpoints("base"))[-1]
    os.truncate(last / "optimizer.pt", 1000)
    with caplog.at_level("INFO", logger="chatmodel"):
        resumed = build(run, text)
        resumed.train()
    assert f"checkpoint {last} is damaged (optimizer.pt has 1000 bytes instead of" in caplog.text
    assert "continuing from" in caplog.text
    assert_equal(resumed, unbroken)


def test_a_checkpoint_of_another_model_is_refused(run, text):
    build(run, text, max_steps=3).train()
    with pytest.raises(UserError, match="does not fit this model"):
        build(run, text, max_steps=3, depth=2).train()


def test_accepted_changes_count_from_the_step_they_were_made_at(run, text, unbroken, monkeypatch):
    """Also when the run is stopped once more: half the rates, which are not those of the checkpoint."""
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(UserError, match="after step 5"):
        build(run, text).train()
    monkeypatch.undo()
    at_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(UserError, match="after step 7"):
        build(run, text, lr_fraction=0.5).train()
    monkeypatch.undo()
    resumed = build(run, text, lr_fraction=0.5)
    resumed.train()
    assert resumed.state.changed_settings == [{"step": 5, "changed": {"lr_fraction": [1.0, 0.5]}}]
    assert resumed.state.first_steps == 3  # one of each process
    for ours, before in zip(
        resumed.train_step.optimizer.param_groups, unbroken.train_step.optimizer.param_groups, strict=True
    ):
        assert ours["initial_lr"] == before["initial_lr"] / 2
        assert ours["lr"] == pytest.approx(before["lr"] / 2)
    assert resumed.state.history[-1]["loss"] != unbroken.state.history[-1]["loss"]


def test_changes_that_cannot_be_are_refused(run, text):
    build(run, text, max_steps=3).train()
    with pytest.raises(UserError, match=r"step-00000003 is behind the last of 2 steps; ask for more"):
        build(run, text, max_steps=2).train()
    with pytest.raises(UserError, match=r"set back what was changed .depth 1 -> 2"):
        build(run, text, depth=2, max_steps=3).train()


def test_a_loss_that_breaks_before_anything_is_saved_names_no_state(run, text, monkeypatch):
    pretraining = build(run, text)
    with torch.no_grad():
        pretraining.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"at step 0, before .* set mixed_precision to 'no', then start again$"):
        pretraining.train()


def test_a_batch_that_gives_nan_is_stopped_at_and_named(run, text, when_known):
    """One weight becomes NaN that only one word needs: the first row that holds this word is the guilty one."""
    pretraining = build(run, text)
    store = pretraining.train_store
    number, word = find_late_word(PackedRows(store, sequence_length=32, seed=42), 16)
    step, micro_batch = divmod(number, 2)
    with torch.no_grad():
        pretraining.model.model.embed_tokens.weight[word] = float("nan")
    sentence = (
        rf"became nan .* at step {step}, before its update: it comes from rank 0, micro-batch {micro_batch}, row 0"
    )
    with pytest.raises(UserError, match=sentence):
        pretraining.train()
    assert saved_steps(run)[-1] == max(due for due in (3, 4, 6) if due <= step)
    record = json.loads((run.run_dir / "bad_batch.json").read_text())
    assert record["step"] == step
    bad = record["rows"][0]
    assert (bad["rank"], bad["micro_batch"], bad["row"]) == (0, micro_batch, 0)
    tokens = [token for start, stop in bad["spans"] for token in store.tokens[start:stop].tolist()]
    assert word in tokens[:-1]
    assert len(tokens) == 33
    for document, (start, stop) in zip(bad["documents"], bad["spans"], strict=True):
        assert store.offsets[document] <= start < stop <= store.offsets[document + 1]


def test_a_broken_loss_saves_the_state_before_it(run, text, unbroken, monkeypatch, when_known):
    """Weights and data are good: what is wrong is not there when the micro-batches are run again."""
    accumulate = TrainStep.accumulate
    calls = []

    def accumulate_badly(self, batch):
        loss = accumulate(self, batch)
        calls.append(loss)
        if len(calls) == 2 * 5 + 2:
            self._losses[-1] = loss * float("inf")
        return loss

    monkeypatch.setattr(TrainStep, "accumulate", accumulate_badly)
    sentence = r"became inf .* at step 5.*cannot be repeated: suspect the hardware.* with --accept_changes$"
    with pytest.raises(UserError, match=sentence):
        build(run, text).train()
    assert saved_steps(run) == [4, 5]
    monkeypatch.undo()
    resumed = build(run, text)
    resumed.train()
    assert_equal(resumed, unbroken)


def test_a_hanging_disk_is_one_sentence(run, text, monkeypatch):
    read = PackedRows._read_rows

    def hang(self, rows):
        if list_checkpoints(run.checkpoints("base")):
            time.sleep(1)
        return read(self, rows)

    monkeypatch.setattr(PackedRows, "_read_rows", hang)
    with pytest.raises(UserError, match=r"data[/\\]train has hung"):
        build(run, text, data_timeout=0.3).train()
    assert saved_steps(run)[0] == 3  # what was read ahead may have sufficed for another one


def test_a_full_disk_ends_the_run_and_the_last_checkpoint_is_good(run, text, unbroken, monkeypatch):
    def fill(path, part):
        if "step-00000006" in str(path) and path.name == "optimizer.pt":
            raise OSError(28, "No space left on device")
        return write_part(path, part)

    write_part = checkpoint.write_part
    monkeypatch.setattr(checkpoint, "write_part", fill)
    with pytest.raises(UserError, match=r"step-00000006 could not be written .*No space left on device"):
        build(run, text).train()
    assert saved_steps(run) == [3, 4]
    monkeypatch.undo()
    resumed = build(run, text)
    resumed.train()
    assert_equal(resumed, unbroken)


def test_memory_that_does_not_suffice_is_one_sentence(run, text, monkeypatch):
    def fail(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")

    monkeypatch.setattr(TrainStep, "accumulate", fail)
    with pytest.raises(UserError, match=r"device_batch_size=1 .CUDA out of memory.*smaller one or auto_batch"):
        build(run, text).train()


def test_rows_that_do_not_fit_are_lowered_and_said(run, text, unbroken, caplog):
    """A step has two rows, and 32 are the default."""
    with caplog.at_level("INFO", logger="chatmodel"):
        lowered = build(run, text, device_batch_size=32, max_steps=3)
        lowered.train()
    assert caplog.text.count("device_batch_size: 2 in place of 32, as a step has 2 rows") == 1
    assert lowered.state.device_batch_size == 2
    for one, other in zip(lowered.state.history, unbroken.state.history, strict=False):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_the_batch_size_found_is_kept(run, text, unbroken, monkeypatch):
    """More rows at once, the same step; a resumed run does not look for another size."""
    found = build(run, text, auto_batch=True, max_steps=3)
    found.train()
    assert found.state.device_batch_size == max(list_candidates(found.plan, 1)) == 2
    assert found.train_step.accumulation == 1
    for one, other in zip(found.state.history, unbroken.state.history, strict=False):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    monkeypatch.setattr("chatmodel.training.loop.choose_device_batch_size", None)
    resumed = build(run, text, auto_batch=True, max_steps=3)
    resumed.train()
    assert resumed.train_step.accumulation == 1


def test_kernels_are_chosen_for_the_batch_size_found(run, text, monkeypatch):
    """Also by a run that continues, which then takes over the ones it was begun with."""
    asked = []

    def record(shapes, device, dtype, *, compiled):
        asked.append([(shape.batch, shape.documents_apart) for shape in shapes])
        return dict.fromkeys((shape.window for shape in shapes), "sdpa")

    monkeypatch.setattr("chatmodel.train_step.choose_attention", record)
    monkeypatch.setattr("chatmodel.training.loop.choose_device_batch_size", lambda *_, **__: 2)
    begun = build(run, text, auto_batch=True, documents_apart=True, max_steps=3)
    begun.train()
    assert [set(shapes) for shapes in asked] == [{(1, True)}, {(2, True)}]
    monkeypatch.undo()
    resumed = build(run, text, auto_batch=True, documents_apart=True, max_steps=3)
    assert set(resumed.train_step.attention.values()) == {"products"}
    resumed.train()
    assert set(resumed.train_step.attention.values()) == {"sdpa"}


def test_what_cannot_be_is_refused():
    for name in ("save_every_minutes", "data_timeout", "rank_timeout"):
        with pytest.raises(UserError, match=f"{name}=0 must be greater than 0"):
            PretrainArguments(**(SETTINGS | {name: 0}))


def test_a_stopped_run_may_go_on_with_fewer_rows_at_once(tmp_path):
    """What a device holds at once changes nothing but rounding; depth changes the run."""
    stopped = Run(tmp_path)
    asked = {"depth": 4, "device_batch_size": 32}
    stopped.begin("tokenizer", settings=asked)
    (stopped.checkpoints("tokenizer") / "step-00000001").mkdir(parents=True)
    assert stopped.begin("tokenizer", settings=asked | {"device_batch_size": 16, "save_every_minutes": 1}) is not None
    with pytest.raises(UserError, match="depth=4, now 5"):
        stopped.begin("tokenizer", settings=asked | {"depth": 5})


@pytest.fixture
def cuda():
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.gpu
def test_a_gpu_goes_on_bit_for_bit(run, text, tmp_path, cuda):
    settings = {"cpu": False, "mixed_precision": "bf16", "depth": 2}
    whole = build(copy_run(run, tmp_path / "whole"), text, **settings)
    whole.train()
    build(run, text, **settings).train()
    shutil.rmtree(list_checkpoints(run.checkpoints("base"))[-1])  # as if killed behind step 6
    resumed = build(run, text, **settings)
    resumed.train()
    assert_equal(resumed, whole)


@pytest.mark.gpu
def test_the_largest_batch_of_a_gpu_is_found_by_trying(run, text, cuda, caplog):
    """With 4 GB of it to use, the estimate from its free memory is far too high."""
    torch.cuda.set_per_process_memory_fraction(4e9 / torch.cuda.get_device_properties(0).total_memory)
    shutil.rmtree(run.folder("data"))  # it is too little for such a step
    large = {"total_batch_tokens": 2**19, "max_steps": 1, "depth": 8}
    with caplog.at_level("INFO", logger="chatmodel"):
        found = build(run, text, cpu=False, mixed_precision="bf16", auto_batch=True, **large)
        found.train()
    assert "auto_batch: " in caplog.text
    assert 1 <= found.state.device_batch_size < list_candidates(found.plan, 1)[-1]
