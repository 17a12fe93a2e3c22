"""Adapter folders that were damaged at random: every outcome is the right soup or a typed error, and nothing is left behind."""

import json
import random
import shutil

import memory
import pytest
import torch
from dense import dense
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny import tiny_adapter, tiny_llama

import rsoups
from rsoups.adapters.filenames import CONFIG_FILE, WEIGHTS_FILE
from rsoups.adapters.layer_names import PREFIX

VALUES: list = [
    None, True, False, 0, 1, -1, 3, 4, 8, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "4", "q_proj",
    "false", "LORA", "pissa", "../../etc/passwd", "(", "x" * 10_000, [], [1], ["q_proj"], ["q_proj", "v_proj"], ["("], [[]],
    [None], {}, {"q_proj": 2}, {"q_proj": 4}, {"q_proj": None}, {"(": 4}, {"v_proj": 0.5}, [{}], "all-linear", "lora_only",
]  # fmt: skip


def flip(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def in_the_header(data, rng):
    at = rng.randrange(min(len(data), 700))
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


BYTES = [
    flip,
    in_the_header,
    lambda data, rng: data[: rng.randrange(len(data))],
    lambda data, rng: data + rng.randbytes(rng.randrange(1, 50)),
    lambda data, rng: data[: (at := rng.randrange(len(data)))] + rng.randbytes(9) + data[at:],
    lambda data, rng: rng.getrandbits(64).to_bytes(8, "little") + data[8:],
    lambda data, rng: data[: (at := rng.randrange(len(data)))] + b"\xff" * 8 + data[at + 8 :],
    lambda data, rng: rng.randbytes(rng.randrange(40)),
]


def damage_files(folder, rng):
    path = folder / rng.choice([CONFIG_FILE, WEIGHTS_FILE])
    kind = rng.randrange(6)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.unlink()
        path.mkdir()
    elif kind == 2:
        path.unlink()
        path.symlink_to(path.name)  # to itself
    elif kind == 3:
        path.rename(folder / "adapter_model.bin")
    elif kind == 4:
        path.write_bytes(b"")
    else:
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def damage_config(folder, rng):
    path = folder / CONFIG_FILE
    if rng.random() < 0.2:
        path.write_bytes(rng.choice(BYTES)(path.read_bytes(), rng))
    elif rng.random() < 0.03:
        path.write_text("[" * 100_000)
    else:
        config = json.loads(path.read_text())
        for _ in range(rng.choice([1, 1, 2])):
            field = rng.choice([*config, "new_field"])
            if rng.random() < 0.1:
                config.pop(field, None)
            else:
                config[field] = rng.choice(VALUES)
        path.write_text(json.dumps(config))


def damage(folder, rng):
    kind = rng.random()
    if kind < 0.45:
        path = folder / WEIGHTS_FILE
        path.write_bytes(rng.choice(BYTES)(path.read_bytes(), rng))
    elif kind < 0.9:
        damage_config(folder, rng)
    else:
        damage_files(folder, rng)


def expected_changes(folder):
    """Δ of each module as PEFT has it once its config is made; from the file, in float64."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    if not config.get("rank_pattern") and not config.get("alpha_pattern"):
        config |= {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": config.get("use_rslora") or False}
        config["r"] = config.get("r", 8)
        config["lora_alpha"] = config.get("lora_alpha", 8)
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        return dense(folder)
    known = {key: value for key, value in config.items() if key in LoraConfig.__dataclass_fields__}
    known["init_lora_weights"] = True
    model = get_peft_model(tiny_llama(), LoraConfig(**known))
    scalings = {n: m.scaling["default"] for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    found = {}
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        for path, scaling in scalings.items():
            a, b = (file.get_tensor(f"{PREFIX}{path}.lora_{f}.weight").double() for f in "AB")
            found[path] = scaling * b @ a
    return found


def attempt(folder, good, out):
    soup = rsoups.interpolate({"damaged": folder, "good": good}, [0.25, 0.75])
    soup.save_pretrained(out)
    first, second = expected_changes(folder), dense(good)
    ours = {key.removesuffix(".lora_A.weight").removeprefix(PREFIX) for key in soup.state_dict if "lora_A" in key}
    assert ours == first.keys() | second.keys()
    for path in ours:
        a, b = (soup.state_dict[f"{PREFIX}{path}.lora_{f}.weight"].double() for f in "AB")
        parts = [w * change[path] for w, change in ((0.25, first), (0.75, second)) if path in change]
        size = sum(float(part.abs().max()) for part in parts)
        assert (b @ a - sum(parts)).abs().max() <= 1e-5 * size + 1e-30


def fuzz(tmp_path, tries, seed):
    rng = random.Random(seed)
    whole, good = tiny_adapter(tmp_path / "whole", seed=1), tiny_adapter(tmp_path / "good", seed=2)
    folder, out = tmp_path / "damaged", tmp_path / "out" / "soup"
    out.parent.mkdir()
    outcomes = {"soup": 0, "refused": 0}

    def attempt_all():
        for number in range(tries):
            shutil.copytree(whole, folder)
            damage(folder, rng)
            try:
                attempt(folder, good, out)
                outcomes["soup"] += 1
                shutil.rmtree(out)
            except rsoups.RsoupsError as error:
                assert len(str(error)) < 12_000
                outcomes["refused"] += 1
            except Exception as error:
                kept = tmp_path / f"failed-{number}"
                shutil.copytree(folder, kept, symlinks=True)
                raise AssertionError(
                    f"seed {seed}, try {number}, kept in {kept}: {type(error).__name__}: {error}"
                ) from error
            assert list(out.parent.iterdir()) == [], "a partial output was left"
            shutil.rmtree(folder)

    grown = memory.growth(attempt_all)
    assert grown < 200, f"memory grew by {grown:.0f} MB"
    assert outcomes["soup"] > tries / 20 and outcomes["refused"] > tries / 4, outcomes


@memory.told
@pytest.mark.filterwarnings("default")  # PEFT's words on odd configs
def test_damaged_adapters_are_refused_or_right(tmp_path):
    fuzz(tmp_path, 3_000, seed=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_damaged_adapters_are_refused_or_right(tmp_path, seed):
    fuzz(tmp_path, 10_000, seed)


def test_the_reference_of_the_fuzz_can_fail(tmp_path):
    folder = tiny_adapter(tmp_path / "a", alpha_pattern={"q_proj": 3})
    changes = expected_changes(folder)
    assert torch.allclose(changes["model.layers.0.self_attn.q_proj"], dense(folder)["model.layers.0.self_attn.q_proj"])
    assert not torch.allclose(
        changes["model.layers.0.self_attn.q_proj"], 2 * dense(folder)["model.layers.0.self_attn.q_proj"]
    )
