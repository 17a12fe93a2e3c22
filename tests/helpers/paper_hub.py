"""The Hub as the paper's LLaMA experiments need it: the very ids, revisions, classes, tokenizers and data formats, tiny.

The texts are made up here; sizes and weights are the only things that differ from what the ids hold.
"""

import gzip
import io
import json
import random
import shutil

import pyarrow
import pyarrow.parquet
import sentencepiece
import torch
import transformers
import yaml
from edited import ALPACA
from hub_server import Repository
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer

WORDS = (
    "what how why can you please tell me about the best way to cook rice fix a bike learn to draw plant a tree find "
    "a job and is it safe to eat snow good answer first then wash it well because water helps people often forget "
    "that they need time so start small do more later ask a friend read the label never mix it with bleach"
).split()


def sentence(rng, least=4, most=9):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most))).capitalize() + "."


def spm(path, kind, size, **options):
    """A SentencePiece model trained on made-up sentences."""
    rng, model = random.Random(0), io.BytesIO()
    lines = iter(
        [sentence(rng) for _ in range(400)] + ["### Instruction: ### Input: ### Response: Human: Assistant:"] * 9
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type=kind, vocab_size=size, minloglevel=2, **options
    )
    path.write_bytes(model.getvalue())


def dump(path, value):
    path.write_text(json.dumps(value, indent=2))


def llama(folder):
    """huggyllama/llama-7b: two safetensors files with an index, a tokenizer without a pad token."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=2048, rms_norm_eps=1e-6, pad_token_id=0, initializer_range=0.2, dtype="float16",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).half()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").is_file()
    spm(
        folder / "tokenizer.model",
        "bpe",
        384,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
    )
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    tokenizer = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": token | {"content": "<s>"},
        "clean_up_tokenization_spaces": False,
        "eos_token": token | {"content": "</s>"},
        "model_max_length": 2048,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": token | {"content": "<unk>"},
    }
    dump(folder / "tokenizer_config.json", tokenizer)
    return model.float()


def alpaca(folder, base):
    """tloen/alpaca-lora-7b: a pickle and the config of its time."""
    folder.mkdir()
    torch.manual_seed(1)
    known = {key: value for key, value in ALPACA.items() if key not in ("enable_lora", "merge_weights")}
    model = get_peft_model(base, LoraConfig(**known | {"inference_mode": False, "base_model_name_or_path": None}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    torch.save(dict(get_peft_model_state_dict(model)), folder / "adapter_model.bin")
    dump(folder / "adapter_config.json", ALPACA)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\nA card.\n")


def deberta(folder, seed):
    """A DeBERTa-v3 reward model of OpenAssistant; its tokenizer is a SentencePiece model alone."""
    torch.manual_seed(seed)
    config = transformers.DebertaV2Config(
        vocab_size=201, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=512, type_vocab_size=0, num_labels=1, relative_attention=True, position_buckets=256,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], max_relative_positions=-1,
        position_biased_input=False, pooler_hidden_size=16, pooler_dropout=0, initializer_range=0.3,
    )  # fmt: skip
    transformers.DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    pieces = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    spm(folder / "spm.model", "unigram", 200, hard_vocab_limit=False, **ids, **pieces)
    special = {"bos_token": "[CLS]", "cls_token": "[CLS]", "eos_token": "[SEP]", "mask_token": "[MASK]"}
    special |= {"pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    dump(folder / "special_tokens_map.json", special)
    dump(folder / "added_tokens.json", {"[MASK]": 200})
    settings = {"do_lower_case": False, "split_by_punct": False, "sp_model_kwargs": {}, "vocab_type": "spm"}
    dump(folder / "tokenizer_config.json", special | settings | {"tokenizer_class": "DebertaV2Tokenizer"})


def electra(folder, seed):
    """The ELECTRA reward model, with a WordPiece vocabulary."""
    torch.manual_seed(seed)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *dict.fromkeys(WORDS)]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + list("abcdefghijklmnopqrstuvwxyz")
    (folder / "vocab.txt").parent.mkdir(exist_ok=True)
    words = list(dict.fromkeys(words))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    config = transformers.ElectraConfig(
        vocab_size=len(words), hidden_size=16, embedding_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    transformers.ElectraForSequenceClassification(config).save_pretrained(folder)
    dump(folder / "tokenizer_config.json", {"do_lower_case": True, "tokenizer_class": "ElectraTokenizer"})


def as_the_bot_found_it(folder):
    """main's files: the weights as a pickle. What the conversion bot added is returned as a folder of its own."""
    safe = folder.with_name(f"{folder.name}-safetensors")
    safe.mkdir()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    shutil.move(folder / "model.safetensors", safe / "model.safetensors")
    return safe


