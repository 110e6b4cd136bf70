"""A kernel with one thing wrong must fail the known answers: each part of the hash counts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from gpuksm.errors import BackendUnavailable
from gpuksm.hashing import selftest, xxh3
from gpuksm.hashing.compiled import build, link

SOURCE = Path(__file__).parents[2] / "gpuksm" / "hashing" / "_page_kernel.py"

MUTATIONS = {
    "nothing changed": ("", ""),
    "an avalanche constant": ("xxh3.PRIME_MX1", "xxh3.PRIME64_3"),
    "the first accumulators": ("_vector(xxh3.ACCUMULATORS)", "_vector(reversed(xxh3.ACCUMULATORS))"),
    "the lane swap": ("[lane ^ 1 for lane", "[lane for lane"),
    "the last stripe's key": ("[*self.stripe_keys[:-1], self.last_key]", "self.stripe_keys"),
    "the scramble's key": ("keys, _word(16)", "keys, _word(17)"),
    "the scramble's shift": ("_splat(47)", "_splat(46)"),
    "a scramble too many": ("return self._merge(mixed)", "return self._merge(self._scramble(mixed))"),
    "the merge's key": ("keys, _word(32)", "keys, _word(31)"),
    "the high half of a product": ("ir.Constant(_I128, 64)", "ir.Constant(_I128, 63)"),
    "a block too few": ("_FULL_BLOCKS = 3", "_FULL_BLOCKS = 2"),
    "zero taken for constant": ("words[first] == 0", "words[first] != 0"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_self_test_tells(name, tmp_path):
    right, wrong = MUTATIONS[name]
    source = SOURCE.read_text()
    assert not right or source.count(right) == 1
    mutated = tmp_path / "mutated.py"
    mutated.write_text(source.replace(right, wrong) if right else source)
    spec = importlib.util.spec_from_file_location("mutated", mutated)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernels = link(build(module))

    def hash_pages(pages, seed):
        digests, kinds = np.empty(len(pages), np.uint64), np.empty(len(pages), np.uint8)
        readable = np.ones(len(pages), np.bool_)
        words = pages.reshape(-1).view(np.uint64)
        kernels.hash_pages(words, readable, xxh3.page_keys(seed), digests, kinds)
        return digests, kinds

    if right:
        with pytest.raises(BackendUnavailable, match="self-test"):
            selftest.check("mutated", hash_pages)
    else:
        selftest.check("unchanged", hash_pages)
