"""DeBERTa's positions, projected once: the logits are those of transformers' own attention."""

from copy import deepcopy

import pytest
import torch
from tiny import tiny_classifier, tiny_llama
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

import rsoups
from rsoups.rewards.relative_positions import project_positions_once

SHAPE = {
    "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "relative_attention": True, "max_position_embeddings": 64, "position_biased_input": False, "type_vocab_size": 0,
    "num_labels": 3, "pad_token_id": 0, "initializer_range": 0.6,
}  # fmt: skip
# DeBERTa-v3's own settings first: logarithmic buckets, normalized positions, one projection for tokens and positions.
KINDS = [
    {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"]},
    {"position_buckets": -1, "share_att_key": False, "pos_att_type": ["p2c", "c2p"]},
    {"position_buckets": 8, "share_att_key": False, "pos_att_type": ["c2p"]},
    {"position_buckets": 8, "share_att_key": True, "pos_att_type": ["p2c"]},
    {"position_buckets": 8, "pos_att_type": []},
]


def inputs(rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (rows, length), generator=generator)
    sizes = torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < sizes).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_logits_are_those_of_transformers(kind, dtype):
    torch.manual_seed(0)
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**SHAPE, **kind)).to(dtype).eval()
    own = deepcopy(model)
    project_positions_once(own)
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    with torch.inference_mode():
        # Lengths below, at and above what the buckets tell apart, of one row and several, a length twice.
        for rows, length in ((3, 5), (1, 1), (2, 17), (4, 5), (1, 40)):
            batch = inputs(rows, length, seed=length)
            expected, found = model(**batch).logits, own(**batch).logits
            assert torch.allclose(found, expected, rtol=near, atol=near * float(expected.abs().max()))
            assert (
                length == 1
                or rows == 1
                or float((expected[0] - expected[1]).abs().max()) > 10 * near * dtype.is_floating_point
            )


def test_positions_are_projected_once_and_only_those_that_occur_are_read(monkeypatch):
    torch.manual_seed(0)
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**SHAPE, **KINDS[0])).eval()
    project_positions_once(model)
    projected, products, bmm = [], [], torch.bmm
    for layer in model.deberta.encoder.layer:
        layer.attention.self.key_proj.register_forward_hook(
            lambda module, args, output: projected.append(args[0].shape)
        )

    def seen(a, b):
        products.append(b.shape[-1])
        return bmm(a, b)

    monkeypatch.setattr(torch, "bmm", seen)
    with torch.inference_mode():
        for _ in range(2):
            model(**inputs(2, 3, seed=0))
    positions = [shape for shape in projected if shape[0] == 16]
    assert len(positions) == 3, "once for each layer, in the first call"
    assert 5 in products and 16 not in products, "the distances from -2 to 2 of 16 positions"


def test_a_loaded_reward_scores_as_the_model_itself(tmp_path):
    folder = tiny_classifier(tmp_path / "deberta", "deberta")
    reward = rsoups.Reward(rsoups.RewardCard("r", model=str(folder)), "cpu")
    prompts, responses = ["w1 w2", "w3"], ["w4 w5 w6 w7", "w8"]
    model = DebertaV2ForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        rows = [{k: torch.tensor([v]) for k, v in row.items()} for row in reward.encode(prompts, responses)]
        expected = [float(model(**row).logits[0, 0]) for row in rows]
    assert reward(prompts, responses) == pytest.approx(expected, rel=1e-5)


def test_other_models_are_left_alone():
    model = tiny_llama()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    project_positions_once(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {k: set(v) for k, v in before.items()}
