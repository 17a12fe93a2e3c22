"""A cache that grows in place holds and returns what transformers' own does."""

import torch
from tiny import tiny_llama
from transformers.cache_utils import DynamicCache

from rsoups.generation.cache import reserve
from rsoups.generation.decoding import _largest


def states(tokens, rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, tokens, 4, generator=generator) for _ in range(2)]


def caches(tokens, room):
    """The same keys and values in two layers of a plain cache, and in a reserved one."""
    plain, reserved = DynamicCache(), DynamicCache()
    for layer in range(2):
        for cache in (plain, reserved):
            cache.update(*states(tokens, seed=layer), layer)
    reserve(reserved, room)
    return plain, reserved


def assert_same(plain, reserved):
    assert plain.get_seq_length() == reserved.get_seq_length()
    for one, other in zip(plain.layers, reserved.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


def test_it_holds_what_a_plain_cache_holds_whatever_comes():
    plain, reserved = caches(5, room=3)
    assert_same(plain, reserved)
    for number, tokens in enumerate((1, 2, 1, 4)):  # the third does not fit any more
        for layer in range(2):
            new = states(tokens, seed=10 + number)
            expected, found = plain.update(*new, layer), reserved.update(*new, layer)
            assert all(map(torch.equal, expected, found))
        assert_same(plain, reserved)


def test_rows_leave_it():
    plain, reserved = caches(5, room=4)
    rows = torch.tensor([2, 0])
    for cache in (plain, reserved):
        cache.batch_select_indices(rows)
    assert_same(plain, reserved)
    for layer in range(2):
        for cache in (plain, reserved):
            cache.update(*states(1, rows=2, seed=7), layer)
    assert_same(plain, reserved)


def test_tokens_that_have_room_are_not_copied():
    _, reserved = caches(5, room=3)
    places = [layer.keys.data_ptr() for layer in reserved.layers]
    for _ in range(3):
        for layer in range(2):
            reserved.update(*states(1), layer)
    assert [layer.keys.data_ptr() for layer in reserved.layers] == places


@torch.inference_mode()
def test_a_model_decodes_alike():
    model = tiny_llama(num_key_value_heads=2)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    plain, reserved = DynamicCache(), DynamicCache()
    for cache in (plain, reserved):
        model(input_ids=ids, past_key_values=cache)
    reserve(reserved, 2)
    for step in range(4):
        token = torch.tensor([[11 + step], [20 - step]])
        logits = [model(input_ids=token, past_key_values=cache).logits for cache in (plain, reserved)]
        assert torch.allclose(*logits, rtol=1e-5, atol=1e-6)


def test_the_largest_logit_is_the_first_of_equal_ones():
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [-2.0, -2.0, -2.0, -2.0], [1.0, 2.0, 3.0, 4.0]])
    assert _largest(logits).tolist() == [1, 0, 3]
