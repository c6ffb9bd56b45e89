"""``python -m tests.fuzzing TARGET --seconds N``: fuzzes with coverage (atheris) where that is installed, else blindly.

A finding ends the run; its bytes are in ``runs/fuzzing`` and belong into ``tests/data/corpus/TARGET`` once it is
mended. A finding is an exception that nobody should see, or more CPU seconds than the size of an input allows.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from random import Random

import onnx
from google.protobuf.message import DecodeError

try:
    import atheris
except ImportError:
    atheris = None
with atheris.instrument_imports(include=["ghn_service", "ghn_client"]) if atheris else nullcontext():
    from tests.fuzzing.models import build_network, mutate, spoil_text
    from tests.fuzzing.targets import CORPUS, TARGETS, check_cost

OUTPUT = Path("runs/fuzzing")


def mutated(target: str, data: bytes, random: Random) -> bytes:
    """Another input near ``data``; for models, one that is still a message more often than not."""
    if target == "reader" and random.random() < 0.9:
        try:
            proto = onnx.ModelProto.FromString(data) if data and random.random() < 0.8 else build_network(random)
            mutate(proto, random, random.randint(1, 4))
        except (DecodeError, ValueError):
            proto = build_network(random)
        result = proto.SerializeToString()
        return spoil_text(result, random) if random.random() < 0.1 else result
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(changed) + 1)
        changed[place : place + random.choice((0, 1, 1, 4))] = random.randbytes(random.choice((0, 1, 1, 2, 8)))
    return bytes(changed)


def blindly(target: str, inputs: list[bytes], end: float, seed: int) -> None:
    """Mutates inputs and keeps what is accepted."""
    random, count = Random(seed), 0
    while time.monotonic() < end:
        data = mutated(target, random.choice(inputs), random)
        last = OUTPUT / f"{target}.last"
        last.write_bytes(data)
        check_cost(TARGETS[target], data)
        count += 1
        if len(data) < 1 << 16 and random.random() < 0.05:
            inputs.append(data)
            del inputs[:-1000]
    print(f"{target}: {count} inputs, no finding")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="for blind fuzzing and atheris alike")
    options = parser.parse_args()
    corpus = CORPUS / options.target
    OUTPUT.mkdir(parents=True, exist_ok=True)
    if atheris is None:
        inputs = [path.read_bytes() for path in sorted(corpus.glob("*"))] or [b""]
        blindly(options.target, inputs, time.monotonic() + options.seconds, options.seed)
        return
    grown = OUTPUT / options.target
    grown.mkdir(exist_ok=True)
    atheris.Setup(
        [
            sys.argv[0],
            str(grown),
            str(corpus),
            f"-max_total_time={options.seconds}",
            f"-seed={options.seed}",
            f"-artifact_prefix={OUTPUT}/{options.target}-",
            "-max_len=65536",
            "-timeout=30",
        ],
        lambda data: check_cost(TARGETS[options.target], data),
        custom_mutator=lambda data, size, seed: mutated(options.target, data, Random(seed))[:size],
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
