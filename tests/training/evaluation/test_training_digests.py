"""Digests of the training networks: the cache gives what computing gives, and grows with the pool."""

from __future__ import annotations

import time

from ghn_architectures.architecture import Interface
from ghn_service.training.evaluation import measurements as module
from ghn_service.training.evaluation.measurements import training_digests
from ghn_service.training.networks import Pool, find_network

INTERFACE = Interface(4, 3, 16)


def pool(size, split="train"):
    return Pool(split, INTERFACE, size)


def test_digests_are_those_of_the_first_training_networks():
    known = training_digests(pool(3), None)
    expected = {find_network("train", str(index), INTERFACE).graph().digest() for index in range(3)}
    assert set(known) == expected


def test_after_the_deadline_only_what_is_known_comes_back(tmp_path):
    known = training_digests(pool(2), tmp_path)
    assert training_digests(pool(5), tmp_path, time.monotonic()) == known


def test_the_cache_grows_with_the_pool(tmp_path, monkeypatch):
    small = training_digests(pool(2), tmp_path)
    asked = []
    find = module.find_candidate

    def counted(source, index):
        asked.append(index)
        return find(source, index)

    monkeypatch.setattr(module, "find_candidate", counted)
    large = training_digests(pool(4), tmp_path)
    assert asked == [2, 3]
    assert large[:2] == small
    assert training_digests(pool(2), tmp_path) == small


def test_a_broken_cache_is_computed_again(tmp_path):
    known = training_digests(pool(2), tmp_path)
    for path in tmp_path.iterdir():
        path.write_text("[")
    assert training_digests(pool(2), tmp_path) == known


def test_a_network_that_cannot_be_made_is_no_member(monkeypatch):
    monkeypatch.setattr(module, "find_candidate", lambda source, index: None)
    assert training_digests(pool(2), None) == ("", "")


def test_digests_are_those_of_the_split_that_was_trained_on():
    expected = {find_network("broad", str(index), INTERFACE).graph().digest() for index in range(3)}
    assert set(training_digests(pool(3, "broad"), None)) == expected