def hh_rlhf(folder):
    """Anthropic/hh-rlhf: a folder of gzipped JSON lines for each part, chosen and rejected conversations."""
    rng = random.Random(1)
    for part in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"):
        (folder / part).mkdir(parents=True)
        for split, count in (("train", 60), ("test", 12)):
            with gzip.open(folder / part / f"{split}.jsonl.gz", "wt") as lines:
                for _ in range(count):
                    asked, first, more = (sentence(rng) for _ in range(3))
                    start = f"\n\nHuman: {asked[:-1]}?\n\nAssistant: {first}\n\nHuman: {more}\n\nAssistant: "
                    row = {name: start + sentence(rng) for name in ("chosen", "rejected")}
                    lines.write(json.dumps(row) + "\n")
    (folder / "red-team-attempts").mkdir()
    with gzip.open(folder / "red-team-attempts" / "red_team_attempts.jsonl.gz", "wt") as lines:
        lines.write(json.dumps({"transcript": "\n\nHuman: Hi", "rating": 0.0}) + "\n")
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- human-feedback\n---\n\n# A card\n")


DEBERTA = {
    "OpenAssistant/reward-model-deberta-v3-large-v2": "refs/pr/3",
    "OpenAssistant/reward-model-deberta-v3-base": "refs/pr/1",
    "theblackcat102/reward-model-deberta-v3-base-v2": "refs/pr/1",
}
ELECTRA = ("OpenAssistant/reward-model-electra-large-discriminator", "refs/pr/1")


def publish_assistant(hub, root):
    """What the assistant task needs."""
    base = llama(root / "llama")
    hub.publish("huggyllama/llama-7b", root / "llama")
    alpaca(root / "alpaca", base)
    hub.publish("tloen/alpaca-lora-7b", root / "alpaca")
    for seed, (name, revision) in enumerate([*DEBERTA.items(), ELECTRA]):
        folder = root / f"reward{seed}"
        (electra if (name, revision) == ELECTRA else deberta)(folder, seed)
        safe = as_the_bot_found_it(folder)
        hub.publish(name, folder)
        for number in range(1, int(revision.rpartition("/")[2]) + 1):
            hub.repositories[name].refs[f"refs/pr/{number}"] = hub.repositories[name].refs["main"]
        hub.publish(name, safe, revision)
    hh_rlhf(root / "hh")
    hub.publish("datasets/Anthropic/hh-rlhf", root / "hh")


def bpe(folder, **special):
    """The files of a GPT-2 or BART tokenizer: vocab.json and merges.txt."""
    rng = random.Random(0)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [sentence(rng) for _ in range(300)], vocab_size=320, special_tokens=list(special.values())
    )
    tokenizer.save_model(str(folder))
    return tokenizer.get_vocab_size()


