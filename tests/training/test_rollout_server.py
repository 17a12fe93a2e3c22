"""Rollouts through a server, against a stand-in on loopback that speaks vLLM's API and samples with seeds of its own."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from ppo_runs import CUT, PROMPTS, WORDS, config, history, trainer
from tiny import tiny_adapter, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.trainer.utils import use_adapter
from vllm_stand_in import stand_in

import rsoups
from rsoups.generation import vllm_client

VOCABULARY = len(tiny_tokenizer(WORDS))


def base():
    return tiny_llama(vocab_size=VOCABULARY)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("openai._base_client.time.sleep", lambda seconds: None)
    monkeypatch.setattr(vllm_client, "_POLL", 0.01)
    monkeypatch.setattr(vllm_client, "_PATIENCE", 0.2)
    with stand_in(base, tiny_tokenizer(WORDS)) as server:
        yield server


def adapter(run):
    return {name: value.clone() for name, value in run.model.named_parameters() if "lora_" in name}


def test_a_reward_that_pays_for_one_word_is_learnt(tmp_path, server):
    run = trainer(tmp_path, rollout_server=server.url, max_steps=48, learning_rate=1e-2)
    run.train()
    reward = history(run, "reward")
    assert reward[0] < 0.15 and reward[-1] > 0.4
    assert max(history(run, "server_difference")) < 1e-4
    # One adapter for each rollout, and one for the check before the first, which has the same weights.
    assert len(server.loads) == 12 and list(server.loaded) == server.loads[-1:]
    assert len({data["seed"] for data in server.asked if "seed" in data}) > 300


def test_sampling_is_that_of_a_local_rollout(tmp_path, server):
    """The same distribution of first tokens, at a temperature, with the adapter."""
    start = PeftModel.from_pretrained(base(), tiny_adapter(tmp_path / "a", base()), is_trainable=True)
    run = trainer(tmp_path, model=start, temperature=0.7, max_completion_length=1, rollout_server=server.url)
    prompt = [4, 5, 6]
    responses = run.rollout_server.generate([prompt] * 400)
    with torch.no_grad():
        weights = (run.model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(torch.tensor([ids[0] for ids in responses]), minlength=VOCABULARY)
    likely = weights * 400 > 5
    chi2 = ((counts - 400 * weights) ** 2 / (400 * weights))[likely].sum()
    assert chi2 < 2.5 * likely.sum(), "chi squared per degree of freedom"
    for data in server.asked[:400]:
        sampling = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "stop_token_ids"]
        assert [data[name] for name in sampling] == [0.7, 1.0, -1, 0, 1.0, 1, [2]]


def test_a_resumed_run_ends_with_the_same_adapter_bit_for_bit(tmp_path, server):
    run = trainer(tmp_path / "whole", rollout_server=server.url, **CUT | {"max_steps": 8})
    run.train()
    for step in (2, 5):
        torch.manual_seed(step)
        again = trainer(tmp_path / str(step), rollout_server=server.url, **CUT | {"max_steps": 8})
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / f"checkpoint-{step}"))
        assert all(torch.equal(value, adapter(run)[name]) for name, value in adapter(again).items())


def test_a_restart_of_the_server_changes_nothing(tmp_path, server):
    options = {"rollout_server": server.url, "max_steps": 8}
    run = trainer(tmp_path / "a", **options)
    run.train()
    server.restarts_at = [len(server.asked) + count for count in (40, 41, 70)]
    again = trainer(tmp_path / "b", **options)
    again.train()
    assert all(torch.equal(value, adapter(run)[name]) for name, value in adapter(again).items())


def test_base_and_reference_generate_when_they_are_active(tmp_path, server):
    """The summary at the end of a run generates with the adapter off, or with the frozen copy of a continued one."""
    start = PeftModel.from_pretrained(base(), tiny_adapter(tmp_path / "a", base()), is_trainable=True)
    run = trainer(tmp_path, model=start, rollout_server=server.url)
    policy = run.accelerator.unwrap_model(run.model)
    with torch.no_grad():
        for name, value in policy.named_parameters():
            if "lora_B.default" in name:
                value.mul_(-1)
    for name, expected in (("default", 1), ("ref", 2), (None, 2), ("default", 3)):
        with use_adapter(policy, name):
            run.rollout_server.generate([[4, 5, 6]] * 2)  # refuses if the server has another policy
        assert len(server.loads) == expected


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_any_rank_is_handed_over_exactly(tmp_path, server, rank):
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True}
    start = PeftModel.from_pretrained(
        base(), tiny_adapter(tmp_path / "a", base(), r=rank, **patterns), is_trainable=True
    )
    run = trainer(tmp_path, model=start, rollout_server=server.url)
    run.rollout_server.generate([[4, 5, 6], [7, 8]])
    assert run.rollout_server.difference < 1e-4


@pytest.mark.filterwarnings("default")  # bitsandbytes tells which kernels it lacks here
def test_the_base_may_be_quantized(tmp_path, server):
    pytest.importorskip("bitsandbytes")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    tiny_llama(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def quantized():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four, dtype=torch.float32)

    server.base_model = quantized
    run = trainer(tmp_path, model=quantized(), rollout_server=server.url, max_steps=8, learning_rate=1e-2)
    run.train()
    # Products of 4-bit weights differ with the number of rows.
    assert max(history(run, "server_difference")) < 5e-2 and history(run, "kl")[-1] > 0.01


def test_files_are_in_memory_and_go_with_the_trainer(tmp_path, server):
    run = trainer(tmp_path, rollout_server=server.url)
    run.rollout_server.generate([[4, 5]])
    folder = run.rollout_server._folder
    if Path("/dev/shm").is_dir():
        assert folder.parent == Path("/dev/shm")
    assert [path.name for path in folder.iterdir()] == server.loads
    run.rollout_server._closed()
    assert not folder.exists() and not server.loaded


# --- refusals, before the first step ------------------------------------------------------------------------------------


def refused(tmp_path, server, error, match, **options):
    run = trainer(tmp_path, rollout_server=server.url, **options)
    with pytest.raises(error, match=match):
        run.train()
    assert run.state.global_step == 0


def test_another_base_is_refused(tmp_path, server):
    server.base_model = lambda: tiny_llama(vocab_size=VOCABULARY, rms_norm_eps=0.5)
    refused(tmp_path, server, rsoups.TrainingError, "differ by .* nats per token.*the server has another base")


def test_a_server_that_applies_no_adapter_is_refused(tmp_path, server):
    start = PeftModel.from_pretrained(base(), tiny_adapter(tmp_path / "a", base()), is_trainable=True)
    run = trainer(tmp_path, model=start, rollout_server=server.url)
    load = server.RequestHandlerClass.load

    def forgets(handler, data):
        answer = load(handler, data)
        server.loaded[data["lora_name"]] = base()
        return answer

    server.RequestHandlerClass.load, patched = forgets, load
    try:
        with pytest.raises(rsoups.TrainingError, match="does not apply the whole adapter"):
            run.train()
    finally:
        server.RequestHandlerClass.load = patched


def test_a_server_without_runtime_loading_is_refused(tmp_path, server):
    server.runtime = False
    refused(tmp_path, server, rsoups.ServerError, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")


def test_a_rank_above_the_servers_is_refused(tmp_path, server):
    server.max_rank = 1
    refused(tmp_path, server, rsoups.ServerError, "no LoRA of rank 8: serve with --max-lora-rank 8")


def test_a_server_without_token_ids_is_refused(tmp_path, server):
    server.hides = ("token_ids",)
    refused(tmp_path, server, rsoups.TrainingError, "tells no token ids")


def test_whole_parameters_are_refused(tmp_path, server):
    folder = tiny_adapter(tmp_path / "a", base(), modules_to_save=["norm"])
    start = PeftModel.from_pretrained(base(), folder, is_trainable=True)
    refused(tmp_path, server, rsoups.AdapterError, "was trained beside them", model=start)


def test_a_server_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(rsoups.ServerError, match="is not reached"):
        trainer(tmp_path, rollout_server="http://127.0.0.1:1")


def test_a_server_that_goes_away_stops_the_run_and_checkpoints_stay(tmp_path, server):
    def goes_away(prompts, completions, **columns):
        server.down = 10**9 if run.state.global_step else 0
        return [0.0 for _ in completions]

    run = trainer(tmp_path, goes_away, rollout_server=server.url, **CUT)
    with pytest.raises(rsoups.ServerError, match="start it and run again: what is finished is kept"):
        run.train()
    assert (tmp_path / "run" / "checkpoint-8").is_dir()


def test_two_ways_to_generate_are_refused(tmp_path):
    for other in ("use_vllm", "use_transformers_continuous_batching"):
        with pytest.raises(rsoups.SettingsError, match=f"rollout_server and {other} both generate"):
            config(tmp_path, rollout_server="http://x", **{other: True})


# --- TRL's own vLLM mode, as far as it goes without a GPU -----------------------------------------------------------------


def test_trls_mode_says_what_is_missing(tmp_path):
    if shutil.which("vllm"):
        pytest.skip("vLLM is installed here")
    for mode in ("server", "colocate"):
        with pytest.raises(rsoups.SettingsError, match="needs the package vllm in this environment.*rollout_server"):
            config(tmp_path, use_vllm=True, vllm_mode=mode)


def test_trls_mode_gets_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr("rsoups.training.ppo_config.find_spec", lambda name: object())
    args = config(
        tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url="http://gpu:8000", vllm_group_port=5
    )
    assert (args.use_vllm, args.vllm_mode, args.vllm_server_base_url) == (True, "server", "http://gpu:8000")
    assert args.vllm_group_port == 5 and args.rollout_server is None
    with pytest.raises(
        ImportError, match="vLLM is not available"
    ):  # TRL's own, where the package only seems to be there
        trainer(tmp_path, use_vllm=True, vllm_mode="server")


def test_trls_trainer_still_gathers_parameters_and_knows_end_tokens(tmp_path):
    """`RolloutServer` uses both: without them it hands over pieces of an adapter, or responses do not end."""
    run = trainer(tmp_path)
    parameters = list(run.model.parameters())
    with run._dist.gather_params(parameters):
        assert parameters[0].numel()
    assert list(run.eos_token_ids) == [2] and PROMPTS
