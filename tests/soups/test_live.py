"""LiveSoup: every row of a batch against the soup of its λ, made and loaded by itself."""

import threading

import pytest
import torch
from dense import VARIETIES
from peft import PeftModel
from tiny import tiny_adapter, tiny_llama, tiny_tokenizer
from tiny_bases import IDS, gpt2
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BitsAndBytesConfig,
    XGLMConfig,
    XGLMForCausalLM,
)

import rsoups
from rsoups import LiveSoup
from rsoups.soups.attach import output_scale

ROWS = [[1.0, 0.0], [0.3, 0.7], [0.0, 1.0], [0.5, 0.5]]
FOUR = torch.cat([IDS, IDS.flip(0)])


def alone(make, folders, lambdas, ids, method="exact"):
    """Logits of one row by the soup of its λ."""
    model = rsoups.interpolate(folders, lambdas, method=method).load(make()).eval()
    with torch.no_grad():
        return model(ids[None]).logits[0]


KINDS: dict[str, tuple] = {name: (tiny_llama, kinds) for name, kinds in VARIETIES.items()}
KINDS |= {
    "tied": (
        lambda: tiny_llama(tie_word_embeddings=True),
        [{"target_modules": ["embed_tokens", "up_proj"]}, {"target_modules": "all-linear"}],
    ),
    "gpt2": (gpt2, [{"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}] * 2),
    "embeddings": (tiny_llama, [{"target_modules": ["embed_tokens", "q_proj"]}] * 2),
    "head": (tiny_llama, [{"target_modules": ["lm_head"]}, {"target_modules": ["up_proj"]}]),
    "bias": (lambda: tiny_llama(attention_bias=True), [{"lora_bias": True}, {}]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias", "ignore:Model has `tie_word_embeddings=True`")
def test_each_row_is_the_soup_of_its_lambdas(tmp_path, kind):
    make, loras = KINDS[kind]
    folders = [tiny_adapter(tmp_path / str(i), make(), seed=i, **lora) for i, lora in enumerate(loras)]
    live = LiveSoup(make(), folders)
    with torch.no_grad():
        base = make()(FOUR).logits
        with live.at(ROWS) as model:
            found = model(FOUR).logits
        for row, lambdas in enumerate(ROWS):
            expected = alone(make, folders, lambdas, FOUR[row])
            assert torch.allclose(found[row], expected, atol=2e-5), lambdas
            assert not torch.allclose(expected, base[row], atol=1e-3)
        with live.at([0.3, 0.7]) as model:
            shared = model(FOUR).logits
        assert torch.allclose(shared[1], found[1], atol=1e-5)
        assert torch.equal(live.model(FOUR).logits, base), "outside of `at`, the base is itself"
        merged_equals_alone(live, make, folders, [0.3, 0.7])
        live.remove()
        with live.at([0.3, 0.7]) as model:
            assert torch.equal(model(FOUR).logits, base)


def merged_equals_alone(live, make, folders, lambdas):
    """And the base's own tensors come back, the same ones with the same bits."""
    before = {name: (parameter, parameter.clone()) for name, parameter in live.model.named_parameters()}
    with live.merged(lambdas) as model:
        found = model(FOUR).logits
    for row, ids in enumerate(FOUR):
        assert torch.allclose(found[row], alone(make, folders, lambdas, ids, live.method), atol=2e-5)
    after = dict(live.model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, values) in before.items():
        assert after[name] is parameter and torch.equal(parameter, values), name


@pytest.mark.filterwarnings("ignore:these ingredients do not start")
def test_factors_too(tmp_path):
    folders = [tiny_adapter(tmp_path / str(i), seed=i) for i in range(3)]
    rows = [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.4, 0.4, 0.2], [0.0, 0.5, 0.5]]
    live = LiveSoup(tiny_llama(), folders, method="factors")
    with torch.no_grad(), live.at(rows) as model:
        found = model(FOUR).logits
    for row, lambdas in enumerate(rows):
        assert torch.allclose(found[row], alone(tiny_llama, folders, lambdas, FOUR[row], "factors"), atol=2e-5)
    with torch.no_grad():
        merged_equals_alone(live, tiny_llama, folders, rows[0])
    soup = live.to_soup(rows[0])
    assert soup.method == "factors" and soup.lambdas == (0.2, 0.3, 0.5)
    assert repr(live) == "LiveSoup(0, 1, 2; factors, 4 layers of LlamaForCausalLM '')"


def pretrained(tmp_path):
    tokenizer = tiny_tokenizer([f"w{i}" for i in range(20)])
    base = tiny_llama(vocab_size=len(tokenizer), initializer_range=0.5)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folders = {n: tiny_adapter(tmp_path / n, tiny_llama(vocab_size=len(tokenizer)), seed=i) for i, n in enumerate("ab")}
    return str(tmp_path / "base"), folders


def test_greedy_generations_are_those_of_the_soups(tmp_path):
    base, folders = pretrained(tmp_path)
    live = LiveSoup.from_pretrained(base, folders)
    prompts = ["w1 w2 w3", "w4", "w5 w6", "w7"]
    found = live.generate(prompts, ROWS, max_new_tokens=12, do_sample=False)
    assert len(set(found)) == 4
    for prompt, row, text in zip(prompts, ROWS, found, strict=True):
        model = live.to_soup(row).load(AutoModelForCausalLM.from_pretrained(base)).eval()
        inputs = live.tokenizer(prompt, return_tensors="pt")
        ids = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=12, do_sample=False
        )
        assert text == live.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_rows_repeat_for_several_sequences_and_beams(tmp_path):
    base, folders = pretrained(tmp_path)
    live = LiveSoup.from_pretrained(base, folders)
    prompts, rows = ["w1 w2", "w4 w5"], [[1, 0], [0, 1]]
    together = live.generate(prompts, rows, max_new_tokens=8, num_beams=3, num_return_sequences=2, do_sample=False)
    apart = [
        text
        for prompt, row in zip(prompts, rows, strict=True)
        for text in live.generate([prompt], row, max_new_tokens=8, num_beams=3, num_return_sequences=2, do_sample=False)
    ]
    assert together == apart and len(together) == 4
    sampled = live.generate(prompts, rows, max_new_tokens=8, do_sample=True, num_return_sequences=3, seed=1)
    assert sampled == live.generate(prompts, rows, max_new_tokens=8, do_sample=True, num_return_sequences=3, seed=1)
    assert len(sampled) == 6


def in_threads(work):
    """Call `work` with 0 to 3 at once, each in a thread of its own."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_calls_of_several_threads_never_mix(tmp_path):
    folders = [tiny_adapter(tmp_path / str(i), seed=i) for i in range(2)]
    live = LiveSoup(tiny_llama(), folders)
    expected = [alone(tiny_llama, folders, row, FOUR[0]) for row in ROWS]
    wrong = []

    def work(number):
        for _ in range(20):
            with torch.no_grad(), live.at(ROWS[number]) as model:
                found = model(FOUR[:1]).logits[0]
            if not torch.allclose(found, expected[number], atol=2e-5):
                wrong.append(number)

    in_threads(work)
    assert wrong == []


def test_merged_is_alone(tmp_path):
    """Calls in other threads wait for it, and it for them; of the same thread they are refused, not waited for forever."""
    folders = [tiny_adapter(tmp_path / str(i), seed=i) for i in range(2)]
    live = LiveSoup(tiny_llama(), folders)
    expected = {tuple(row): alone(tiny_llama, folders, row, FOUR[0]) for row in ROWS}
    wrong, go = [], threading.Barrier(4)

    def work(number):
        go.wait()
        for turn in range(20):
            row = ROWS[(number + turn) % 4]
            with torch.no_grad(), live.at(row) if number % 2 else live.merged(row) as model:
                found = model(FOUR[:1]).logits[0]
            if not torch.allclose(found, expected[tuple(row)], atol=2e-5):
                wrong.append((number, turn))

    in_threads(work)
    assert wrong == []
    with live.at(ROWS[0]), pytest.raises(rsoups.LambdasError, match="within `at`"), live.merged(ROWS[0]):
        pass
    with live.merged(ROWS[0]):
        for inner in (live.at, live.merged):
            with pytest.raises(rsoups.LambdasError, match="leave `merged`"), inner(ROWS[0]):
                pass
    with pytest.raises(ZeroDivisionError), live.merged(ROWS[1]):
        raise ZeroDivisionError
    with torch.no_grad():
        assert torch.equal(live.model(FOUR).logits, tiny_llama()(FOUR).logits)


def test_a_batch_goes_on_with_some_of_its_rows(tmp_path):
    folders = [tiny_adapter(tmp_path / str(i), seed=i) for i in range(2)]
    live, rows = LiveSoup(tiny_llama(), folders), torch.tensor([3, 1])
    with torch.no_grad(), live.at(ROWS) as model:
        whole = model(FOUR).logits
        live.keep(rows)
        assert torch.allclose(model(FOUR[rows]).logits, whole[rows], atol=1e-5)
        with pytest.raises(rsoups.LambdasError, match="2 rows of λ for a batch of 3"):
            model(FOUR[:3])


def test_gradients_flow_through_it(tmp_path):
    """To inputs, as through the soup's own: nothing is written over what a gradient needs."""
    folders = [tiny_adapter(tmp_path / str(i), seed=i, target_modules="all-linear") for i in range(2)]
    live = LiveSoup(tiny_llama(), folders)
    ids = FOUR[:1]
    embedded = live.model.get_input_embeddings()(ids).detach()
    found, expected = embedded.clone().requires_grad_(), embedded.clone().requires_grad_()
    with live.at(ROWS[1]) as model:
        model(inputs_embeds=found).logits.square().sum().backward()
    soup = rsoups.interpolate(folders, ROWS[1]).load(tiny_llama())
    soup(inputs_embeds=expected).logits.square().sum().backward()
    assert torch.allclose(found.grad, expected.grad, rtol=1e-3, atol=1e-3 * float(expected.grad.abs().max()))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "settings",
    [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}],
    ids=["8", "4"],
)
def test_over_quantised_bases(tmp_path, settings):
    pytest.importorskip("bitsandbytes")
    size = {"hidden_size": 64, "intermediate_size": 128}
    tiny_llama(**size).save_pretrained(tmp_path / "base")
    folders = [tiny_adapter(tmp_path / str(i), tiny_llama(**size), seed=i) for i in range(2)]

    def make():
        quantized = BitsAndBytesConfig(**settings)
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantized, dtype=torch.float32
        )

    live = LiveSoup(make(), folders)
    for row, lambdas in enumerate(ROWS):
        # one row at a time: 8-bit activations are rounded by the largest of their batch
        with torch.no_grad(), live.at(lambdas) as model:
            found = model(FOUR[row : row + 1]).logits[0]
        assert torch.allclose(found, alone(make, folders, lambdas, FOUR[row]), atol=1e-3)
    with pytest.raises(rsoups.AdapterError, match="quantized"), live.merged(ROWS[0]):
        pass


