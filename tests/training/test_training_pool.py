"""Digests of the training networks: the cache gives what computing gives, and grows with the pool."""

from __future__ import annotations

from ghn_service.training import training_pool as module
from ghn_service.training.networks import Task, find_network
from ghn_service.training.training_pool import pool_size, pool_split, training_pool

TASK = Task(4, 3, 16)


def test_digests_are_those_of_the_first_training_networks():
    pool = training_pool(3, TASK, None)
    expected = {find_network("train", str(index), TASK).graph().digest() for index in range(3)}
    assert pool.digests == expected


def test_the_cache_grows_with_the_pool(tmp_path, monkeypatch):
    small = training_pool(2, TASK, tmp_path)
    asked = []
    find = module.find_candidate

    def counted(source, index):
        asked.append(index)
        return find(source, index)

    monkeypatch.setattr(module, "find_candidate", counted)
    large = training_pool(4, TASK, tmp_path)
    assert asked == [2, 3]
    assert small.digests < large.digests
    assert training_pool(2, TASK, tmp_path) == small


def test_a_broken_cache_is_computed_again(tmp_path):
    pool = training_pool(2, TASK, tmp_path)
    for path in tmp_path.iterdir():
        path.write_text("[")
    assert training_pool(2, TASK, tmp_path) == pool


def test_a_network_that_cannot_be_made_is_no_member(monkeypatch):
    monkeypatch.setattr(module, "find_candidate", lambda source, index: None)
    assert training_pool(2, TASK, None).digests == frozenset()


def test_an_imported_checkpoint_names_no_pool():
    assert pool_size({}) == 0
    assert pool_size({"settings": {"sampling": {"pool": 7}}}) == 7


def test_digests_are_those_of_the_split_that_the_checkpoint_names():
    assert pool_split({"settings": {"sampling": {"pool": 7}}}) == "train"
    pool = training_pool(3, TASK, None, pool_split({"settings": {"sampling": {"split": "broad"}}}))
    assert pool.digests == {find_network("broad", str(index), TASK).graph().digest() for index in range(3)}