def gpt2(folder, seed):
    """Tristan/gpt2_reward_summarization: no pad token, weights as a pickle only."""
    folder.mkdir()
    torch.manual_seed(seed)
    size = bpe(folder, end="<|endoftext|>")
    config = transformers.GPT2Config(
        vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=1024, num_labels=1, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    transformers.GPT2ForSequenceClassification(config).save_pretrained(folder)
    dump(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024})
    dump(folder / "special_tokens_map.json", dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"))


def bart(folder, seed):
    """CogComp/bart-faithful-summary-detector: two labels."""
    folder.mkdir()
    torch.manual_seed(seed)
    size = bpe(folder, bos="<s>", pad="<pad>", eos="</s>", unk="<unk>", mask="<mask>")
    config = transformers.BartConfig(
        vocab_size=size, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=1024, init_std=0.3,
        id2label={0: "Hallucinated", 1: "Faithful"}, label2id={"Hallucinated": 0, "Faithful": 1},
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    transformers.BartForSequenceClassification(config).save_pretrained(folder)
    dump(folder / "tokenizer_config.json", {"tokenizer_class": "BartTokenizer", "model_max_length": 1024})


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def news_summary(folder):
    """argilla/news-summary: Argilla's records. The larger split is called test."""
    rng = random.Random(2)

    def row(i):
        text = f"LONDON (Reuters) - {' '.join(sentence(rng) for _ in range(4))}"
        guess = [{"label": None, "score": 1.0, "text": sentence(rng)}]
        return {
            "text": text,
            "inputs": {"text": text},
            "prediction": guess,
            "prediction_agent": "dataset",
            "id": str(i),
        }

    for split, count in (("train", 20), ("test", 150)):
        parquet(folder / "data" / f"{split}-00000-of-00001-0123456789abcdef.parquet", [row(i) for i in range(count)])


def summarize_from_feedback(folder):
    """openai/summarize_from_feedback: a script on main, which datasets no longer runs; the Hub's conversion beside it."""
    rng = random.Random(3)

    def row(i):
        post = " ".join(sentence(rng) for _ in range(5))
        info = {"id": f"t3_{i}", "post": post if i % 10 else None, "title": sentence(rng), "subreddit": "tifu"}
        info |= {"site": None, "article": None if i % 10 else post}
        summaries = [{"text": f" {sentence(rng)}", "policy": "sup2", "note": None} for _ in range(2)]
        return {
            "info": info,
            "summaries": summaries,
            "choice": i % 2,
            "worker": "w",
            "batch": "batch3",
            "split": "train",
        }

    for split, count in (("train", 170), ("validation", 20)):
        parquet(folder / "converted" / "comparisons" / split / "0000.parquet", [row(i) for i in range(count)])
    for split in ("test", "validation"):
        parquet(
            folder / "converted" / "axis" / split / "0000.parquet", [{"info": {"id": "t3_x"}, "summary": {"text": "x"}}]
        )
    (folder / "main").mkdir()
    (folder / "main" / "summarize_from_feedback.py").write_text("raise SystemExit('a script ran')\n")
    (folder / "main" / "README.md").write_text("---\npretty_name: Summarize from Human Feedback\n---\n")


def stack_exchange_paired(folder):
    """lvwerra/stack-exchange-paired: parts for fine-tuning, rewards and RL; several rows to a question."""
    rng = random.Random(4)

    def row(i):
        told = {
            "qid": i // 2,
            "question": sentence(random.Random(i // 2)),
            "date": "2011/01/01",
            "metadata": ["https://x"],
        }
        return told | {"response_j": sentence(rng), "response_k": sentence(rng)}

    for part in ("finetune", "reward", "rl"):
        parquet(folder / "data" / part / "train-00000-of-00001.parquet", [row(i) for i in range(280)])
    parquet(folder / "data" / "evaluation" / "train-00000-of-00001.parquet", [row(i) for i in range(1000, 1040)])


def imdb(folder):
    """stanfordnlp/imdb: one configuration, three splits."""
    rng = random.Random(5)
    for split, count in (("train", 140), ("test", 20), ("unsupervised", 5)):
        rows = [{"text": " ".join(sentence(rng) for _ in range(12)), "label": i % 2} for i in range(count)]
        parquet(folder / "plain_text" / f"{split}-00000-of-00001.parquet", rows)
    files = [{"split": s, "path": f"plain_text/{s}-*"} for s in ("train", "test", "unsupervised")]
    card = {"configs": [{"config_name": "plain_text", "data_files": files, "default": True}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")


def publish_other_tasks(hub, root):
    """What the news, reddit, stack and review tasks need beside `publish_assistant`."""
    gpt2(root / "gpt2", 7)
    as_the_bot_found_it(root / "gpt2")  # no pull request of the bot here
    hub.publish("Tristan/gpt2_reward_summarization", root / "gpt2")
    bart(root / "bart", 8)
    safe = as_the_bot_found_it(root / "bart")
    hub.publish("CogComp/bart-faithful-summary-detector", root / "bart")
    hub.publish("CogComp/bart-faithful-summary-detector", safe, "refs/pr/1")
    for name, make in (
        ("argilla/news-summary", news_summary),
        ("lvwerra/stack-exchange-paired", stack_exchange_paired),
        ("stanfordnlp/imdb", imdb),
    ):
        folder = root / name.rpartition("/")[2]
        make(folder)
        hub.publish(f"datasets/{name}", folder)
    summarize_from_feedback(root / "feedback")
    name = "datasets/openai/summarize_from_feedback"
    hub.publish(name, root / "feedback" / "main")
    converted = hub.repositories[name]
    converted.refs["refs/convert/parquet"] = Repository(False).refs["main"]
    converted.commits |= Repository(False).commits
    hub.publish(name, root / "feedback" / "converted", "refs/convert/parquet")