def test_bfloat16_to_its_rounding(tmp_path):
    folders = [tiny_adapter(tmp_path / str(i), seed=i) for i in range(2)]
    live = LiveSoup(tiny_llama().bfloat16(), folders)
    with torch.no_grad(), live.at(ROWS) as model:
        found = model(FOUR).logits
    assert found.dtype == torch.bfloat16
    for row, lambdas in enumerate(ROWS):
        expected = alone(tiny_llama, folders, lambdas, FOUR[row])
        assert (found[row].float() - expected).abs().max() < 0.05 * expected.abs().max()
    with torch.no_grad(), live.merged(ROWS[1]) as model:
        merged = model(FOUR[1:2]).logits[0]
    assert merged.dtype == torch.bfloat16
    assert (merged.float() - alone(tiny_llama, folders, ROWS[1], FOUR[1])).abs().max() < 0.05 * expected.abs().max()


def test_what_cannot_be_live_is_refused(tmp_path):
    folders = [tiny_adapter(tmp_path / str(i), seed=i, modules_to_save=["lm_head"]) for i in range(2)]
    with pytest.raises(rsoups.AdapterError, match="lm_head.weight was trained as a whole"):
        LiveSoup(tiny_llama(), folders)
    plain = [tiny_adapter(tmp_path / f"p{i}", seed=i) for i in range(2)]
    with pytest.raises(rsoups.AdapterError, match=r"has no layer model.layers.1"):
        LiveSoup(tiny_llama(num_hidden_layers=1), plain)
    with pytest.raises(rsoups.AdapterError, match=r"\(64, 64\) in the base.*\(32, 32\)"):
        LiveSoup(tiny_llama(hidden_size=64), plain)
    live = LiveSoup(tiny_llama(), plain)
    for lambdas, words in (([0.5, 0.6], "sum to"), ([1.0], "shape"), ([1.5, -0.5], "extrapolate")):
        with pytest.raises(rsoups.LambdasError, match=words), live.at(lambdas):
            pass
    with pytest.raises(rsoups.LambdasError, match="3 rows of λ for a batch of 4"), live.at(ROWS[:3]) as model:
        model(FOUR)
    with pytest.raises(rsoups.LambdasError, match="method"):
        LiveSoup(tiny_llama(), plain, method="svd")
    with pytest.raises(rsoups.LambdasError, match="without a tokenizer"):
        live.generate(["x"], [1, 0])


