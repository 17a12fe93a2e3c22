"""The work of a sweep: nothing is done twice, batches shrink to the memory, and scoring does not stand in generation's way."""

import threading

from sweep_runs import run, same

import rsoups
from rsoups.common.files import read_jsonl
from rsoups.generation import decoding


def test_a_batch_that_memory_does_not_hold_is_halved(two, tmp_path, monkeypatch):
    run(two, tmp_path / "whole.jsonl")
    sizes, call = [], decoding.Decoder.__call__

    def small(self, prompts, *args):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return call(self, prompts, *args)

    read, logps = [], decoding.Decoder.logps

    def small_too(self, prompts, said):
        read.append(len(prompts))
        if len(prompts) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return logps(self, prompts, said)

    monkeypatch.setattr(decoding.Decoder, "__call__", small)
    monkeypatch.setattr(decoding.Decoder, "logps", small_too)
    run(two, tmp_path / "small.jsonl", batch_tokens=10_000)
    assert 2 in read and 1 in read
    assert same(read_jsonl(tmp_path / "small.jsonl"), read_jsonl(tmp_path / "whole.jsonl"))
    assert sizes[0] == 16 and sum(size > 2 for size in sizes) <= 3 and max(sizes[-4:]) <= 2, "it remembers"


def test_what_prompts_begin_with_is_read_once_by_each_model(two, tmp_path, monkeypatch):
    prompts = ["w5 w9 w2 w1 w2", "w5 w9 w2 w3 w4 w5 w6", "w5 w9 w2 w7"]
    shapes, forward = [], decoding.Decoder._forward

    def seen(self, ids, *args, **kwargs):
        shapes.append(tuple(ids.shape))
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(decoding.Decoder, "_forward", seen)
    settings = {"prompts": prompts, "temperature": 0, "ensemble": True}
    run(two, tmp_path / "together.jsonl", batch_tokens=10_000, **settings)
    begun = [rows for rows, length in shapes if length == 3]
    assert sorted(begun) == [2, 4], "the two members of the ensemble; the base and three soups"
    run(two, tmp_path / "apart.jsonl", batch_tokens=1, **settings)
    assert same(read_jsonl(tmp_path / "apart.jsonl"), read_jsonl(tmp_path / "together.jsonl"))


def test_what_several_models_say_alike_is_scored_and_read_by_the_base_once(two, tmp_path, monkeypatch):
    scored, read, logps = [], [], decoding.Decoder.logps

    def told(prompts, responses):
        scored.extend(zip(prompts, responses, strict=True))
        return [float(len(scored))] * len(responses)

    def reading(self, prompts, said):
        read.extend((tuple(prompt), tuple(one.ids)) for prompt, one in zip(prompts, said, strict=True))
        return logps(self, prompts, said)

    monkeypatch.setattr(decoding.Decoder, "logps", reading)
    run(two, tmp_path / "r.jsonl", {"told": told}, others={"again": two["a"]}, batch_tokens=40, temperature=0)
    records = read_jsonl(tmp_path / "r.jsonl")
    assert len(scored) == len({*scored}) == len({(r["prompt"], r["response"]) for r in records}) < len(records)
    assert len(read) == len({*read}) < len(records)
    by_model = {(r["name"], r["prompt"], *(r["lambdas"] or {}).values()): r for r in records}
    for (name, prompt, *_), r in by_model.items():
        if name == "again":  # the ingredient that it is, at λ = 1, 0
            assert r["rewards"] == by_model["soup", prompt, 1.0, 0.0]["rewards"]
            assert r["base_nll"] == by_model["soup", prompt, 1.0, 0.0]["base_nll"]


def test_functions_are_called_beside_the_generation_and_models_on_the_cpu_after_it(two, tmp_path, monkeypatch):
    """A judge that answers only once the next batch was begun would wait for ever in a sweep that scores in turn."""
    begun, threads, call, classify = [], set(), decoding.Decoder.__call__, rsoups.Reward.__call__

    def counted(self, *args):
        begun.append(threading.Event())
        for earlier in begun[:-1]:
            earlier.set()
        return call(self, *args)

    def judge(prompts, responses):
        if len(begun) == 1:
            assert begun[0].wait(60), "the second batch was begun meanwhile"
        return [0.0] * len(responses)

    def classified(self, *args):
        threads.add(threading.current_thread())
        return classify(self, *args)

    monkeypatch.setattr(decoding.Decoder, "__call__", counted)
    monkeypatch.setattr(rsoups.Reward, "__call__", classified)
    rewards = {"judge": judge, "coverage": rsoups.load_reward("coverage")}
    run(two, tmp_path / "r.jsonl", rewards, batch_tokens=60)
    assert len(begun) > 2 and threads == {threading.main_thread()}
    for record in read_jsonl(tmp_path / "r.jsonl"):
        assert list(record["rewards"]) == ["judge", "coverage"]