def gemma(kind):
    import transformers

    name = {"1": "Gemma", "2": "Gemma2", "3": "Gemma3"}[kind]
    config = getattr(transformers, f"{name}TextConfig" if kind == "3" else f"{name}Config")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    torch.manual_seed(0)
    made = config(**sizes, num_attention_heads=4, num_key_value_heads=4, initializer_range=0.2)
    return getattr(transformers, f"{name}ForCausalLM")(made).eval()


def bart(**more):
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.2}
    sizes |= {
        f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("attention_heads", 4), ("ffn_dim", 64))
    }
    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(**sizes, max_position_embeddings=64, **more)).eval()


def xglm():
    sizes = {"vocab_size": 64, "d_model": 32, "ffn_dim": 64, "num_layers": 1, "attention_heads": 4}
    torch.manual_seed(0)
    return XGLMForCausalLM(XGLMConfig(**sizes, max_position_embeddings=64, init_std=0.2)).eval()


SCALED = {
    "Gemma 1": lambda: gemma("1"),
    "Gemma 2": lambda: gemma("2"),
    "Gemma 3": lambda: gemma("3"),
    "BART": lambda: bart(scale_embedding=True),
    "XGLM": xglm,
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("kind", SCALED)
def test_embeddings_that_are_scaled(tmp_path, kind):
    """Live, merged and loaded are what PEFT itself computes of the soup's file."""
    make = SCALED[kind]
    lora = {"target_modules": ["q_proj", "embed_tokens"], "task_type": None}
    folders = [tiny_adapter(tmp_path / str(i), make(), seed=i, **lora) for i in range(2)]
    soup = rsoups.interpolate(folders, [0.3, 0.7])
    soup.save_pretrained(tmp_path / "soup")
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if kind == "BART" else {})
    live = LiveSoup(make(), folders)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(make(), tmp_path / "soup").eval()(**inputs).logits
        assert not torch.allclose(expected, make()(**inputs).logits, atol=1e-2)
        with live.at([0.3, 0.7]) as model:
            assert torch.allclose(model(**inputs).logits, expected, atol=2e-5)
        with live.merged([0.3, 0.7]) as model:
            assert torch.allclose(model(**inputs).logits, expected, atol=2e-5)
        assert torch.allclose(soup.load(make()).eval()(**inputs).logits, expected, atol=2e-5)


class _Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(32, 4)


def test_layers_that_do_more_with_their_weights_are_refused(tmp_path):
    positions = tiny_adapter(tmp_path / "a", bart(), target_modules=["encoder.embed_positions"], task_type=None)
    for refused in (
        lambda: LiveSoup(bart(), [positions]),
        lambda: rsoups.interpolate([positions]).merge(bart(), "out"),
    ):
        with pytest.raises(
            rsoups.AdapterError, match="embed_positions is a BartLearnedPositionalEmbedding, which does more"
        ):
            refused()
    inside = _Attention()
    with pytest.raises(rsoups.AdapterError, match="read inside torch's MultiheadAttention"):
        output_scale(inside.attention.out_proj, "attention.out_proj", inside)


def test_prompts_are_padded_on_the_left_whatever_the_tokenizer_says(tmp_path):
    base, folders = pretrained(tmp_path)
    live = LiveSoup.from_pretrained(base, folders)
    live.tokenizer.padding_side = "right"
    prompts = ["w1 w2 w3 w4 w5", "w7 w9"]
    both = live.generate(prompts, [0.5, 0.5], max_new_tokens=8, do_sample=False)
    assert both == [live.generate([one], [0.5, 0.5], max_new_tokens=8, do_sample=False)[0] for one in prompts]
